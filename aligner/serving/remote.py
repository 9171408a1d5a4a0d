"""Services of other jobs, asked with patience, and the reward model among them."""

import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aligner.serving.access import AccessConfig
from aligner.serving.service import (
    REWARD,
    STATUS,
    Arrays,
    Code,
    RewardRequest,
    Sequences,
    ServiceError,
    ServiceStatus,
    from_answer,
)
from aligner.serving.text import ROWS

PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0  # before a call is tried again: doubled every time, and a half of it by chance


@dataclass(frozen=True, kw_only=True)
class Patience:
    """deadline_s: of one call; a peer that is gone is noticed earlier, by gRPC's pings. total_s: of all tries of it.
    start_s: of those before the run begins."""

    deadline_s: float = 600.0
    total_s: float = 1200.0  # more than one call's, for a service that takes a request and never answers
    start_s: float = 60.0


class _Server:
    """One of several that serve the same. outstanding: tokens that it works on for this process."""

    def __init__(self, connection):
        self.connection, self.outstanding, self.rests_until = connection, 0, 0.0


class Remote:
    """A service, asked again as long as that may help; any thread may call.

    what: the service in words, for errors. options: group of the options that name it here, its command too.
    address: host:port; of several servers of the same, with + between them, the one with the fewest outstanding tokens
    is asked. access: secret and certificates.
    """

    def __init__(
        self, what: str, address: str, *, options: str, access: AccessConfig, patience: Patience | None = None
    ):
        self.what, self.address, self.patience = what, address, patience or Patience()
        self._options = options
        self._servers = [_Server(access.connect(one, options)) for one in address.split("+")]
        self._lock = threading.Lock()
        self._given_up = threading.Event()

    def start(self, kind: str, tokenizer: str | None) -> ServiceStatus:
        """Wait until all its servers are ready. Raises ValueError when one is not in time, or does not fit.

        tokenizer: digest of the run's; None for who sends text.
        """
        status = None
        for server in self._servers:
            status = ServiceStatus.of(self.call(STATUS, {}, self.patience.start_s, among=[server]))
            if status.kind != kind:
                raise ValueError(f"{self.address} serves a {status.kind}, expected a {self.what}.")
            if tokenizer is not None and status.tokenizer != tokenizer:
                raise ValueError(
                    f"the {self.what} at {self.address} has another tokenizer than the model, so it cannot read its "
                    "responses; serve one of the same family."
                )
        return status

    def status(self) -> ServiceStatus:
        return ServiceStatus.of(self.call(STATUS, {}))

    def call(
        self,
        endpoint: str,
        request: Arrays,
        total_s: float | None = None,
        *,
        passes: tuple[Code, ...] = (),
        among: list[_Server] | None = None,
    ) -> Arrays:
        """The reply. Raises ValueError, or ServiceError for the codes in `passes`.

        total_s: seconds of all tries. among: the servers to choose from; None for all.
        """
        total_s = self.patience.total_s if total_s is None else total_s
        began, tries, pause = time.monotonic(), 0, PAUSE_S
        since = time.strftime("%H:%M:%S")
        while True:
            if self._given_up.is_set():
                raise ValueError(f"the {self.what} at {self.address} has not answered another request.")
            tries += 1
            left = total_s - (time.monotonic() - began)
            server = self._choose(among or self._servers, len(request.get("tokens_N", ())))
            try:
                return server.connection.call(endpoint, request, min(self.patience.deadline_s, max(left, 0.1)))
            except ServiceError as error:
                left = total_s - (time.monotonic() - began)
                if error.code in passes:
                    raise
                if not error.code.repeatable:
                    unknown = error.code is Code.UNAUTHENTICATED
                    hint = f"give --{self._options}.token-file" if unknown else "look at its log"
                    raise ValueError(
                        f"the {self.what} at {self.address} refused: {error} ({error.code.value}); {hint}."
                    ) from None
                if left <= 0:
                    self._given_up.set()
                    raise ValueError(
                        f"the {self.what} at {self.address} has not answered since {since} ({tries} tries; the last "
                        f"one: {error}); check that `python -m aligner.serve {self._options}` runs there, that its "
                        "port is open to this machine, and whether it speaks TLS."
                    ) from None
                server.rests_until = time.monotonic() + pause
            finally:
                self._release(server, len(request.get("tokens_N", ())))
            if not self._another_is_ready(among):
                self._given_up.wait(min(pause * random.uniform(0.5, 1.0), left))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _choose(self, servers: list[_Server], tokens: int) -> _Server:
        with self._lock:
            now = time.monotonic()
            server = min(servers, key=lambda s: (s.rests_until > now, s.outstanding))
            server.outstanding += tokens
        return server

    def _release(self, server: _Server, tokens: int) -> None:
        with self._lock:
            server.outstanding -= tokens

    def _another_is_ready(self, among: list[_Server] | None) -> bool:
        return any(server.rests_until <= time.monotonic() for server in among or self._servers)


