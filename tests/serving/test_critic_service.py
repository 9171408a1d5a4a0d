"""The critic's service without a transport: trainings that are done once and in order, values of known weights."""

import json
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from aligner.checkpoint import training
from aligner.run import distributed
from aligner.serving.critic_service import CriticService
from aligner.serving.group import Group
from aligner.serving.service import (
    SAVE,
    STATUS,
    TRAIN,
    VALUES,
    Code,
    Limits,
    Sequences,
    ServiceError,
    ServiceStatus,
    TrainRequest,
    ValuesRequest,
    from_answer,
)

LIMITS = Limits(vocabulary=100, context=8, tokens=10)
SEQUENCES = Sequences.pack([[1, 2, 3], [40, 50]])
MASK = np.array([False, True, True, False, True])


class Tally:
    """A critic whose value of a token is weight * token; a step adds the sum of its returns * weights to the weight."""

    def __init__(self):
        self.weight, self.steps, self.go, self.faults, self.parts = 1.0, [], threading.Event(), [], []
        self.go.set()

    @property
    def critic(self):
        return SimpleNamespace(infer=self.infer)

    def infer(self, batch, parts):
        self.parts.append([list(part) for part in parts])
        return self.weight * batch.tokens_N.float() * batch.action_mask_N

    def train(self, batch, steps) -> Future:
        assert self.go.wait(10)
        if self.faults:
            raise self.faults.pop()
        statistics = []
        for sequences in steps:
            mini = batch.take(sequences)
            self.steps.append(sequences)
            self.weight += float((mini.returns_N * mini.weights_N).sum())
            statistics.append({"loss": self.weight, "old": float(mini.old_values_N.sum())})
        return done(statistics)

    def state_dict(self) -> dict:
        return {"weight": self.weight}


