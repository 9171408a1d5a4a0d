"""A critic that another job serves, behind the methods and futures of one in this process."""

import itertools
import json
import sys
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aligner.data.batch import Rollout
from aligner.models.critic import CriticConfig
from aligner.models.network import Stats
from aligner.run.atomic import atomic_write
from aligner.run.background import Background
from aligner.run.distributed import gather, gather_lists, is_main
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
    from_answer,
)

AT_ONCE = 8  # requests for values that leave while responses are sampled
ROUNDS = 20  # times that a critic may fall back before one request of a run is answered


@dataclass(frozen=True, kw_only=True)
class ServedCriticConfig(CriticConfig, AccessConfig):
    url: str = ""
    """host:port of `python -m aligner.serve critic`, started with the same --critic options; empty trains it here."""
    answer_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which it answers with values."""

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


@dataclass(frozen=True)
class Values:
    """Values of a rollout to come; all ranks call result().

    asked: (sequences, what RemoteCritic.ahead() gave) of each part that this rank sampled.
    """

    critic: "RemoteCritic"
    rollout: Rollout
    asked: list[tuple[list[int], Future]]
    version: int

    def result(self) -> Tensor:
        """values_N of the action tokens, float32, reward units. Raises ValueError when there is no answer."""
        answers = gather_lists(lambda: [(sequences, future.result()) for sequences, future in self.asked])
        behind = [sequences for sequences, values_A in answers if values_A is None]
        answers += gather_lists(lambda: self._again(behind) if is_main() else [])
        values_N = torch.zeros(len(self.rollout.tokens_N))
        starts, mask_N = self.rollout.cu_seqlens.tolist(), self.rollout.action_mask_N
        for sequences, values_A in answers:
            if values_A is not None:
                index_N = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in sequences])
                values_N[index_N[mask_N[index_N]]] = torch.from_numpy(values_A)
        return values_N

    def _again(self, behind: list[list[int]]) -> list[tuple[list[int], np.ndarray]]:
        """Of a critic that was behind when it was asked."""
        ask = partial(self.critic.ask_values, version=self.version, catch_up=True)
        return [(sequences, ask(self.rollout.take(sequences))) for sequences in behind]


class FromFirstRank:
    """The first rank's future, for all of them: all call result(), and all get it or raise."""

    def __init__(self, future: Future | None):
        self._future = future

    def result(self) -> Any:
        return gather(lambda: self._future.result() if self._future else None)[0]


class RemoteCritic:
    """A served critic. All ranks make it and call its methods; those that sample ask for values, the rest is the
    first one's.

    A request names the version of the weights that it wants, which is the number of trainings that this run has asked
    for. When the service has fewer, because it was started again from its last save, it is given the missing trainings
    from the run's log first.

    remote: None on ranks that do not sample. tokenizer: digest of the run's.
    settings: as of job.critic.critic_settings. run: the run's folder, for the log.
    saved: the plain values that state_dict() gave; empty at a first start. saves: steps of the run's checkpoints.
    dtype: of the values that it answers with.
    Raises ValueError on all ranks unless the service is ready, fits, and is where the run is.
    """

    networks = ()

    def __init__(
        self,
        remote: Remote | None,
        tokenizer: str,
        settings: str,
        run: Path,
        saved: dict,
        saves: list[int],
        dtype: str = "float32",
    ):
        self._remote, self._log = remote, StepLog(run / "critic-steps")
        self._version, self._run_id = saved.get("version", 0), saved.get("run_id") or uuid.uuid4().hex
        self._settings, self._dtype = settings, dtype
        self._worker = Background("critic")  # one thread: requests leave in the order of their versions
        self._callers = Background("critic-values", AT_ONCE)
        self._first: ServiceStatus = gather(lambda: self._begin(tokenizer, saves) if is_main() else None)[0]

    def ahead(self, part: Rollout) -> Future:
        """Values of its action tokens, (A,) float32; None of a critic that has fallen back. On a rank that samples."""
        return self._callers.submit(self._ask_ahead, part, self._version)

    def infer(self, rollout: Rollout, asked: list[tuple[list[int], Future]]) -> Values:
        """values_N of the action tokens, float32, reward units.

        asked: (sequences, what ahead() gave) of each part that this rank sampled.
        """
        return Values(self, rollout, asked, self._version)

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

    def _begin(self, tokenizer: str, saves: list[int]) -> ServiceStatus:
        status = self._remote.start("critic", tokenizer)
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
        return status

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

    def _ask_ahead(self, part: Rollout, version: int) -> np.ndarray | None:
        try:
            return self.ask_values(part, version, catch_up=False)
        except ServiceError:
            return None  # the first rank has the trainings that it lacks, and asks again

    def ask_values(self, part: Rollout, version: int, *, catch_up: bool) -> np.ndarray:
        """(A,) float32, reward units: values of a part's action tokens by the weights of this version.

        catch_up: a critic that has fallen back is given what it lacks, else ServiceError is raised.
        """
        once = partial(self._remote.call, passes=(Code.PRECONDITION,))
        ask = partial(self._ask, version=version) if catch_up else once
        starts, values = part.cu_seqlens.tolist(), []
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        for run in parts(lengths, self._first.request_tokens):
            begin, end = starts[run[0]], starts[run[-1] + 1]
            request = ValuesRequest(
                sequences=Sequences(
                    tokens_N=part.tokens_N[begin:end].numpy().astype(np.int32),
                    cu_seqlens=(part.cu_seqlens[run[0] : run[-1] + 2] - begin).numpy(),
                ),
                action_mask_N=part.action_mask_N[begin:end].numpy(),
                weights_version=version,
                dtype=self._dtype,
            ).arrays()
            reply = ask(VALUES, request)
            check_identity(self._remote, reply, self._first)
            values.append(from_answer(reply["values_A"]))
        values_A = np.concatenate(values)
        if not np.isfinite(values_A).all():
            raise ValueError(f"the critic at {self._remote.address} gave a value that is not finite; look at its log.")
        return values_A

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
        size, most = sum(array.nbytes for array in request.values()), self._first.request_bytes
        if size > most:
            raise ValueError(
                f"a training has {size} bytes, the critic at {self._remote.address} takes {most} in a request; "
                "train on fewer or shorter responses, or serve it by gRPC or with more of /dev/shm."
            )
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
