"""Batches: one frozen dataclass per stage; a field exists only once it is true.

Shape suffixes: N packed tokens, B sequences, K of something each has. A field ending in _N or _NK is sliced by token,
one ending in _B or _BK by sequence. Entry t of every _N tensor is about token t.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aligner.data.examples import Example, Pair, Taught


class Packed:
    """Base of the batches: slicing by sequence.

    together: neighbouring sequences that must stay in one micro-batch, because a loss compares them.
    """

    together: ClassVar[int] = 1

    def to(self, device):
        """The same batch with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {name: x.to(device) for name, x in moved.items() if isinstance(x, Tensor | Packed)}
        return dataclasses.replace(self, **moved)

    def take(self, sequences: Sequence[int]):
        """The same batch restricted to the given sequences, in that order."""
        rollout = getattr(self, "rollout", self)
        starts = rollout.cu_seqlens.tolist()
        index_B = torch.tensor(list(sequences), dtype=torch.int64)
        index_N = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in sequences])
        counts = torch.tensor([0, *(starts[b + 1] - starts[b] for b in sequences)], dtype=torch.int32)
        return _pick(self, index_N, index_B, counts.cumsum(0, dtype=torch.int32))


@dataclass(frozen=True, kw_only=True)
class Rollout(Packed):
    """Prompts with the responses that the sampler gave to them.

    tokens_N: (N,) int64, token ids, prompts and responses, sequences concatenated.
    cu_seqlens: (B + 1,) int32, tokens. Prefix sum of sequence lengths; cu_seqlens[B] == N.
    action_mask_N: (N,) bool. True where the policy sampled the token.
    sampler_logprobs_N: (N,) float32, nats. The sampler's log-probability of each action token; 0 elsewhere.
    finished_B: (B,) bool. True where the response ended by itself and not by the length limit.
    weights_version: optimizer steps behind the weights that the sampler was holding.
    """

    tokens_N: Tensor
    cu_seqlens: Tensor
    action_mask_N: Tensor
    sampler_logprobs_N: Tensor
    finished_B: Tensor
    weights_version: int

    def __post_init__(self):
        num_tokens, last = len(self.tokens_N), self.cu_seqlens[1:].long() - 1
        if int(self.cu_seqlens[-1]) != num_tokens:
            raise ValueError(f"Rollout: cu_seqlens ends at {int(self.cu_seqlens[-1])}, expected {num_tokens} tokens.")
        if not bool(self.action_mask_N[last].all()):
            raise ValueError("Rollout: every sequence must end in an action token; give each response >= 1 token.")


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(Packed):
    """What a policy update reads.

    old_logprobs_N: (N,) float32, nats. The trainer's log-probabilities before this update; 0 outside action tokens.
    advantages_N: (N,) float32, dimensionless once whitened, else reward units.
    weights_N: (N,) float32, dimensionless. Weight of each token in the loss; 0 outside action tokens.
    """

    rollout: Rollout
    old_logprobs_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor


@dataclass(frozen=True, kw_only=True)
class GroupBatch(PolicyBatch):
    """What an update without a critic reads.

    importance_N: (N,) float32, dimensionless. Correction for the sampler's probabilities.
    reference_logprobs_N: (N,) float32, nats; 0 outside action tokens. None where no KL is in the loss.
    """

    importance_N: Tensor
    reference_logprobs_N: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ValueBatch(Packed):
    """What a critic update reads.

    old_values_N: (N,) float32, reward units. The critic's values before this update; 0 outside action tokens.
    returns_N: (N,) float32, reward units. Regression target of each action token.
    weights_N: (N,) float32, dimensionless. Weight of each token in the loss; 0 outside action tokens.
    """

    rollout: "Rollout | SupervisedBatch"
    old_values_N: Tensor
    returns_N: Tensor
    weights_N: Tensor


@dataclass(frozen=True, kw_only=True)
class SupervisedBatch(Packed):
    """Sequences whose masked tokens a model learns to say.

    tokens_N: (N,) int64, token ids, sequences concatenated.
    cu_seqlens: (B + 1,) int32, tokens. Prefix sum of sequence lengths.
    action_mask_N: (N,) bool. True for the tokens that are learnt.
    """

    tokens_N: Tensor
    cu_seqlens: Tensor
    action_mask_N: Tensor


@dataclass(frozen=True, kw_only=True)
class PairBatch(Packed):
    """Pairs of responses to one prompt: sequence 2i is the chosen one, 2i + 1 the rejected one.

    tokens_N, cu_seqlens: as of SupervisedBatch.
    action_mask_N: (N,) bool. True for the tokens that are read: a response's for its log-probability, its last one for
        its score.
    """

    together: ClassVar[int] = 2

    tokens_N: Tensor
    cu_seqlens: Tensor
    action_mask_N: Tensor


