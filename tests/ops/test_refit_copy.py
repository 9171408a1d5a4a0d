import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from aligner import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(t):
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


def numbers(*shape, dtype=torch.float32, seed=0):
    """All kinds of floats: denormal, huge, signed zero, infinite; NaN apart, whose payload a cast may change."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 10 ** (10 * torch.randn(*shape, generator=generator))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65504.0, 65520.0, 6e-8, 3e-8, 2.9e-8, 1.0009765625])
    at = torch.rand(*shape, generator=generator) < 0.3
    x[at] = special[torch.randint(0, len(special), (int(at.sum()),), generator=generator)]
    return x.to(dtype)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("destination", DTYPES)
@pytest.mark.parametrize("one", [False, True])
def test_every_cast_bit_for_bit(isa, source, destination, one):
    # Vectors, whole matrices, rows of wider ones on either side, more than a tile, nothing at all.
    shapes = [(0,), (1,), (7,), (33,), (5, 0), (3, 17), (4, 40000), (70000,), (300, 130)]
    sources, destinations, wants = [], [], []
    for i, shape in enumerate(shapes):
        x = numbers(*shape, dtype=source, seed=i)
        wide = torch.full((*shape[:-1], shape[-1] + 3), 9.0, dtype=source)
        wide[..., : shape[-1]] = x
        into = torch.full((*shape[:-1], shape[-1] + 5), -7.0, dtype=destination)
        pairs = [(x, torch.empty(shape, dtype=destination)), (wide[..., : shape[-1]], into[..., : shape[-1]])]
        for a, b in pairs:
            sources.append(a)
            destinations.append(b)
            wants.append((x.float() + 1 if one else x).to(destination))
        untouched = into[..., shape[-1] :]
    sums = ops.refit_copy(sources, destinations, add_one=[one] * len(sources), checksum=True, impl="cpp")
    for got, want in zip(destinations, wants, strict=True):
        assert torch.equal(bits(got), bits(want))
    assert (untouched == -7).all()
    again = [torch.empty_like(w) for w in wants]
    expected = ops.refit_copy(sources, again, add_one=[one] * len(sources), checksum=True, impl="reference")
    assert torch.equal(sums, expected)
    assert all(torch.equal(bits(a), bits(w)) for a, w in zip(again, wants, strict=True))


def test_nan_stays_nan(isa):
    for source in DTYPES:
        for destination in DTYPES:
            into = torch.zeros(40, dtype=destination)
            ops.refit_copy([torch.full((40,), torch.nan, dtype=source)], [into], impl="cpp")
            assert into.isnan().all()


@hypothesis.given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=12), st.randoms())
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_table(shapes, random):
    sources = [numbers(r, c, dtype=random.choice(DTYPES), seed=r * c) for r, c in shapes]
    destinations = [torch.empty(r, c, dtype=random.choice(DTYPES)) for r, c in shapes]
    ops.refit_copy(sources, destinations, impl="cpp")
    for s, d in zip(sources, destinations, strict=True):
        assert torch.equal(bits(d), bits(s.to(d.dtype)))


def test_checksum_sees_what_changes(isa):
    x = torch.randn(50, 30)
    swapped = x.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    flipped = x.clone()
    flipped[7, 7] *= -1
    into = [torch.empty_like(x) for _ in range(4)]
    sums = ops.refit_copy([x, x, swapped, flipped], into, checksum=True, impl="cpp")
    assert sums[0] == sums[1]
    assert len(set(sums.tolist())) == 3


def test_a_destination_that_is_its_own_source_is_only_summed_up(isa):
    x, wide = numbers(300, 130), numbers(40, 70, dtype=torch.bfloat16)
    before, views = [x.clone(), wide.clone()], [x, wide[:, 3:50]]
    copied = ops.refit_copy(views, [torch.empty_like(v) for v in views], checksum=True, impl="cpp")
    assert torch.equal(ops.refit_copy(views, views, checksum=True, impl="cpp"), copied)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, [x, wide], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_weights_wrap_at_two_to_the_32(dtype):
    # One row of memory seen 71,600 times: just over 2^31 elements. Every count below is exact in 64 bits.
    rows, columns = 71600, 30011
    x = numbers(columns, dtype=dtype)
    many = x.expand(rows, columns)
    got = ops.refit_copy([many], [many], checksum=True, impl="cpp").item()
    mask = 0xFFFF if dtype == torch.bfloat16 else 0xFFFFFFFF
    total = 0
    for c, word in enumerate(bits(x).tolist()):
        wrapped = rows - -(-(2**31 - c) // columns)  # rows whose weight exceeds 2^32
        total += (word & mask) * (rows * (2 * c + 1) + columns * rows * (rows - 1) - 2**32 * wrapped)
    assert got % 2**64 == total % 2**64


def test_errors():
    x, y = torch.randn(4, 6), torch.zeros(4, 6)
    with pytest.raises(RuntimeError, match=r"sources\[0\] is CPU Float of shape \[4, 6\], destinations.*one shape"):
        ops.refit_copy([x], [y[:, :5]])
    with pytest.raises(RuntimeError, match=r"destinations\[1\] must have unit stride along its rows, got 4"):
        ops.refit_copy([x, x], [y, torch.zeros(6, 4).T])
    assert (y == 0).all()  # a table with a mistake writes nothing
    with pytest.raises(RuntimeError, match=r"sources\[0\] must be a vector or a matrix on CPU"):
        ops.refit_copy([x[None]], [y[None]])
    with pytest.raises(ValueError, match="got 1 sources, 2 destinations"):
        ops.refit_copy([x], [y, y])
    with pytest.raises(ValueError, match=r"destinations\[0\] is int64 on cpu, impl cpp takes"):
        ops.refit_copy([x], [y.long()], impl="cpp")


def test_opcheck():
    x, y = torch.randn(4, 6), torch.zeros(4, 6)
    torch.library.opcheck(torch.ops.aligner.refit_copy.default, ([x, x[0]], [y, torch.zeros(6)], [False, True], True))
    boxes = torch.tensor([[0, 0, 1, 2, 0, 3, 2, 3]])
    torch.library.opcheck(torch.ops.aligner.refit_copy.default, ([x], [y], [], True, boxes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_the_caches_hold(isa, dtype):
    """Stores then go past the caches: aligned and not, whole vectors and parts of one, beside narrow rows."""
    x = numbers(9_000_000)
    sources = [x, x[5:3_000_003], x[:900_000].view(-1, 30)[:, 3:20], x[:11]]
    into = [torch.full((s.numel() + 40,), -7.0, dtype=dtype) for s in sources]
    views = [t[3 + i : 3 + i + s.numel()].view(s.shape) for i, (t, s) in enumerate(zip(into, sources, strict=True))]
    sums = ops.refit_copy(sources, views, checksum=True, impl="cpp")
    wants = [torch.empty(s.shape, dtype=dtype) for s in sources]
    assert torch.equal(sums, ops.refit_copy(sources, wants, checksum=True, impl="reference"))
    for i, (t, view, want) in enumerate(zip(into, views, wants, strict=True)):
        assert torch.equal(bits(view), bits(want))
        assert (t[: 3 + i] == -7).all() and (t[3 + i + want.numel() :] == -7).all()
    assert torch.equal(ops.refit_copy(views, views, checksum=True, impl="cpp"), sums)


@hypothesis.given(st.integers(0, 10_000))
@hypothesis.settings(max_examples=30, deadline=None)
def test_boxes(seed):
    """Boxes of vectors, matrices and rows of wider ones against slices, and their checksums against the reference's."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    sources = [numbers(70), numbers(9, 40, dtype=torch.bfloat16), numbers(30, 50)[:, 3:47]]
    destinations = [torch.zeros(25, 60), torch.zeros(80, dtype=torch.float16), torch.zeros(40, 64)[:, :57]]
    matrices = [[t if t.dim() == 2 else t[None] for t in side] for side in (sources, destinations)]
    boxes, wants = [], []
    for destination in range(3):
        source = draw(0, 2)
        s, d = matrices[0][source], matrices[1][destination]
        rows, columns = draw(0, min(len(s), len(d))), draw(0, min(s.shape[1], d.shape[1]))
        at = [draw(0, s.shape[0] - rows), draw(0, s.shape[1] - columns)]
        to = [draw(0, d.shape[0] - rows), draw(0, d.shape[1] - columns)]
        boxes.append([source, destination, *at, *to, rows, columns])
        want = d.clone()
        want[to[0] : to[0] + rows, to[1] : to[1] + columns] = s[at[0] : at[0] + rows, at[1] : at[1] + columns]
        wants.append(want)
    again = [d.clone() for d in destinations]
    one = [bool(draw(0, 1)) for _ in boxes]
    table = torch.tensor(boxes)
    ops.refit_copy(sources, destinations, boxes=table, impl="cpp")
    for d, want in zip(matrices[1], wants, strict=True):
        assert torch.equal(bits(d), bits(want))
    sums = ops.refit_copy(sources, destinations, boxes=table, add_one=one, checksum=True, impl="cpp")
    expected = ops.refit_copy(sources, again, boxes=table, add_one=one, checksum=True, impl="reference")
    assert torch.equal(sums, expected)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(again, destinations, strict=True))


def test_boxes_outside_are_refused():
    x, y = torch.randn(4, 6), torch.zeros(4, 6)
    whole = [0, 0, 0, 0, 0, 0, 4, 6]
    for field, value in [(0, 1), (1, -1), (2, 1), (3, -1), (4, 1), (5, 1), (6, 5), (7, 7), (7, -1)]:
        wrong = list(whole)
        wrong[field] = value
        with pytest.raises(RuntimeError, match=r"boxes\[1\] lies outside of sources"):
            ops.refit_copy([x], [y], boxes=torch.tensor([whole, wrong]), impl="cpp")
    with pytest.raises(RuntimeError, match="boxes must be CPU Long of shape"):
        ops.refit_copy([x], [y], boxes=torch.zeros(3, 7, dtype=torch.int64), impl="cpp")
    assert (y == 0).all()
