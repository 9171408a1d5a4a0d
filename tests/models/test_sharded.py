"""Parameters saved on one parallel layout are the same whole tensors on another."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import nn

from aligner.checkpoint import training
from aligner.models.sharded import sharded

LAYER = "decoder.layers.{}."
SPLIT = {"self_attention.linear_qkv.weight": 0, "mlp.linear_fc1.weight": 0, "mlp.linear_fc1.lora.b": 0}
SPLIT |= {"mlp.linear_fc2.weight": 1, "mlp.linear_fc2.lora.a": 1}
WHOLE = ("input_layernorm.weight", "mlp.linear_fc1.lora.a", "mlp.linear_fc2.lora.b")


def piece(whole: torch.Tensor, name: str, axis: int, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part: of the gate and of the values each, where a layer has both."""
    parts = whole.chunk(2, axis) if "linear_fc1" in name else [whole]
    return torch.cat([part.chunk(ranks, axis)[rank] for part in parts], axis)


def parameters(layers: range, rank: int, ranks: int, scale: float) -> dict[str, nn.Parameter]:
    """Parameters of some layers on tensor rank `rank`; the numbers depend on the whole tensors alone."""
    made = {}
    for layer in layers:
        for i, name in enumerate([*SPLIT, *WHOLE]):
            whole = scale * (torch.arange(8.0 * 8).reshape(8, 8) + 100 * i + 1000 * layer)
            axis = SPLIT.get(name)
            part = whole if axis is None else piece(whole, name, axis, rank, ranks)
            made[LAYER.format(layer) + name] = parameter = nn.Parameter(part)
            if axis is not None:
                set_tensor_model_parallel_attributes(parameter, True, axis, 1)
    return made


def tied(stage: int, scale: float) -> dict[str, nn.Parameter]:
    """The embedding on the first stage, and its copy on the last."""
    parameter = nn.Parameter(scale * torch.arange(12.0).reshape(4, 3))
    parameter.shared = stage > 0
    return {"output_layer.weight" if stage else "embedding.word_embeddings.weight": parameter}


def load_and_check(folder: Path, mine: dict, wanted: dict) -> None:
    loaded = training.load(folder, {"net": sharded(mine.items())})["net"]
    assert loaded.keys() == wanted.keys()
    for name, want in wanted.items():
        assert torch.equal(loaded[name], want.detach()), name


@pytest.mark.slow
def test_tensor_and_pipeline_parallel_and_one_process(tmp_path):
    mp.start_processes(two_processes, args=(tmp_path,), nprocs=2, start_method="forkserver")
    for layout in ("tensor", "pipeline"):
        embedding = {} if layout == "tensor" else tied(0, 1)
        mine, wanted = parameters(range(2), 0, 1, 0), parameters(range(2), 0, 1, 1) | embedding
        load_and_check(training.latest(tmp_path / layout), mine | (tied(0, 0) if embedding else {}), wanted)


def two_processes(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    by_tensor = training.save(folder / "tensor", 1, {"net": sharded(parameters(range(2), rank, 2, 1).items())})
    load_and_check(by_tensor, parameters(range(2), rank, 2, 0), parameters(range(2), rank, 2, 1))
    parallel_state.destroy_model_parallel()

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    stage = range(rank, rank + 1)
    mine = parameters(stage, 0, 1, 1) | tied(rank, 1)
    by_stage = training.save(folder / "pipeline", 1, {"net": sharded(mine.items())})
    load_and_check(by_stage, parameters(stage, 0, 1, 0) | tied(rank, 0), mine)
    both = training.load(by_tensor, {"net": sharded(parameters(stage, 0, 1, 0).items())})["net"]
    assert all(torch.equal(both[name], p.detach()) for name, p in parameters(stage, 0, 1, 1).items())
    dist.barrier()
    dist.destroy_process_group()