@dataclass(frozen=True, kw_only=True)
class MarginBatch(PairBatch):
    """Pairs with how much better the chosen response is.

    margins_B: (B,) float32, >= 0, the same in both entries of a pair.
    """

    margins_B: Tensor


@dataclass(frozen=True, kw_only=True)
class RatedBatch(SupervisedBatch):
    """Sequences with ratings of K attributes.

    attributes_BK: (B, K) float32, rating units, -100 where there is none.
    """

    attributes_BK: Tensor


@dataclass(frozen=True, kw_only=True)
class TaughtBatch(SupervisedBatch):
    """Sequences with a teacher's logits.

    topk_ids_NK: (N, K) int64, its likeliest tokens in place of each masked token; 0 elsewhere.
    topk_logits_NK: (N, K) float32, their logits.
    log_sum_N: (N,) float32, nats, of all its logits; None where the data does not have it.
    """

    topk_ids_NK: Tensor
    topk_logits_NK: Tensor
    log_sum_N: Tensor | None


@dataclass(frozen=True, kw_only=True)
class SteerBatch(SupervisedBatch):
    """Several responses to each prompt, for SteerLM 2: those of one prompt are neighbours.

    together: how many.
    target_log_weights_B: (B,) float32, nats, unnormalised: log P(a | x, y) + log P(y | x) - log Q(y | a, x).
    proposal_logprobs_B: (B,) float32, nats, log Q(y | a, x).
    """

    together: int
    target_log_weights_B: Tensor
    proposal_logprobs_B: Tensor


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(PairBatch):
    """Pairs with what the reference says of them.

    reference_logprobs_B: (B,) float32, nats. Sum of the reference's log-probabilities over each response; None for a
        loss without a reference.
    rewards_B: (B,) float32, reward units. Of each response; None for a loss that reads labels only.
    """

    reference_logprobs_B: Tensor | None
    rewards_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class JudgedBatch(SupervisedBatch):
    """Responses that are desirable or not.

    reference_logprobs_B: (B,) float32, nats. Sum of the reference's log-probabilities over each response.
    desirable_B: (B,) bool.
    """

    reference_logprobs_B: Tensor
    desirable_B: Tensor


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    sequences: int = 48
    """Responses sampled in a step."""
    samples_per_prompt: int = 1
    """Responses to each prompt."""
    minibatch_sequences: int = 24
    """Responses of one optimizer step."""
    epochs: int = 1
    """Passes over a step's responses."""
    tokens_per_micro_batch: int = 1024
    """Tokens of all sequences in one forward pass; changes memory and speed, never a gradient."""

    def __post_init__(self):
        if min(self.sequences, self.samples_per_prompt, self.minibatch_sequences, self.epochs) < 1:
            raise ValueError("every batch.* size must be 1 or more.")
        for name in ("minibatch_sequences", "samples_per_prompt"):
            if self.sequences % getattr(self, name):
                option = name.replace("_", "-")
                raise ValueError(
                    f"batch.sequences is {self.sequences}, not a multiple of batch.{option} {getattr(self, name)}; "
                    "change one of them."
                )


@dataclass(frozen=True, kw_only=True)
class ExampleBatchConfig:
    examples: int = 32
    """Examples of one optimizer step; a pair is one example."""
    tokens_per_micro_batch: int = 1024
    """Tokens of all sequences in one forward pass; changes memory and speed, never a gradient."""

    def __post_init__(self):
        if min(self.examples, self.tokens_per_micro_batch) < 1:
            raise ValueError("batch.examples and batch.tokens-per-micro-batch must be 1 or more.")


@dataclass(frozen=True, kw_only=True)
class ToolBatchConfig:
    prompts: int = 64
    """Prompts that are worked on at once."""
    tokens_per_micro_batch: int = 1024
    """Tokens of all sequences in one forward pass; changes memory and speed only."""

    def __post_init__(self):
        if min(self.prompts, self.tokens_per_micro_batch) < 1:
            raise ValueError("batch.prompts and batch.tokens-per-micro-batch must be 1 or more.")


def _pick(batch, index_N: Tensor, index_B: Tensor, cu_seqlens: Tensor):
    changes = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if field.name == "rollout":
            changes["rollout"] = _pick(value, index_N, index_B, cu_seqlens)
        elif value is None:
            continue
        elif field.name == "cu_seqlens":
            changes["cu_seqlens"] = cu_seqlens
        elif field.name.endswith(("_N", "_NK")):
            changes[field.name] = value[index_N]
        elif field.name.endswith(("_B", "_BK")):
            changes[field.name] = value[index_B]
    return dataclasses.replace(batch, **changes)


