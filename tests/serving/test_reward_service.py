"""The reward service without a transport: batches, a full queue, failures, its end. The model is a sum of tokens."""

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aligner.serving.group import Group
from aligner.serving.metrics import ServiceMetrics
from aligner.serving.reward_service import RewardService
from aligner.serving.service import (
    ANSWERS,
    REWARD,
    STATUS,
    Code,
    Limits,
    RewardRequest,
    Sequences,
    ServiceError,
    ServiceStatus,
    from_answer,
)

LIMITS = Limits(vocabulary=100, context=8, tokens=10)


class Sum:
    """Gives a sequence the sum of its tokens at its last one, and their negative; waits for `go`."""

    attributes, shape = 2, SimpleNamespace(vocab=100)

    def __init__(self):
        self.batches, self.parts, self.go, self.faults = [], [], threading.Event(), []

    def infer(self, batch, parts) -> torch.Tensor:
        assert self.go.wait(10)
        starts = batch.cu_seqlens.tolist()
        pieces = [batch.tokens_N[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        self.batches.append([piece.tolist() for piece in pieces])
        self.parts.append([list(part) for part in parts])
        assert batch.action_mask_N.nonzero()[:, 0].tolist() == [end - 1 for end in starts[1:]]
        if self.faults:
            raise self.faults.pop()
        scores_NK = torch.zeros(len(batch.tokens_N), 2)
        for piece, end in zip(pieces, starts[1:], strict=True):
            scores_NK[end - 1] = torch.tensor([1.0, -1.0]) * piece.sum()
        return scores_NK


@pytest.fixture
def running():
    """(model, service, stop, thread) of a service that takes up to 4 requests."""
    model, stop = Sum(), threading.Event()
    group = Group(LIMITS.tokens, queue_size=4)
    service = RewardService(group, model, {"model": "m", "tokenizer": "t"}, LIMITS, None)
    thread = threading.Thread(target=group.run, args=(stop,))
    thread.start()
    yield model, service, stop, thread
    model.go.set()
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def ask(service: RewardService, *sequences: list[int]) -> Future:
    return service.call(REWARD, Sequences.pack(list(sequences)).arrays())


def first_is_taken(service: RewardService) -> None:
    end = time.monotonic() + 10
    while service.status().queue and time.monotonic() < end:
        time.sleep(0.01)


def test_what_waits_is_answered_in_batches(running):
    model, service, _, _ = running
    first = ask(service, [1, 2])
    first_is_taken(service)
    others = [ask(service, [10] * 4, [3]), ask(service, [20] * 4), ask(service, [5]), ask(service, [6] * 8)]
    with pytest.raises(ServiceError, match="4 requests wait already") as error:
        ask(service, [7])
    assert error.value.code is Code.BUSY and service.status().queue == 4
    model.go.set()
    answers = [future.result(10)["rewards_BK"].tolist() for future in (first, *others)]
    assert answers == [[[3, -3]], [[40, -40], [3, -3]], [[80, -80]], [[5, -5]], [[48, -48]]]
    # Ten tokens at most: 5 + 4 + 1, then the one that did not fit.
    assert model.batches == [[[1, 2]], [[10] * 4, [3], [20] * 4, [5]], [[6] * 8]]
    assert model.parts == [[[0]], [[0, 1], [2], [3]], [[0]]]  # no request's numbers depend on another's
    counted = service.metrics.registry.get_sample_value
    assert (counted("aligner_tokens_total"), counted("aligner_queue_seconds_count")) == (20, 5)
    assert (counted("aligner_batch_tokens_sum"), counted("aligner_batch_tokens_count")) == (20, 3)
    assert counted("aligner_compute_seconds_count") == 3 and counted("aligner_weights_version") == 0


def test_answers_of_sixteen_bits_beside_others(running):
    """The sum 257 has nine bits, of which bfloat16 has eight: the even neighbour is 256."""
    model, service, _, _ = running
    model.go.set()
    sequences = Sequences.pack([[99, 99, 59], [1]])
    wide, narrow = (service.call(REWARD, RewardRequest(sequences=sequences, dtype=d).arrays()) for d in ANSWERS)
    assert wide.result(10)["rewards_BK"].tolist() == [[257, -257], [1, -1]]
    sent = narrow.result(10)["rewards_BK"]
    assert sent.nbytes == 8 and from_answer(sent).tolist() == [[256, -256], [1, -1]]


def test_who_has_hung_up_is_not_worked_for(running):
    model, service, _, _ = running
    first = ask(service, [1])
    first_is_taken(service)
    gone, other = ask(service, [2]), ask(service, [3])
    assert gone.cancel()
    model.go.set()
    assert other.result(10)["rewards_BK"].tolist() == [[3, -3]] and first.done()
    assert model.batches == [[[1]], [[3]]]


def test_a_failure_ends_with_its_batch(running, capsys):
    model, service, stop, thread = running
    model.faults.append(RuntimeError("out of memory at /secret/path"))
    model.go.set()
    with pytest.raises(ServiceError, match="the model failed; the log of the service says why") as error:
        ask(service, [1]).result(10)
    assert error.value.code is Code.FAILED and "secret" not in str(error.value)
    assert ask(service, [2]).result(10)["rewards_BK"].tolist() == [[2, -2]]
    model.faults.append(RuntimeError("again"))
    stop.set()  # heard though its batch fails
    with pytest.raises(ServiceError):
        ask(service, [1]).result(10)
    thread.join(10)
    assert not thread.is_alive()
    assert "1 reward_v1 failed: out of memory at /secret/path" in capsys.readouterr().err


def test_a_bad_request_never_reaches_the_model(running):
    model, service, _, _ = running
    model.go.set()
    for asked, words in (
        ({"tokens_N": np.array([100]), "cu_seqlens": np.array([0, 1])}, "ids from 100 to 100"),
        ({"tokens_N": np.array([1])}, "expected tokens_N and cu_seqlens"),
    ):
        with pytest.raises(ServiceError, match=words):
            service.call(REWARD, asked)
    with pytest.raises(ServiceError, match="there is no endpoint 'reward_v0'"):
        service.call("reward_v0", {})
    assert model.batches == []


def test_it_answers_what_waits_before_it_ends(running):
    model, service, stop, thread = running
    first = ask(service, [1])
    first_is_taken(service)
    waiting = [ask(service, [i]) for i in (2, 3)]
    stop.set()
    model.go.set()
    assert [future.result(10)["rewards_BK"][0, 0] for future in (first, *waiting)] == [1, 2, 3]
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(ServiceError, match="about to stop") as error:
        ask(service, [4])
    assert error.value.code is Code.UNAVAILABLE and service.status().draining


def test_an_idle_service_keeps_a_beat(running):
    _, service, _, _ = running
    time.sleep(2.5)
    status = ServiceStatus.of(service.call(STATUS, {}).result())
    assert status == service.status().__class__(**vars(service.status()) | {"beat_age_s": status.beat_age_s})
    assert status.beat_age_s < 2 and (status.kind, status.model, status.tokenizer, status.attributes) == (
        "reward",
        "m",
        "t",
        2,
    )


def test_metrics_on_a_port_in_use():
    metrics = ServiceMetrics()
    port = metrics.publish("127.0.0.1", 0)
    with pytest.raises(ValueError, match=f"cannot publish metrics on 127.0.0.1:{port}"):
        metrics.publish("127.0.0.1", port)
