"""What each rank should give to and get from collectives, in closed form; docs/parallelism.md has the same as a table.

Letters: t, c, d, p ranks of tensor, context, data and pipeline parallelism; L layers of this rank, H hidden size, F
inner size of the MLP, V vocabulary, Q = heads x head size, K = key-value heads x head size, r rank of the adapters; T
rows of a micro-batch after alignment, R = T / c, N its packed tokens, A action tokens on this rank; w bytes of an
activation or weight. All four linear layers have adapters, if any.
"""

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass

from collectives import Amount, Counts, Kind, add

from aligner.models.microbatch import deal
from aligner.models.shape import ModelShape
from aligner.run.distributed import ParallelConfig

SHAPE_BYTES = 3 * 8  # of a message between pipeline stages that says how large the next one is
STATISTICS = ("supervised_loss", "loss", "rows", "tokens")  # of models.network.Network.step


@dataclass(frozen=True, kw_only=True)
class Work:
    """One rank's share of one call: `forward_only` is Policy.infer, else Policy.update with one loss.

    lora: r, or 0 when all weights are trained. width: w. sequences: tokens of the prompt, and of the response, which is
    learnt, of each. budget: tokens of a micro-batch. rank: of `world`.
    """

    shape: ModelShape
    parallel: ParallelConfig
    lora: int
    width: int
    sequences: Sequence[tuple[int, int]]
    budget: int
    rank: int
    world: int
    forward_only: bool

    @property
    def data(self) -> int:
        return self.parallel.data(self.world)

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Ranks of tensor, context, data and pipeline parallelism: the first changes fastest."""
        t, c = self.parallel.tensor, self.parallel.context
        return (
            self.rank % t,
            self.rank // t % c,
            self.rank // (t * c) % self.data,
            self.rank // (t * c * self.data),
        )

    @property
    def first(self) -> bool:
        return self.place[3] == 0

    @property
    def last(self) -> bool:
        return self.place[3] == self.parallel.pipeline - 1

    @property
    def layers(self) -> int:
        return self.shape.num_layers // self.parallel.pipeline


@dataclass(frozen=True)
class Micro:
    """T, N and A of one micro-batch."""

    rows: int
    packed: int
    actions: int


def micro_batches(work: Work) -> list[Micro]:
    lengths = [prompt + response for prompt, response in work.sequences]
    dealt = deal(
        lengths,
        work.data,
        work.budget,
        quadratic=work.shape.heads * work.shape.head_dim / work.shape.layer_weights(),
        multiple=work.parallel.pipeline if work.parallel.virtual_pipeline > 1 else 1,
    )
    return [_micro(work, [work.sequences[i] for i in members]) for members in dealt[work.place[2]]]


def _micro(work: Work, members: list[tuple[int, int]]) -> Micro:
    """The stream is cut into 2 c chunks, one without context parallelism; a rank has the chunks k and 2 c - 1 - k."""
    c, split = work.parallel.context, work.parallel.tensor if work.parallel.sequence else 1
    chunks = 2 * c if c > 1 else 1
    packed = sum(map(sum, members))
    chunk = math.ceil(max(packed, 1) / (chunks * split)) * split
    mine = {work.place[1], chunks - 1 - work.place[1]}
    start, predictors = 0, []
    for prompt, response in members:
        predictors += range(start + prompt - 1, start + prompt + response - 1)
        start += prompt + response
    return Micro(chunks * chunk, packed, sum(row // chunk in mine for row in predictors))


def expected(work: Work) -> Counts:
    counts: Counts = {}
    micros = micro_batches(work)
    for part in (tensor, context, pipeline):
        part(work, micros, counts)
    world(work, counts)
    if not work.forward_only:
        sequence_parallel_gradients(work, counts)
        embedding(work, counts)
        data(work, counts)
        gradient_norm(work, counts)
    return counts


def tensor(work: Work, micros: list[Micro], counts: Counts) -> None:
    """Activations and their gradients between the tensor ranks, and the softmax over the split vocabulary."""
    if work.parallel.tensor == 1:
        return
    calls = sequence_parallel_calls(work) if work.parallel.sequence else all_reduce_calls(work)
    for m in micros:
        entries = m.rows // work.parallel.context * work.width
        for operation, (hidden, low) in calls.items():
            size = entries * (hidden * work.shape.hidden + low * work.lora)
            add(counts, Kind("tensor", operation), Amount(hidden + low, size))
        if work.last and m.packed:
            # Maximum, then three float64 sums; backward the gradient of the hidden states, in float32.
            add(counts, Kind("tensor", "all-reduce"), Amount(2, (4 + 3 * 8) * m.actions))
            if not work.forward_only:
                add(counts, Kind("tensor", "all-reduce"), Amount(1, 4 * m.actions * work.shape.hidden))


def all_reduce_calls(work: Work) -> dict[str, tuple[int, int]]:
    """Of one micro-batch: operation -> calls with H, and calls with r numbers a row.

    A layer has two column-parallel linear layers, whose inputs' gradients are summed, and two row-parallel ones, whose
    outputs are.
    """
    hidden, low = 2 * work.layers + work.first, 2 * work.layers
    if not work.forward_only:
        again = 2 * work.layers if work.parallel.recompute == "full" else 0
        hidden, low = hidden + inputs(work) + again, 2 * low + again
    return {"all-reduce": (hidden, low if work.lora else 0)}


def sequence_parallel_calls(work: Work) -> dict[str, tuple[int, int]]:
    """As all_reduce_calls(): each sum is a reduce-scatter, and what was whole before is gathered."""
    gathers, scatters, low = 2 * work.layers + work.last, 2 * work.layers + work.first, 2 * work.layers
    if not work.forward_only:
        again = 2 * work.layers if work.parallel.recompute == "full" else 0
        gathers, scatters = gathers + 2 * work.layers + again, scatters + inputs(work) + again
        low = 2 * low + again
        if not work.lora:  # inputs again, for the weights' gradients, and the gradient of the embedding's output
            gathers += 2 * work.layers + work.first
    low = low if work.lora else 0
    return {"all-gather": (gathers, low), "reduce-scatter": (scatters, low)}


def inputs(work: Work) -> int:
    """Column-parallel layers whose input has a gradient: over a frozen embedding not the first, unless layers are
    recomputed, which makes the embedding's output ask for one.
    """
    return 2 * work.layers - (1 if work.lora and work.first and work.parallel.recompute != "full" else 0)


def sequence_parallel_gradients(work: Work, counts: Counts) -> None:
    """Of what all tensor ranks have whole but apply to their own tokens: norms, or the unsplit factors of adapters."""
    if not work.parallel.sequence:
        return
    vectors = 4 * work.layers * work.lora if work.lora else 2 * work.layers + work.last
    add(counts, Kind("tensor", "all-reduce"), Amount(1, 4 * vectors * work.shape.hidden))


def context(work: Work, micros: list[Micro], counts: Counts) -> None:
    """Keys and values of every layer, their gradients; the last stage's log-probabilities and entropies."""
    if work.parallel.context == 1:
        return
    for m in micros:
        entries = 2 * work.shape.kv_heads * work.shape.head_dim // work.parallel.tensor
        amount = Amount(work.layers, work.layers * m.rows * entries * work.width)
        add(counts, Kind("context", "all-gather"), amount)
        if not work.forward_only:
            add(counts, Kind("context", "reduce-scatter"), amount)
            if work.parallel.recompute != "none":  # "selective" too: they are gathered in the attention's core
                add(counts, Kind("context", "all-gather"), amount)
        if work.last and m.packed:
            add(counts, Kind("context", "all-reduce"), Amount(2, 2 * 4 * m.packed))


