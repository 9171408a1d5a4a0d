"""The contract of the services, whatever carries it: endpoints, requests and replies as named arrays, stable errors.

    reward_v1   tokens_N, cu_seqlens -> rewards_BK, weights_version, model, tokenizer     inference, safe to repeat
    status_v1   -> ServiceStatus                                                          the real test of readiness

A service checks a request before it enqueues it, so that a bad one costs its sender an error and nobody else anything.
Names carry a version: a change that an older client would misread gets a new one.
"""

from concurrent.futures import Future
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from aligner.serving.metrics import ServiceMetrics

Arrays = dict[str, np.ndarray]
REWARD, STATUS = "reward_v1", "status_v1"
TOKEN_TYPES = (np.dtype(np.int32), np.dtype(np.int64))


class Code(Enum):
    """Why a call failed; the names are stable."""

    INVALID = "INVALID"  # the request itself: the same one would fail again
    UNAUTHENTICATED = "UNAUTHENTICATED"
    BUSY = "BUSY"  # the queue is full
    UNAVAILABLE = "UNAVAILABLE"  # nobody there, or about to leave
    DEADLINE = "DEADLINE"
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
    """What a transport carries. metrics: where it counts calls."""

    metrics: ServiceMetrics

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

    def arrays(self) -> Arrays:
        return {"tokens_N": self.tokens_N, "cu_seqlens": self.cu_seqlens}

    @staticmethod
    def of(arrays: Arrays, limits: Limits) -> "Sequences":
        """Raises ServiceError INVALID, which names the array, unless they are whole sequences within the limits."""
        expect(set(arrays) == {"tokens_N", "cu_seqlens"}, f"got {sorted(arrays)}, expected tokens_N and cu_seqlens")
        for name, array in arrays.items():
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
class ServiceStatus:
    """What a service is and how it does.

    kind: "reward". model, tokenizer: digests; the tokenizer's is compared with the caller's. vocabulary: token ids.
    attributes: numbers a response. request_tokens, context: tokens that a request, and a sequence, may have.
    weights_version: of the weights that answer. queue: requests that wait. beat_age_s: seconds since all ranks met.
    draining: it takes no more requests.
    """

    kind: str
    model: str
    tokenizer: str
    vocabulary: int
    attributes: int
    request_tokens: int
    context: int
    weights_version: int
    queue: int
    beat_age_s: float
    draining: bool

    def arrays(self) -> Arrays:
        return {name: np.array(value) for name, value in asdict(self).items()}

    @staticmethod
    def of(arrays: Arrays) -> "ServiceStatus":
        return ServiceStatus(**{name: array.item() for name, array in arrays.items()})


def expect(condition: bool, message: str) -> None:
    """Raise ServiceError INVALID unless the condition holds."""
    if not condition:
        raise ServiceError(Code.INVALID, f"{message}.")
