"""One of four ranks that import and export together: the other half of test_export.py."""

import os
import resource
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from aligner.checkpoint import huggingface
from aligner.checkpoint.huggingface import Weights, write
from aligner.models.low_rank import LowRank
from aligner.models.rope import Rope
from aligner.models.shape import ModelShape
from aligner.models.weights import export, fill, megatron_entry
from tests.refit.layouts import PADDING, Model, megatron_rank

LAYOUTS = {"tp2-pp2": (2, 2), "tp4": (4, 1), "pp4": (1, 4), "tp2-dp2": (2, 1)}
DTYPES = {"llama": torch.float32, "llama-tied": torch.bfloat16, "qwen2-tied": torch.float32, "qwen3": torch.float16}
SHARD_BYTES = 200_000
LARGE = ModelShape(
    num_layers=12, hidden=512, ffn=2048, heads=8, kv_heads=8, head_dim=64, vocab=4096, context=64, rope=Rope(),
    norm_eps=1e-5, tied=True,
)  # fmt: skip
LARGE_SHARD_BYTES = 50_000_000
LAYER_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 2048)
LARGEST_BYTES = 4 * 4096 * 512
SLACK = 8 << 20  # bytes; the allocator's own, sockets


def as_model(shape: ModelShape) -> Model:
    return Model(
        num_layers=shape.num_layers, hidden=shape.hidden, ffn=shape.ffn, heads=shape.heads, kv_heads=shape.kv_heads,
        head_dim=shape.head_dim, vocab=shape.vocab, tied=shape.tied, bias=shape.qkv_bias, qk_norm=shape.qk_norm,
    )  # fmt: skip


