r"""Supervised fine-tuning: `python -m aligner.sft`.

    L = -sum over the learnt tokens of log pi(token | its prefix) / number of learnt tokens of the step

Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5.
Learnt are the responses: of a prompt and its completion the completion, of a conversation the turns of the assistant
(or those that the file's `mask` leaves), each up to its end-of-turn token. Sequences of any length are packed into
micro-batches and never padded to one another.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch

from aligner.data.batch import pack_examples
from aligner.data.examples import Prompt
from aligner.data.formats import SUPERVISED
from aligner.data.movie_reviews import review_rows
from aligner.job.config import OfflineConfig
from aligner.job.job import Logged
from aligner.job.offline import OfflineRun, train_offline
from aligner.losses.statistics import update_statistics
from aligner.losses.supervised import supervised_loss
from aligner.refit.replica import Replica
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import SamplingConfig
from aligner.rollout.scoring import sample_and_score
from aligner.rollout.transcript import Transcript
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    eval_samples: int = 0
    """Held-out prompts that are answered at every evaluation and compared with their response."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=64))
    """How they are answered."""


def step(run: OfflineRun, number: int) -> Logged:
    """One optimizer step on the next examples."""
    with run.job.timers("train"):
        batch = pack_examples(run.examples(number))
        num_tokens = float(batch.action_mask_N.sum())
        stats = run.policy.update(
            batch, lambda logprobs_N, _entropy_N, micro: supervised_loss(logprobs_N, micro, num_tokens)
        )
    counts = {"tokens": len(batch.tokens_N), "tokens/learnt": num_tokens}
    return update_statistics([stats]) | {"loss": stats["loss"]} | counts, []


def evaluate(run: OfflineRun, number: int) -> Logged:
    """Loss and perplexity of the held-out examples, and answers to some of their prompts."""
    if not run.held_out:
        return {}, []
    batch = pack_examples(run.held_out)
    logprobs_N, entropy_N = run.policy.infer(batch)
    mask_N = batch.action_mask_N
    loss = -logprobs_N[mask_N].mean()
    metrics = {"eval/loss": loss, "eval/perplexity": loss.exp(), "eval/entropy": entropy_N[mask_N].mean()}
    answers, rows = answer(run, number) if run.config.eval_samples else ({}, [])
    return {name: float(x) for name, x in metrics.items()} | answers, rows


def answer(run: OfflineRun, number: int) -> Logged:
    """Generation-based validation: responses to held-out prompts against the ones of the data."""
    c, tokenizer, shape = run.config, run.job.tokenizer, run.policy.shape
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    pairs = [example.split() for example in run.held_out[: c.eval_samples]]
    prompts = [Prompt(text=decode(list(prompt)), tokens=prompt, metadata={}) for prompt, _ in pairs]
    replica = Replica(run.policy, lambda: NativeSampler(shape, dtype=c.sampling.dtype, tokenizer=run.job.folder))
    replica.refit(number)
    transcript = Transcript(tokenizer)
    sampling = c.sampling.sampling(c.seed, transcript.stop)
    texts = sample_and_score(replica.sampler, prompts, sampling, 1, transcript, None).texts
    both = [(given, transcript.decode(wanted)) for given, (_, wanted) in zip(texts[1], pairs, strict=True)]
    scores_B2 = torch.tensor(
        [(float(given.split() == wanted.split()), word_f1(given, wanted)) for given, wanted in both]
    )
    exact, f1 = scores_B2.mean(0).tolist()
    return {"eval/exact_match": exact, "eval/word_f1": f1}, transcript.rows(number, "eval", texts, scores_B2[:, 1])


def word_f1(given: str, wanted: str) -> float:
    """2 P R / (P + R) of the words that two texts share. Source: Rajpurkar et al. 2016, arXiv:1606.05250, sec. 6.1."""
    a, b = given.lower().split(), wanted.lower().split()
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b)) if a or b else 1.0


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    return train_offline("sft", config, SUPERVISED, step, evaluate, default=review_rows, reference=False)


if __name__ == "__main__":
    options.user_errors(main)
