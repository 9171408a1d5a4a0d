r"""Proximal policy optimization with a critic: `python -m aligner.ppo`.

    r_t = R [t is the last action] - kl_coef * kl_t          kl_t estimates KL(policy || reference) at token t
    A   = whiten(GAE(r, V)),   ret = GAE(r, V) + V
    L_policy = mean_t max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high)) - entropy_bonus * H
    L_value  = mean_t 1/2 max((V_clip - ret)^2, (V - ret)^2)

Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; KL in the reward: Ouyang et al. 2022, arXiv:2203.02155, eq. 2.
Deviations from NeMo-Aligner (arXiv:2405.01481), which this follows otherwise:
  1) Means run over all tokens (or sequences) of the optimizer step, never of a micro-batch.
  2) The KL estimator defaults to k1 (unbiased), not to the absolute log-ratio, which stays selectable.
  3) Several epochs and mini-batches per step; the clip range is asymmetric when asked; dual clip.
  4) Responses that reach the length limit train the policy too.
  5) The sampling temperature also divides the logits of the log-probabilities.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aligner import ops
from aligner.checkpoint import huggingface, training
from aligner.checkpoint.default_model import default_model
from aligner.data.batch import BatchConfig, PolicyBatch, Rollout, ValueBatch, minibatches
from aligner.data.prompts import Prompt, PromptOrder
from aligner.data.sources import load_prompts
from aligner.data.tokenizer import load_tokenizer
from aligner.losses.kl import kl_estimate
from aligner.losses.policy import clipped_policy_loss, token_weights
from aligner.losses.statistics import estimate_statistics, rollout_statistics, update_statistics
from aligner.losses.value import clipped_value_loss
from aligner.models import parallel
from aligner.models.critic import Critic, CriticConfig
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.policy import Policy
from aligner.models.shape import ModelShape
from aligner.refit.plan import Plan, compile_plan
from aligner.refit.replica import Replica
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import SamplingConfig
from aligner.rollout.scoring import sample_and_score
from aligner.rollout.transcript import Transcript
from aligner.run import config as options
from aligner.run import distributed
from aligner.run.directory import RunDirectory
from aligner.run.distributed import gather
from aligner.run.loop import ProgramConfig, repeat
from aligner.run.report import write_report
from aligner.run.timers import Timers, peak_memory_bytes
from aligner.serving.local import LocalCritic
from aligner.serving.reward import RewardConfig, RewardFunction, load_reward


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-3))
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of the loss at negative advantages, > 1; none leaves it out."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy in the objective."""
    average: Literal["token", "sequence"] = "token"
    """Mean over all tokens, or over sequences of each one's token mean."""


@dataclass(frozen=True, kw_only=True)
class Config(ProgramConfig):
    kl_coef: float = 0.08
    """Weight of the per-token KL penalty in the reward."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """Estimator of that penalty."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)


@dataclass
class Run:
    """Everything that a step uses. One rank of each replica samples and has a sampler, its plan and the reward."""

    config: Config
    folder: Path
    policy: Policy
    critic: LocalCritic
    replica: Replica
    sampler: NativeSampler | None
    plan: Plan | None
    reward: RewardFunction | None
    transcript: Transcript
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    timers: Timers