def done(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def request(version: int, run_id: str = "run", **changes) -> TrainRequest:
    made = TrainRequest(
        sequences=SEQUENCES,
        action_mask_N=MASK,
        old_values_A=np.array([1, 2, 4], np.float32),
        returns_A=np.array([1, 0, 10], np.float32),
        weights_A=np.ones(3, np.float32),
        order_I=np.array([1, 0, 0], np.int32),
        order_ends=np.array([1, 3], np.int32),
        run_id=run_id,
        weights_version=version,
    )
    return replace(made, **changes)


# Nobody runs it: what passes the checks waits.
FUZZED = CriticService(
    Group(10, 8),
    Tally(),
    {"model": "m", "tokenizer": "t"},
    LIMITS,
    None,
    settings="{}",
    folder=Path("/nowhere"),
    begun={},
)


class Running:
    """A service in a thread of its own."""

    def __init__(self, folder: Path, begun: dict | None = None):
        distributed.initialize(1)
        self.critic, self.stop = Tally(), threading.Event()
        shared = {"settings": "{}", "folder": folder, "begun": begun or {}}
        self.group = Group(LIMITS.tokens, 8)
        self.service = CriticService(self.group, self.critic, {"model": "m", "tokenizer": "t"}, LIMITS, None, **shared)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        self.group.run(self.stop)
        self.service.finish()

    def train(self, asked: TrainRequest) -> Future:
        return self.service.call(TRAIN, asked.arrays())

    def values(self, version: int, dtype: str = "float32") -> Future:
        asked = ValuesRequest(sequences=SEQUENCES, action_mask_N=MASK, weights_version=version, dtype=dtype)
        return self.service.call(VALUES, asked.arrays())

    def save(self, version: int, run_id: str = "run") -> Future:
        return self.service.call(SAVE, {"run_id": np.array(run_id), "weights_version": np.array(version)})

    def status(self) -> ServiceStatus:
        return ServiceStatus.of(self.service.call(STATUS, {}).result())

    def end(self) -> None:
        self.critic.go.set()
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def running(tmp_path):
    made = Running(tmp_path)
    yield made
    made.end()


def refused(future: Future, words: str, code: Code = Code.PRECONDITION) -> None:
    with pytest.raises(ServiceError, match=words) as error:
        future.result(10)
    assert error.value.code is code


def test_training_and_values(running):
    assert running.values(0).result(10)["values_A"].tolist() == [2, 3, 50]
    reply = running.train(request(0)).result(10)
    # Sequence 1 adds 10; sequence 0 is in its step twice, and adds 1 each time.
    assert json.loads(reply["names"].item()) == ["loss", "old"]
    assert reply["statistics_SK"].tolist() == [[11, 4], [13, 6]] and running.critic.steps == [[1], [0, 0]]
    assert (reply["weights_version"], reply["replayed"]) == (1, False)
    reply = running.values(1).result(10)
    assert reply["values_A"].tolist() == [26, 39, 650] and reply["weights_version"] == 1
    status = running.status()
    assert (status.kind, status.weights_version, status.run_id) == ("critic", 1, "run")
    assert running.service.metrics.registry.get_sample_value("aligner_weights_version") == 1


def test_a_repeated_training_is_done_once(running):
    running.critic.go.clear()
    first, again = running.train(request(0)), running.train(request(0))
    assert first is not again and first.cancel()  # its caller has hung up, and the training goes on
    running.critic.go.set()
    joined = again.result(10)
    late = running.train(request(0)).result(10)
    assert running.critic.steps == [[1], [0, 0]]
    assert (joined["weights_version"], late["weights_version"]) == (1, 1) and late["replayed"]
    assert late["statistics_SK"].tolist() == joined["statistics_SK"].tolist() == [[11, 4], [13, 6]]
    other = request(0, returns_A=np.zeros(3, np.float32))
    with pytest.raises(ServiceError, match="another request was made with this run_id and weights_version") as error:
        running.train(other)
    assert error.value.code is Code.INVALID


def test_another_request_under_the_key_of_one_that_waits(running):
    running.critic.go.clear()
    first = running.train(request(0))
    with pytest.raises(ServiceError, match="another request was made"):
        running.train(request(0, weights_A=np.zeros(3, np.float32)))
    running.critic.go.set()
    first.result(10)


def test_what_comes_out_of_order_is_refused_with_both_numbers(running):
    refused(running.train(request(1)), "the critic has weights version 0, the request wants 1")
    running.train(request(0)).result(10)
    refused(running.values(0), "the critic has weights version 1, the request wants 0")
    refused(running.values(2), "the critic has weights version 1, the request wants 2")
    refused(running.train(request(1, "other")), "belongs to another run")
    refused(running.save(0), "the critic has weights version 1, the request wants 0")
    refused(running.save(1, "other"), "belongs to another run")
    assert running.critic.weight == 13
    # A refusal is no result: the same request is done once its time has come.
    assert running.train(request(1)).result(10)["weights_version"] == 2


def test_values_of_mixed_versions_in_one_batch(running):
    running.critic.go.clear()
    training_first = running.train(request(0))
    asked = [running.values(*each) for each in ((1, "float32"), (0, "float32"), (1, "bfloat16"), (1, "float32"))]
    running.critic.go.set()
    training_first.result(10)
    assert asked[0].result(10)["values_A"].tolist() == asked[3].result(10)["values_A"].tolist() == [26, 39, 650]
    assert from_answer(asked[2].result(10)["values_A"]).tolist() == [26, 39, 648]  # of eight bits
    assert running.critic.parts == [[[0, 1]], [[0, 1], [2, 3]]]  # ten tokens at once
    refused(asked[1], "weights version 1, the request wants 0")


def test_it_goes_on_from_a_save_with_its_results(tmp_path):
    first = Running(tmp_path)
    first.train(request(0)).result(10)
    assert first.save(1).result(10)["weights_version"] == 1
    first.train(request(1)).result(10)
    first.end()  # saves what no checkpoint has
    assert training.steps(tmp_path) == [1, 2]
    plain = training.read_plain(training.latest(tmp_path))["plain"]
    second = Running(tmp_path, plain)
    assert second.status().checkpoints == "1,2"
    late = second.train(request(1)).result(10)
    assert late["replayed"] and late["weights_version"] == 2 and second.critic.steps == []
    assert second.train(request(2)).result(10)["weights_version"] == 3
    second.end()


def test_saving_twice_writes_once(running, tmp_path):
    running.train(request(0)).result(10)
    running.save(1).result(10)
    before = (tmp_path / "checkpoints" / "step-1").stat().st_mtime_ns
    assert running.save(1).result(10)["weights_version"] == 1
    assert (tmp_path / "checkpoints" / "step-1").stat().st_mtime_ns == before


def test_a_save_that_fails_is_told_and_the_service_lives(running, tmp_path, capsys):
    running.train(request(0)).result(10)
    (tmp_path / "checkpoints").write_text("in the way")
    refused(running.save(1), "the checkpoint could not be written", Code.FAILED)
    (tmp_path / "checkpoints").unlink()
    assert running.save(1).result(10)["weights_version"] == 1
    assert "could not be written" in capsys.readouterr().err


def test_a_last_save_that_fails_is_an_error(tmp_path):
    service = Running(tmp_path)
    service.train(request(0)).result(10)
    (tmp_path / "checkpoints").write_text("in the way")
    failed, hook = [], threading.excepthook
    threading.excepthook = lambda arguments: failed.append(arguments.exc_value)
    try:
        service.end()
    finally:
        threading.excepthook = hook
    assert isinstance(failed[0], OSError) and "could not be written" in str(failed[0])


def test_a_training_that_fails_ends_the_service(tmp_path, capsys):
    """Some of its optimizer steps may have been applied: only the last save is whole."""
    service, died = Running(tmp_path), []
    threading.excepthook, hook = lambda args: died.append(args.exc_value), threading.excepthook
    try:
        service.critic.faults.append(FloatingPointError("the loss is nan"))
        refused(service.train(request(0)), "the model failed", Code.FAILED)
        service.thread.join(10)
    finally:
        threading.excepthook = hook
    assert not service.thread.is_alive() and str(died[0]) == "the loss is nan"
    assert training.steps(tmp_path) == []


BAD = {
    "a mask of numbers": ({"action_mask_N": MASK.astype(np.int32)}, "action_mask_N is int32"),
    "a short mask": ({"action_mask_N": MASK[1:]}, "expected 5 of bool"),
    "no action at the end": ({"action_mask_N": np.array([True] * 4 + [False])}, "true for the last token"),
    "float64": ({"returns_A": np.zeros(3)}, "returns_A is float64"),
    "one too few": ({"old_values_A": np.zeros(2, np.float32)}, "expected 3 finite numbers"),
    "nan": ({"returns_A": np.array([1, np.nan, 0], np.float32)}, "finite"),
    "a negative weight": ({"weights_A": np.array([1, -1, 0], np.float32)}, "negative"),
    "a sequence that is not there": ({"order_I": np.array([0, 2, 1], np.int32)}, "indices from 0 to 2 of 2"),
    "a step of nothing": ({"order_ends": np.array([1, 1, 3], np.int32)}, "order_ends must grow"),
    "a step that is left out": ({"order_ends": np.array([1, 2], np.int32)}, "order_ends must grow"),
    "no steps": ({"order_I": np.array([], np.int32)}, "order_I is int32 of shape"),
    "a number as the run": ({"run_id": np.array(3)}, "run_id must be a text"),
    "no run": ({"run_id": np.array("")}, "run_id must have 1 to 100 letters"),
    "a negative version": ({"weights_version": np.array(-1)}, "weights_version must be an integer"),
    "versions": ({"weights_version": np.array([1])}, "weights_version must be an integer"),
    "tokens outside the vocabulary": ({"tokens_N": np.array([1, 2, 3, 4, 100])}, "ids from 1 to 100"),
    "an array too much": ({"more": np.array(1)}, "got .*'more'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_at_once(running, name: str):
    change, words = BAD[name]
    with pytest.raises(ServiceError, match=words) as error:
        running.service.call(TRAIN, request(0).arrays() | change)
    assert error.value.code is Code.INVALID and running.critic.steps == []


def test_the_other_endpoints_refuse_what_they_do_not_know(running):
    long = Sequences.pack([[1] * 6] * 2)
    with pytest.raises(ServiceError, match="got \\['run_id'\\]"):
        running.service.call(SAVE, {"run_id": np.array("x")})
    with pytest.raises(ServiceError, match="there is no endpoint 'reward_v1'"):
        running.service.call("reward_v1", {})
    with pytest.raises(ServiceError, match="got 12 tokens, a request may have 10"):
        asked = ValuesRequest(sequences=long, action_mask_N=np.ones(12, bool), weights_version=0)
        running.service.call(VALUES, asked.arrays())
    # Trainings are whole rollouts, whatever a request for values may have.
    columns = {name: np.ones(12, np.float32) for name in ("old_values_A", "returns_A", "weights_A")}
    whole = request(0, sequences=long, action_mask_N=np.ones(12, bool), **columns)
    assert running.train(whole).result(10)["weights_version"] == 1


ANYTHING = arrays.arrays(
    st.sampled_from(["int32", "int64", "float32", "float64", "bool"]),
    arrays.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=6),
) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5).map(np.array)


@given(st.sampled_from([TRAIN, VALUES, SAVE]), st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_is_sent_is_refused_or_makes_sense(endpoint: str, data):
    """A valid request with some arrays replaced or left out: an answer, or INVALID, and nothing else."""
    values = ValuesRequest(sequences=SEQUENCES, action_mask_N=MASK, weights_version=0)
    save = {"run_id": np.array("run"), "weights_version": np.array(0)}
    whole = {TRAIN: request(0).arrays(), VALUES: values.arrays(), SAVE: save}[endpoint]
    changed = data.draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=3, unique=True))
    asked = whole | {name: data.draw(ANYTHING) for name in changed[:2]}
    for name in changed[2:]:
        del asked[name]
    try:
        FUZZED.call(endpoint, asked)
    except ServiceError as error:
        assert error.code in (Code.INVALID, Code.BUSY)


def test_a_digest_tells_requests_apart():
    assert request(0).digest() == request(0).digest()
    changes = [
        {"returns_A": np.array([1, 0, 11], np.float32)},
        {"order_I": np.array([0, 1, 0], np.int32)},
        {"weights_version": 1},
        {"run_id": "other"},
        {"sequences": Sequences.pack([[1, 2, 3], [40, 51]])},
    ]
    assert len({replace(request(0), **change).digest() for change in changes} | {request(0).digest()}) == 6


def test_a_service_that_drains_takes_no_more(running):
    running.stop.set()
    end = time.monotonic() + 10
    while running.thread.is_alive() and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(ServiceError, match="about to stop") as error:
        running.train(request(0))
    assert error.value.code is Code.UNAVAILABLE


def test_packed_batches_are_torch_s_own(running):
    """What the critic is given may be written to, and shares nothing with the request."""
    seen = []
    infer = running.critic.infer
    running.critic.infer = lambda batch, parts: seen.append(batch) or infer(batch, parts)
    running.values(0).result(10)
    assert seen[0].tokens_N.dtype == torch.int64 and seen[0].cu_seqlens.dtype == torch.int32
