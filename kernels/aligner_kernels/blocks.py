"""Blocks of matrices, for kernels whose programs own one block of the result each."""

import triton
import triton.language as tl

GROUP = tl.constexpr(8)  # blocks of rows that are in the cache together


@triton.jit
def halves(tile):
    """Left and right half of the columns: what follows a product is done to one after the other, in few registers."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def block_of(pid, size_0, size_1):
    """Block of a grid of size_0 by size_1 blocks, in an order that keeps neighbours in the cache."""
    return tl.swizzle2d(pid // size_1, pid % size_1, size_0, size_1, GROUP)


@triton.jit
def block_at(matrix, stride, rows, columns, i, j, shape_0: tl.constexpr, shape_1: tl.constexpr):
    """Pointers to block (i, j) of a matrix, and which of them are inside it."""
    row = i * shape_0 + tl.arange(0, shape_0)[:, None]
    column = j * shape_1 + tl.arange(0, shape_1)[None, :]
    return matrix + row.to(tl.int64) * stride + column, (row < rows) & (column < columns)


@triton.jit
def store_block(matrix, stride, rows, columns, i, j, block):
    at, mask = block_at(matrix, stride, rows, columns, i, j, block.shape[0], block.shape[1])
    tl.store(at, block.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def add_block(matrix, stride, rows, columns, i, j, block):
    at, mask = block_at(matrix, stride, rows, columns, i, j, block.shape[0], block.shape[1])
    tl.store(at, tl.load(at, mask=mask, other=0.0) + block, mask=mask)
