"""Distillation: (logits, the teacher's top k, targets, num_tokens) -> (loss, statistics)."""

from typing import Literal

from torch import Tensor

from aligner import ops

Divergence = Literal["forward_kl", "backward_kl"]


def distillation_loss(
    logits_AV: Tensor,
    topk_ids_AK: Tensor,
    topk_logits_AK: Tensor,
    log_sum_A: Tensor | None,
    targets_A: Tensor,
    num_tokens: float,
    *,
    kind: Divergence,
    temperature: float = 1.0,
    kd_coef: float = 1.0,
    sft_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Divergence of the student from a teacher known by its top k logits, and the likelihood of the text itself.

        loss = sum_a (kd_coef KL_a - sft_coef log softmax(logits_a)[target_a]) / num_tokens

    with the KL_a of ops.topk_distillation_loss.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2. The temperature is the divergence's alone, and its gradient
    is not multiplied by T^2: kd_coef says how much it weighs.

    logits_AV: (A, V) float32, bfloat16 or float16, dimensionless. The student's at the A action tokens; gradients flow
        to it.
    topk_ids_AK: (A, K) int64, token ids. topk_logits_AK: (A, K) float32, dimensionless. The teacher's largest.
    log_sum_A: (A,) float32, nats, log sum_v exp(logit_v / T) of the teacher, or None: then both renormalise to the k.
    targets_A: (A,) int64, token ids.
    num_tokens: action tokens of the whole optimizer step, > 0, so that micro-batches add up.
    kind: "forward_kl" | "backward_kl". temperature: T, dimensionless, > 0. kd_coef, sft_coef: dimensionless.

    Returns the loss, () float32, and the detached statistics "distillation_loss" and "sft_loss", nats a token, both
    before their coefficients. Raises ValueError for an argument out of range.
    """
    divergence, stats = ops.topk_distillation_loss(
        *(logits_AV, topk_ids_AK, topk_logits_AK, None, num_tokens),
        kind=kind,
        teacher_log_sum_N=log_sum_A,
        temperature=temperature,
    )
    likelihood_A, _ = ops.logprobs(logits_AV if sft_coef else logits_AV.detach(), targets_A)
    sft = -likelihood_A.sum() / num_tokens
    loss = kd_coef * divergence + sft_coef * sft
    return loss, {"distillation_loss": stats["distillation_loss"], "sft_loss": sft.detach()}
