r"""Self-play fine-tuning: `python -m aligner.spin --data examples.jsonl`.

    iteration k:  y' ~ pi_k(. | x) for the prompts of the data,  pi_{k+1} from  L = mean -log s(beta delta)
    delta = (log pi - log pi_k)(y) - (log pi - log pi_k)(y'),    y the response of the data, y' the model's own

Source: Chen et al. 2024, arXiv:2401.01335, eq. 4.7 and algorithm 1, with the logistic loss.
Only prompts and good responses are needed. At the start of an iteration the policy becomes the reference and the
opponent; what the opponent says is sampled as its step comes, from weights that stay what they were.
Deviations from NeMo-Aligner (arXiv:2405.01481): LoRA works, and generation is by the refitted sampler.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from aligner.data.batch import PreferenceBatch, pack_examples, pack_pairs
from aligner.data.dataset import Dataset
from aligner.data.examples import Example, Pair, Prompt
from aligner.data.formats import SUPERVISED
from aligner.data.movie_reviews import review_rows
from aligner.job.config import OfflineConfig
from aligner.job.job import Job, Logged
from aligner.job.offline import load_examples, steps_of
from aligner.job.reference import Reference
from aligner.losses.preference import direct_preference_loss
from aligner.losses.statistics import preference_statistics, update_statistics
from aligner.models.parallel import NetworkPlan
from aligner.models.policy import Policy
from aligner.refit.replica import Replica
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import SamplingConfig
from aligner.rollout.scoring import sample_and_score
from aligner.rollout.transcript import Transcript
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    steps: int = 0
    """Steps of each iteration; 0 is one pass over the data."""
    iterations: int = 3
    """Times that the reference is moved to the policy."""
    beta: tuple[float, ...] = (0.1,)
    """Inverse temperature, 1/nats; one, or one for each iteration."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=64))
    """How the opponent answers."""

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 1 or len(self.beta) not in (1, self.iterations) or min(self.beta) <= 0:
            raise ValueError(
                f"iterations is {self.iterations} and beta has {len(self.beta)} values; give 1 iteration or more, and "
                "one beta above 0, or one for each iteration."
            )


@dataclass(frozen=True)
class Run:
    config: Config
    job: Job
    policy: Policy
    replica: Replica
    reference: Reference
    train: Dataset
    held_out: list[Example]

    def iteration(self, number: int) -> int:
        """0-based, of the step with this 1-based number."""
        return max(number - 1, 0) // steps_of(self.config, self.train)


def pairs(run: Run, examples: Sequence[Example], seed: int) -> tuple[list[Pair], list[dict]]:
    """The responses of the data against what the sampler says to the same prompts, and rows for samples.jsonl."""
    tokenizer = run.job.tokenizer
    transcript = Transcript(tokenizer)
    halves = [example.split() for example in examples]
    prompts = [Prompt(text=tokenizer.decode(list(p)), tokens=p, metadata={}) for p, _ in halves]
    sampling = run.config.sampling.sampling(seed, transcript.stop)
    scored = sample_and_score(run.replica.sampler, prompts, sampling, 1, transcript, None)
    starts, tokens_N = scored.rollout.cu_seqlens.tolist(), scored.rollout.tokens_N
    made = []
    for (prompt, wanted), begin, end in zip(halves, starts[:-1], starts[1:], strict=True):
        own = tokens_N[begin + len(prompt) : end].tolist()
        made.append(Pair(chosen=Example.of(prompt, wanted), rejected=Example.of(prompt, own)))
    return made, transcript.rows(0, "train", scored.texts, torch.zeros(len(made)))


def prepared(run: Run, made: list[Pair]) -> PreferenceBatch:
    batch = pack_pairs(made)
    return PreferenceBatch(**vars(batch), reference_logprobs_B=run.reference.sums(batch))


def step(run: Run, number: int) -> Logged:
    """One optimizer step against the opponent, which is the policy as it was when the iteration began."""
    c, timers, iteration = run.config, run.job.timers, run.iteration(number)
    if iteration > run.iteration(number - 1):
        run.policy.move_reference()
        run.replica.refit(number - 1)
    with timers("sample"):
        made, rows = pairs(run, run.train.batch(number - 1, c.batch.examples), c.seed * 2**32 + number)
    with timers("reference"):
        batch = prepared(run, made)
    beta = c.beta[iteration % len(c.beta)]
    loss = partial(direct_preference_loss, num_pairs=len(made), kind="dpo", beta=beta)
    with timers("train"):
        stats = run.policy.update(batch, lambda logprobs_N, _entropy_N, micro: loss(logprobs_N, micro))
    own = batch.action_mask_N.sum() / len(made)
    metrics = preference_statistics(stats) | update_statistics([stats])
    metrics |= {"tokens": len(batch.tokens_N), "iteration": float(iteration), "pair_length/mean": float(own)}
    return metrics, [row | {"step": number} for row in rows]


def evaluate(run: Run, number: int) -> Logged:
    """Held-out loss of the data's responses: what SPIN raises the likelihood of."""
    if not run.held_out:
        return {}, []
    batch = pack_examples(run.held_out)
    return {"eval/loss": -float(run.policy.infer(batch)[0][batch.action_mask_N].mean())}, []


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    job = Job("spin", config)
    if job.dry_run(NetworkPlan(name="policy", shape=job.shape, lora=config.lora)):
        return 0
    train, held_out = load_examples(job, SUPERVISED, review_rows)
    job.begin()
    policy = job.policy(config.lora, config.optimizer)
    dtype = config.sampling.dtype
    replica = Replica(policy, lambda: NativeSampler(job.shape, dtype=dtype, tokenizer=job.folder))
    run = Run(config, job, policy, replica, Reference(policy, job.folder, None), train, held_out)
    if run.iteration(job.start) > 0:
        policy.move_reference()  # so that the checkpoint's has a place
    job.restore(policy=policy)
    with policy.as_reference():
        replica.refit(run.iteration(job.start) * steps_of(config, train))
    return job.repeat(
        step=partial(step, run),
        evaluate=partial(evaluate, run),
        networks={"policy": policy},
        export=policy.hugging_face,
        steps=config.iterations * steps_of(config, train),
    )


if __name__ == "__main__":
    options.user_errors(main)
