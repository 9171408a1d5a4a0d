"""The embedded sampler: a batched decoder with a key-value cache, for machines without a GPU.

Weights lie in the engine's own fused layout ([q|k|v], [gate|up]) and are overwritten in place by a refit plan.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from aligner.checkpoint.huggingface import Weights
from aligner.data.batch import Rollout, pack_rollout
from aligner.models.shape import ModelShape
from aligner.models.weights import entry, fill
from aligner.rollout.draw import Streams, draw
from aligner.rollout.sampling import Response, Sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NativeSampler:
    """Samples from a decoder of `shape` whose weights come from a refit (or from_pretrained).

    dtype: "float32" or "bfloat16", of weights, activations and cache; logits are float32.
    max_batch: sequences decoded at once.
    """

    def __init__(self, shape: ModelShape, *, dtype: str = "float32", max_batch: int = 64):
        if dtype not in DTYPES:
            raise ValueError(f"sampler dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        self.shape, self.max_batch, self.weights_version = shape, max_batch, 0
        self.weights: dict[str, Tensor] = {}
        self._manifest: list[dict] = []
        for name, parts in _layout(shape).items():
            tail = shape.tensors()[parts[0][0]][1:]
            self.weights[name] = torch.zeros(sum(rows for _, _, rows in parts), *tail, dtype=DTYPES[dtype])
            self._manifest.append(entry(name, self.weights[name], parts))
        frequency = shape.rope_base ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
        self._frequency = torch.cat([frequency, frequency])

    @staticmethod
    def from_pretrained(folder: Path, dtype: str = "float32", threads: int = 0) -> "NativeSampler":
        """A sampler with the weights of a Hugging Face model directory. threads: 0 leaves torch's choice."""
        if threads:
            torch.set_num_threads(threads)
        shape = ModelShape.from_folder(folder)
        sampler = NativeSampler(shape, dtype=dtype)
        fill(sampler._manifest, sampler.weights, Weights(folder, shape.tensors()))
        return sampler

    def manifest(self) -> list[dict]:
        """Where each parameter stands in the Hugging Face checkpoint (see refit.plan)."""
        return self._manifest

    def refit(self, plan, source: Callable[[str], Tensor], version: int) -> None:
        """Overwrite the weights in place by executing `plan`; `version` becomes weights_version."""
        plan.execute(source, self.weights)
        self.weights_version = version

    def generate(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> Rollout:
        """n responses to each prompt (token ids), as one packed Rollout ordered by prompt, then sample."""
        responses = sorted(self.stream(prompts, sampling, n), key=lambda r: (r.prompt, r.sample))
        return pack_rollout(
            [prompts[r.prompt] for r in responses],
            [r.tokens for r in responses],
            [r.logprobs for r in responses],
            [r.finished for r in responses],
            self.weights_version,
        )

    def stream(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> Iterator[Response]:
        """The same responses one by one, as they finish."""
        self._check(prompts, sampling, n)
        per_batch = max(1, self.max_batch // n)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for begin in range(0, len(order), per_batch):
            yield from self._decode(prompts, order[begin : begin + per_batch], sampling, n)

    def _check(self, prompts: list[list[int]], sampling: Sampling, n: int) -> None:
        if n < 1:
            raise ValueError(f"n is {n}, expected 1 or more samples a prompt.")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty; give it at least one token (a begin-of-text token will do).")
            if len(prompt) + sampling.max_tokens > self.shape.context:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}, together over the "
                    f"model's context of {self.shape.context}; shorten the prompt or lower max_tokens."
                )

    @torch.no_grad()
    def _decode(self, prompts: list[list[int]], chosen: list[int], sampling: Sampling, n: int) -> Iterator[Response]:
        """Prefill each prompt once, then decode its n samples together; finished sequences leave the batch."""
        rows = [(i, j) for i in chosen for j in range(n)]
        streams = Streams.of(sampling.seed, [(prompts[i], j) for i, j in rows])
        tokens: list[list[int]] = [[] for _ in rows]
        nats: list[list[float]] = [[] for _ in rows]
        position_B = torch.tensor([len(prompts[i]) for i, _ in rows])
        logits_BV, cache = self._prefill([prompts[i] for i in chosen], sampling.max_tokens, n)
        live = list(range(len(rows)))  # rows of `rows` still decoding, aligned with the tensors
        for step in range(sampling.max_tokens):
            next_B, logprobs_B = draw(logits_BV, sampling, streams.uniforms(live, step))
            keep = []
            for at, (row, token, logprob) in enumerate(zip(live, next_B.tolist(), logprobs_B.tolist(), strict=True)):
                tokens[row].append(token)
                nats[row].append(logprob)
                finished = token in sampling.stop
                if finished or step + 1 == sampling.max_tokens:
                    prompt, sample = rows[row]
                    yield Response(
                        prompt=prompt, sample=sample, tokens=tokens[row], logprobs=nats[row], finished=finished
                    )
                else:
                    keep.append(at)
            if not keep:
                return
            if len(keep) < len(live):
                index = torch.tensor(keep)
                live, next_B, position_B = [live[at] for at in keep], next_B[index], position_B[index]
                cache = [(k[index], v[index]) for k, v in cache]
            hidden_BH = self._layers(next_B[:, None], position_B[:, None], cache)[:, 0]
            position_B = position_B + 1
            logits_BV = self._logits(hidden_BH)

    def _prefill(self, prompts: list[list[int]], max_tokens: int, n: int) -> tuple[Tensor, list]:
        """Logits after each prompt, repeated n times, and the cache, with room for max_tokens more."""
        shape, count, longest = self.shape, len(prompts), max(map(len, prompts))
        tokens = torch.zeros(count, longest, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = torch.tensor(prompt)
        size, dtype = (count, shape.kv_heads, longest + max_tokens, shape.head_dim), self.weights["norm"].dtype
        cache = [(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)) for _ in range(shape.num_layers)]
        hidden = self._layers(tokens, torch.arange(longest).expand(count, -1), cache)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        logits_BV = self._logits(hidden[torch.arange(count), last])
        if n > 1:
            logits_BV = logits_BV.repeat_interleave(n, 0)
            cache = [(k.repeat_interleave(n, 0), v.repeat_interleave(n, 0)) for k, v in cache]
        return logits_BV, cache

    def _layers(self, tokens: Tensor, positions: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(b, s, H) normalised hidden states of (b, s) tokens at their positions; extends the cache."""
        w, s = self.weights, self.shape
        angle = positions[..., None].float() * self._frequency
        cos, sin = angle.cos()[:, None].to(w["norm"].dtype), angle.sin()[:, None].to(w["norm"].dtype)
        # A sequence sees its cached positions up to its own; what right padding left beyond them is masked out.
        mask = torch.arange(int(positions.max()) + 1) <= positions[:, None, :, None]
        x = w["embedding"][tokens]
        for i, (keys, values) in enumerate(cache):
            at = f"layers.{i}."
            h = F.rms_norm(x, (s.hidden,), w[at + "attention_norm"], s.norm_eps)
            a = self._attention(F.linear(h, w[at + "qkv"]), cos, sin, positions, keys, values, mask)
            x = x + F.linear(a, w[at + "attention_out"])
            h = F.rms_norm(x, (s.hidden,), w[at + "ffn_norm"], s.norm_eps)
            gate, up = F.linear(h, w[at + "gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, w[at + "down"])
        return F.rms_norm(x, (s.hidden,), w["norm"], s.norm_eps)

    def _attention(self, qkv, cos, sin, positions, keys, values, mask) -> Tensor:
        s = self.shape
        b, length = positions.shape
        heads = qkv.view(b, length, s.heads + 2 * s.kv_heads, s.head_dim).transpose(1, 2)
        q, k, v = heads.split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if length == 1:
            row = torch.arange(b)
            keys[row, :, positions[:, 0]], values[row, :, positions[:, 0]] = k[:, :, 0], v[:, :, 0]
        else:
            keys[:, :, :length], values[:, :, :length] = k, v
        seen = mask.shape[-1]
        out = F.scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(b, length, s.heads * s.head_dim)

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        return F.linear(hidden_BH, self.weights["embedding" if self.shape.tied else "head"]).float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves convention (Su et al. 2021, arXiv:2104.09864, as Llama lays it out)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _layout(shape: ModelShape) -> dict[str, list[tuple[str, int, int]]]:
    """Engine parameter -> (Hugging Face name, first row, rows) from top to bottom."""
    rows = {name: size[0] for name, size in shape.tensors().items()}

    def whole(*names: str) -> list[tuple[str, int, int]]:
        return [(name, 0, rows[name]) for name in names]

    layout = {"embedding": whole("model.embed_tokens.weight"), "norm": whole("model.norm.weight")}
    if not shape.tied:
        layout["head"] = whole("lm_head.weight")
    for i in range(shape.num_layers):
        hf = f"model.layers.{i}."
        layout |= {
            f"layers.{i}.attention_norm": whole(hf + "input_layernorm.weight"),
            f"layers.{i}.qkv": whole(*(hf + f"self_attn.{c}_proj.weight" for c in "qkv")),
            f"layers.{i}.attention_out": whole(hf + "self_attn.o_proj.weight"),
            f"layers.{i}.ffn_norm": whole(hf + "post_attention_layernorm.weight"),
            f"layers.{i}.gate_up": whole(hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight"),
            f"layers.{i}.down": whole(hf + "mlp.down_proj.weight"),
        }
    return layout
