"""Distillation from a teacher known by its top k logits."""

# Shape suffixes: N packed tokens, V vocabulary, K tokens kept of the teacher.

import torch
from torch import Tensor

from aligner.ops import library
from aligner.ops.logprobs import DTYPES

KINDS = ("forward_kl", "backward_kl")
REST_FLOOR = 1e-8


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p - log_q)).sum(-1)


def topk_distillation_loss_reference(
    logits_NV: Tensor,
    topk_ids_NK: Tensor,
    topk_logits_NK: Tensor,
    mask_N: Tensor | None,
    num_tokens: float,
    *,
    kind: str = "forward_kl",
    teacher_log_sum_N: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`topk_distillation_loss` in plain PyTorch: any device, any float dtype."""
    work = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    z_NV, t_NK = logits_NV.to(work) / temperature, topk_logits_NK.detach().to(work) / temperature
    if mask_N is not None:
        z_NV, t_NK = torch.where(mask_N[:, None], z_NV, 0), torch.where(mask_N[:, None], t_NK, 0)
        topk_ids_NK = torch.where(mask_N[:, None], topk_ids_NK, 0)
    if teacher_log_sum_N is None:
        log_p, log_q = t_NK.log_softmax(-1), z_NV.gather(1, topk_ids_NK).log_softmax(-1)
    else:
        log_p = t_NK - teacher_log_sum_N.detach().to(work)[:, None]
        log_q = z_NV.log_softmax(-1).gather(1, topk_ids_NK)
        rests = [(1 - x.exp().sum(-1, keepdim=True)).clamp(min=REST_FLOOR).log() for x in (log_p, log_q)]
        log_p, log_q = torch.cat([log_p, rests[0]], 1), torch.cat([log_q, rests[1]], 1)
    kl_N = _kl(log_p, log_q) if kind == "forward_kl" else _kl(log_q, log_p)
    if mask_N is not None:
        kl_N = torch.where(mask_N, kl_N, 0)
    loss = kl_N.sum() / num_tokens
    return loss, {"distillation_loss": loss.detach()}


def topk_distillation_loss(
    logits_NV: Tensor,
    topk_ids_NK: Tensor,
    topk_logits_NK: Tensor,
    mask_N: Tensor | None,
    num_tokens: float,
    *,
    kind: str = "forward_kl",
    teacher_log_sum_N: Tensor | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""KL divergence between a teacher, known by its top k logits, and the student, averaged over tokens.

        forward_kl: sum_e p_e log(p_e / q_e),    backward_kl: sum_e q_e log(q_e / p_e)
        without teacher_log_sum: e runs over the k tokens,
        p = softmax(topk_logits / T), q = softmax(logits[topk_ids] / T)
        with it: p_k = exp(topk_logits_k / T - teacher_log_sum), q_k = softmax(logits / T)_k, and one more event holds
        what remains of each, never less than 1e-8

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2; backward KL: Gu et al. 2023, arXiv:2306.08543, section 2.1.

    logits_NV: (N, V) float32, bfloat16 or float16, dimensionless. The student's; gradients flow to it.
    topk_ids_NK: (N, K) int64, token ids of the teacher's largest logits, different within a row.
    topk_logits_NK: (N, K) float32, dimensionless. The teacher's.
    mask_N: (N,) bool, tokens that take part, or None for all. What another token holds is ignored, NaN included.
    num_tokens: tokens, > 0. Denominator of the whole optimizer step, so that micro-batches add up.
    kind: "forward_kl" | "backward_kl".
    teacher_log_sum_N: (N,) float32, nats. log sum_v exp(logit_v / T) over the teacher's whole vocabulary, or None.
    temperature: T, dimensionless, > 0.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns the loss, () float32, nats, and the detached statistic "distillation_loss". Raises ValueError for an
    argument out of range, RuntimeError for shapes and token ids.
    """
    if kind not in KINDS:
        raise ValueError(f"topk_distillation_loss: kind is {kind!r}, expected forward_kl or backward_kl.")
    if not num_tokens > 0:
        raise ValueError(f"topk_distillation_loss: num_tokens is {num_tokens}, expected the step's positive number.")
    if not temperature > 0:
        raise ValueError(f"topk_distillation_loss: temperature is {temperature}, expected more than 0.")
    if not library.use_compiled("topk_distillation_loss", impl, {"logits": logits_NV}, DTYPES):
        return topk_distillation_loss_reference(
            *(logits_NV, topk_ids_NK, topk_logits_NK, mask_N, num_tokens),
            kind=kind,
            teacher_log_sum_N=teacher_log_sum_N,
            temperature=temperature,
        )
    settings = (teacher_log_sum_N, mask_N, temperature, kind == "backward_kl")
    kl_N, *_ = torch.ops.aligner.topk_distillation_loss(logits_NV, topk_ids_NK, topk_logits_NK.detach(), *settings)
    loss = kl_N.sum() / num_tokens
    return loss, {"distillation_loss": loss.detach()}


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, ctx.backward_kl = inputs
    ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, d_kl, *_):
    *tensors, maximum, log_sum, rest = ctx.saved_tensors
    d_logits = torch.ops.aligner.topk_distillation_loss_backward(
        *tensors, ctx.temperature, ctx.backward_kl, maximum, log_sum, rest, d_kl.contiguous()
    )
    return d_logits, *([None] * 6)


if library.LOADED:

    @torch.library.register_fake("aligner::topk_distillation_loss")
    def _(logits, *_):
        return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))

    @torch.library.register_fake("aligner::topk_distillation_loss_backward")
    def _(logits, *_):
        return logits.new_empty(logits.shape)

    torch.library.register_autograd("aligner::topk_distillation_loss", _backward, setup_context=_setup_context)
