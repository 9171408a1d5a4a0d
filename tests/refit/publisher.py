"""A trainer rank in its own process: `python -m tests.refit.publisher NAME RANK RANKS`, commands on standard input."""

import sys
import time

import torch

from aligner.models.rope import Rope
from aligner.models.shape import ModelShape
from aligner.models.weights import manifest, megatron_entry
from aligner.refit.shared import SharedWeights
from tests.refit.layouts import Model, checkpoint, megatron_rank

MODEL = Model(num_layers=2, hidden=16, ffn=24, heads=4, kv_heads=2, head_dim=4, vocab=53)
SHAPE = ModelShape(
    num_layers=2, hidden=16, ffn=24, heads=4, kv_heads=2, head_dim=4, vocab=53, context=64, rope=Rope(),
    norm_eps=1e-5, tied=True,
)  # fmt: skip


def weights(version: int) -> dict[str, torch.Tensor]:
    """The whole checkpoint after `version` steps."""
    g = torch.Generator().manual_seed(version)
    return {name: torch.randn(t.shape, generator=g) for name, t in checkpoint(MODEL).items()}


class Rank:
    def __init__(self, rank: int, ranks: int):
        self.rank, self.ranks, self.stalls = rank, ranks, -1
        self.step(0)
        entries = [megatron_entry(n, t, MODEL, rank=rank, ranks=ranks) for n, t in self.held.items()]
        self._manifest = manifest(SHAPE.tensors(), entries)

    def step(self, version: int) -> None:
        self.held = megatron_rank(MODEL, weights(version), self.ranks, 1, self.rank, 0, 4)

    def manifest(self) -> dict:
        return self._manifest

    def weights(self, names) -> list[torch.Tensor]:
        self.stalls -= 1
        if self.stalls == 0:
            print("stalled", flush=True)
            time.sleep(600)
        return [self.held[name] for name in names]


def main(name: str, rank: int, ranks: int) -> None:
    source = Rank(rank, ranks)
    shared = SharedWeights(name, source)
    print("ready", flush=True)
    for line in sys.stdin:
        command, version = line.split()
        source.step(int(version))
        source.stalls = 2 if command == "stall" else -1  # the preflight asks first, then the copy
        shared.publish(int(version))
        print("published", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
