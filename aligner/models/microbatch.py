"""Packed sequences <-> the padded (s, b) layout that the network runs on. The only place that shifts by one token.

Entry t of a packed tensor is about token t; the hidden state that predicts token t stands at position t - 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One micro-batch.

    tokens_BS: (b, s) int64, right-padded with 0.
    action_tokens: (A,) int64, ids of the action tokens.
    action_index: (A,) int64, packed index of each action token.
    predictor_row: (A,) int64, row of the flattened (s * b) hidden states that predicts that token.
    num_packed: packed tokens in the micro-batch.
    """

    tokens_BS: Tensor
    action_tokens: Tensor
    action_index: Tensor
    predictor_row: Tensor
    num_packed: int

    @staticmethod
    def of(tokens_N: Tensor, action_mask_N: Tensor, cu_seqlens: Tensor) -> "Layout":
        starts = cu_seqlens.long()
        counts = starts[1:] - starts[:-1]
        b, s = len(counts), int(counts.max())
        sequence_N = torch.repeat_interleave(torch.arange(b), counts)
        position_N = torch.arange(len(tokens_N)) - starts[sequence_N]
        tokens_BS = torch.zeros(b, s, dtype=torch.int64)
        tokens_BS[sequence_N, position_N] = tokens_N
        action_index = action_mask_N.nonzero()[:, 0]
        if bool((position_N[action_index] == 0).any()):
            raise ValueError("a sequence starts with an action token, which nothing predicts; give it a prompt.")
        predictor_row = (position_N[action_index] - 1) * b + sequence_N[action_index]
        return Layout(
            tokens_BS=tokens_BS,
            action_tokens=tokens_N[action_index],
            action_index=action_index,
            predictor_row=predictor_row,
            num_packed=len(tokens_N),
        )

    def predictors(self, hidden_SBH: Tensor) -> Tensor:
        """(A, H) hidden states that predict the action tokens."""
        return hidden_SBH.reshape(-1, hidden_SBH.shape[-1])[self.predictor_row]

    def packed(self, values_A: Tensor) -> Tensor:
        """(num_packed,) tensor with the action tokens' values, 0 elsewhere; differentiable."""
        return values_A.new_zeros(self.num_packed).index_put((self.action_index,), values_A)


def split(lengths: list[int], tokens_per_micro_batch: int) -> list[list[int]]:
    """Group sequences of similar length so that no group, padded, exceeds the budget (a longer one stands alone)."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= tokens_per_micro_batch:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
