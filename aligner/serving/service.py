"""The contract of the services, whatever carries it: endpoints, requests and replies as named arrays, stable errors.

    reward_v1         RewardRequest -> rewards_BK, weights_version, model, tokenizer            inference
    critic_values_v1  ValuesRequest -> values_A, weights_version, model, tokenizer              inference
    critic_train_v1   TrainRequest -> weights_version, replayed, names, statistics_SK           done once
    critic_save_v1    run_id, weights_version -> weights_version                                done once
    status_v1         -> ServiceStatus                                                          is it ready?

Rewards and values come as `dtype` says, float32 unless it is there; bfloat16 travels as uint16, the upper half of a
float32. Instead of tokens both take `rows` (serving.text).
All are safe to repeat. A service checks a request before it enqueues it, so that a bad one costs its sender an error
and nobody else anything.
A critic's weights_version counts its training requests. Whoever asks says which version is to answer, and is refused
with both numbers when another one would; so no value comes from other weights than its caller believes.
Names carry a version: a change that an older client would misread gets a new one.
"""

import hashlib
import itertools
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from aligner.serving.metrics import ServiceMetrics

Arrays = dict[str, np.ndarray]
REWARD, STATUS = "reward_v1", "status_v1"
VALUES, TRAIN, SAVE = "critic_values_v1", "critic_train_v1", "critic_save_v1"
TOKEN_TYPES = (np.dtype(np.int32), np.dtype(np.int64))
ANSWERS = ("float32", "bfloat16")


class Code(Enum):
    """Why a call failed; the names are stable."""

    INVALID = "INVALID"  # the request itself: the same one would fail again
    UNAUTHENTICATED = "UNAUTHENTICATED"
    BUSY = "BUSY"  # the queue is full
    UNAVAILABLE = "UNAVAILABLE"  # nobody there, or about to leave
    DEADLINE = "DEADLINE"
    PRECONDITION = "PRECONDITION"  # the service's weights, or the run that they belong to, are others
    FAILED = "FAILED"  # the service's own work

    @property
    def repeatable(self) -> bool:
        """Whether the same request may succeed later."""
        return self in (Code.BUSY, Code.UNAVAILABLE, Code.DEADLINE)


class ServiceError(Exception):
    """What went wrong, in words for the caller and without anything of the service's inside."""

    def __init__(self, code: Code, message: str):
        super().__init__(message)
        self.code = code


class Service(Protocol):
    """What a transport carries. metrics: where it counts calls. request_bytes: of a frame, at most."""

    metrics: ServiceMetrics
    endpoints: tuple[str, ...]
    request_bytes: int

    def call(self, endpoint: str, request: Arrays) -> Future:
        """The future Arrays of the reply. Raises ServiceError when the request is refused at once."""
        ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for. context: tokens of a sequence. tokens: of a request."""

    vocabulary: int
    context: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Packed sequences: tokens_N int32 or int64, cu_seqlens (B + 1,) int32 or int64, prefix sums of their lengths."""

    tokens_N: np.ndarray
    cu_seqlens: np.ndarray

    @staticmethod
    def pack(sequences: list[list[int]]) -> "Sequences":
        lengths = [len(sequence) for sequence in sequences]
        tokens = [token for sequence in sequences for token in sequence]
        return Sequences(
            tokens_N=np.array(tokens, np.int32), cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        )

    @staticmethod
    def join(parts: list["Sequences"]) -> "Sequences":
        """All their sequences, one part after the other."""
        ends = [part.cu_seqlens[1:] for part in parts]
        before = np.cumsum([0, *(part.cu_seqlens[-1] for part in parts)])
        shifted = [end + offset for end, offset in zip(ends, before[:-1], strict=True)]
        return Sequences(
            tokens_N=np.concatenate([part.tokens_N for part in parts]), cu_seqlens=np.concatenate([[0], *shifted])
        )

    @staticmethod
    def shares(parts: list["Sequences"]) -> list[range]:
        """Where each part's sequences are among those of all, by index."""
        ends = np.cumsum([0, *(len(part.cu_seqlens) - 1 for part in parts)]).tolist()
        return [range(*pair) for pair in itertools.pairwise(ends)]

    def arrays(self) -> Arrays:
        return {"tokens_N": self.tokens_N, "cu_seqlens": self.cu_seqlens}

    @staticmethod
    def of(arrays: Arrays, limits: Limits, *others: str) -> "Sequences":
        """Raises ServiceError INVALID, which names the array, unless they are whole sequences within the limits.

        others: names of the arrays that come with them.
        """
        names = ("tokens_N", "cu_seqlens", *others)
        expect(set(arrays) == set(names), f"got {sorted(arrays)}, expected {' and '.join(names)}")
        for name in ("tokens_N", "cu_seqlens"):
            array = arrays[name]
            expect(
                array.dtype in TOKEN_TYPES and array.ndim == 1,
                f"{name} is {array.dtype} of shape {array.shape}, expected int32 or int64 of one dimension",
            )
        tokens, ends = arrays["tokens_N"], arrays["cu_seqlens"].astype(np.int64)
        expect(len(ends) > 1 and ends[0] == 0, "cu_seqlens does not begin with 0 and hold the end of a sequence")
        expect(ends[-1] == len(tokens), f"cu_seqlens ends with {ends[-1]}, but tokens_N has {len(tokens)} tokens")
        lengths = np.diff(ends)
        expect(lengths.min() > 0, "cu_seqlens does not grow: every sequence needs a token")
        expect(
            lengths.max() <= limits.context,
            f"the longest sequence has {lengths.max()} tokens, the model's context is {limits.context}",
        )
        expect(len(tokens) <= limits.tokens, f"got {len(tokens)} tokens, a request may have {limits.tokens}")
        low, high = int(tokens.min()), int(tokens.max())
        expect(
            low >= 0 and high < limits.vocabulary,
            f"tokens_N has ids from {low} to {high}, expected 0 to {limits.vocabulary - 1}",
        )
        return Sequences(tokens_N=tokens.astype(np.int64), cu_seqlens=ends)


