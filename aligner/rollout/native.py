"""The embedded sampler: a compiled decoder (csrc/engine) with continuous batching, for machines without a GPU.

Weights lie in the engine's own fused layout ([q|k|v], [gate|up]) and are overwritten in place by a refit plan.
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from aligner._engine import Engine
from aligner.checkpoint.huggingface import Weights
from aligner.data.batch import Rollout
from aligner.data.tokenizer import load_tokenizer, token_bytes
from aligner.models.refitted import Refitted
from aligner.models.shape import ModelShape
from aligner.models.weights import entry, fill, manifest
from aligner.rollout.sampling import Response, Sampling, check_prompts, pack_responses, stream_key

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}  # of what is not quantised
HUGE_PAGE, LINE = 1 << 21, 64  # bytes
QUANTISED = ("qkv", "attention_out", "gate_up", "down")


class NativeSampler:
    """Samples from a decoder of `shape` whose weights come from a refit (or from_pretrained).

    dtype: "float32", "bfloat16" or "int8", of weights; activations, cache and logits are float32. int8 holds the
        layers' matrices as integers with one scale a row; embedding, head, norms and biases stay float32. On SmolLM2
        that moves the log-probability of a sampled token by 0.06 nats in the mean and 0.39 at most of 576 tokens. A
        refit of int8 weights needs the room of a float32 model while it lasts.
    max_batch: sequences decoded at once.
    cache_bytes: of the key-value cache, at most; held only while sequences are in flight.
    tokenizer: a Hugging Face folder; read when the first stop string asks for the tokens' texts.
    It runs on as many threads as torch does, and in one Python thread at a time.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        dtype: str = "float32",
        max_batch: int = 64,
        cache_bytes: int = 1 << 30,
        tokenizer: Path | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"sampler dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        self.shape, self.max_batch, self.tokenizer = shape, max_batch, tokenizer
        self._state = Refitted()
        sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        entries: list[dict] = []
        for name, parts in _layout(shape).items():
            tail = shape.tensors()[parts[0][0]][1:]
            size = (sum(rows for _, _, rows in parts), *tail)
            entries.append(entry(name, torch.empty(size, dtype=DTYPES[dtype], device="meta"), parts))
            sizes[name] = size, DTYPES[dtype]
            if dtype == "int8" and name.endswith(QUANTISED):
                sizes |= {name: (size, torch.int8), name + ".scale": (size[:1], torch.float32)}
        self.weights = _zeros(sizes)
        self._manifest = manifest(shape.tensors(), entries)
        self.engine = Engine(
            shape=shape,
            frequencies=shape.rope.frequencies(shape.head_dim).tolist(),
            weights=self.weights,
            dtype=dtype,
            cache_bytes=cache_bytes,
        )
        self._owners: dict[int, tuple[int, int, dict]] = {}  # sequence id -> prompt, sample, inbox of its stream

    @staticmethod
    def from_pretrained(folder: Path, dtype: str = "float32", threads: int = 0) -> "NativeSampler":
        """A sampler with the weights of a Hugging Face model directory. threads: 0 leaves torch's choice."""
        if threads:
            torch.set_num_threads(threads)
        shape = ModelShape.from_folder(folder)
        sampler = NativeSampler(shape, dtype=dtype, tokenizer=folder)
        destination = sampler._destination()
        fill(sampler._manifest["tensors"], destination, Weights(folder, shape.tensors()))
        sampler._quantise(destination)
        sampler._state.version = 0
        return sampler

    @property
    def weights_version(self) -> int:
        return self._state.version

    @property
    def refusal(self) -> str:
        """Why the weights cannot be sampled from; empty when they can."""
        return self._state.refusal

    def manifest(self) -> dict:
        """Where each parameter stands in the Hugging Face checkpoint (see models.weights)."""
        return self._manifest

    def _destination(self) -> dict[str, Tensor]:
        """What the manifest names: the weights themselves, or float32 rows for those that _quantise() will read."""
        held = {name: weight for name, weight in self.weights.items() if not name.endswith(".scale")}
        return {name: torch.empty(w.shape) if w.dtype == torch.int8 else w for name, w in held.items()}

    @torch.no_grad()
    def _quantise(self, destination: dict[str, Tensor]) -> None:
        """Symmetric integers for each row: scale = max |w| / 127, w ~ scale * round(w / scale)."""
        for name in list(destination):
            if self.weights[name].dtype == torch.int8:
                rows = destination.pop(name)
                scale = rows.abs().amax(1) / 127
                self.weights[name + ".scale"].copy_(scale)
                self.weights[name].copy_(rows.div_(scale.clamp(min=1e-30)[:, None]).round_())

    def refit(self, plan, source, version: int) -> None:
        """Overwrite the weights in place by executing `plan` from `source`; `version` becomes weights_version.

        What is wrong before the first write raises and changes nothing. From the first write until all of it is
        verified the weights are a mixture and the sampler refuses to generate; a whole refit ends that.
        """
        if self.engine.num_live:
            raise RuntimeError(
                f"sampler: {self.engine.num_live} responses are unfinished; exhaust or close their stream, then refit."
            )
        self._state.refit(plan, source, version, self._manifest, self._destination, finish=self._quantise)

    def generate(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> Rollout:
        """n responses to each prompt (token ids), as one packed Rollout ordered by prompt, then sample."""
        return pack_responses(prompts, list(self.stream(prompts, sampling, n)), self.weights_version)

    def stream(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> Iterator[Response]:
        """The same responses one by one, as they finish. Closing the iterator cancels those that have not.

        Streams of one sampler that are read in turns decode in one batch.
        """
        self._check(prompts, sampling, n)
        mine: dict[int, Response] = {}  # finished and not yet given out
        ids: set[int] = set()
        try:
            for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):  # long ones first: they end last
                keys = [stream_key(sampling.seed, j, prompts[i]) for j in range(n)]
                for j, number in enumerate(self.engine.add(prompts[i], keys, sampling)):
                    self._owners[number] = (i, j, mine)
                    ids.add(number)
            while ids:
                while mine:
                    number = next(iter(mine))
                    ids.remove(number)
                    yield mine.pop(number)
                if ids:
                    self._step()
        finally:
            for number in ids:
                self.engine.cancel(number)
                self._owners.pop(number, None)

    def _step(self) -> None:
        for done in self.engine.step(self.max_batch):
            prompt, sample, inbox = self._owners.pop(done.id)
            inbox[done.id] = Response(
                prompt=prompt,
                sample=sample,
                tokens=done.tokens,
                logprobs=done.logprobs,
                sampling_logprobs=done.sampling_logprobs,
                finished=done.stopped,
            )

    def _know_tokens(self) -> None:
        if self.tokenizer is None:
            raise ValueError("stop_strings need the texts of the tokens; give NativeSampler a tokenizer folder.")
        texts = token_bytes(load_tokenizer(self.tokenizer))[: self.shape.vocab]
        self.engine.set_token_texts(texts + [b""] * (self.shape.vocab - len(texts)))  # ids that pad the vocabulary

    def _check(self, prompts: list[list[int]], sampling: Sampling, n: int) -> None:
        self._state.check()
        if sampling.stop_strings and not self.engine.has_token_texts:
            self._know_tokens()
        check_prompts(prompts, sampling, n, self.shape.context)


def _zeros(sizes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Tensors in one piece of memory, of huge pages where the system has them: every token reads all of it."""
    starts, end = {}, 0
    for name, (size, dtype) in sizes.items():
        starts[name] = end
        end += -(-math.prod(size) * dtype.itemsize // LINE) * LINE
    memory = mmap.mmap(-1, end + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    bytes_ = torch.frombuffer(memory, dtype=torch.uint8)
    first = -bytes_.data_ptr() % HUGE_PAGE
    return {
        name: bytes_[first + starts[name] :][: math.prod(size) * dtype.itemsize].view(dtype).view(size)
        for name, (size, dtype) in sizes.items()
    }


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
        if shape.qkv_bias:
            layout[f"layers.{i}.qkv_bias"] = whole(*(hf + f"self_attn.{c}_proj.bias" for c in "qkv"))
        if shape.qk_norm:
            layout[f"layers.{i}.query_norm"] = whole(hf + "self_attn.q_norm.weight")
            layout[f"layers.{i}.key_norm"] = whole(hf + "self_attn.k_norm.weight")
    return layout