def step(run: Run, number: int) -> tuple[dict[str, float], list[dict]]:
    """One PPO step: sample, score, estimate, update, refit. Returns metrics and the rows for samples.jsonl."""
    c, timers, b = run.config, run.timers, run.config.batch
    seed = c.seed * 2**32 + number
    chosen = PromptOrder(len(run.train_prompts), c.seed).batch(number - 1, b.sequences // b.samples_per_prompt)
    prompts = [run.train_prompts[i] for i in chosen]

    with timers("sample"):
        sampling = c.sampling.sampling(seed, run.transcript.stop)
        scored = sample_and_score(run.sampler, prompts, sampling, b.samples_per_prompt, run.transcript, run.reward)
        rollout = scored.rollout
    with timers("values"):
        values = run.critic.infer(rollout)
    with timers("logprobs"):
        logprobs_N, entropy_N = run.policy.infer(rollout)
    with timers("reference"):
        reference_N = run.policy.infer_reference(rollout)
    with timers("reward_wait"):
        rewards_B = scored.rewards()
    with timers("estimate"):
        policy_batch, value_batch = estimate(c, rollout, rewards_B, logprobs_N, reference_N, values.result())

    order = list(minibatches(b.sequences, b.minibatch_sequences, b.epochs, torch.Generator().manual_seed(seed)))
    with timers("train_critic"):
        critic_stats = run.critic.train(value_batch, order, partial(clipped_value_loss, clip=c.critic.value_clip))
    with timers("train_policy"):
        policy_stats = [update(run, policy_batch.take(sequences)) for sequences in order]
    with timers("refit"):
        refit(run, number)

    metrics = rollout_statistics(rollout, rewards_B, logprobs_N - reference_N)
    metrics |= estimate_statistics(policy_batch, value_batch, logprobs_N, entropy_N)
    metrics |= update_statistics(policy_stats, critic_stats.result())
    times = timers.take()
    metrics |= times | {
        "tokens_per_second": len(rollout.tokens_N) / sum(times.values()),
        "sampled_tokens_per_second": int(rollout.action_mask_N.sum()) / times["time/sample"],
        "peak_memory_bytes": peak_memory_bytes(),
    }
    return metrics, run.transcript.rows(number, "train", scored.texts, rewards_B)


def estimate(
    c: Config, rollout: Rollout, rewards_B: Tensor, logprobs_N: Tensor, reference_N: Tensor, values_N: Tensor
) -> tuple[PolicyBatch, ValueBatch]:
    """KL penalty, advantages and returns of a rollout."""
    mask_N = rollout.action_mask_N
    rewards_N = -c.kl_coef * kl_estimate(logprobs_N, reference_N, c.kl_estimator) * mask_N
    rewards_N[rollout.cu_seqlens[1:].long() - 1] += rewards_B
    advantages_N, returns_N = ops.gae(rewards_N, values_N, mask_N, rollout.cu_seqlens, gamma=c.gamma, lam=c.lam)
    weights_N = token_weights(mask_N, rollout.cu_seqlens, c.policy.average)
    policy_batch = PolicyBatch(
        rollout=rollout,
        old_logprobs_N=logprobs_N,
        advantages_N=ops.whiten(advantages_N, mask_N),
        weights_N=weights_N,
    )
    return policy_batch, ValueBatch(rollout=rollout, old_values_N=values_N, returns_N=returns_N, weights_N=weights_N)


def update(run: Run, mini: PolicyBatch) -> dict[str, Tensor]:
    """One optimizer step of the policy."""
    c, num_tokens = run.config.policy, float(mini.weights_N.sum())

    def loss(logprobs_N: Tensor, entropy_N: Tensor, micro: PolicyBatch):
        return clipped_policy_loss(
            logprobs_N,
            entropy_N,
            micro,
            num_tokens,
            clip_low=c.clip_low,
            clip_high=c.clip_high,
            dual_clip=c.dual_clip,
            entropy_bonus=c.entropy_bonus,
        )

    return run.policy.update(mini, loss)


def refit(run: Run, version: int) -> None:
    """The policy's weights go into the samplers."""
    run.replica.publish(version)
    gather(lambda: run.sampler and run.sampler.refit(run.plan, run.replica, version=version))


def evaluate(run: Run, number: int) -> tuple[dict[str, float], list[dict]]:
    """Reward and KL on held-out prompts; every call draws with the same seeds."""
    c, prompts = run.config, run.eval_prompts
    if not prompts:
        return {}, []
    sampling = c.sampling.sampling(c.seed, run.transcript.stop)
    scored = sample_and_score(run.sampler, prompts, sampling, 1, run.transcript, run.reward)
    rollout, rewards_B = scored.rollout, scored.rewards()
    log_ratio_N = torch.zeros_like(rollout.sampler_logprobs_N)
    if rollout.weights_version:  # before the first update the policy is the reference
        log_ratio_N = run.policy.infer(rollout)[0] - run.policy.infer_reference(rollout)
    metrics = rollout_statistics(rollout, rewards_B, log_ratio_N, prefix="eval/")
    return metrics, run.transcript.rows(number, "eval", scored.texts, rewards_B)


def setup(config: Config) -> tuple[Run, RunDirectory, int]:
    """Check what can be wrong, cheapest first, then load. Returns the run, its directory and the steps already done."""
    folder, shape, critic_shape = shapes(config)
    read = huggingface.Weights(folder, shape.tensors())
    tokenizer = load_tokenizer(folder)
    train_prompts, eval_prompts = load_prompts(
        config.data, config.eval_data, tokenizer, shape.context - config.sampling.max_tokens
    )
    prompts_per_step = config.batch.sequences // config.batch.samples_per_prompt
    PromptOrder(len(train_prompts), config.seed).batch(0, prompts_per_step)
    checkpoint = training.latest(config.output) if config.resume and config.output else None
    start = training.read_plain(checkpoint)["step"] if checkpoint else 0
    distributed.initialize(config.threads, config.parallel)
    directory = RunDirectory.create(
        config.output, "ppo", options.to_yaml(config), config.resume, needed_bytes=2 * shape.num_bytes()
    )
    reward = None
    if distributed.place().leads:
        reward = load_reward(config.reward.function)
    gather(lambda: reward and reward.check())

    shared = {
        "tokens_per_micro_batch": config.batch.tokens_per_micro_batch,
        "seed": config.seed,
        "parallel": config.parallel,
        "dtype": getattr(torch, config.dtype),
    }
    p, c, temperature = config.policy, config.critic, config.sampling.temperature
    policy = Policy(shape, read, lora=p.lora, optimizer=p.optimizer, temperature=temperature, **shared)
    critic = Critic(critic_shape, read, lora=c.lora, optimizer=c.optimizer, **shared)
    if checkpoint:
        networks = {"policy": policy, "critic": critic}
        state = training.load(checkpoint, {name: n.state_dict(loading=True) for name, n in networks.items()})
        for name, network in networks.items():
            network.load_state_dict(state[name])
        directory.truncate(start or -1)  # a run that was stopped before its first step evaluates again
    replica, sampler, plan = Replica(policy), None, None
    if replica.leads:
        sampler = NativeSampler(shape, dtype=config.sampling.dtype, tokenizer=folder)
        plan = compile_plan(replica.manifest(), sampler.manifest())
    run = Run(
        config=config,
        folder=folder,
        policy=policy,
        critic=LocalCritic(critic),
        replica=replica,
        sampler=sampler,
        plan=plan,
        reward=reward,
        transcript=Transcript(tokenizer),
        train_prompts=train_prompts,
        eval_prompts=eval_prompts[: config.eval_prompts],
        timers=Timers(),
    )
    refit(run, start)
    return run, directory, start


def shapes(config: Config) -> tuple[Path, ModelShape, ModelShape]:
    """The model's folder, and the shapes of policy and critic, once they fit the layout."""
    config.parallel.data(distributed.world_size())
    folder = Path(config.model) if Path(config.model).is_dir() else default_model(config.model)
    shape = ModelShape.from_folder(folder)
    critic_shape = config.critic.shape(shape)
    parallel.check(config.parallel, shape, "the model")
    parallel.check(config.parallel, critic_shape, "the critic")
    return folder, shape, critic_shape


def save(run: Run, directory: RunDirectory, number: int) -> None:
    """A checkpoint, from which the run continues exactly, and the policy as a Hugging Face directory."""
    state = {"policy": run.policy.state_dict(), "critic": run.critic.critic.state_dict()}
    training.save(directory.path, number, state)
    huggingface.write(directory.path / "policy", run.policy.hugging_face(), like=run.folder)


def layout(config: Config) -> str:
    """Which rank would hold what."""
    _, shape, critic_shape = shapes(config)
    plans = [
        parallel.NetworkPlan(name="policy", shape=shape, lora=config.policy.lora),
        parallel.NetworkPlan(name="critic", shape=critic_shape, lora=config.critic.lora, value_head=True),
    ]
    return parallel.describe(config.parallel, plans, distributed.world_size(), getattr(torch, config.dtype))


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    print(options.to_yaml(config), flush=True)
    if config.dry_run:
        print(layout(config))
        return 0
    run, directory, start = setup(config)
    status = repeat(
        config,
        directory,
        start,
        evaluate=partial(evaluate, run),
        step=partial(step, run),
        save=partial(save, run, directory),
    )
    directory.close()
    if distributed.is_main():
        print(f"tuned policy: {directory.path / 'policy'}\nreport: {write_report(directory.path)}")
    return status


if __name__ == "__main__":
    options.user_errors(main)
