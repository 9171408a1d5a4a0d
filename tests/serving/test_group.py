"""Requests of a group whose networks take turns on the device."""

import threading
import time
from types import SimpleNamespace

import pytest

from aligner.serving import group as module
from aligner.serving.group import Group


class Network:
    """Notes when its weights come and go."""

    def __init__(self, name: str, events: list[str]):
        self.offload = SimpleNamespace(
            leave=lambda weights: events.append(f"{name} leaves"),
            weights_come_back=lambda: events.append(f"{name} comes"),
        )


@pytest.fixture
def running():
    """(group, events, begin) of two networks with two endpoints each; nothing is worked on before begin()."""
    group, events, stop = Group(tokens=3, queue_size=20), [], threading.Event()
    networks = {name: Network(name, events) for name in "ab"}

    def works(endpoint: str) -> None:
        def answer(requests: list) -> list[dict]:
            events.append(f"{endpoint} {requests}")
            return [{"answer": request} for request in requests]

        group.works(endpoint, answer)

    for endpoint in ("a1", "a2", "b1"):
        works(endpoint)
    group.take_turns({"a1": networks["a"], "a2": networks["a"], "b1": networks["b"]})
    assert events == ["a leaves", "b leaves"] or events == ["b leaves", "a leaves"]
    events.clear()
    thread = threading.Thread(target=group.run, args=(stop,))
    yield group, events, thread.start
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_one_network_goes_on_as_long_as_it_has_requests(running):
    group, events, begin = running
    asked = [("a1", 0), ("b1", 1), ("a1", 2), ("b1", 3), ("a2", 4), ("a1", 5), ("b1", 6), ("b1", 7), ("b1", 8)]
    futures = [group.submit(endpoint, number, 1) for endpoint, number in asked]
    assert group.state()["queue"] == 9
    begin()
    assert [future.result(10)["answer"] for future in futures] == list(range(9))
    assert events == ["a comes", "a1 [0, 2]", "a2 [4]", "a1 [5]", "a leaves", "b comes", "b1 [1, 3, 6]", "b1 [7, 8]"]
    counted = group.metrics.registry.get_sample_value
    assert counted("aligner_swap_seconds_count") == 2
    assert group.submit("b1", 9, 1).result(10)["answer"] == 9  # which is there
    assert events[-1] == "b1 [9]" and counted("aligner_swap_seconds_count") == 2


def test_nobody_waits_for_ever(running, monkeypatch):
    """Whoever has waited longer than a turn lasts comes next."""
    group, events, begin = running
    monkeypatch.setattr(module, "TURN_S", 0.2)
    first = [group.submit("a1", number, 3) for number in range(2)]
    late = group.submit("b1", 7, 1)
    more = [group.submit("a1", number, 3) for number in range(2, 4)]
    time.sleep(0.3)
    begin()
    assert [future.result(10)["answer"] for future in (*first, late, *more)] == [0, 1, 7, 2, 3]
    assert [event for event in events if "[" in event] == ["a1 [0]", "a1 [1]", "b1 [7]", "a1 [2]", "a1 [3]"]


def test_requests_stay_in_their_order_where_nobody_takes_turns():
    group, seen, stop = Group(tokens=10, queue_size=20), [], threading.Event()
    for endpoint in ("x", "y"):
        group.works(endpoint, lambda requests: seen.append(requests) or [{} for _ in requests])
    futures = [group.submit(endpoint, endpoint + str(i), 1) for i, endpoint in enumerate("xxyxyy")]
    thread = threading.Thread(target=group.run, args=(stop,))
    thread.start()
    for future in futures:
        future.result(10)
    stop.set()
    thread.join(10)
    assert seen == [["x0", "x1"], ["y2"], ["x3"], ["y4", "y5"]]
