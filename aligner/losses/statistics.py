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


def estimate_statistics(policy_batch, value_batch, logprobs_N: Tensor, entropy_N: Tensor) -> dict[str, float]:
    """Entropy, advantages, returns, values and the sampler's log-probability gap over the action tokens of a step."""
    rollout = policy_batch.rollout
    mask_N = rollout.action_mask_N
    gap = (logprobs_N - rollout.sampler_logprobs_N)[mask_N]
    returns, values, advantages = (
        t[mask_N] for t in (value_batch.returns_N, value_batch.old_values_N, policy_batch.advantages_N)
    )
    return {
        "entropy/mean": float(entropy_N[mask_N].mean()),
        "advantages/mean": float(advantages.mean()),
        "advantages/std": float(advantages.std(correction=0)),
        "returns/mean": float(returns.mean()),
        "returns/std": float(returns.std(correction=0)),
        "values/mean": float(values.mean()),
        "values/std": float(values.std(correction=0)),
        "explained_variance": explained_variance(values, returns),
        "sampler_gap/mean": float(gap.abs().mean()),
        "sampler_gap/max": float(gap.abs().max()),
    }


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 when the returns do not vary."""
    variance = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / variance if variance > 0 else 0.0


def update_statistics(policy: list[dict[str, float]], value: list[dict[str, float]]) -> dict[str, float]:
    """Means over optimizer steps of what the policy's and the critic's updates report.

    A step that was skipped (optimizer.non_finite) counts in `skipped` only; where all were, there are no means.
    """
    names = {"policy_loss": "loss/policy", "grad_norm": "grad_norm/policy", "clip_fraction": "clip_fraction"}
    names |= {"approx_kl": "approx_kl", "ratio": "ratio/mean", "ratio_clamped": "ratio_clamped/mean"}
    names |= {"padding": "padding/policy"}
    value_names = {"value_loss": "loss/value", "grad_norm": "grad_norm/value"}
    value_names |= {"value_clip_fraction": "value_clip_fraction"}
    skipped = {
        f"skipped/{name}": sum(step["skipped"] for step in steps) / len(steps)
        for name, steps in (("policy", policy), ("value", value))
    }
    return _means(policy, names) | _means(value, value_names) | skipped


def _means(steps: list[dict[str, float]], names: dict[str, str]) -> dict[str, float]:
    applied = [step for step in steps if not step["skipped"]]
    return {new: sum(step[old] for step in applied) / len(applied) for old, new in names.items()} if applied else {}
