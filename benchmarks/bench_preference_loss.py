"""DPO-family losses with their statistics, forward and backward, against the same in PyTorch.

From pairs' log-probabilities, and from those of a million packed tokens: what a training step does.
"""

import harness
import torch

from aligner import ops


def inputs(b):
    def make(small: bool):
        policy, reference = -torch.rand(2, 1000 if small else b), -torch.rand(2, 1000 if small else b)
        return policy[0].requires_grad_(), policy[1].requires_grad_(), *reference

    return make


def call(kind, impl):
    def step(chosen, rejected, ref_chosen, ref_rejected):
        loss, stats = ops.preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, 1000.0, kind=kind, beta=0.1, sft_coef=0.1, impl=impl
        )
        return stats, torch.autograd.grad(loss, (chosen, rejected))

    return step


TOKENS_PER_RESPONSE = 512


def token_inputs(small: bool):
    n = 1 << (12 if small else 20)
    cu_seqlens = torch.arange(0, n + 1, TOKENS_PER_RESPONSE, dtype=torch.int32)
    return (-torch.rand(n)).requires_grad_(), torch.rand(n) < 0.8, cu_seqlens, -100 * torch.rand(len(cu_seqlens) - 1)


def pair_loss(policy, reference, kind, impl):
    sides = (policy[0::2], policy[1::2], reference[0::2], reference[1::2])
    return ops.preference_loss(*(x.contiguous() for x in sides), 1000.0, kind=kind, beta=0.1, impl=impl)[0]


def from_tokens(kind, impl):
    def step(logprobs, mask, cu_seqlens, reference):
        sums = ops.segment_sum(logprobs, cu_seqlens, mask_N=mask, impl=impl)
        return torch.autograd.grad(pair_loss(sums, reference, kind, impl), logprobs)

    return step


def from_padded_tokens(kind):
    """As where every response has the same length: a sum over a row."""

    def step(logprobs, mask, cu_seqlens, reference):
        sums = (logprobs * mask).view(-1, TOKENS_PER_RESPONSE).sum(1)
        return torch.autograd.grad(pair_loss(sums, reference, kind, "reference"), logprobs)

    return step


if __name__ == "__main__":
    cases = [
        harness.Case(
            shape=f"B{b} {kind} forward+backward",
            dtype="float32",
            inputs=inputs(b),
            subjects={impl: call(kind, impl) for impl in (harness.COMPILED, "reference")},
            bytes=b * 4 * (4 + 2),
        )
        for kind, b in (*(("dpo", b) for b in harness.TOKENS), ("cdpo", 1 << 20), ("ipo", 1 << 20), ("orpo", 1 << 20))
    ]
    for kind in ("dpo", "cdpo"):
        both = {impl: from_tokens(kind, impl) for impl in (harness.COMPILED, "reference")}
        cases.append(
            harness.Case(
                shape=f"N{1 << 20} B{(1 << 20) // TOKENS_PER_RESPONSE} {kind} forward+backward from tokens",
                dtype="float32",
                inputs=token_inputs,
                subjects=both | {"torch-padded": from_padded_tokens(kind)},
                bytes=(1 << 20) * (4 + 1 + 4),
            )
        )
    harness.main("preference_loss", cases)
