"""The copies of a refit of SmolLM2-135M, in one call, against this machine's copy rate and torch's copy_ one by one.

The copy rate is that of one large contiguous copy of the same bytes by torch, which uses every thread.
"""

import harness
import torch

from aligner import ops

H, F, KV, LAYERS, V = 576, 1536, 192, 30, 49152
LAYER = [(H, H), (KV, H), (KV, H), (H, H), (F, H), (F, H), (H, F), (H,), (H,)]


def inputs(dtype, layers):
    def make(small: bool):
        shapes = LAYER if small else LAYER * layers + [(V * layers // LAYERS, H), (H,)]
        sources = [torch.randn(shape) for shape in shapes]
        return sources, [torch.zeros(shape, dtype=dtype) for shape in shapes]

    return make


def one_by_one(sources, destinations):
    for s, d in zip(sources, destinations, strict=True):
        d.copy_(s)


_flat = {}


def contiguous(sources, destinations):
    """As many bytes in one piece, float32: what the memory can do."""
    moved = sum(s.nbytes for s in sources) + sum(d.nbytes for d in destinations)
    if moved not in _flat:
        _flat.clear()
        _flat[moved] = (torch.ones(moved // 8), torch.zeros(moved // 8))
    _flat[moved][1].copy_(_flat[moved][0])


def refit(checksum):
    return lambda sources, destinations: ops.refit_copy(sources, destinations, checksum=checksum, impl=harness.COMPILED)


if __name__ == "__main__":
    cases = []
    for dtype, layers in ((torch.float32, 8), (torch.float32, 16), (torch.float32, 30), (torch.bfloat16, 30)):
        elements = layers * sum(torch.Size(s).numel() for s in LAYER) + V * layers // LAYERS * H + H
        cases.append(
            harness.Case(
                shape=f"SmolLM2 {layers} layers, {elements} elements",
                dtype=f"float32 to {str(dtype).removeprefix('torch.')}",
                inputs=inputs(dtype, layers),
                subjects={
                    harness.COMPILED: refit(False),
                    harness.COMPILED + "-checksum": refit(True),
                    "torch-one-by-one": one_by_one,
                    "contiguous-copy": contiguous,
                },
                bytes=elements * (4 + dtype.itemsize),
            )
        )
    harness.main("refit_copy", cases)
