"""Numbers that describe a step; pure functions of its tensors."""

from torch import Tensor

from aligner import ops


def rollout_statistics(rollout, rewards_B: Tensor, log_ratio_N: Tensor, prefix: str = "") -> dict[str, float]:
    """Reward, KL per response, lengths, finished share of one rollout.

    rewards_B: (B,) float32, reward units. log_ratio_N: (N,) float32, nats, log pi - log pi_ref, 0 outside actions.
    KL per response is the k1 estimate, the sum of the log-ratio over a response, whatever the penalty's estimator is.
    """
    counts = (rollout.cu_seqlens[1:] - rollout.cu_seqlens[:-1]).float()
    lengths_B = ops.segment_sum(rollout.action_mask_N.float(), rollout.cu_seqlens)
    return {
        prefix + "reward/mean": float(rewards_B.mean()),
        prefix + "reward/std": float(rewards_B.std(correction=0)),
        prefix + "kl/mean": float(ops.segment_sum(log_ratio_N, rollout.cu_seqlens).mean()),
        prefix + "response_length/mean": float(lengths_B.mean()),
        prefix + "prompt_length/mean": float((counts - lengths_B).mean()),
        prefix + "finished/mean": float(rollout.finished_B.float().mean()),
    }


def sampler_statistics(rollout, logprobs_N: Tensor, entropy_N: Tensor) -> dict[str, float]:
    """Entropy, and the sampler's log-probability gap to the trainer, over the action tokens of a step."""
    mask_N = rollout.action_mask_N
    gap = (logprobs_N - rollout.sampler_logprobs_N)[mask_N]
    return {
        "entropy/mean": float(entropy_N[mask_N].mean()),
        "sampler_gap/mean": float(gap.abs().mean()),
        "sampler_gap/max": float(gap.abs().max()),
    }


def estimate_statistics(policy_batch, value_batch) -> dict[str, float]:
    """Advantages, returns and values over the action tokens of a step."""
    mask_N = policy_batch.rollout.action_mask_N
    returns, values, advantages = (
        t[mask_N] for t in (value_batch.returns_N, value_batch.old_values_N, policy_batch.advantages_N)
    )
    return {
        "advantages/mean": float(advantages.mean()),
        "advantages/std": float(advantages.std(correction=0)),
        "returns/mean": float(returns.mean()),
        "returns/std": float(returns.std(correction=0)),
        "values/mean": float(values.mean()),
        "values/std": float(values.std(correction=0)),
        "explained_variance": explained_variance(values, returns),
    }


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 when the returns do not vary."""
    variance = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / variance if variance > 0 else 0.0


POLICY_NAMES = {
    "policy_loss": "loss/policy",
    "supervised_loss": "loss/policy",
    "grad_norm": "grad_norm/policy",
    "clip_fraction": "clip_fraction",
    "approx_kl": "approx_kl",
    "ratio": "ratio/mean",
    "ratio_clamped": "ratio_clamped/mean",
    "importance": "importance/mean",
    "padding": "padding/policy",
}
VALUE_NAMES = {
    "value_loss": "loss/value",
    "grad_norm": "grad_norm/value",
    "value_clip_fraction": "value_clip_fraction",
}


def update_statistics(policy: list[dict[str, float]], value: list[dict[str, float]] = ()) -> dict[str, float]:
    """Means over optimizer steps of what the policy's and the critic's updates report, as far as they do.

    A step that was skipped (optimizer.non_finite) counts in `skipped` only; where all were, there are no means.
    """
    metrics = {}
    for who, steps, names in (("policy", policy, POLICY_NAMES), ("value", value, VALUE_NAMES)):
        applied = [step for step in steps if not step["skipped"]]
        for old, new in names.items():
            if applied and old in applied[0]:
                metrics[new] = sum(step[old] for step in applied) / len(applied)
        if steps:
            metrics[f"skipped/{who}"] = sum(step["skipped"] for step in steps) / len(steps)
    return metrics


def preference_statistics(stats: dict[str, float], prefix: str = "") -> dict[str, float]:
    """What a loss of the DPO family reports: its implicit rewards are beta (log pi - log pi_ref)."""
    names = {
        "loss": "loss",
        "preference_loss": "loss/preference",
        "sft_loss": "loss/sft",
        "accuracy": "accuracy",
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "reward_margin": "rewards/margin",
    }
    return {prefix + new: float(stats[old]) for old, new in names.items() if old in stats}
