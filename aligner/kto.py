r"""Kahneman-Tversky optimization on responses that are desirable or not: `python -m aligner.kto --data judged.jsonl`.

    h = (log pi - log pi_ref)(y | x),    z = max(0, mean over the step of h(y_j | x_i), responses to other prompts)
    L = mean  desirable_weight   (1 - s(beta (h - z)))   where y is desirable
              undesirable_weight (1 - s(beta (z - h)))   where it is not

Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8 and section 4.1.
No pairs are needed. Deviations from NeMo-Aligner (arXiv:2405.01481), whose KTO does not start: z is the mean over all
responses of the step on all ranks, taken before the update; rewards are averaged by each response's own label.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aligner import ops
from aligner.data.batch import JudgedBatch, SupervisedBatch, pack_examples
from aligner.data.examples import Example, Judged
from aligner.data.formats import JUDGED
from aligner.job.config import OfflineConfig
from aligner.job.job import Logged
from aligner.job.offline import OfflineRun, train_offline
from aligner.losses.kto import kl_baseline, kto_loss
from aligner.losses.statistics import update_statistics
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    beta: float = 0.1
    """Inverse temperature, 1/nats."""
    desirable_weight: float = 1.0
    """Weight of desirable responses; with fewer of them than of the others, more."""
    undesirable_weight: float = 1.0
    """Weight of undesirable responses."""

    def __post_init__(self):
        super().__post_init__()
        if self.batch.examples < 2:
            raise ValueError(
                "batch.examples is 1, and the KL baseline needs responses to other prompts; give 2 or more."
            )


def pack(examples: list[Judged]) -> SupervisedBatch:
    return pack_examples([Example.of(e.prompt, e.response) for e in examples])


def prepared(run: OfflineRun, examples: list[Judged]) -> tuple[JudgedBatch, Tensor]:
    """The batch of a step and the KL baseline: every prompt with the response to the next one."""
    batch = pack(examples)
    next_responses = [e.response for e in examples[1:] + examples[:1]]
    mismatched = pack_examples([Example.of(e.prompt, y) for e, y in zip(examples, next_responses, strict=True)])
    logprobs_B = ops.segment_sum(run.policy.infer(mismatched)[0], mismatched.cu_seqlens)
    reference_B = ops.segment_sum(run.policy.infer_reference(mismatched), mismatched.cu_seqlens)
    desirable_B, sums_B = torch.tensor([e.desirable for e in examples]), run.reference.sums(batch)
    judged = JudgedBatch(**vars(batch), reference_logprobs_B=sums_B, desirable_B=desirable_B)
    return judged, kl_baseline(logprobs_B, reference_B)


def judged_loss(c: Config, logprobs_N: Tensor, batch: JudgedBatch, kl: Tensor, num: int):
    weights = {"desirable_weight": c.desirable_weight, "undesirable_weight": c.undesirable_weight}
    return kto_loss(logprobs_N, batch, num, beta=c.beta, kl=kl, **weights)


def reported(stats: dict[str, float], kl: Tensor, prefix: str = "") -> dict[str, float]:
    """Implicit rewards beta h, in the mean over the responses of each label."""
    share = float(stats["desirable"])
    means = {"chosen": (stats["reward_desirable"], share), "rejected": (stats["reward_undesirable"], 1 - share)}
    rewards = {f"rewards/{name}": float(total) / part for name, (total, part) in means.items() if part > 0}
    metrics = {"loss": float(stats["loss"]), "kl_baseline": float(kl), "desirable": share} | rewards
    return {prefix + name: value for name, value in metrics.items()}


def step(run: OfflineRun, number: int) -> Logged:
    """One optimizer step on the next responses."""
    c, examples = run.config, run.examples(number)
    with run.job.timers("reference"):
        batch, kl = prepared(run, examples)
    with run.job.timers("train"):
        stats = run.policy.update(
            batch,
            lambda logprobs_N, _entropy_N, micro: judged_loss(
                c, logprobs_N, micro, kl.to(logprobs_N.device), len(examples)
            ),
        )
    return reported(stats, kl) | update_statistics([stats]) | {"tokens": len(batch.tokens_N)}, []


def evaluate(run: OfflineRun, number: int) -> Logged:
    """The same on the held-out responses, without an update."""
    if len(run.held_out) < 2:
        return {}, []
    batch, kl = prepared(run, run.held_out)
    loss, stats = judged_loss(run.config, run.policy.infer(batch)[0], batch, kl, len(run.held_out))
    return reported(stats | {"loss": loss}, kl, prefix="eval/"), []


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    return train_offline("kto", config, JUDGED, step, evaluate, reference=True)


if __name__ == "__main__":
    options.user_errors(main)
