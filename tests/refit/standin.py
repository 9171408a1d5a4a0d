"""A stand-in for TensorRT-LLM's PyTorch backend: its module names, fused storages, reload and control action.

One process; a thread a tensor rank. What follows upstream: names and layouts, `control_action` that waits for all ranks
and for requests to end, without any deadline; `reload` as HfWeightMapper does it. "CUDA graphs" are addresses: a
forward reads what lies there and nothing else.
"""

import ctypes
import math
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from aligner.models.shape import ModelShape
from aligner.refit.extension import RefitExtension

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class UnquantizedLinearMethod:
    """As upstream's is called."""


class FP8BlockScalesLinearMethod:
    """Its weights go with scales."""


class Linear(nn.Module):
    def __init__(self, rows: int, columns: int, *, bias: bool = False, split: str = "rows"):
        super().__init__()
        self.quant_method, self.rebuild_tensor_metadata, self.split = UnquantizedLinearMethod(), {}, split
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(rows), requires_grad=False)


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)


class Table(nn.Module):
    """Embedding or head: ceil(vocab / ranks) rows."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)


def build(s: ModelShape, ranks: int) -> nn.Module:
    """A rank's modules, with random weights as of a dummy load."""
    kv = s.kv_heads * max(1, ranks // s.kv_heads) * s.head_dim // ranks
    queries, ffn, rows = s.heads * s.head_dim // ranks, s.ffn // ranks, math.ceil(s.vocab / ranks)
    layers = []
    for _ in range(s.num_layers):
        attention, mlp, layer = nn.Module(), nn.Module(), nn.Module()
        attention.qkv_proj = Linear(queries + 2 * kv, s.hidden, bias=s.qkv_bias)
        attention.o_proj = Linear(s.hidden, queries, split="columns")
        if s.qk_norm:
            attention.q_norm, attention.k_norm = Norm(s.head_dim), Norm(s.head_dim)
        mlp.gate_up_proj, mlp.down_proj = Linear(2 * ffn, s.hidden), Linear(s.hidden, ffn, split="columns")
        layer.input_layernorm, layer.post_attention_layernorm = Norm(s.hidden), Norm(s.hidden)
        layer.self_attn, layer.mlp = attention, mlp
        layers.append(layer)
    whole, model = nn.Module(), nn.Module()
    model.embed_tokens, model.norm = Table(rows, s.hidden), Norm(s.hidden)
    model.layers = nn.ModuleList(layers)
    for layer, after in zip(layers, [*(layer.input_layernorm for layer in layers[1:]), model.norm], strict=True):
        layer.next_layer_layernorm = after  # an alias, as upstream's fused norms have it
    whole.model, whole.lm_head = model, Table(rows, s.hidden)
    if s.tied:
        whole.lm_head.weight = model.embed_tokens.weight
    for p in whole.parameters():
        p.data.uniform_(-1e-3, 1e-3)
    return whole


class ModelLoader:
    """Loads Hugging Face tensors into a rank's modules, as upstream's reload does: fuse, repeat, cut, copy."""

    def __init__(self, shape: ModelShape, rank: int, ranks: int):
        self.shape, self.rank, self.ranks = shape, rank, ranks

    def reload(self, model: nn.Module, weights: dict[str, Tensor], allow_partial_loading: bool = False) -> None:
        for prefix, module in model.named_modules(remove_duplicate=False):
            name = prefix.rpartition(".")[2]
            if name == "next_layer_layernorm" or (name == "lm_head" and self.shape.tied):
                continue
            for kind, parameter in module.named_parameters(recurse=False):
                names = [prefix.replace(name, part) for part in FUSED.get(name, (name,))]
                given = [weights.get(f"{n}.{kind}") for n in names]
                if all(g is None for g in given) and allow_partial_loading:
                    continue
                cut = torch.cat([self._cut(n.rpartition(".")[2], g, module) for n, g in zip(names, given, strict=True)])
                parameter.data[: len(cut)].copy_(getattr(module, "transform_weights", lambda t: t)(cut))

    def _cut(self, part: str, tensor: Tensor, module: nn.Module) -> Tensor:
        if isinstance(module, Norm):
            return tensor
        if part in ("k_proj", "v_proj") and self.ranks > self.shape.kv_heads:
            heads = tensor.view(self.shape.kv_heads, -1, *tensor.shape[1:])
            tensor = heads.repeat_interleave(self.ranks // self.shape.kv_heads, 0).flatten(0, 1)
        dim = 1 if getattr(module, "split", "rows") == "columns" else 0
        width = math.ceil(tensor.shape[dim] / self.ranks)
        begin = min(self.rank * width, tensor.shape[dim])
        return tensor.narrow(dim, begin, min(width, tensor.shape[dim] - begin))


class Executor:
    """What all ranks' event loops share: requests in flight, and who has come to a control action."""

    def __init__(self, ranks: int):
        self.ranks, self.active, self.came, self.entered, self.left = ranks, 0, 0, 0, 0
        self.changed = threading.Condition()
        self.resets, self.closed = 0, False
        self._stepping, self._hasty = False, set()

    @contextmanager
    def request(self):
        with self.changed:
            self.active += 1
        try:
            yield
        finally:
            with self.changed:
                self.active -= 1
                self.changed.notify_all()

    @contextmanager
    def iteration(self):
        """One of the event loop, when there are requests; a control action has the loop stopped between two of them."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.closed or (self.active and not self._due() and self.left >= self.entered)
            )
            self._stepping = True
        try:
            yield
        finally:
            with self.changed:
                self._stepping = False
                self.changed.notify_all()

    @contextmanager
    def control_action(self, *, drain: bool = True, control_id: int | None = None):
        """All ranks are in it at once, with no request in flight if drained; upstream has no deadline here."""
        with self.changed:
            together = (self.came // self.ranks + 1) * self.ranks  # how many have come once all of this action have
            self.came += 1
            if not drain:
                self._hasty.add(together)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.closed or self._entered(together))
            self._expect_open()
        try:
            yield
        finally:
            with self.changed:
                self.left += 1
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.closed or self.left >= together)

    def _due(self) -> bool:
        """Whether the next action may begin as soon as the loop stands."""
        together = self.entered + self.ranks
        return self.came >= together and self.left >= self.entered and (together in self._hasty or not self.active)

    def _entered(self, together: int) -> bool:
        if self._due() and not self._stepping:
            self.entered += self.ranks
        return self.entered >= together

    def _expect_open(self) -> None:
        if self.closed:
            raise RuntimeError("the engine was shut down")

    def close(self) -> None:
        """Who waits, is let go."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def reset_prefix_cache(self) -> None:
        with self.changed:
            self.resets += 1


class BaseWorker:
    """A rank's worker, before an extension is mixed in."""

    def __init__(self, shape: ModelShape, executor: Executor, rank: int, ranks: int):
        self.model, self.executor = build(shape, ranks), executor
        loader = ModelLoader(shape, rank, ranks)
        mapping = SimpleNamespace(tp_rank=rank, tp_size=ranks)
        model_engine = SimpleNamespace(model=self.model, model_loader=loader, mapping=mapping)
        self.engine = SimpleNamespace(
            control_action=executor.control_action,
            reset_prefix_cache=executor.reset_prefix_cache,
            model_engine=model_engine,
        )
        held = dict(self.model.named_parameters(remove_duplicate=False))
        self.graph = {name: (p.data_ptr(), p.shape) for name, p in held.items()}
        self._allocated = [p.detach() for p in held.values()]  # a graph's memory outlives the parameter that was in it

    def captured(self, name: str) -> Tensor:
        """The memory that a captured graph reads, whatever the parameter is by now."""
        address, shape = self.graph[name]
        buffer = (ctypes.c_float * math.prod(shape)).from_address(address)
        return torch.frombuffer(buffer, dtype=torch.float32).view(shape)

    def read(self, name: str) -> Tensor:
        """What a captured graph would read now."""
        return self.captured(name).clone()


class Worker(BaseWorker, RefitExtension):
    """A rank's worker with the extension mixed in."""


class Actor:
    """Calls of one rank, one after the other, as Ray's actors take them: a call that waits has the next ones wait."""

    def __init__(self):
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, call: Callable, *arguments, **named) -> Future:
        future = Future()
        self._calls.put((future, call, arguments, named))
        return future

    def _run(self) -> None:
        while True:
            future, call, arguments, named = self._calls.get()
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(call(*arguments, **named))
            except BaseException as error:
                future.set_exception(error)
            del future, call, arguments, named  # or the last one would be kept until the next comes


class Engine:
    """All ranks, called as AsyncLLM.collective_rpc calls them."""

    def __init__(self, shape: ModelShape, ranks: int):
        self.shape, self.executor = shape, Executor(ranks)
        self.workers = [Worker(shape, self.executor, rank, ranks) for rank in range(ranks)]
        self.actors = [Actor() for _ in range(ranks)]

    def rpc(self, method: str, *arguments, **named) -> list[Future]:
        """A future of each rank's answer."""
        pairs = zip(self.actors, self.workers, strict=True)
        return [actor.submit(getattr(worker, method), *arguments, **named) for actor, worker in pairs]

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(T, vocab) of one sequence, by what the captured addresses hold, ranks added up."""
        s, ranks = self.shape, len(self.workers)
        with self.executor.request():
            held = [{name: worker.read(name) for name in worker.graph} for worker in self.workers]
        rows = torch.cat([h["model.embed_tokens.weight"] for h in held])
        x = rows[tokens]
        angles = torch.arange(len(tokens))[:, None] * s.rope.frequencies(s.head_dim)
        cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
        q_heads, kv_heads = s.heads // ranks, max(1, s.kv_heads // ranks)
        for i in range(s.num_layers):
            at = f"model.layers.{i}."
            y = _norm(x, held[0][at + "input_layernorm.weight"], s.norm_eps)
            for h in held:
                qkv = y @ h[at + "self_attn.qkv_proj.weight"].T + h.get(at + "self_attn.qkv_proj.bias", 0)
                q, k, v = qkv.view(len(tokens), -1, s.head_dim).split([q_heads, kv_heads, kv_heads], 1)
                if s.qk_norm:
                    q = _norm(q, h[at + "self_attn.q_norm.weight"], s.norm_eps)
                    k = _norm(k, h[at + "self_attn.k_norm.weight"], s.norm_eps)
                q, k = (z * cos + _turned(z) * sin for z in (q, k))
                k, v = (z.repeat_interleave(q_heads // kv_heads, 1).transpose(0, 1) for z in (k, v))
                out = nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True)
                x = x + out.transpose(0, 1).flatten(1) @ h[at + "self_attn.o_proj.weight"].T
            y = _norm(x, held[0][at + "post_attention_layernorm.weight"], s.norm_eps)
            for h in held:
                gate, up = (y @ h[at + "mlp.gate_up_proj.weight"].T).chunk(2, 1)
                x = x + (nn.functional.silu(gate) * up) @ h[at + "mlp.down_proj.weight"].T
        y = _norm(x, held[0]["model.norm.weight"], s.norm_eps)
        return torch.cat([y @ h["lm_head.weight"].T for h in held], 1)[:, : s.vocab]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _turned(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)
