"""Log-probability and entropy of logits = hidden weight^T on the GPU: the logits are made a tile at a time, twice.

Forward. One program takes a block of active rows and a share of the vocabulary, walks the share a tile at a time and
keeps, for each row, the largest logit, sum e^z, sum e^z z and the target's logit. A small second kernel merges the
shares: with few rows it is the shares that fill the GPU.

Backward. For as many columns of the vocabulary at a time as fit a bounded scratch, one kernel makes their d_logits (in
the dtype of hidden), one multiplies them by hidden into their rows of d_weight, one by weight into d_hidden, summed in
float32. Every output has one writer, so a result is the same every time. Two kernels that kept d_logits in registers
would make the logits once more (8 A V H flops) and move their (block, H) sums through memory for every tile.

With A active rows, V rows of weight, width H and s bytes an element, each matrix read once, as caches nearly allow:
    forward   2 A V H flops; s (A + V) H bytes
    backward  6 A V H flops; s (2 A + 3 V) H + 3 s A V bytes, and 8 A H for each chunk of columns
The 3 s A V bytes are d_logits, written once and read twice, a chunk at a time: 2 H / s flops for each of them.
"""

# Shapes in comments: N packed tokens, A active rows, V vocabulary (of this rank's shard), H hidden.

import torch
import triton
import triton.language as tl
from torch import Tensor

from aligner_kernels.blocks import add_block, block_of, halves, store_block
from aligner_kernels.softmax import exp_or_zero, merge
from aligner_kernels.tiles import choose_tile, shares_of

DTYPES = (torch.float32, torch.bfloat16)
SCRATCH = 2**26  # elements of d_logits held at a time,
MIN_COLUMNS = 4096  # but at least so many columns, or adding to d_hidden in memory would cost more than the products


@triton.jit
def logits_tile(hidden, weight, row, column, width, hidden_stride, weight_stride, BLOCK_H: tl.constexpr):
    """hidden[row] @ weight[column]^T in float32."""
    hidden_rows = hidden + row[:, None].to(tl.int64) * hidden_stride
    weight_rows = weight + column[:, None].to(tl.int64) * weight_stride
    logits = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, width, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)[None, :]
        x = tl.load(hidden_rows + h, mask=h < width, other=0.0)
        w = tl.load(weight_rows + h, mask=h < width, other=0.0)
        logits = tl.dot(x, tl.trans(w), logits, input_precision="ieee")
    return logits


@triton.jit
def add_tile(largest, total, weighted, at_target, x, first, target, vocabulary, inverse_temperature):
    """Statistics of rows after the logits x of columns from `first` on."""
    v = first + tl.arange(0, x.shape[1])[None, :]
    x = tl.where(v < vocabulary, x, float("-inf"))
    at_target += tl.sum(tl.where(v == target[:, None], x, 0.0), 1)
    tile_max = tl.max(x, 1)
    finite = tl.where(tile_max == float("-inf"), 0.0, tile_max)
    e, z = exp_or_zero((x - finite[:, None]) * inverse_temperature)
    largest, total, weighted = merge(
        largest, total, weighted, tile_max, tl.sum(e, 1), tl.sum(e * z, 1), inverse_temperature
    )
    return largest, total, weighted, at_target


