"""Drawing the next token: truncation, random streams, log-probabilities."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aligner import ops
from aligner.rollout.sampling import Sampling

_BLOCK = 256  # columns summed at once when a uniform number is looked up in the cumulative distribution


@dataclass(frozen=True, kw_only=True)
class Streams:
    """One counter-based random stream per sequence: a pure function of (seed, prompt, sample index, position).

    Source: the SplitMix64 finaliser, Steele et al. 2014, doi:10.1145/2660193.2660195, section 4.
    """

    keys: np.ndarray

    @staticmethod
    def of(seed: int, sequences: Sequence[tuple[list[int], int]]) -> "Streams":
        """A stream for each (prompt ids, sample index)."""
        digests = [
            hashlib.blake2b(np.asarray([seed, sample, *prompt], dtype=np.int64).tobytes(), digest_size=8).digest()
            for prompt, sample in sequences
        ]
        return Streams(keys=np.frombuffer(b"".join(digests), dtype=np.uint64))

    def uniforms(self, rows: list[int], step: int) -> Tensor:
        """(len(rows),) float64 in [0, 1): the number that draws token `step` of each of the given sequences."""
        with np.errstate(over="ignore"):
            z = self.keys[rows] + np.uint64(step + 1) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens, (B,) int64, and their log-probabilities, (B,) float32, nats.

    logits_BV: (B, V) float32. uniform_B: (B,) float64 in [0, 1), unused when sampling.temperature is 0.
    The log-probability is under softmax(logits / temperature) (temperature 1 when greedy), before top-k and top-p.
    """
    if sampling.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, ops.logprobs(logits_BV, tokens_B)[0]
    kept_BV = logits_BV
    if sampling.top_k or sampling.top_p < 1:
        kept_BV = _truncate(logits_BV, sampling)
    tokens_B = _invert_cdf(torch.softmax(kept_BV / sampling.temperature, -1), uniform_B)
    return tokens_B, ops.logprobs(logits_BV, tokens_B, temperature=sampling.temperature)[0]


def _truncate(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits with -inf outside the k most likely tokens and outside the smallest set that reaches top_p.

    Source: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2020, arXiv:1904.09751, section 3.1 (top-p).
    """
    ordered_BV, index_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    drop_BV = torch.zeros_like(ordered_BV, dtype=torch.bool)
    if sampling.top_k:
        drop_BV[:, sampling.top_k :] = True
    if sampling.top_p < 1:
        probability_BV = torch.softmax(ordered_BV.masked_fill(drop_BV, -torch.inf) / sampling.temperature, -1)
        drop_BV |= probability_BV.cumsum(-1) - probability_BV >= sampling.top_p
    return logits_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, index_BV, drop_BV), -torch.inf)


def _invert_cdf(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative probability passes uniform * total; found by block, then inside the block."""
    batch, vocab = probability_BV.shape
    padded = torch.nn.functional.pad(probability_BV, (0, -vocab % _BLOCK)).view(batch, -1, _BLOCK)
    blocks = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform_B[:, None] * blocks[:, -1:]
    # A token or block of probability 0 is never chosen: `right` skips every entry whose cumulative sum is <= target.
    block = torch.searchsorted(blocks, target, right=True).clamp(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = padded[torch.arange(batch), block[:, 0]].double().cumsum(-1)
    # Rounding may leave target - before just past the block's own sum: fall back on its last possible token.
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    token = torch.minimum(torch.searchsorted(inside, target - before, right=True), last)
    return (block * _BLOCK + token)[:, 0]
