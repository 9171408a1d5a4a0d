"""Bugs that the tests of the CUDA kernels must catch: (operator whose driver runs, file, text, what becomes of it)."""

# Wrong numbers in any schedule.
WRONG_NUMBERS = {
    "block_reduce: only half of the warps": (
        "value_loss",
        "cuda_kernel.cuh",
        "lane < warps ?",
        "lane < warps / 2 ?",
    ),
    "warp_reduce: half of the lanes": (
        "value_loss",
        "cuda_kernel.cuh",
        "int distance = WARP / 2; distance",
        "int distance = WARP / 4; distance",
    ),
    "tokens: stride of one block": (
        "whiten",
        "cuda_kernel.cuh",
        "const int64_t step = int64_t(gridDim.x) * blockDim.x;\n  for (int64_t i = int64_t(blockIdx.x)",
        "const int64_t step = blockDim.x;\n  for (int64_t i = int64_t(blockIdx.x)",
    ),
    "whiten: masked tokens counted": (
        "whiten",
        "whiten.cu",
        "if (!takes_part) return;",
        "",
    ),
    "whiten: merge ignores the distance of the means": (
        "whiten",
        "whiten.cu",
        "a.deviation + b.deviation + delta * delta * a.count * share",
        "a.deviation + b.deviation",
    ),
    "gae: the follower is the farthest action": (
        "gae",
        "gae.cu",
        "31 - __clz(later)",
        "__ffs(later) - 1",
    ),
    "gae: values of the window before are forgotten": (
        "gae",
        "gae.cu",
        "if (actions) next_value",
        "next_value",
    ),
    "gae: scan one step short": (
        "gae",
        "gae.cu",
        "distance < WARP; distance *= 2",
        "distance < 16; distance *= 2",
    ),
    "gae: half a warp leaves": (
        "gae",
        "gae.cu",
        "if (sequence >= p.num_sequences) return;",
        "if (sequence >= p.num_sequences || lane > 15) return;",
    ),
    "value_loss: gradient of the clipped branch": (
        "value_loss",
        "value_loss.cu",
        "(active ? 0.f : smaller(",
        "(smaller(",
    ),
    "value_loss: huber ignored": (
        "value_loss",
        "value_loss.cu",
        "size <= huber ?",
        "true ?",
    ),
    "policy_loss: dual clip for gains too": (
        "policy_loss",
        "policy_loss.cu",
        "if (a < 0.f && dual < l)",
        "if (dual < l)",
    ),
    "policy_loss: k3 slope": (
        "policy_loss",
        "policy_loss.cu",
        "return {value, x - value};",
        "return {value, value - x};",
    ),
    "logprobs: rescaling forgets the weighted sum": (
        "logprobs",
        "softmax_row.cuh",
        "scale * (weighted + sum * y)",
        "scale * weighted",
    ),
    "logprobs: tail of the row left out": (
        "logprobs",
        "softmax_row.cuh",
        "  if (split.tail + threadIdx.x < columns) add_one(split.tail + threadIdx.x);\n",
        "",
    ),
    "logprobs: row offset in 32 bits": (
        "logprobs",
        "logprobs.cu",
        "const T* row = static_cast<const T*>(p.logits) + n * p.row_stride;\n  const RowStats",
        "const T* row = static_cast<const T*>(p.logits) + int(n * p.row_stride);\n  const RowStats",
    ),
    "logprobs: target of another shard": (
        "logprobs",
        "logprobs.cu",
        "target >= 0 && target < p.columns",
        "target >= 0",
    ),
    "logprobs: gradient of the target before it": (
        "logprobs",
        "softmax_row.cuh",
        "j == target ?",
        "j + 1 == target ?",
    ),
    "segment_sum: tokens before the sequence": (
        "segment_sum",
        "segment_sum.cu",
        "body(t, t >= s.begin)",
        "body(t, true)",
    ),
    "segment_sum: mean over all tokens": (
        "segment_sum",
        "segment_sum.cu",
        "tokens += counts ? 1 : 0;",
        "tokens += 1;",
    ),
    "group_advantages: group ends with its window": (
        "group_advantages",
        "group_advantages.cu",
        "if (others) return first + __ffs(int(others)) - 1;",
        "return first + (others ? __ffs(int(others)) - 1 : WARP);",
    ),
    "group_advantages: overwrites the last group of the block before": (
        "group_advantages",
        "group_advantages.cu",
        "store_if(i >= mine,",
        "store_if(true,",
    ),
    "group_advantages: only the first group of a window": (
        "group_advantages",
        "group_advantages.cu",
        "rest; rest &= rest - 1)",
        "rest; rest = 0)",
    ),
    "kto_loss: weights swapped": (
        "kto_loss",
        "kto_loss.cu",
        "good ? p.desirable_weight : p.undesirable_weight",
        "good ? p.undesirable_weight : p.desirable_weight",
    ),
    "preference_loss: log-odds without the complement": (
        "preference_loss",
        "preference_loss.cu",
        "-expm1f(logp)",
        "-logp",
    ),
    "preference_loss: sigmoid of the other side": (
        "preference_loss",
        "log_sigmoid.cuh",
        "x > 0.f ? large : small, x > 0.f ? small : large",
        "x > 0.f ? small : large, x > 0.f ? large : small",
    ),
    "topk_distillation_loss: the top k counted in the rest": (
        "topk_distillation_loss",
        "topk_distillation_loss.cu",
        "x[v] = top >> v & 1 ? -INFINITY : x[v];",
        "x[v] = top >> v & 0 ? -INFINITY : x[v];",
    ),
    "topk_distillation_loss: offset of the row forgotten": (
        "topk_distillation_loss",
        "topk_distillation_loss.cu",
        "load(t.ids + i) + offset - part",
        "load(t.ids + i) - part",
    ),
    "refit_copy: checksum of the tile's own count": (
        "refit_copy",
        "refit_copy.cu",
        "const int64_t first = tile.row * item.columns + tile.column;",
        "const int64_t first = tile.row * tile.columns + tile.column;",
    ),
    "refit_copy: tile of the next item": (
        "refit_copy",
        "refit_copy.cu",
        "(load(p.first_tile + middle) <= tile ?",
        "(load(p.first_tile + middle) < tile ?",
    ),
    "refit_copy: rest of a row left out": (
        "refit_copy",
        "refit_copy.cu",
        "i < unsigned(tile.rows) * rest;",
        "i < unsigned(tile.rows) * 0;",
    ),
}