def concatenate(batches: Sequence[Rollout]) -> Rollout:
    """All their sequences, one batch after the other."""
    columns = {f.name: [getattr(b, f.name) for b in batches] for f in dataclasses.fields(batches[0])}
    joined = {name: torch.cat(x) for name, x in columns.items() if name.endswith(("_N", "_B"))}
    counts = torch.cat([b.cu_seqlens[1:] - b.cu_seqlens[:-1] for b in batches])
    joined["cu_seqlens"] = torch.cat([counts.new_zeros(1), counts]).cumsum(0, dtype=torch.int32)
    return dataclasses.replace(batches[0], **joined)


def pack_rollout(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    finished: Sequence[bool],
    weights_version: int,
) -> Rollout:
    """Concatenate prompt/response pairs into one packed Rollout; arguments are aligned lists, one entry a sequence."""
    pairs = zip(prompts, responses, logprobs, strict=True)
    return pack_turns([(p, r, [True] * len(r), nats) for p, r, nats in pairs], finished, weights_version)


def pack_turns(sequences: Sequence[tuple], finished: Sequence[bool], weights_version: int) -> Rollout:
    """One packed Rollout of (prompt, tokens after it, which of these are actions, their log-probabilities)."""
    mask = [([False] * len(prompt) + list(actions)) for prompt, _, actions, _ in sequences]
    sampled = [x for prompt, _, _, nats in sequences for x in ([0.0] * len(prompt) + list(nats))]
    return Rollout(
        **_packed([((*sequence[0], *sequence[1]), m) for sequence, m in zip(sequences, mask, strict=True)]),
        sampler_logprobs_N=torch.tensor(sampled, dtype=torch.float32),
        finished_B=torch.tensor(list(finished), dtype=torch.bool),
        weights_version=weights_version,
    )


def pack_examples(examples: Sequence[Example]) -> SupervisedBatch:
    """Supervised sequences one after the other."""
    return SupervisedBatch(**_packed([(example.tokens, example.mask) for example in examples]))


def pack_pairs(pairs: Sequence[Pair]) -> PairBatch:
    """Pairs one after the other, the chosen response at 2i, the rejected one at 2i + 1; the mask is the responses'."""
    examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    return PairBatch(**_packed([(example.tokens, example.mask) for example in examples]))


def pack_taught(examples: Sequence[Taught]) -> TaughtBatch:
    """Sequences with a teacher's logits one after the other."""
    joined = {name: [x for e in examples for x in getattr(e, name)] for name in ("topk_ids", "topk_logits")}
    known = examples[0].log_sum is not None
    return TaughtBatch(
        **_packed([(example.tokens, example.mask) for example in examples]),
        topk_ids_NK=torch.tensor(joined["topk_ids"], dtype=torch.int64),
        topk_logits_NK=torch.tensor(joined["topk_logits"], dtype=torch.float32),
        log_sum_N=torch.tensor([x for e in examples for x in e.log_sum]) if known else None,
    )


def pack_last(sequences: Sequence[Sequence[int]]) -> SupervisedBatch:
    """Token sequences of which the last token alone is read, by a reward model."""
    return SupervisedBatch(**_packed([(tokens, _last_alone(tokens)) for tokens in sequences]))


def pack_pairs_last(pairs: Sequence[Pair]) -> PairBatch:
    """As `pack_pairs`, but the last token of each sequence alone is read, by a reward model."""
    sequences = [example.tokens for pair in pairs for example in (pair.chosen, pair.rejected)]
    return PairBatch(**_packed([(tokens, _last_alone(tokens)) for tokens in sequences]))


def _last_alone(tokens: Sequence[int]) -> list[bool]:
    return [False] * (len(tokens) - 1) + [True]


def _packed(sequences: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> dict[str, Tensor]:
    """The fields of a SupervisedBatch or a PairBatch from (tokens, mask) of each sequence."""
    counts = torch.tensor([0, *(len(tokens) for tokens, _ in sequences)], dtype=torch.int32)
    return {
        "tokens_N": torch.tensor([token for tokens, _ in sequences for token in tokens], dtype=torch.int64),
        "cu_seqlens": counts.cumsum(0, dtype=torch.int32),
        "action_mask_N": torch.tensor([learnt for _, mask in sequences for learnt in mask], dtype=torch.bool),
    }


def response_tokens(rollout: Rollout) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of each sequence."""
    starts, tokens, mask = rollout.cu_seqlens.tolist(), rollout.tokens_N, rollout.action_mask_N
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        ids, action = tokens[begin:end], mask[begin:end]
        yield ids[~action].tolist(), ids[action].tolist()


def minibatches(num_sequences: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Sequence indices of each optimizer step, every epoch in a fresh order drawn from `generator`."""
    for _ in range(epochs):
        order = torch.randperm(num_sequences, generator=generator).tolist()
        yield from (order[i : i + size] for i in range(0, num_sequences, size))
