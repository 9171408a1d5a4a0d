"""Which examples a step takes, as a function of seed and step alone: a resumed run needs no saved position."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BLOCK = 1000  # positions in which the files of a blend have their shares


class Order:
    """Every epoch a fresh shuffle of all examples, a pure function of (seed, epoch).

    num: examples.
    seed: of the shuffles.
    noun: what messages call the examples.
    """

    def __init__(self, num: int, seed: int, noun: str = "examples"):
        self.num, self.seed, self.noun = num, seed, noun
        self._epoch = lru_cache(maxsize=2)(self._shuffled)  # a batch may span two

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of one step; batches run across the border of two epochs.

        step: 0-based number of the step.
        size: examples a step. Raises ValueError when there are fewer than that.
        """
        check_size(size, self.num, self.noun)
        first = step * size
        epochs = range(first // self.num, (first + size - 1) // self.num + 1)
        order = np.concatenate([self._epoch(epoch) for epoch in epochs])
        offset = first - epochs[0] * self.num
        return order[offset : offset + size].tolist()

    def at(self, position: int) -> int:
        """The example at one position of the stream that the batches cut."""
        epoch, place = divmod(position, self.num)
        return int(self._epoch(epoch)[place])

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num)


class Blend:
    """Files mixed by weight, each in an order of its own with epochs of its own.

    Up to the end of every block of 1000 positions, each file has had its share of them, rounded to a neighbouring whole
    number by largest remainder; within a block the order is shuffled.

    nums: examples of each file.
    weights: shares, positive; they need not add up to 1.
    seed: of the shuffles.
    Raises ValueError when a weight is less than a thousandth of all: its file would miss whole blocks.
    """

    def __init__(self, nums: Sequence[int], weights: Sequence[float], seed: int):
        self.num, self.seed = sum(nums), seed
        self._shares = np.array(weights, np.float64) / sum(weights)
        if self._shares.min() * BLOCK < 1:
            least = weights[int(self._shares.argmin())]
            raise ValueError(
                f"the weight {least:g} is less than a thousandth of the sum of all weights; raise it or leave the "
                "file out."
            )
        self._orders = [Order(num, seed) for num in nums]
        self._block = lru_cache(maxsize=2)(self._files)

    def batch(self, step: int, size: int) -> list[tuple[int, int]]:
        """(file, example of the file) of each place of one step.

        step: 0-based number of the step.
        size: examples a step. Raises ValueError when all files together hold fewer than that.
        """
        check_size(size, self.num, "examples")
        return [self._at(position) for position in range(step * size, (step + 1) * size)]

    def _at(self, position: int) -> tuple[int, int]:
        block, place = divmod(position, BLOCK)
        files, uses = self._block(block)
        file = int(files[place])
        return file, self._orders[file].at(int(uses[place]))

    def _files(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(file of each place of a block, how often the file was taken before that place)."""
        before, after = self._quotas(block * BLOCK), self._quotas((block + 1) * BLOCK)
        files = np.repeat(np.arange(len(before)), after - before)
        files = np.random.default_rng([self.seed, block]).permutation(files)
        uses = np.empty(BLOCK, np.int64)
        for file, used in enumerate(before):
            places = np.flatnonzero(files == file)
            uses[places] = used + np.arange(len(places))
        return files, uses

    def _quotas(self, positions: int) -> np.ndarray:
        """How often each file is taken in the first positions: its share, rounded by largest remainder.

        A share of a thousandth or more makes this grow with every block, which largest remainders do not in general.
        """
        ideal = self._shares * positions
        counts = np.floor(ideal).astype(np.int64)
        remainders = np.argsort(counts - ideal, kind="stable")
        counts[remainders[: positions - counts.sum()]] += 1
        return counts


def check_size(size: int, num: int, noun: str) -> None:
    """Raise ValueError when a step takes more examples than there are."""
    if size > num:
        raise ValueError(f"a step takes {size} {noun}, but there are only {num}; lower the batch size or add {noun}.")