# What the thread sanitizer finds.
RACES = {
    "group_advantages: no barrier before the window is written back": (
        "group_advantages",
        "group_advantages.cu",
        "earliest[threadIdx.x / WARP] = of_warp;\n  __syncthreads();",
        "earliest[threadIdx.x / WARP] = of_warp;",
    ),
    "block_reduce: no barrier before the parts are read": (
        "policy_loss",
        "cuda_kernel.cuh",
        "  if (lane == 0) parts[warp] = x;\n  __syncthreads();",
        "  if (lane == 0) parts[warp] = x;",
    ),
    "partial sums: blocks share a place": (
        "policy_loss",
        "cuda_kernel.cuh",
        "store(workspace + k * gridDim.x + blockIdx.x,",
        "store(workspace + k * gridDim.x,",
    ),
    "whiten: no barrier before the scale is read": (
        "whiten",
        "whiten.cu",
        "  }\n  __syncthreads();\n  const double shift",
        "  }\n  const double shift",
    ),
    "topk_distillation_loss: no barrier before the top k are written over": (
        "topk_distillation_loss",
        "topk_distillation_loss.cu",
        "  __syncthreads();  // the top k are written over\n",
        "",
    ),
    "topk_distillation_loss: bits cleared while they are read": (
        "topk_distillation_loss",
        "topk_distillation_loss.cu",
        "    __syncthreads();  // bits of the part before may still be read\n",
        "",
    ),
    "refit_copy: blocks add without an atomic": (
        "refit_copy",
        "refit_copy.cu",
        "atomicAdd(reinterpret_cast<unsigned long long*>(p.checksums + tile.item),",
        "*(p.checksums + tile.item) += (",
    ),
}
