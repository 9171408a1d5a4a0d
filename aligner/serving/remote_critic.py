"""A critic that another job serves, behind the methods and futures of one in this process."""

import json
import sys
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aligner.models.critic import CriticConfig
from aligner.models.network import Stats
from aligner.run.atomic import atomic_write
from aligner.run.background import Background
from aligner.run.distributed import gather, is_main
from aligner.serving.access import AccessConfig
from aligner.serving.grpc_transport import from_frame, to_frame
from aligner.serving.remote import Remote, check_identity, parts
from aligner.serving.service import (
    SAVE,
    TRAIN,
    VALUES,
    Arrays,
    Code,
    SaveRequest,
    Sequences,
    ServiceError,
    ServiceStatus,
    TrainRequest,
    ValuesRequest,
)

ROUNDS = 20  # times that a critic may fall back before one request of a run is answered


@dataclass(frozen=True, kw_only=True)
class ServedCriticConfig(CriticConfig, AccessConfig):
    url: str = ""
    """host:port of `python -m aligner.serve critic`, started with the same --critic options; empty trains it here."""

    def __post_init__(self):
        if "+" in self.url:
            raise ValueError(f"critic.url is {self.url}, but a critic has one server; give one host:port.")


class StepLog:
    """Training requests on disk, from before they are sent until the critic has saved what they made of it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, version: int, request: Arrays) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self._file(version), to_frame(request))

    def read(self, version: int) -> Arrays:
        """Raises ValueError when it is not there."""
        try:
            return from_frame(self._file(version).read_bytes())
        except (OSError, ServiceError) as error:
            raise ValueError(f"{self._file(version)} cannot be read ({error}).") from None

    def versions(self) -> list[int]:
        return sorted(int(file.stem) for file in self.folder.glob("*.frame") if file.stem.isdigit())

    def forget(self, versions: Callable[[int], bool]) -> None:
        for version in filter(versions, self.versions()):
            self._file(version).unlink()

    def _file(self, version: int) -> Path:
        return self.folder / f"{version}.frame"


class FromFirstRank:
    """The first rank's future, for all of them: all call result(), and all get it or raise."""

    def __init__(self, future: Future | None):
        self._future = future

    def result(self) -> Any:
        return gather(lambda: self._future.result() if self._future else None)[0]


