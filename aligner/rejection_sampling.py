r"""Online rejection sampling, or best-of-n fine-tuning: `python -m aligner.rejection_sampling`.

    y_1 ... y_n ~ pi(. | x);   K(x) the top_n of them by reward
    L = -mean over the tokens of all K(x) of log pi(token | its prefix)

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.2 (rejection sampling fine-tuning); Dong et al. 2023,
arXiv:2304.06767 (RAFT). The policy that samples is the one that is trained, as in NeMo-Aligner.
The KL to the reference is not penalised: it grows with log n and with every step, and is logged.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from aligner.data.batch import BatchConfig, SupervisedBatch, minibatches
from aligner.job.config import OnlineConfig
from aligner.job.job import Logged
from aligner.job.online import OnlineRun, train_online
from aligner.losses.statistics import sampler_statistics, update_statistics
from aligner.losses.supervised import supervised_loss
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.policy import Policy
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(OnlineConfig):
    top_n: int = 1
    """Responses kept of each prompt's samples, those of the largest rewards."""
    mask_unfinished: bool = False
    """Leave responses that reached the length limit out of the loss."""
    batch: BatchConfig = field(
        default_factory=lambda: BatchConfig(sequences=96, samples_per_prompt=8, minibatch_sequences=96)
    )
    """minibatch-sequences counts sampled responses: of them top_n of each samples_per_prompt are trained on."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))

    def __post_init__(self):
        super().__post_init__()
        n, mini = self.batch.samples_per_prompt, self.batch.minibatch_sequences
        if not 1 <= self.top_n <= n:
            raise ValueError(f"top-n is {self.top_n}, expected 1 to batch.samples-per-prompt, which is {n}.")
        if mini % n:
            raise ValueError(f"batch.minibatch-sequences is {mini}, expected a multiple of samples-per-prompt {n}.")


def step(run: OnlineRun, number: int) -> Logged:
    """One step: sample, score, keep the best, imitate them, refit."""
    c, timers, b, actor = run.config, run.job.timers, run.config.batch, run.actor
    seed = c.seed * 2**32 + number

    with timers("sample"):
        scored = actor.sample(actor.prompts(number - 1), seed)
        actor.replica.sleep()
        rollout = scored.rollout
    with timers("logprobs"):
        logprobs_N, entropy_N = run.policy.infer(rollout)
    with timers("reference"):
        reference_N = run.policy.infer_reference(rollout)
    with timers("reward_wait"):
        raw_B = actor.raw_rewards(scored)
    kept = best(actor.shaped(raw_B, rollout), b.samples_per_prompt, c.top_n)
    chosen = rollout.take(kept)
    mask_N = chosen.action_mask_N.clone()
    if c.mask_unfinished:
        counts_B = (chosen.cu_seqlens[1:] - chosen.cu_seqlens[:-1]).long()
        mask_N &= torch.repeat_interleave(chosen.finished_B, counts_B)
    batch = SupervisedBatch(tokens_N=chosen.tokens_N, cu_seqlens=chosen.cu_seqlens, action_mask_N=mask_N)

    size = b.minibatch_sequences // b.samples_per_prompt * c.top_n
    order = minibatches(len(kept), size, b.epochs, torch.Generator().manual_seed(seed))
    with timers("train_policy"):
        minis = [batch.take(sequences) for sequences in order]
        stats = [update(run.policy, mini) for mini in minis if mini.action_mask_N.any()]
    with timers("refit"):
        actor.replica.refit(number)

    metrics, rows = actor.record(number, scored, raw_B, logprobs_N - reference_N)
    metrics |= sampler_statistics(rollout, logprobs_N, entropy_N) | update_statistics(stats)
    return metrics | {"reward/kept": float(raw_B[kept].mean())}, rows


def best(rewards_B: Tensor, samples_per_prompt: int, top_n: int) -> list[int]:
    """Sequences of the top_n largest rewards of each prompt, in their order; of equal ones the earlier."""
    order = (-rewards_B.view(-1, samples_per_prompt)).argsort(dim=1, stable=True)[:, :top_n].sort(1).values
    return (order + samples_per_prompt * torch.arange(len(order))[:, None]).flatten().tolist()


def update(policy: Policy, mini: SupervisedBatch) -> dict[str, float]:
    """One optimizer step of the policy."""
    num_tokens = float(mini.action_mask_N.sum())
    return policy.update(mini, lambda logprobs_N, _entropy_N, micro: supervised_loss(logprobs_N, micro, num_tokens))


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    return train_online("rejection_sampling", config, step)


if __name__ == "__main__":
    options.user_errors(main)