class Part:
    """What one rank of a layout holds of a model, cut by slicing, and its entries."""

    def __init__(self, shape: ModelShape, full: dict[str, Tensor], rank: int = 0, tp: int = 1, pp: int = 1):
        m, (stage, tensor_rank) = as_model(shape), divmod(rank % (tp * pp), tp)
        self.held = megatron_rank(m, full, tp, pp, tensor_rank, stage, 4)
        first = stage * (m.num_layers // pp)
        self.entries = [
            megatron_entry(name, t, shape, rank=tensor_rank, ranks=tp, first_layer=first)
            for name, t in self.held.items()
        ]
        self.asked: list[str] = []

    def read(self, name: str) -> Tensor:
        self.asked.append(name)
        return self.held[name]


def round_trip(rank: int, folder: Path, name: str, layout: str) -> None:
    """What is imported is what slicing gives, and rank 0, which alone knows where, writes it again."""
    shape, (tp, pp) = ModelShape.from_folder(folder / name), LAYOUTS[layout]
    truth = Part(shape, load_file(folder / name / "model.safetensors"), rank, tp, pp)
    part = Part(shape, {n: torch.full(s, PADDING) for n, s in shape.tensors().items()}, rank, tp, pp)
    fill(part.entries, part.held, Weights(folder / name, shape.tensors()))
    assert all(torch.equal(part.held[n], t) for n, t in truth.held.items())
    out, like = (folder / f"{name}-{layout}", folder / name) if rank == 0 else (Path("/dev/null/x"), Path("/dev/null"))
    write(out, export(part.entries, part.read, shape, dtype=DTYPES[name]), like, max_shard_bytes=SHARD_BYTES)
    assert (part.asked == []) == (layout == "tp2-dp2" and rank >= 2)  # replicas give nothing
    if layout == "pp4" and shape.tied and rank == 3:
        assert "output_layer.weight" in part.held and "output_layer.weight" not in part.asked


def adapters(rank: int, folder: Path, name: str) -> None:
    """Shards of the factors merge to what the whole factors do, B cut with rows and A with columns."""
    shape, g, r = ModelShape.from_folder(folder / name), torch.Generator().manual_seed(0), 3
    full = load_file(folder / name / "model.safetensors")
    cut, whole, truth = dict(full), {}, dict(full)
    for i in range(shape.num_layers):
        for linear, parts in {
            "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attention.linear_proj": ("self_attn.o_proj",),
            "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.linear_fc2": ("mlp.down_proj",),
        }.items():
            names = [f"model.layers.{i}.{part}.weight" for part in parts]
            bs = [torch.randn(full[n].shape[0], r, generator=g) for n in names]
            a = torch.randn(r, full[names[0]].shape[1], generator=g)
            by_rows = len(parts) > 1
            cut |= dict(zip(names, bs if by_rows else [a], strict=True))
            whole[i, linear] = a if by_rows else bs[0]
            truth |= {n: full[n].double() + 0.5 * b.double() @ a.double() for n, b in zip(names, bs, strict=True)}
    tp, pp = LAYOUTS["tp2-pp2"]
    part, factors = Part(shape, full, rank, tp, pp), Part(shape, cut, rank, tp, pp).held

    def read(name: str) -> Tensor | LowRank:
        base, linear = part.held[name], name.removesuffix(".weight").split(".", 3)[-1]
        if "linear_" not in name or not name.endswith("weight"):
            return base
        other = whole[int(name.split(".")[2]) + rank // tp * (shape.num_layers // pp), linear]
        b, a = (factors[name], other) if linear.endswith(("qkv", "fc1")) else (other, factors[name])
        return LowRank(base, b, a, 0.5)

    seen = 0
    for name, tensor in export(part.entries, read, shape):
        torch.testing.assert_close(tensor.double(), truth[name].double(), rtol=0, atol=2e-6)
        seen += 1
    assert seen == (len(shape.tensors()) if rank == 0 else 0)


def full_disk(rank: int, folder: Path, name: str) -> None:
    """Rank 0 cannot write its second file: every rank raises the same error, and the group still works."""
    shape = ModelShape.from_folder(folder / name)
    part = Part(shape, load_file(folder / name / "model.safetensors"), rank, *LAYOUTS["tp2-pp2"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, limits[1]))
    with pytest.raises(OSError, match="could not be written.*free some disk space") as error:
        write(folder / "full", export(part.entries, part.read, shape), folder / name, max_shard_bytes=SHARD_BYTES)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    words: list = [None] * 4
    dist.all_gather_object(words, str(error.value))
    assert len(set(words)) == 1 and not any("full" in path.name for path in folder.iterdir())
    assert len(list(export(part.entries, part.read, shape))) == (len(shape.tensors()) if rank == 0 else 0)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watched:
    """Weights, and the most resident memory that was seen while a window was held."""

    def __init__(self, weights: Weights):
        self.weights, self.peak = weights, 0

    def window(self, *box) -> Tensor:
        tensor = self.weights.window(*box)
        tensor.sum()  # touches the pages of a mapped file
        self.peak = max(self.peak, resident())
        return tensor


def memory(rank: int, folder: Path) -> None:
    """Export holds one file's tensors and one more; import one file's mapped pages, or less, and one layer."""
    full = {name: torch.zeros(size) for name, size in LARGE.tensors().items()}
    total = sum(t.nbytes for t in full.values())
    part = Part(LARGE, full) if rank == 3 else None  # the others hold nothing
    before, peaks = resident(), [0]

    def watched():
        for name, tensor in export(part.entries if part else [], part and part.read, LARGE):
            tensor.fill_(len(name))
            peaks.append(resident())
            yield name, tensor

    like = folder / "llama"
    write(folder / "large", watched(), like, max_shard_bytes=LARGE_SHARD_BYTES)
    assert max(peaks) - before < LARGE_SHARD_BYTES + LARGEST_BYTES + SLACK < total / 2
    del full
    part = Part(LARGE, {name: torch.zeros(size) for name, size in LARGE.tensors().items()}, rank, 4, 1)
    for tensor in part.held.values():
        tensor.fill_(1)
    before, weights = resident(), Watched(Weights(folder / "large", LARGE.tensors()))
    fill(part.entries, part.held, weights)
    assert weights.peak - before < LARGE_SHARD_BYTES + LAYER_BYTES + SLACK < total / 2
    huggingface.MAPPED_BYTES = 10 << 20  # of this process, which ends with the test
    before, weights = resident(), Watched(Weights(folder / "large", LARGE.tensors()))
    for name, size in LARGE.tensors().items():
        weights.window(name, [0] * len(size), size)
    assert weights.peak - before < huggingface.MAPPED_BYTES + LARGEST_BYTES + SLACK < LARGE_SHARD_BYTES


def lost_rank(rank: int, folder: Path, name: str) -> None:
    """A rank that fails ends the others too: nobody waits for it."""
    shape = ModelShape.from_folder(folder / name)
    part = Part(shape, load_file(folder / name / "model.safetensors"), rank, *LAYOUTS["tp2-pp2"])

    def read(parameter: str) -> Tensor:
        if rank == 1 and "layers.1.mlp" in parameter:
            raise RuntimeError("rank 1 fails")
        return part.read(parameter)

    with pytest.raises(RuntimeError, match="rank 1 fails" if rank == 1 else "onnection closed|onnection reset"):
        write(folder / "lost", export(part.entries, read, shape), folder / name)
    assert not any("lost" in path.name for path in folder.iterdir()) or rank


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store, soon = f"file://{folder}/rendezvous", timedelta(minutes=5)  # ranks that wait for each other fail
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4, timeout=soon)
    for name in DTYPES:
        for layout in LAYOUTS:
            round_trip(rank, folder, name, layout)
    adapters(rank, folder, "qwen2-tied")
    full_disk(rank, folder, "llama")
    memory(rank, folder)
    lost_rank(rank, folder, "llama")
