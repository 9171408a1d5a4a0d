"""A reward model that another job serves, behind the methods of one in this process."""

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aligner.serving.grpc_transport import Connection
from aligner.serving.service import REWARD, STATUS, Arrays, Code, Sequences, ServiceError, ServiceStatus

PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0  # before a call is tried again: doubled every time, and a half of it by chance


@dataclass(frozen=True, kw_only=True)
class Patience:
    """deadline_s: of one call; a peer that is gone is noticed earlier, by gRPC's pings. total_s: of all tries of it.
    start_s: of those before the run begins."""

    deadline_s: float = 600.0
    total_s: float = 600.0
    start_s: float = 60.0


class RemoteReward:
    """A served reward model.

        r = sum_k weight_k r_k

    address: host:port of `python -m aligner.serve reward`. weights: of the attributes that it gives.
    token_file: file with the service's secret; empty for none. authority: PEM file of the certificates to trust; with
        it the connection is encrypted.
    """

    def __init__(
        self,
        address: str,
        weights: Sequence[float],
        *,
        token_file: str = "",
        authority: str = "",
        patience: Patience | None = None,
    ):
        self.address, self._weights_K, self._patience = address, np.array(list(weights)), patience or Patience()
        token = read_secret(token_file, "reward.token-file") if token_file else ""
        trusted = read_bytes(authority, "reward.tls-ca") if authority else None
        self._connection = Connection(address, token=token, authority=trusted)
        self._status: ServiceStatus | None = None
        self._given_up = threading.Event()

    def check(self, tokenizer: str) -> None:
        """Wait until it is ready. Raises ValueError when it is not in time, or does not fit.

        tokenizer: digest of the run's.
        """
        status = ServiceStatus.of(self._call(STATUS, {}, self._patience.start_s))
        if status.kind != "reward":
            raise ValueError(f"{self.address} serves a {status.kind}, expected a reward model.")
        if status.tokenizer != tokenizer:
            raise ValueError(
                f"the reward model at {self.address} has another tokenizer than the model, so it cannot read its "
                "responses; serve one of the same family."
            )
        if status.attributes != len(self._weights_K):
            raise ValueError(
                f"reward.attribute-weights has {len(self._weights_K)} numbers, the reward model at {self.address} "
                f"gives {status.attributes} attributes; give one number each."
            )
        self._status = status

    def score(self, sequences: list[list[int]]) -> list[float]:
        """Rewards of whole sequences, prompts and responses. Raises ValueError when there is no answer."""
        rewards: list[float] = []
        for part in _parts(sequences, self._status.request_tokens):
            reply = self._call(REWARD, Sequences.pack(part).arrays(), self._patience.total_s)
            if any(reply[name].item() != getattr(self._status, name) for name in ("model", "tokenizer")):
                raise ValueError(
                    f"{self.address} serves another reward model than when this run began; serve the first one again."
                )
            rewards += (reply["rewards_BK"].astype(np.float64) @ self._weights_K).tolist()
        if len(rewards) != len(sequences) or not np.isfinite(rewards).all():
            raise ValueError(
                f"the reward model at {self.address} gave {len(rewards)} rewards for {len(sequences)} responses, or "
                "one that is not finite; look at its log."
            )
        return rewards

    def _call(self, endpoint: str, request: Arrays, total_s: float) -> Arrays:
        """Tried again as long as that may help: inference changes nothing."""
        began, tries, pause = time.monotonic(), 0, PAUSE_S
        since = time.strftime("%H:%M:%S")
        while True:
            if self._given_up.is_set():
                raise ValueError(f"the reward model at {self.address} has not answered another request.")
            tries += 1
            left = total_s - (time.monotonic() - began)
            try:
                return self._connection.call(endpoint, request, min(self._patience.deadline_s, max(left, 0.1)))
            except ServiceError as error:
                left = total_s - (time.monotonic() - began)
                if not error.code.repeatable:
                    hint = "give --reward.token-file" if error.code is Code.UNAUTHENTICATED else "look at its log"
                    raise ValueError(
                        f"the reward model at {self.address} refused: {error} ({error.code.value}); {hint}."
                    ) from None
                if left <= 0:
                    self._given_up.set()
                    raise ValueError(
                        f"the reward model at {self.address} has not answered since {since} ({tries} tries; the last "
                        f"one: {error}); check that `python -m aligner.serve reward` runs there, that its port is open "
                        "to this machine, and whether it speaks TLS."
                    ) from None
            self._given_up.wait(min(pause * random.uniform(0.5, 1.0), left))
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _parts(sequences: list[list[int]], most: int) -> list[list[list[int]]]:
    """Runs of sequences of at most `most` tokens; a longer sequence makes one of its own."""
    parts, tokens = [], 0
    for sequence in sequences:
        if not parts or tokens + len(sequence) > most:
            parts.append([])
            tokens = 0
        parts[-1].append(sequence)
        tokens += len(sequence)
    return parts


def read_bytes(file: str, option: str) -> bytes:
    """Raises ValueError, which names the option, when the file cannot be read."""
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"--{option} {file!r} cannot be read ({error.strerror}); name a file.") from None


def read_secret(file: str, option: str) -> str:
    """The token in a file, without white space around it. Raises ValueError when there is none."""
    secret = read_bytes(file, option).decode(errors="replace").strip()
    if not secret.isascii() or not secret.isprintable() or len(secret) < 16:
        raise ValueError(
            f"--{option} {file!r} holds no token of 16 or more printable characters; make one: openssl rand -hex 32."
        )
    return secret
