"""Tile sizes of matrix products for the current device."""

import dataclasses
import functools

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # decided, as by triton.jit, at import


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tile of a matrix product: rows by columns of the result, `depth` of the summed dimension at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def options(self, *names: str) -> dict[str, int]:
        """Launch options of a kernel that calls its rows, columns and depth by these names."""
        sizes = dict(zip(names, (self.rows, self.columns, self.depth), strict=True))
        return {**sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.cache
def device_limits(device: int) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory a block may have."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def choose_tile(dtype: torch.dtype) -> tuple[Tile, int]:
    """Tile of every product, and how many programs the current device runs at once."""
    if INTERPRETED:
        return Tile(32, 64, 32, 4, 1), 4
    multiprocessors, shared = device_limits(triton.runtime.driver.active.get_current_device())
    if dtype == torch.float32:  # exact products, on the scalar units
        return Tile(64, 64, 32, 4, 3), 2 * multiprocessors
    wide = shared >= 200 * 1024  # sm_90 and sm_100: 144 KiB of operands in flight
    return Tile(128, 256 if wide else 128, 64, 8, 3), multiprocessors


@functools.cache
def shares_of(tiles: int, blocks: int, programs: int) -> int:
    """Into how many shares to cut the tiles of each block, so that `programs` at a time finish soonest."""

    def time(shares: int) -> float:  # in tiles; starting a program is taken to cost a quarter
        return triton.cdiv(blocks * shares, programs) * (triton.cdiv(tiles, shares) + 0.25)

    return min(range(1, min(tiles, 4 * programs) + 1), key=time)
