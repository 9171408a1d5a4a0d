"""The forward passes of a batch of sequences, with cached keys and values, over the weights of all tensor ranks.

Everything is float32, and read at the addresses that were captured when the engine was made.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from aligner.models.shape import ModelShape


class Batch:
    """Sequence i lies in row i of the caches: (2, ranks, layers, rows, heads, length, dim), grown as needed.

    weights: of each rank, by name.
    """

    def __init__(self, shape: ModelShape, weights: list[dict[str, Tensor]]):
        self.shape, self.weights, ranks = shape, weights, len(weights)
        self.heads, self.kv_heads = shape.heads // ranks, max(1, shape.kv_heads // ranks)
        self.frequencies = shape.rope.frequencies(shape.head_dim)
        self.clear()

    def clear(self) -> None:
        s = self.shape
        self.lengths: list[int] = []
        self.cache = torch.zeros(2, len(self.weights), s.num_layers, 0, self.kv_heads, 0, s.head_dim)

    def remove(self, row: int) -> None:
        """The last sequence takes its row."""
        last = len(self.lengths) - 1
        self.cache[:, :, :, row] = self.cache[:, :, :, last]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Append sequences. Returns the logits (n, vocab) after each."""
        first, lengths = len(self.lengths), [len(p) for p in prompts]
        self._reserve(first + len(prompts), max(lengths))
        self.cache[:, :, :, first:] = (
            0  # what is left of others, weights that were lost among it, would count as 0 * NaN
        )
        self.lengths += lengths
        ends = torch.tensor(lengths).cumsum(0)
        begins = [int(end) - length for end, length in zip(ends, lengths, strict=True)]

        def attend(rank: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            for row, (begin, length) in enumerate(zip(begins, lengths, strict=True), first):
                one = slice(begin, begin + length)
                kv = torch.stack([k[one], v[one]]).transpose(1, 2)
                self.cache[:, rank, layer, row, :, :length] = kv
                keys, values = kv.repeat_interleave(self.heads // self.kv_heads, 1)
                one_out = scaled_dot_product_attention(q[one].transpose(0, 1), keys, values, is_causal=True)
                out[one] = one_out.transpose(0, 1)
            return out

        positions = torch.cat([torch.arange(n) for n in lengths])
        return self._forward(torch.cat([torch.tensor(p) for p in prompts]), positions, attend, ends - 1)

    @torch.no_grad()
    def decode(self, tokens: list[int]) -> Tensor:
        """Append a token to every sequence. Returns the logits (n, vocab) after it."""
        rows, positions, groups = torch.arange(len(tokens)), torch.tensor(self.lengths), self.heads // self.kv_heads
        length = max(self.lengths) + 1
        self._reserve(len(tokens), length)
        self.lengths = [n + 1 for n in self.lengths]
        hidden = torch.arange(length) > positions[:, None]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]

        def attend(rank: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache[:, rank, layer, : len(tokens), :, :length]
            keys[rows, :, positions], values[rows, :, positions] = k, v
            q = q.view(len(tokens), self.kv_heads, groups, -1) * q.shape[-1] ** -0.5
            return (torch.softmax(q @ keys.mT + mask, -1) @ values).view(len(tokens), self.heads, -1)

        return self._forward(torch.tensor(tokens), positions, attend, rows)

    def _reserve(self, rows: int, length: int) -> None:
        """Room for so many, doubled when it is too little."""
        had = self.cache.shape
        if rows <= had[3] and length <= had[5]:
            return
        rows, length = (max(a, b if b <= a else 2 * b) for a, b in ((had[3], rows), (had[5], length)))
        grown = torch.zeros(*had[:3], rows, had[4], length, had[6])
        grown[:, :, :, : had[3], :, : had[5]] = self.cache
        self.cache = grown

    def _forward(self, tokens: Tensor, positions: Tensor, attend, last: Tensor) -> Tensor:
        """Logits (len(last), vocab) at `last`, of packed tokens (T,). attend: (rank, layer, q, k, v) -> as q."""
        s, first = self.shape, self.weights[0]
        angles = positions[:, None] * self.frequencies
        turn = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
        x = self._embed(tokens)
        for i in range(s.num_layers):
            at = f"model.layers.{i}."
            y = self._norm(x, first[at + "input_layernorm.weight"])
            x = x + sum(self._attention(rank, i, y, turn, attend) for rank in range(len(self.weights)))
            y = self._norm(x, first[at + "post_attention_layernorm.weight"])
            for w in self.weights:
                gate, up = linear(y, w[at + "mlp.gate_up_proj.weight"]).chunk(2, 1)
                x = x + linear(silu(gate) * up, w[at + "mlp.down_proj.weight"])
        y = self._norm(x[last], first["model.norm.weight"])
        return torch.cat([linear(y, w["lm_head.weight"]) for w in self.weights], 1)[:, : s.vocab]

    def _attention(self, rank: int, layer: int, y: Tensor, turn: tuple[Tensor, Tensor], attend) -> Tensor:
        w, at = self.weights[rank], f"model.layers.{layer}.self_attn."
        qkv = linear(y, w[at + "qkv_proj.weight"], w.get(at + "qkv_proj.bias"))
        parts = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = qkv.view(len(y), -1, self.shape.head_dim).split(parts, 1)
        if self.shape.qk_norm:
            q, k = self._norm(q, w[at + "q_norm.weight"]), self._norm(k, w[at + "k_norm.weight"])
        q, k = (z * turn[0] + _turned(z) * turn[1] for z in (q, k))
        return linear(attend(rank, layer, q, k, v).flatten(1), w[at + "o_proj.weight"])

    def _embed(self, tokens: Tensor) -> Tensor:
        """Each rank has so many rows of the table."""
        tables = [w["model.embed_tokens.weight"] for w in self.weights]
        rows = len(tables[0])
        x = torch.empty(len(tokens), self.shape.hidden)
        for rank, table in enumerate(tables):
            own = tokens // rows == rank
            x[own] = embedding(tokens[own] - rank * rows, table)
        return x

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.shape.norm_eps)


def _turned(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)
