"""The sampler's matrix product against the libraries that torch brings: `python benchmarks/bench_engine_matmul.py`.

All linear layers of SmolLM2-135M without the head, one after another: x (rows, depth) float32 times weights as they lie
in a checkpoint. `torch` is its sgemm (MKL or OpenBLAS) in float32 and oneDNN in bfloat16; the latter rounds x to
bfloat16 too, the sampler's product does not.
"""

import harness
import torch
from aligner._engine import matmul

LAYERS = 30
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # outputs, depth


def inputs(rows: int, dtype: torch.dtype):
    def make(small: bool):
        layers = 1 if small else LAYERS
        weights = [torch.randn(size).to(dtype) for _ in range(layers) for size in SHAPES]
        x = {depth: torch.randn(rows, depth) for _, depth in SHAPES}
        y = {outputs: torch.empty(rows, outputs) for outputs, _ in SHAPES}
        return weights, x, y

    return make


def native(weights, x, y):
    for w in weights:
        matmul(x[w.shape[1]], w, y[w.shape[0]])


def with_torch(weights, x, y):
    for w in weights:
        if w.dtype == torch.float32:
            torch.mm(x[w.shape[1]], w.T, out=y[w.shape[0]])
        else:
            y[w.shape[0]].copy_(torch.mm(x[w.shape[1]].to(w.dtype), w.T))


if __name__ == "__main__":
    parameters = LAYERS * sum(o * d for o, d in SHAPES)
    cases = [
        harness.Case(
            shape=f"rows {rows}",
            dtype=str(dtype).removeprefix("torch."),
            inputs=inputs(rows, dtype),
            subjects={"cpp": native, "torch": with_torch},
            bytes=parameters * dtype.itemsize,
            flops=2.0 * rows * parameters,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for rows in (1, 2, 4, 8, 16, 32, 64, 256)
    ]
    harness.main("engine_matmul", cases)
