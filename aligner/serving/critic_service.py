"""A critic as a service: values, and trainings that are done exactly once, in the order of their versions."""

import json
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch

from aligner.checkpoint import training
from aligner.data.batch import SupervisedBatch, ValueBatch
from aligner.data.encoder import Encoder
from aligner.serving.group import Group
from aligner.serving.local import LocalCritic
from aligner.serving.service import (
    SAVE,
    STATUS,
    TRAIN,
    VALUES,
    Arrays,
    Code,
    Limits,
    SaveRequest,
    Sequences,
    ServiceError,
    ServiceStatus,
    TrainRequest,
    ValuesRequest,
    expect,
    resolved,
    to_answer,
)
from aligner.serving.text import in_tokens

KEPT = 8  # results of trainings, for callers whose answer was lost
Result = tuple[str, str, list[list[float]]]  # digest of the request, names and numbers of its statistics


class CriticService:
    """All ranks make it and run its group, then call finish(); the first one takes requests meanwhile, from any thread.

    group: that works on its requests, with other services' or alone.
    digests: of the "model" and of its "tokenizer". limits: of a request for values. encoder: of one in words.
    settings: what the critic is trained with, as text.
    folder: of the run, for checkpoints. begun: plain values of the checkpoint that it goes on from; empty at the start.
    """

    endpoints = (VALUES, TRAIN, SAVE, STATUS)
    request_bytes = 4 << 30  # a training is a whole rollout

    def __init__(
        self,
        group: Group,
        critic: LocalCritic,
        digests: dict[str, str],
        limits: Limits,
        encoder: Encoder,
        *,
        settings: str,
        folder: Path,
        begun: dict,
    ):
        self.critic, self._digests, self._limits, self._settings = critic, digests, limits, settings
        self._encoder = encoder
        self._train_limits = Limits(vocabulary=limits.vocabulary, context=limits.context, tokens=sys.maxsize)
        self._identity = {name: np.array(digest) for name, digest in digests.items()}
        self._group, self.metrics = group, group.metrics
        group.works(VALUES, self._values)
        group.works(TRAIN, lambda requests: [self._in_turn(requests[0], self._train)])
        group.works(SAVE, lambda requests: [self._in_turn(requests[0], self._try_save)])
        self._folder, self._saved = folder, begun.get("version", -1)
        self._run_id, self._version = begun.get("run_id", ""), begun.get("version", 0)
        self._lock = threading.Lock()
        self._results: dict[int, Result] = begun.get("results", {})  # by the version that was changed
        self._running: dict[tuple[str, int], tuple[str, Future]] = {}
        self.metrics.weights_version.set(self._version)

    def call(self, endpoint: str, request: Arrays) -> Future:
        """As of serving.service.Service."""
        if endpoint == STATUS:
            return resolved(self.status().arrays())
        if endpoint == VALUES:
            values = ValuesRequest.of(in_tokens(request, self._encoder, actions=True), self._limits)
            return self._group.submit(endpoint, values, len(values.action_mask_N))
        if endpoint == TRAIN:
            return self._train_once(TrainRequest.of(request, self._train_limits))
        expect(endpoint == SAVE, f"there is no endpoint {endpoint!r}, expected {' or '.join(self.endpoints)}")
        return self._group.submit(endpoint, SaveRequest.of(request), 0, changes=True)

    def status(self) -> ServiceStatus:
        return ServiceStatus(
            kind="critic",
            vocabulary=self._limits.vocabulary,
            **self._digests,
            attributes=1,
            request_tokens=self._limits.tokens,
            request_bytes=self.request_bytes,
            context=self._limits.context,
            weights_version=self._version,
            **self._group.state(),
            run_id=self._run_id,
            checkpoints=",".join(map(str, training.steps(self._folder))),
            settings=self._settings,
        )

    def finish(self) -> None:
        """Save what no checkpoint has; all ranks call it once the group has ended. Raises OSError on all of them."""
        if self._version != max(self._saved, 0):
            self._group.make_room(SAVE)
            self._save()

    def _train_once(self, request: TrainRequest) -> Future:
        """The reply of the first request with its key, whether that was answered, waits, or is this one."""
        key, digest = (request.run_id, request.weights_version), request.digest()
        mine: Future = Future()
        with self._lock:
            result = self._results.get(request.weights_version) if request.run_id == self._run_id else None
            if result:
                _expect_same(result[0], digest)
                return resolved(self._trained(request.weights_version, result, replayed=True))
            if key in self._running:
                first, shared = self._running[key]
                _expect_same(first, digest)
            else:
                shared = self._group.submit(TRAIN, request, len(request.action_mask_N), changes=True)
                self._running[key] = digest, shared
        # Who hangs up cancels a future of its own, and not the training.
        shared.add_done_callback(lambda done: self._tell(key, done, mine))
        return mine

    def _tell(self, key: tuple[str, int], done: Future, mine: Future) -> None:
        with self._lock:
            self._running.pop(key, None)
        if not mine.set_running_or_notify_cancel():
            return
        if error := done.exception():
            mine.set_exception(error)
        else:
            mine.set_result(done.result())

    def _in_turn(self, request: TrainRequest | SaveRequest, do) -> Arrays | ServiceError:
        return self._stale(request.weights_version, request.run_id) or do(request)

    def _stale(self, version: int, run_id: str = "") -> ServiceError | None:
        if run_id and self._run_id and run_id != self._run_id:
            return ServiceError(Code.PRECONDITION, "the critic belongs to another run.")
        if version == self._version:
            return None
        return ServiceError(
            Code.PRECONDITION, f"the critic has weights version {self._version}, the request wants {version}."
        )

    def _values(self, requests: list[ValuesRequest]) -> list[Arrays | ServiceError]:
        errors = [self._stale(request.weights_version) for request in requests]
        asked = [request for request, error in zip(requests, errors, strict=True) if not error]
        if not asked:
            return errors
        mask_N = np.concatenate([request.action_mask_N for request in asked])
        sequences = [request.sequences for request in asked]
        packed = _packed(Sequences.join(sequences), mask_N)
        values_N = self.critic.critic.infer(packed, Sequences.shares(sequences)).numpy()
        counts = np.cumsum([int(request.action_mask_N.sum()) for request in asked])
        parts = np.split(values_N[mask_N], counts[:-1])
        answers = iter([to_answer(part, request.dtype) for part, request in zip(parts, asked, strict=True)])
        shared = {"weights_version": np.array(self._version), **self._identity}
        return [error or {"values_A": next(answers), **shared} for error in errors]

    def _train(self, request: TrainRequest) -> Arrays:
        mask_N, columns_N = torch.from_numpy(request.action_mask_N.copy()), {}
        for name in ("old_values", "returns", "weights"):
            columns_N[f"{name}_N"] = torch.zeros(len(mask_N))
            columns_N[f"{name}_N"][mask_N] = torch.from_numpy(getattr(request, f"{name}_A").copy())
        batch = ValueBatch(rollout=_packed(request.sequences, request.action_mask_N), **columns_N)
        steps = self.critic.train(batch, request.steps()).result()
        numbers = [[float(value) for value in statistics.values()] for statistics in steps]
        version, result = self._version, (request.digest(), json.dumps(list(steps[0])), numbers)
        with self._lock:
            self._run_id, self._version = request.run_id, version + 1
            self._results[version] = result
            self._results.pop(version - KEPT, None)
        self.metrics.weights_version.set(self._version)
        return self._trained(version, result, replayed=False)

    def _trained(self, version: int, result: Result, *, replayed: bool) -> Arrays:
        _, names, numbers = result
        shared = {"weights_version": np.array(version + 1), "replayed": np.array(replayed)}
        return shared | {"names": np.array(names), "statistics_SK": np.array(numbers, np.float64)}

    def _try_save(self, _request: SaveRequest) -> Arrays | ServiceError:
        """What was saved already is not written again."""
        try:
            if self._version != self._saved:
                self._save()
        except OSError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return ServiceError(Code.FAILED, "the checkpoint could not be written; the service's log says why.")
        return {"weights_version": np.array(self._version)}

    def _save(self) -> None:
        """Weights, optimizer and results as one checkpoint."""
        plain = {"run_id": self._run_id, "version": self._version, "results": self._results}
        training.save(self._folder, self._version, {"critic": self.critic.state_dict(), "plain": plain})
        self._saved = self._version


def _packed(sequences: Sequences, mask_N: np.ndarray) -> SupervisedBatch:
    return SupervisedBatch(
        tokens_N=torch.from_numpy(sequences.tokens_N),
        cu_seqlens=torch.from_numpy(sequences.cu_seqlens).int(),
        action_mask_N=torch.from_numpy(mask_N.copy()),
    )


def _expect_same(first: str, digest: str) -> None:
    expect(first == digest, "another request was made with this run_id and weights_version; one of them is a mistake")