class RemoteReward:
    """A served reward model.

        r = sum_k weight_k r_k

    address: host:port of `python -m aligner.serve reward`, several of one model with + between them.
    weights: of the attributes that it gives. access: secret and certificates. dtype: that it answers in.
    """

    def __init__(
        self,
        address: str,
        weights: Sequence[float],
        access: AccessConfig | None = None,
        patience: Patience | None = None,
        dtype: str = "float32",
    ):
        self.address, self._weights_K, self._dtype = address, np.array(list(weights)), dtype
        self._remote = Remote(
            "reward model", address, options="reward", access=access or AccessConfig(), patience=patience
        )
        self._status: ServiceStatus | None = None

    def check(self, tokenizer: str | None = None) -> None:
        """Wait until it is ready. Raises ValueError when it is not in time, or does not fit.

        tokenizer: digest of the run's; None for who sends text.
        """
        status = self._remote.start("reward", tokenizer)
        if status.attributes != len(self._weights_K):
            raise ValueError(
                f"reward.attribute-weights has {len(self._weights_K)} numbers, the reward model at {self.address} "
                f"gives {status.attributes} attributes; give one number each."
            )
        self._status = status

    def score(self, sequences: list[list[int]]) -> list[float]:
        """Rewards of whole sequences, prompts and responses. Raises ValueError when there is no answer."""
        rewards: list[float] = []
        for part in parts(list(map(len, sequences)), self._status.request_tokens):
            packed = Sequences.pack([sequences[i] for i in part])
            rewards += self._ask(RewardRequest(sequences=packed, dtype=self._dtype).arrays())
        self._expect_one_each(rewards, len(sequences))
        return rewards

    def score_rows(self, rows: list[dict]) -> list[float]:
        """Rewards of rows as of a data set of aligner.sft, which the service makes tokens of.

        {"prompt": ..., "completion": ...}, {"messages": [...]} and the like. Raises ValueError when there is no answer.
        """
        rewards = self._ask({ROWS: np.array(json.dumps(rows)), "dtype": np.array(self._dtype)})
        self._expect_one_each(rewards, len(rows))
        return rewards

    def _ask(self, request: Arrays) -> list[float]:
        reply = self._remote.call(REWARD, request)
        check_identity(self._remote, reply, self._status)
        return (from_answer(reply["rewards_BK"]).astype(np.float64) @ self._weights_K).tolist()

    def _expect_one_each(self, rewards: list[float], num: int) -> None:
        if len(rewards) != num or not np.isfinite(rewards).all():
            raise ValueError(
                f"the reward model at {self.address} gave {len(rewards)} rewards for {num} responses, or one that is "
                "not finite; look at its log."
            )


def check_identity(remote: Remote, reply: Arrays, first: ServiceStatus) -> None:
    """Raise ValueError when a reply does not come from the model and tokenizer that the service had at first."""
    if any(reply[name].item() != getattr(first, name) for name in ("model", "tokenizer")):
        raise ValueError(
            f"{remote.address} serves another {remote.what} than when this run began; serve the first one again."
        )


def parts(lengths: list[int], most: int) -> list[list[int]]:
    """Runs of sequences, by index, of at most `most` tokens; a longer sequence makes one of its own."""
    runs, tokens = [], 0
    for i, length in enumerate(lengths):
        if not runs or tokens + length > most:
            runs.append([])
            tokens = 0
        runs[-1].append(i)
        tokens += length
    return runs