class RemoteCritic:
    """A served critic. All ranks make it and call its methods; the first one talks to the service.

    A request names the version of the weights that it wants, which is the number of trainings that this run has asked
    for. When the service has fewer, because it was started again from its last save, it is given the missing trainings
    from the run's log first.

    remote: None on the other ranks. tokenizer: digest of the run's. settings: as of job.critic.critic_settings.
    run: the run's folder, for the log. saved: the plain values that state_dict() gave; empty at a first start.
    saves: steps of the run's checkpoints.
    Raises ValueError on all ranks unless the service is ready, fits, and is where the run is.
    """

    networks = ()

    def __init__(self, remote: Remote | None, tokenizer: str, settings: str, run: Path, saved: dict, saves: list[int]):
        self._remote, self._log = remote, StepLog(run / "critic-steps")
        self._version, self._run_id = saved.get("version", 0), saved.get("run_id") or uuid.uuid4().hex
        self._settings, self._first = settings, None
        self._worker = Background("critic")  # one thread: requests leave in the order of their versions
        gather(lambda: self._begin(tokenizer, saves) if is_main() else None)

    def infer(self, rollout) -> FromFirstRank:
        """values_N of the action tokens, float32, reward units."""
        return self._submit(self._values, rollout, self._version)

    def train(self, batch, steps: Iterable[list[int]]) -> FromFirstRank:
        """As of serving.local.LocalCritic."""
        version, self._version = self._version, self._version + 1
        return self._submit(self._train, batch, list(steps), version)

    def state_dict(self, *, loading: bool = False) -> dict:
        """What finds the critic again; the service has saved its weights and optimizer when this returns."""
        if loading:
            return {}
        self._submit(self._save, self._version).result()
        return {"run_id": self._run_id, "version": self._version}

    def load_state_dict(self, state: dict) -> None:
        """Nothing: it was made with what state_dict() gave."""

    def _submit(self, call: Callable, *arguments) -> FromFirstRank:
        return FromFirstRank(self._worker.submit(call, *arguments) if is_main() else None)

    def _begin(self, tokenizer: str, saves: list[int]) -> None:
        status = self._first = self._remote.start("critic", tokenizer)
        self._check_settings(status)
        self._check_run(status)
        if status.weights_version > self._version or self._missing(status, self._version):
            common = set(saves) & {int(step) for step in status.checkpoints.split(",") if step}
            advice = "start both anew"
            if common:
                advice = f"give both --resume --resume-step {max(common)}, the newest that both have saved"
            raise ValueError(
                f"this run is at step {self._version} and the critic at {self._remote.address} at step "
                f"{status.weights_version}; {advice}."
            )
        self._log.forget(lambda version: version >= self._version)  # of steps that this run does again

    def _check_settings(self, status: ServiceStatus) -> None:
        theirs, ours = json.loads(status.settings), json.loads(self._settings)
        for name in ours.keys() | theirs.keys():
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"--{name} is {ours.get(name)} here and {theirs.get(name)} at the critic's service "
                    f"{self._remote.address}; give both the same."
                )

    def _check_run(self, status: ServiceStatus) -> None:
        if status.run_id not in ("", self._run_id):
            raise ValueError(
                f"the critic at {self._remote.address} belongs to another run, at its step {status.weights_version}; "
                "start the service with a new --output, or --resume the run that it belongs to."
            )

    def _missing(self, status: ServiceStatus, version: int) -> set[int]:
        """Trainings between the service's version and this one that are not in the log."""
        return set(range(status.weights_version, version)) - set(self._log.versions())

    def _values(self, rollout, version: int) -> Tensor:
        mask_N, starts = rollout.action_mask_N, rollout.cu_seqlens.tolist()
        values_N = torch.zeros(len(mask_N))
        lengths = [end - start for start, end in zip(starts[:-1], starts[1:], strict=True)]
        for part in parts(lengths, self._first.request_tokens):
            begin, end = starts[part[0]], starts[part[-1] + 1]
            request = ValuesRequest(
                sequences=Sequences(
                    tokens_N=rollout.tokens_N[begin:end].numpy().astype(np.int32),
                    cu_seqlens=(rollout.cu_seqlens[part[0] : part[-1] + 2] - begin).numpy(),
                ),
                action_mask_N=mask_N[begin:end].numpy(),
                weights_version=version,
            )
            reply = self._ask(VALUES, request.arrays(), version)
            check_identity(self._remote, reply, self._first)
            values_N[begin:end][mask_N[begin:end]] = torch.from_numpy(reply["values_A"].copy())
        if not values_N.isfinite().all():
            raise ValueError(f"the critic at {self._remote.address} gave a value that is not finite; look at its log.")
        return values_N

    def _train(self, batch, steps: list[list[int]], version: int) -> list[Stats]:
        rollout = batch.rollout
        mask_N = rollout.action_mask_N
        names = ("old_values", "returns", "weights")
        numbers = {f"{name}_A": getattr(batch, f"{name}_N")[mask_N].numpy() for name in names}
        request = TrainRequest(
            sequences=Sequences(
                tokens_N=rollout.tokens_N.numpy().astype(np.int32), cu_seqlens=rollout.cu_seqlens.numpy()
            ),
            action_mask_N=mask_N.numpy(),
            order_I=np.array([i for step in steps for i in step], np.int32),
            order_ends=np.cumsum([len(step) for step in steps]).astype(np.int32),
            run_id=self._run_id,
            weights_version=version,
            **numbers,
        ).arrays()
        self._log.write(version, request)
        reply = self._ask(TRAIN, request, version)
        names = json.loads(reply["names"].item())
        return [dict(zip(names, numbers, strict=True)) for numbers in reply["statistics_SK"].tolist()]

    def _save(self, version: int) -> None:
        self._ask(SAVE, SaveRequest(run_id=self._run_id, weights_version=version).arrays(), version)
        self._log.forget(lambda logged: logged < version)

    def _ask(self, endpoint: str, request: Arrays, version: int) -> Arrays:
        """The reply of the weights of this version, to which the critic is brought first if it has fallen back."""
        for _ in range(ROUNDS):
            try:
                return self._remote.call(endpoint, request, passes=(Code.PRECONDITION,))
            except ServiceError as error:
                said = str(error)
            self._catch_up(version, said)
        raise ValueError(f"the critic at {self._remote.address} falls back again and again ({said}); look at its log.")

    def _catch_up(self, version: int, said: str) -> None:
        """Give the critic the trainings that it lacks, as long as it takes them."""
        status = self._remote.status()
        self._check_settings(status)
        check_identity(self._remote, status.arrays(), self._first)
        self._check_run(status)
        if status.weights_version > version or self._missing(status, version):
            raise ValueError(
                f"the critic at {self._remote.address} is at step {status.weights_version}, this run needs {version} "
                f"({said}); stop both and --resume them from the newest step that both have saved."
            )
        for behind in range(status.weights_version, version):
            print(f"the critic has fallen back: training {behind} again", file=sys.stderr, flush=True)
            try:
                self._remote.call(TRAIN, self._log.read(behind), passes=(Code.PRECONDITION,))
            except ServiceError:
                return  # it has fallen back once more