def pipeline(work: Work, micros: list[Micro], counts: Counts) -> None:
    """Hidden states to the next chunk of layers, their gradients back; before each its shape."""
    p, v = work.parallel.pipeline, work.parallel.virtual_pipeline
    if p == 1:
        return
    forward_out, forward_in = v - work.last, v - work.first
    out, into = forward_out, forward_in
    if not work.forward_only:
        out, into = out + forward_in, into + forward_out
    # Megatron's interleaved pipeline of two stages sends from odd to even stages in the group of all processes.
    even = work.place[3] % 2 == 0
    across = v > 1 and p == 2
    for operation, calls, group in (
        ("send", out, "world" if across and not even else "pipeline"),
        ("receive", into, "world" if across and even else "pipeline"),
    ):
        for m in micros:
            rows = m.rows // work.parallel.context // (work.parallel.tensor if work.parallel.sequence else 1)
            add(counts, Kind(group, operation), Amount(calls, calls * rows * work.shape.hidden * work.width))
            add(counts, Kind("pipeline", operation, "control"), Amount(calls, calls * SHAPE_BYTES))


def embedding(work: Work, counts: Counts) -> None:
    """Gradients of the two copies of a tied embedding."""
    if work.shape.tied and work.parallel.pipeline > 1 and (work.first or work.last) and not work.lora:
        size = work.shape.vocab * work.shape.hidden // work.parallel.tensor
        add(counts, Kind("embedding", "all-reduce"), Amount(1, 4 * size))


