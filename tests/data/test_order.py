"""The order of examples: every one once an epoch, files by their weights, seed and step alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner.data.order import BLOCK, Blend, Order


@given(num=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(0, 2**32), epochs=st.integers(1, 4))
def test_every_epoch_takes_every_example_once(num, size, seed, epochs):
    if size > num:
        with pytest.raises(ValueError, match=f"takes {size} examples, but there are only {num}; lower the batch size"):
            Order(num, seed).batch(0, size)
        return
    steps = -(-epochs * num // size)
    batches = [Order(num, seed).batch(step, size) for step in range(steps)]
    stream = [index for batch in batches for index in batch]
    assert all(len(batch) == size for batch in batches)
    for epoch in range(epochs):
        expected = np.random.default_rng([seed, epoch]).permutation(num).tolist()
        assert stream[epoch * num : (epoch + 1) * num] == expected and sorted(expected) == list(range(num))
    assert [Order(num, seed).at(position) for position in range(len(stream))] == stream


def test_order_depends_on_seed_and_epoch_alone():
    first = [Order(50, 3).batch(step, 20) for step in range(6)]
    again = Order(50, 3)
    assert [again.batch(step, 20) for step in (5, 0, 2)] == [first[5], first[0], first[2]]
    assert Order(50, 4).batch(0, 20) != first[0]
    stream = [index for batch in first for index in batch]
    assert stream[:100] == Order(50, 3).batch(0, 50) + Order(50, 3).batch(1, 50)


def test_a_permutation_is_drawn_once_an_epoch(monkeypatch):
    drawn = []
    monkeypatch.setattr(Order, "_shuffled", lambda self, epoch: drawn.append(epoch) or np.arange(self.num))
    order = Order(10, 0)
    for step in range(10):
        order.batch(step, 4)
    assert drawn == [0, 1, 2, 3]


def test_the_shuffle_is_uniform():
    counts = Counter(Order(4, seed).batch(0, 1)[0] for seed in range(4000))
    assert all(abs(counts[index] - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for index in range(4))


WEIGHTS = st.lists(st.floats(0.02, 3), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(weights=WEIGHTS, seed=st.integers(0, 1000), blocks=st.integers(1, 30))
def test_every_block_has_its_quotas(weights, seed, blocks):
    blend = Blend([7] * len(weights), weights, seed)
    taken = np.zeros(len(weights), np.int64)
    for block in range(blocks):
        files, uses = blend._files(block)
        assert len(files) == BLOCK
        for file in range(len(weights)):
            places = files == file
            assert uses[places].tolist() == list(range(taken[file], taken[file] + places.sum()))
            taken[file] += places.sum()
        ideal = np.array(weights) / sum(weights) * (block + 1) * BLOCK
        assert np.abs(taken - ideal).max() < 1


@settings(deadline=None, max_examples=20)
@given(weights=WEIGHTS, seed=st.integers(0, 1000))
def test_each_file_has_epochs_of_its_own(weights, seed):
    nums = [11 + 5 * file for file in range(len(weights))]
    blend = Blend(nums, weights, seed)
    stream = [place for step in range(300) for place in blend.batch(step, 10)]
    for file, num in enumerate(nums):
        own = [i for f, i in stream if f == file]
        assert own == [Order(num, seed).at(position) for position in range(len(own))]
    again = Blend(nums, weights, seed)
    assert again.batch(150, 10) == stream[1500:1510]
    assert [place for step in (40, 41) for place in again.batch(step, 7)] == stream[280:294]


def test_a_block_is_mixed():
    files, _ = Blend([5, 5], [1, 1], 0)._files(0)
    assert 400 < sum(files[:-1] != files[1:]) < 600


def test_blends_that_cannot_be():
    with pytest.raises(ValueError, match="the weight 0.0005 is less than a thousandth of the sum"):
        Blend([5, 5], [1, 0.0005], 0)
    with pytest.raises(ValueError, match="takes 11 examples, but there are only 10"):
        Blend([5, 5], [1, 1], 0).batch(0, 11)
