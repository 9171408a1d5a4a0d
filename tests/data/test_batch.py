"""Packing and slicing of batches."""

import pytest
import torch

from aligner.data.batch import (
    PairBatch,
    PolicyBatch,
    Rollout,
    SupervisedBatch,
    minibatches,
    pack_examples,
    pack_last,
    pack_pairs,
    pack_pairs_last,
    pack_rollout,
    response_tokens,
)
from aligner.data.examples import Example, Pair


def rollout() -> Rollout:
    return pack_rollout(
        [[5, 6], [7], [8, 9, 10]], [[1, 2], [3], [4]], [[-0.1, -0.2], [-0.3], [-0.4]], [True, False, True], 2
    )


def test_pack_puts_everything_where_it_belongs():
    r = rollout()
    assert r.tokens_N.tolist() == [5, 6, 1, 2, 7, 3, 8, 9, 10, 4]
    assert r.cu_seqlens.tolist() == [0, 4, 6, 10]
    assert r.action_mask_N.int().tolist() == [0, 0, 1, 1, 0, 1, 0, 0, 0, 1]
    assert torch.allclose(r.sampler_logprobs_N[r.action_mask_N], torch.tensor([-0.1, -0.2, -0.3, -0.4]))
    assert list(response_tokens(r)) == [([5, 6], [1, 2]), ([7], [3]), ([8, 9, 10], [4])]


def test_take_slices_every_field_in_the_given_order():
    n = torch.arange(10.0)
    batch = PolicyBatch(rollout=rollout(), old_logprobs_N=-n, advantages_N=n, weights_N=n + 1)
    part = batch.take([2, 0])
    assert part.rollout.tokens_N.tolist() == [8, 9, 10, 4, 5, 6, 1, 2]
    assert part.rollout.cu_seqlens.tolist() == [0, 4, 8] and part.rollout.cu_seqlens.dtype == torch.int32
    assert part.rollout.finished_B.tolist() == [True, True]
    assert part.advantages_N.tolist() == [6, 7, 8, 9, 0, 1, 2, 3]
    assert part.rollout.weights_version == 2
    assert batch.take([0]).take([0]).weights_N.tolist() == [1, 2, 3, 4]


def test_minibatches_cover_every_sequence_once_an_epoch():
    g = torch.Generator().manual_seed(0)
    steps = list(minibatches(6, 2, 3, g))
    assert [len(s) for s in steps] == [2] * 9
    epochs = [sum(steps[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(6)) for e in epochs) and len({tuple(e) for e in epochs}) > 1


def test_a_sequence_must_end_in_an_action():
    r = rollout()
    mask_N = r.action_mask_N.clone()
    mask_N[5] = False
    with pytest.raises(ValueError, match="must end in an action token"):
        Rollout(**{**vars(r), "action_mask_N": mask_N})
    with pytest.raises(ValueError, match="cu_seqlens ends at 9, expected 10"):
        Rollout(**{**vars(r), "cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32)})


def pair(chosen, rejected) -> Pair:
    return Pair(chosen=sequence(chosen), rejected=sequence(rejected))


def sequence(response) -> Example:
    return Example(tokens=(7, 8, *response), mask=(False, False) + (True,) * len(response))


def fields(batch) -> tuple[list, list, list]:
    assert (batch.tokens_N.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert batch.action_mask_N.dtype == torch.bool
    return batch.tokens_N.tolist(), batch.cu_seqlens.tolist(), batch.action_mask_N.int().tolist()


def test_supervised_sequences_are_packed():
    batch = pack_examples([sequence([1, 2]), sequence([3])])
    assert isinstance(batch, SupervisedBatch)
    assert fields(batch) == ([7, 8, 1, 2, 7, 8, 3], [0, 4, 7], [0, 0, 1, 1, 0, 0, 1])
    last = pack_last([(7, 8, 1, 2), (3,)])
    assert isinstance(last, SupervisedBatch)
    assert fields(last) == ([7, 8, 1, 2, 3], [0, 4, 5], [0, 0, 0, 1, 1])


def test_pairs_are_packed_side_by_side():
    pairs = [pair([1, 2], [3]), pair([4], [5, 6])]
    batch = pack_pairs(pairs)
    tokens, starts = [7, 8, 1, 2, 7, 8, 3, 7, 8, 4, 7, 8, 5, 6], [0, 4, 7, 10, 14]
    assert isinstance(batch, PairBatch) and batch.together == 2
    assert fields(batch) == (tokens, starts, [0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 1])
    last = pack_pairs_last(pairs)
    assert isinstance(last, PairBatch)
    assert fields(last) == (tokens, starts, [0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1])
    assert fields(batch.take([2, 3]))[0] == tokens[7:]