@dataclass(frozen=True, kw_only=True)
class RewardRequest:
    """Rewards of packed sequences. dtype: of the answer."""

    sequences: Sequences
    dtype: str = "float32"

    def arrays(self) -> Arrays:
        return self.sequences.arrays() | {"dtype": np.array(self.dtype)}

    @staticmethod
    def of(arrays: Arrays, limits: Limits) -> "RewardRequest":
        """Raises ServiceError INVALID."""
        rest, dtype = _split_dtype(arrays)
        return RewardRequest(sequences=Sequences.of(rest, limits), dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class ValuesRequest:
    """Values of the action tokens of packed sequences.

    action_mask_N: (N,) bool, true for the last token of every sequence. weights_version: that is to answer.
    dtype: of the answer.
    """

    sequences: Sequences
    action_mask_N: np.ndarray
    weights_version: int
    dtype: str = "float32"

    def arrays(self) -> Arrays:
        named = {"action_mask_N": self.action_mask_N, "weights_version": np.array(self.weights_version)}
        return self.sequences.arrays() | named | {"dtype": np.array(self.dtype)}

    @staticmethod
    def of(arrays: Arrays, limits: Limits) -> "ValuesRequest":
        """Raises ServiceError INVALID."""
        rest, dtype = _split_dtype(arrays)
        sequences = Sequences.of(rest, limits, "action_mask_N", "weights_version")
        return ValuesRequest(
            sequences=sequences,
            action_mask_N=_mask(rest, sequences),
            weights_version=integer(rest, "weights_version"),
            dtype=dtype,
        )


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """One training of a critic: optimizer steps on a rollout, done once for (run_id, weights_version).

    old_values_A, returns_A: (A,) float32, reward units, of the action tokens in order. weights_A: (A,) float32 >= 0.
    order_I, order_ends: int32; sequence indices of all optimizer steps, and where in them each one ends.
    run_id: of the run that trains. weights_version: of the weights that it is to change, so the trainings before it.
    """

    sequences: Sequences
    action_mask_N: np.ndarray
    old_values_A: np.ndarray
    returns_A: np.ndarray
    weights_A: np.ndarray
    order_I: np.ndarray
    order_ends: np.ndarray
    run_id: str
    weights_version: int

    def arrays(self) -> Arrays:
        named = {name: np.array(value) for name, value in vars(self).items() if name != "sequences"}
        return self.sequences.arrays() | named

    def digest(self) -> str:
        """Of all that it holds: a repetition has the same one."""
        digest = hashlib.sha256()
        for name, array in sorted(self.arrays().items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(array.item().encode() if array.dtype.kind == "U" else np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def steps(self) -> list[list[int]]:
        """Sequence indices of each optimizer step."""
        return [part.tolist() for part in np.split(self.order_I, self.order_ends[:-1])]

    @staticmethod
    def of(arrays: Arrays, limits: Limits) -> "TrainRequest":
        """Raises ServiceError INVALID."""
        numbers, order = ("old_values_A", "returns_A", "weights_A"), ("order_I", "order_ends")
        sequences = Sequences.of(arrays, limits, "action_mask_N", *numbers, *order, "run_id", "weights_version")
        mask_N = _mask(arrays, sequences)
        for name in numbers:
            array, num = arrays[name], int(mask_N.sum())
            expect(
                array.dtype == np.float32 and array.shape == (num,) and np.isfinite(array).all(),
                f"{name} is {array.dtype} of shape {array.shape}, expected {num} finite numbers of float32, one for "
                "each action token",
            )
        for name in order:
            array = arrays[name]
            expect(
                array.dtype == np.int32 and array.ndim == 1 and len(array),
                f"{name} is {array.dtype} of shape {array.shape}, expected int32 of one dimension",
            )
        index, ends, num = arrays["order_I"], arrays["order_ends"], len(sequences.cu_seqlens) - 1
        expect(
            index.min() >= 0 and index.max() < num, f"order_I has indices from {index.min()} to {index.max()} of {num}"
        )
        expect(
            ends[0] > 0 and (np.diff(ends) > 0).all() and ends[-1] == len(index),
            "order_ends must grow from above 0 to the length of order_I",
        )
        expect((arrays["weights_A"] >= 0).all(), "weights_A has a negative number")
        return TrainRequest(
            sequences=sequences,
            action_mask_N=mask_N,
            **{name: arrays[name] for name in (*numbers, *order)},
            run_id=text(arrays, "run_id"),
            weights_version=integer(arrays, "weights_version"),
        )


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """A checkpoint of these weights of this run."""

    run_id: str
    weights_version: int

    def arrays(self) -> Arrays:
        return {name: np.array(value) for name, value in vars(self).items()}

    @staticmethod
    def of(arrays: Arrays) -> "SaveRequest":
        """Raises ServiceError INVALID."""
        names = {"run_id", "weights_version"}
        expect(set(arrays) == names, f"got {sorted(arrays)}, expected run_id and weights_version")
        return SaveRequest(run_id=text(arrays, "run_id"), weights_version=integer(arrays, "weights_version"))


def to_answer(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers as they travel: in bfloat16 the nearest of it, of two the even one. Not of NaN."""
    if dtype == "float32":
        return numbers
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_answer(array: np.ndarray) -> np.ndarray:
    """The float32 numbers of an answer."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def _split_dtype(arrays: Arrays) -> tuple[Arrays, str]:
    """The other arrays, and the dtype of the answer."""
    dtype = text(arrays, "dtype") if "dtype" in arrays else ANSWERS[0]
    expect(dtype in ANSWERS, f"dtype is {dtype!r}, expected {' or '.join(ANSWERS)}")
    return {name: array for name, array in arrays.items() if name != "dtype"}, dtype


def _mask(arrays: Arrays, sequences: Sequences) -> np.ndarray:
    mask_N, num = arrays["action_mask_N"], len(sequences.tokens_N)
    expect(
        mask_N.dtype == np.bool_ and mask_N.shape == (num,),
        f"action_mask_N is {mask_N.dtype} of shape {mask_N.shape}, expected {num} of bool",
    )
    expect(mask_N[sequences.cu_seqlens[1:] - 1].all(), "action_mask_N must be true for the last token of a sequence")
    return mask_N


def integer(arrays: Arrays, name: str) -> int:
    """A number that is 0 or more. Raises ServiceError INVALID."""
    array = arrays[name]
    expect(array.dtype in TOKEN_TYPES and array.ndim == 0 and array >= 0, f"{name} must be an integer, 0 or more")
    return array.item()


def text(arrays: Arrays, name: str, longest: int | None = 100) -> str:
    """A text. longest: letters; None for any. Raises ServiceError INVALID."""
    array = arrays[name]
    expect(array.dtype.kind == "U" and array.ndim == 0, f"{name} must be a text")
    letters, bounds = len(array.item()), f"1 to {longest}" if longest else "1 or more"
    expect(letters and not (longest and letters > longest), f"{name} must have {bounds} letters, got {letters}")
    return array.item()


@dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """What a service is and how it does.

    kind: "reward" or "critic". model, tokenizer: digests; the tokenizer's is compared with the caller's.
    vocabulary: token ids. attributes: numbers a response.
    request_tokens, context: tokens that a request, and a sequence, may have. request_bytes: of its frame.
    weights_version: of the weights that answer. queue: requests that wait. beat_age_s: seconds since all ranks met.
    draining: it takes no more requests.
    run_id: of the run that trains it; empty before its first training. checkpoints: versions that it could go on from,
    with commas. settings: a critic's options, as YAML.
    """

    kind: str
    model: str
    tokenizer: str
    vocabulary: int
    attributes: int
    request_tokens: int
    request_bytes: int
    context: int
    weights_version: int
    queue: int
    beat_age_s: float
    draining: bool
    run_id: str = ""
    checkpoints: str = ""
    settings: str = ""

    def arrays(self) -> Arrays:
        return {name: np.array(value) for name, value in asdict(self).items()}

    @staticmethod
    def of(arrays: Arrays) -> "ServiceStatus":
        return ServiceStatus(**{name: array.item() for name, array in arrays.items()})


def expect(condition: bool, message: str) -> None:
    """Raise ServiceError INVALID unless the condition holds."""
    if not condition:
        raise ServiceError(Code.INVALID, f"{message}.")


def resolved(reply: Arrays) -> Future:
    """A future that has its result."""
    future: Future = Future()
    future.set_result(reply)
    return future
