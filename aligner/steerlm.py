r"""SteerLM: responses that follow given attributes: `python -m aligner.steerlm --data labelled.jsonl`.

    sft:      L = mean over the learnt tokens of -log pi(token | prompt, label, what was said)
    steerlm2: L = mean over prompts of KL(p || q),   w_i = log P(a | x, y_i) + log P(y_i | x) - log Q(y_i | a, x)
              p = softmax_i w_i,   q = softmax_i(log pi(y_i | a, x) - log Q(y_i | a, x))

Source: sft: Dong et al. 2023, arXiv:2310.05344, section 3; steerlm2: Wang et al. 2024, arXiv:2406.08673.
The way there: `aligner.reward_model --loss regression` on rated data is the attribute model, `aligner.annotate` writes
its labels into conversations, this trains on them, `aligner.generate --attributes` asks for some. For steerlm2
`aligner.propose` samples responses y_i from the result (Q) and weighs them by the attribute model and a base model (P).
Deviation from NeMo-Aligner: the gradient of steerlm2 is not divided by the mean length of the responses.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from aligner.data.batch import SteerBatch, SupervisedBatch, pack_examples
from aligner.data.examples import Example, Weighted
from aligner.data.formats import SUPERVISED, WEIGHTED
from aligner.job.config import OfflineConfig
from aligner.job.job import Logged
from aligner.job.offline import OfflineRun, train_offline
from aligner.losses.statistics import update_statistics
from aligner.losses.steerlm import steerlm2_loss
from aligner.losses.supervised import supervised_loss
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    loss: Literal["sft", "steerlm2"] = "sft"
    """Attribute-conditioned fine-tuning, or SteerLM 2 on weighted responses."""


def prepared(examples: list[Example] | list[Weighted]) -> SupervisedBatch | SteerBatch:
    if isinstance(examples[0], Example):
        return pack_examples(examples)
    batch = pack_examples([response for e in examples for response in e.responses])
    target = [a + p - q for e in examples for a, p, q in zip(e.log_p_attributes, e.log_p, e.log_q, strict=True)]
    return SteerBatch(
        **vars(batch),
        together=len(examples[0].responses),
        target_log_weights_B=torch.tensor(target),
        proposal_logprobs_B=torch.tensor([q for e in examples for q in e.log_q]),
    )


def loss_of(batch: SupervisedBatch | SteerBatch):
    """The loss, which divides by what the whole batch holds."""
    if isinstance(batch, SteerBatch):
        n = batch.together
        num_prompts = len(batch.target_log_weights_B) / n
        return lambda logprobs_N, _entropy_N, micro: steerlm2_loss(logprobs_N, micro, num_prompts, n)
    num_tokens = float(batch.action_mask_N.sum())
    return lambda logprobs_N, _entropy_N, micro: supervised_loss(logprobs_N, micro, num_tokens)


def step(run: OfflineRun, number: int) -> Logged:
    """One optimizer step on the next examples."""
    with run.job.timers("train"):
        batch = prepared(run.examples(number))
        stats = run.policy.update(batch, loss_of(batch))
    kept = {name: stats[name] for name in ("loss", "distance") if name in stats}
    return update_statistics([stats]) | kept | {"tokens": len(batch.tokens_N)}, []


def evaluate(run: OfflineRun, number: int) -> Logged:
    """The same on the held-out examples, without an update."""
    if not run.held_out:
        return {}, []
    batch = prepared(run.held_out)
    logprobs_N, entropy_N = run.policy.infer(batch)
    loss, stats = loss_of(batch)(logprobs_N, entropy_N, batch)
    return {"eval/loss": float(loss)} | ({"eval/distance": float(stats["distance"])} if "distance" in stats else {}), []


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    return train_offline("steerlm", config, WEIGHTED if config.loss == "steerlm2" else SUPERVISED, step, evaluate)


if __name__ == "__main__":
    options.user_errors(main)