@triton.jit(do_not_specialize=["active", "vocabulary", "vocab_start", "columns"])
def linear_logprobs_statistics(
    hidden,  # [N, H]
    weight,  # [V, H]
    rows,  # [A] int64, which rows of hidden take part
    targets,  # [N] int64, of the whole vocabulary
    partial,  # [4, shares, A] float32 out: max, sum, weighted, the target's logit if it is in the share
    active,
    vocabulary,
    width,
    hidden_stride,
    weight_stride,
    vocab_start,
    columns,  # of the vocabulary in a share, a multiple of BLOCK_V
    inverse_temperature,
    BLOCK_A: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    row = tl.load(rows + tl.minimum(a, active - 1))  # past the last, once more the last
    target = tl.load(targets + row) - vocab_start
    largest = tl.full([BLOCK_A], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32)
    weighted = tl.zeros([BLOCK_A], tl.float32)
    at_target = tl.zeros([BLOCK_A], tl.float32)
    first = tl.program_id(1) * columns
    for start in range(first, tl.minimum(first + columns, vocabulary), BLOCK_V):
        column = tl.minimum(start + tl.arange(0, BLOCK_V), vocabulary - 1)
        x = logits_tile(hidden, weight, row, column, width, hidden_stride, weight_stride, BLOCK_H)
        left, right = halves(x)
        largest, total, weighted, at_target = add_tile(
            largest, total, weighted, at_target, left, start, target, vocabulary, inverse_temperature
        )
        largest, total, weighted, at_target = add_tile(
            largest, total, weighted, at_target, right, start + BLOCK_V // 2, target, vocabulary, inverse_temperature
        )
    size = tl.num_programs(1).to(tl.int64) * active
    out = partial + tl.program_id(1).to(tl.int64) * active + a
    tl.store(out, largest, mask=a < active)
    tl.store(out + size, total, mask=a < active)
    tl.store(out + 2 * size, weighted, mask=a < active)
    tl.store(out + 3 * size, at_target, mask=a < active)


@triton.jit(do_not_specialize=["active", "shares", "vocabulary", "vocab_start", "vocab_size"])
def linear_logprobs_merge(
    partial,  # [4, shares, A]
    rows,  # [A]
    targets,  # [N]
    logprobs,  # [N] out at rows, and so are the three below
    entropy,
    maximum,
    log_sum,
    active,
    shares,
    vocabulary,
    vocab_start,
    vocab_size,
    inverse_temperature,
    BLOCK_A: tl.constexpr,
):
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = a < active
    row = tl.load(rows + a, mask=mask, other=0)
    token = tl.load(targets + row)
    target = token - vocab_start
    size = active.to(tl.int64) * shares
    largest = tl.full([BLOCK_A], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32)
    weighted = tl.zeros([BLOCK_A], tl.float32)
    at_target = tl.zeros([BLOCK_A], tl.float32)
    at = partial + a
    for _ in range(0, shares):
        share_max = tl.load(at, mask=mask, other=0.0)
        share_sum = tl.load(at + size, mask=mask, other=1.0)
        share_weighted = tl.load(at + 2 * size, mask=mask, other=0.0)
        at_target += tl.load(at + 3 * size, mask=mask, other=0.0)
        largest, total, weighted = merge(
            largest, total, weighted, share_max, share_sum, share_weighted, inverse_temperature
        )
        at += active
    log_total = tl.log(total)
    here = (target >= 0) & (target < vocabulary)
    logprob = tl.where(here, (at_target - largest) * inverse_temperature - log_total, 0.0)
    logprob = tl.where((token >= 0) & (token < vocab_size), logprob, float("nan"))
    tl.store(logprobs + row, logprob, mask=mask)
    tl.store(entropy + row, log_total - weighted / total, mask=mask)
    tl.store(maximum + row, largest, mask=mask)
    tl.store(log_sum + row, log_total, mask=mask)


@triton.jit
def d_tile(x, first, target, maximum, log_sum, entropy, g, g_entropy, inverse_temperature):
    """d loss / d logits of columns from `first` on, from the logits x; everything else is per row."""
    v = first + tl.arange(0, x.shape[1])[None, :]
    p, z = exp_or_zero((x - maximum[:, None]) * inverse_temperature - log_sum[:, None])
    d = tl.where(v == target[:, None], g[:, None], 0.0) - p * (g[:, None] + g_entropy[:, None] * (z + entropy[:, None]))
    return inverse_temperature * d


@triton.jit(do_not_specialize=["active", "count", "chunk_start"])
def linear_logprobs_d_logits(
    hidden,  # [A, H]
    weight,  # [count, H], a chunk of the vocabulary
    targets,  # [A]
    maximum,  # [A], of the whole vocabulary, and so are the two below
    log_sum,
    entropy,
    d_logprobs,  # [A]
    d_entropy,  # [A]
    d_logits,  # [A, scratch_stride] out
    active,
    count,
    width,
    hidden_stride,
    weight_stride,
    scratch_stride,
    chunk_start,  # token id of the chunk's first row
    inverse_temperature,
    BLOCK_A: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i, j = block_of(tl.program_id(0), tl.cdiv(active, BLOCK_A), tl.cdiv(count, BLOCK_V))
    row = tl.minimum(i * BLOCK_A + tl.arange(0, BLOCK_A), active - 1)
    column = tl.minimum(j * BLOCK_V + tl.arange(0, BLOCK_V), count - 1)
    left, right = halves(logits_tile(hidden, weight, row, column, width, hidden_stride, weight_stride, BLOCK_H))
    target = tl.load(targets + row) - chunk_start
    m, s, e = tl.load(maximum + row), tl.load(log_sum + row), tl.load(entropy + row)
    g, g_e = tl.load(d_logprobs + row), tl.load(d_entropy + row)
    left = d_tile(left, j * BLOCK_V, target, m, s, e, g, g_e, inverse_temperature)
    store_block(d_logits, scratch_stride, active, count, i, 2 * j, left)
    right = d_tile(right, j * BLOCK_V + BLOCK_V // 2, target, m, s, e, g, g_e, inverse_temperature)
    store_block(d_logits, scratch_stride, active, count, i, 2 * j + 1, right)


@triton.jit(do_not_specialize=["active", "count"])
def linear_logprobs_d_weight(
    d_logits,  # [A, scratch_stride]
    hidden,  # [A, H]
    d_weight,  # [count, H] out
    active,
    count,
    width,
    hidden_stride,
    scratch_stride,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    i, j = block_of(tl.program_id(0), tl.cdiv(count, BLOCK_V), tl.cdiv(width, BLOCK_H))
    v = i * BLOCK_V + tl.arange(0, BLOCK_V)
    h = j * BLOCK_H + tl.arange(0, BLOCK_H)
    a = tl.arange(0, BLOCK_A)
    d_at = d_logits + a[:, None].to(tl.int64) * scratch_stride + v[None, :]
    x_at = hidden + a[:, None].to(tl.int64) * hidden_stride + h[None, :]
    total = tl.zeros([BLOCK_V, BLOCK_H], tl.float32)
    for start in range(0, active, BLOCK_A):
        d = tl.load(d_at, mask=(a < active - start)[:, None] & (v < count)[None, :], other=0.0)
        x = tl.load(x_at, mask=(a < active - start)[:, None] & (h < width)[None, :], other=0.0)
        total = tl.dot(tl.trans(d), x, total, input_precision="ieee")
        d_at += BLOCK_A * tl.cast(scratch_stride, tl.int64)
        x_at += BLOCK_A * tl.cast(hidden_stride, tl.int64)
    store_block(d_weight, width, count, width, i, j, total)


@triton.jit(do_not_specialize=["active", "count"])
def linear_logprobs_d_hidden(
    d_logits,  # [A, scratch_stride]
    weight,  # [count, H]
    d_hidden,  # [A, H] float32, added to
    active,
    count,
    width,
    weight_stride,
    scratch_stride,
    BLOCK_A: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i, j = block_of(tl.program_id(0), tl.cdiv(active, BLOCK_A), tl.cdiv(width, BLOCK_H))
    a = i * BLOCK_A + tl.arange(0, BLOCK_A)
    h = j * BLOCK_H + tl.arange(0, BLOCK_H)
    v = tl.arange(0, BLOCK_V)
    d_at = d_logits + a[:, None].to(tl.int64) * scratch_stride + v[None, :]
    w_at = weight + v[:, None].to(tl.int64) * weight_stride + h[None, :]
    total = tl.zeros([BLOCK_A, BLOCK_H], tl.float32)
    for start in range(0, count, BLOCK_V):
        d = tl.load(d_at, mask=(a < active)[:, None] & (v < count - start)[None, :], other=0.0)
        w = tl.load(w_at, mask=(v < count - start)[:, None] & (h < width)[None, :], other=0.0)
        total = tl.dot(d, w, total, input_precision="ieee")
        d_at += BLOCK_V
        w_at += BLOCK_V * tl.cast(weight_stride, tl.int64)
    left, right = halves(total)
    add_block(d_hidden, width, active, width, i, 2 * j, left)
    add_block(d_hidden, width, active, width, i, 2 * j + 1, right)


def checked(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None) -> list[Tensor]:
    """hidden and weight with the elements of a row side by side, and targets; RuntimeError for shapes and dtypes."""

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise RuntimeError(f"linear_logprobs: {what}")

    require(hidden.dim() == weight.dim() == 2, "hidden and weight must have 2 dimensions")
    require(hidden.dtype == weight.dtype, f"hidden and weight must have one dtype, got {hidden.dtype}, {weight.dtype}")
    require(hidden.dtype in DTYPES, f"hidden must be float32 or bfloat16, got {hidden.dtype}")
    require(hidden.shape[1] == weight.shape[1], f"hidden is {[*hidden.shape]} but weight is {[*weight.shape]}")
    rows = hidden.shape[:1]
    require(targets.shape == rows and targets.dtype == torch.int64, f"targets must be int64 of shape {[*rows]}")
    require(mask is None or (mask.shape == rows and mask.dtype == torch.bool), f"mask must be bool of shape {[*rows]}")
    for name, x in (("weight", weight), ("targets", targets), ("mask", mask)):
        require(x is None or x.device == hidden.device, f"{name} must be on {hidden.device}, as hidden is")
    return [x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight)] + [targets.contiguous()]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    vocab_start: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the torch operator aligner::linear_logprobs does: (logprobs, entropy, max, log_sum), each [N] float32.

    Rows that mask leaves out are not read and give 0; so does the log-probability of a target of another shard. That of
    a target outside [0, vocab_size) is NaN, for which no host has to wait.
    """
    hidden, weight, targets = checked(hidden, weight, targets, mask)
    outputs = [hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(4)]
    rows = torch.arange(len(hidden), device=hidden.device) if mask is None else mask.nonzero().squeeze(1)
    active, (vocabulary, width) = len(rows), weight.shape
    if active == 0:
        return tuple(outputs)
    tile, programs = choose_tile(hidden.dtype)
    blocks, tiles = triton.cdiv(active, tile.rows), triton.cdiv(vocabulary, tile.columns)
    columns = triton.cdiv(tiles, shares_of(tiles, blocks, programs)) * tile.columns
    shares = triton.cdiv(vocabulary, columns)
    partial = hidden.new_empty((4, shares, active), dtype=torch.float32)
    sizes = (vocabulary, width, hidden.stride(0), weight.stride(0), vocab_start, columns)
    linear_logprobs_statistics[blocks, shares](
        *(hidden, weight, rows, targets, partial, active, *sizes, 1 / temperature),
        **tile.options("BLOCK_A", "BLOCK_V", "BLOCK_H"),
    )
    linear_logprobs_merge[(triton.cdiv(active, 128),)](
        *(partial, rows, targets, *outputs, active, shares, vocabulary, vocab_start, vocab_size, 1 / temperature),
        BLOCK_A=128,
    )
    return tuple(outputs)


def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    vocab_start: int,
    vocab_size: int,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """What aligner::linear_logprobs_backward does: (d_hidden, d_weight), with 0 rows when not needed.

    maximum, log_sum, entropy: of the whole vocabulary. Rows without upstream gradient are not read and give 0.
    """
    hidden, weight, targets = checked(hidden, weight, targets, mask)
    g, g_entropy = (torch.zeros_like(maximum) if d is None else d for d in (d_logprobs, d_entropy))
    keep = (g != 0) | (g_entropy != 0)
    rows = (keep if mask is None else keep & mask).nonzero().squeeze(1)
    active, (vocabulary, width) = len(rows), weight.shape
    d_hidden = hidden.new_zeros((len(hidden) if need_hidden else 0, width))
    d_weight = weight.new_empty((vocabulary if need_weight else 0, width))
    if active == 0:
        return d_hidden, d_weight.zero_()
    inputs = [hidden, targets, maximum, log_sum, entropy, g, g_entropy]
    hidden, *of_row = [x if active == len(x) else x.index_select(0, rows) for x in inputs]
    of_row = [x.contiguous() for x in of_row]
    tile, _ = choose_tile(hidden.dtype)
    total = hidden.new_zeros((active, width), dtype=torch.float32) if need_hidden else None
    columns = min(max(SCRATCH // active // 256 * 256, MIN_COLUMNS), triton.cdiv(vocabulary, 256) * 256)
    d_logits = hidden.new_empty((active, columns))

    def grid(rows: int, columns: int) -> tuple[int]:
        return (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)

    for start in range(0, vocabulary, columns):
        chunk = weight[start : start + columns]
        count, hidden_stride, weight_stride = len(chunk), hidden.stride(0), chunk.stride(0)
        linear_logprobs_d_logits[grid(active, count)](
            *(hidden, chunk, *of_row, d_logits, active, count, width, hidden_stride, weight_stride, columns),
            *(vocab_start + start, 1 / temperature),
            **tile.options("BLOCK_A", "BLOCK_V", "BLOCK_H"),
        )
        if need_weight:
            linear_logprobs_d_weight[grid(count, width)](
                *(d_logits, hidden, d_weight[start:], active, count, width, hidden_stride, columns),
                **tile.options("BLOCK_V", "BLOCK_H", "BLOCK_A"),
            )
        if need_hidden:
            linear_logprobs_d_hidden[grid(active, width)](
                *(d_logits, chunk, total, active, count, width, weight_stride, columns),
                **tile.options("BLOCK_A", "BLOCK_H", "BLOCK_V"),
            )
    if need_hidden:
        d_hidden.index_copy_(0, rows, total.to(hidden.dtype))
    return d_hidden, d_weight
