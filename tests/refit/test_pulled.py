"""The trainer's side with several replicas, some of whose engines are on other machines: its ranks are threads."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from aligner.refit import pulled
from aligner.refit.pulled import PulledReplica
from aligner.run import distributed
from aligner.run.distributed import Place
from tests.refit.standin import Engine
from tests.refit.test_extension import SMALL, TrainerRank, after, is_at, refit, shape_of

HERE, THERE = "localhost", "127.0.0.1"  # two names that can be connected to
SOON = 30.0


class Ranks:
    """Collectives of threads; on which machine and which rank a thread is."""

    def __init__(self, places: list[Place], hosts: list[str]):
        self.places, self.hosts, self.mine = places, hosts, threading.local()
        self.barrier, self.told = threading.Barrier(len(places)), [None] * len(places)
        self.calls = [[] for _ in places]

    def gather(self, compute) -> list:
        rank = self.mine.rank
        self.told[rank] = compute()
        self.calls[rank].append("gather")
        self.barrier.wait(SOON)
        everyone = list(self.told)
        self.barrier.wait(SOON)
        return everyone

    def agree(self, compute):
        return self.gather(compute)[self.mine.rank]

    def host(self) -> str:
        return getattr(self.mine, "host", HERE)

    def run(self, call) -> list:
        """call(rank) on all of them."""

        def one(rank: int):
            self.mine.rank, self.mine.host = rank, self.hosts[rank]
            try:
                return call(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.places)) as pool:
            return [f.result(SOON) for f in [pool.submit(one, rank) for rank in range(len(self.places))]]


class Front:
    """An engine, as rollout.wire.EngineSampler gives it to the trainer. hosts: of its ranks."""

    def __init__(self, ranks: Ranks, hosts: list[str]):
        self.engine, self.hosts, self.slept = Engine(shape_of(SMALL), len(hosts)), hosts, 0
        for actor, host in zip(self.engine.actors, hosts, strict=True):
            actor.submit(setattr, ranks.mine, "host", host).result(SOON)

    def where(self) -> list[str]:
        return [f.result(SOON)["host"] for f in self.engine.rpc("refit_where")]

    def attach(self, shape: dict, ranks: list[dict], meeting: dict | None) -> list[dict]:
        told = [f.result(SOON) for f in self.engine.rpc("refit_attach", shape, ranks, meeting, SOON)]
        self.plans = [t["plan"] for t in told]
        return told

    def pull(self, version: int) -> list[dict]:
        try:
            return refit(self.engine, version, self.plans)
        finally:
            for f in self.engine.rpc("refit_end"):
                f.result(SOON)

    def sleep(self) -> None:
        self.slept += 1


@pytest.mark.parametrize(("trainers", "engines"), [
    ([HERE] * 4, [[HERE, HERE], [HERE, HERE]]),  # all on one machine
    ([HERE] * 4, [[HERE, HERE], [THERE, THERE]]),  # one replica's engine is not
    ([HERE, HERE, HERE, THERE], [[THERE, THERE], [HERE, THERE]]),  # a replica and an engine on two machines
])  # fmt: skip
def test_every_replicas_engine_has_the_weights(monkeypatch, trainers: list[str], engines: list[list[str]]):
    places = [Place(tensor=t, pipeline=0, context=0, data=d, replicas=2) for d in range(2) for t in range(2)]
    ranks = Ranks(places, trainers)
    for name in ("gather", "agree"):
        monkeypatch.setattr(pulled, name, getattr(ranks, name))
    monkeypatch.setattr(socket, "gethostname", ranks.host)
    monkeypatch.setattr(dist, "get_rank", lambda: ranks.mine.rank)
    monkeypatch.setattr(distributed, "place", lambda: places[ranks.mine.rank])
    policies = [TrainerRank(SMALL, 2, 1, place.tensor) for place in places]
    opened: dict[int, Front] = {}

    def open_engine(_devices: list) -> Front:
        data = places[ranks.mine.rank].data
        opened[data] = Front(ranks, engines[data])
        return opened[data]

    def make(rank: int) -> PulledReplica:
        return PulledReplica(policies[rank], shape_of(SMALL), open_engine, shares=True)

    replicas = ranks.run(make)
    for version in range(2):
        for policy in policies:
            policy.step(after(version))
        ranks.run(lambda rank, version=version: replicas[rank].refit(version))
        assert all(is_at(front.engine, version) for front in opened.values())
    ranks.run(lambda rank: replicas[rank].sleep())
    assert [front.slept for front in opened.values()] == [1, 1]
    assert len({len(calls) for calls in ranks.calls}) == 1  # the same collectives on all ranks


def test_gpus_are_named_as_another_process_would_see_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for seen, wanted in (("4,5,6", "5"), ("GPU-a, GPU-b", "GPU-b"), ("", "1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        assert distributed.gpu() == wanted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.gpu() is None