def trained(work: Work) -> list[list[int]]:
    """Entries of each trained tensor of this rank, by chunk of layers."""
    s, t, r, v = work.shape, work.parallel.tensor, work.lora, work.parallel.virtual_pipeline
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    columns = [((q + 2 * kv) // t, s.hidden), (2 * s.ffn // t, s.hidden)]
    rows = [(s.hidden, q // t), (s.hidden, s.ffn // t)]
    if r:
        layer = [size for out, into in columns + rows for size in (out * r, r * into)]
    else:
        layer = [out * into for out, into in columns + rows] + 2 * [s.hidden]
    chunks = [layer * (work.layers // v) for _ in range(v)]
    if not r:
        if work.first:
            chunks[0] = [s.vocab * s.hidden // t, *chunks[0]]
        if work.last:
            chunks[-1] = [*chunks[-1], s.hidden]
            if not (s.tied and work.first):
                chunks[-1] += [s.vocab * s.hidden // t]
    return chunks


def data(work: Work, counts: Counts) -> None:
    """Gradients over replicas and context ranks; with the distributed optimizer each weight goes back from one of them.

    Then tensors begin at multiples of 64 entries and the buffer ends at one of 128, so that ranks get equal shares.
    """
    ranks = work.data * work.parallel.context
    if ranks == 1:
        return
    for sizes in trained(work):
        if work.parallel.distributed_optimizer:
            entries = _up(sum(_up(size, 64) for size in sizes), math.lcm(ranks, 128))
            add(counts, Kind("data x context", "reduce-scatter"), Amount(1, 4 * entries))
            add(counts, Kind("data x context", "all-gather"), Amount(1, work.width * entries))
        else:
            add(counts, Kind("data x context", "all-reduce"), Amount(1, 4 * sum(sizes)))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def gradient_norm(work: Work, counts: Counts) -> None:
    """One float32: the sum of squares."""
    if work.parallel.distributed_optimizer:
        add(counts, Kind("world", "all-reduce"), Amount(1, 4))
    elif work.parallel.tensor * work.parallel.pipeline > 1:
        add(counts, Kind("tensor x pipeline", "all-reduce"), Amount(1, 4))


def world(work: Work, counts: Counts) -> None:
    """Results on every rank: of an update a pickled dict of floats, before it its length; else two float32 a token."""
    if work.forward_only:
        packed = sum(map(sum, work.sequences))
        add(counts, Kind("world", "all-reduce"), Amount(1, 2 * 4 * packed))
    else:
        statistics = len(pickle.dumps(dict.fromkeys(STATISTICS, 0.0)))
        add(counts, Kind("world", "all-gather", "control"), Amount(2, work.world * (8 + statistics)))
