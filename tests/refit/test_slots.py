"""Weights over the network: trainer ranks and the ranks of a stand-in engine as threads, with gloo in NCCL's place."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from aligner.models.low_rank import LowRank
from aligner.models.weights import join
from aligner.refit import slots
from aligner.refit.plan import compile_plan
from aligner.refit.slots import Group, Sender
from tests.refit.layouts import Model, checkpoint
from tests.refit.standin import Engine
from tests.refit.test_extension import SMALL, Trainer, TrainerRank, is_at, refit, reloaded, shape_of, stored

PATIENCE = timedelta(seconds=20)
CPU = torch.device("cpu")


class Far:
    """A trainer whose ranks are all on another machine, but those in `near`; they serve in threads."""

    def __init__(self, m: Model, tp: int, pp: int, engine: Engine, near: tuple[int, ...] = ()):
        self.m, self.engine, self.near = m, engine, near
        self.local = Trainer(m, tp, pp)
        self.ranks: list[TrainerRank] = self.local.ranks
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        self.pool = ThreadPoolExecutor(len(self.ranks))
        told = self.local.told
        for i, rank in enumerate(self.ranks):
            if i not in near:
                told[i] = {"host": "elsewhere", "name": "", "manifest": json.loads(json.dumps(rank.manifest()))}
        meeting = {"host": "127.0.0.1", "port": self.store.port, "engines": len(engine.workers)}
        waiting = engine.rpc("refit_attach", asdict(engine.shape), told, meeting, 20.0)
        self.senders = list(self.pool.map(self._sender, range(len(self.ranks))))
        self.plans = [f.result(20)["plan"] for f in waiting]

    def _sender(self, rank: int) -> Sender:
        store = dist.TCPStore("127.0.0.1", self.store.port, is_master=False, timeout=PATIENCE)
        group = Group(store, rank, len(self.ranks), len(self.engine.workers), CPU, PATIENCE)
        far = set() if rank in self.near else set(range(len(self.engine.workers)))
        return Sender(group, join([r.manifest() for r in self.ranks]), self.ranks[rank], far)

    def refit(self, full: dict, version: int, serve: int | None = None, **named) -> list[dict]:
        """serve: the version that the senders have, if another."""
        for rank in self.ranks:
            rank.step(full)
        for i in self.near:
            self.local.published[i].publish(version)
        serving = [self.pool.submit(s.serve, version if serve is None else serve) for s in self.senders]
        try:
            return refit(self.engine, version, self.plans, **named)
        finally:
            for f in self.engine.rpc("refit_end"):
                f.result(20)
            for f in serving:
                f.result(20)

    def close(self) -> None:
        self.local.close()
        self.pool.shutdown()


@pytest.fixture(autouse=True)
def small_slots(monkeypatch):
    """So that copies are cut, and slots follow each other."""
    monkeypatch.setattr(slots, "SLOT_BYTES", 256)
    monkeypatch.setattr(slots.slots, "__defaults__", (256,))


WIDE = Model(num_layers=4, hidden=7, ffn=16, heads=8, kv_heads=2, head_dim=2, vocab=37, tied=True, qk_norm=True)


@pytest.mark.parametrize(("m", "tp", "pp", "ranks", "near"), [
    (SMALL, 1, 1, 1, ()), (SMALL, 2, 2, 1, ()), (SMALL, 1, 1, 4, ()), (WIDE, 2, 2, 8, ()), (WIDE, 4, 1, 2, (0, 2)),
    (SMALL, 2, 1, 2, (1,)),
])  # fmt: skip
def test_every_rank_gets_what_reload_makes_of_it(m: Model, tp: int, pp: int, ranks: int, near: tuple[int, ...]):
    """The first refit passes the golden gate too, whose whole tensors come over the network as well."""
    engine = Engine(shape_of(m), ranks)
    far = Far(m, tp, pp, engine, near)
    try:
        for version in range(2):
            g = torch.Generator().manual_seed(version)
            full = {name: torch.randn(t.shape, generator=g) for name, t in checkpoint(m).items()}
            told = far.refit(full, version)
            assert [t["version"] for t in told] == [version] * ranks
            for mine, theirs in zip(stored(engine), reloaded(m, full, ranks), strict=True):
                for name, wanted in theirs.items():
                    rows = wanted.abs().flatten(1).amax(1) > 1e-3 if "embed" in name or "lm_" in name else slice(None)
                    assert torch.equal(mine[name][rows], wanted[rows]), name
    finally:
        far.close()


def test_slots_hold_every_copy_once_and_no_more_than_they_may():
    engine, ranks = Engine(shape_of(WIDE), 2), [TrainerRank(WIDE, 2, 2, rank) for rank in range(4)]
    trainer = Trainer(WIDE, 2, 2)
    try:
        [f.result(10) for f in engine.rpc("refit_attach", asdict(engine.shape), trainer.told, None, 1.0)]
    finally:
        trainer.close()
    plan = engine.workers[1]._refit_plan.plan
    assert (
        plan.digest == compile_plan(join([r.manifest() for r in ranks]), engine.workers[1]._refit_found.manifest).digest
    )
    covered: dict = {}
    for rank in range(4):
        for slot in slots.slots(plan, rank, 256):
            assert slots._size(slot) <= 256 and len({p.dtype for p in slot}) == 1
            ends = [0] + [p.at + p.rows * p.columns for p in slot]
            assert [p.at for p in slot] == ends[:-1]
            for p in slot:
                assert p.copy.source.startswith(f"{rank}/")
                covered.setdefault(id(p.copy), []).append((p.row, p.rows))
    assert len(covered) == len(plan.copies)
    for c in plan.copies:
        rows = c.size[0] if len(c.size) == 2 else 1
        at = 0
        for row, count in covered[id(c)]:
            assert row == at
            at += count
        assert at == rows
    with pytest.raises(ValueError, match="make slots larger"):
        slots.slots(plan, 0, 8)


def test_adapters_are_merged_and_values_cast_before_they_travel():
    engine = Engine(shape_of(SMALL), 2)
    for worker in engine.workers:
        for p in worker.model.parameters():
            p.data = p.data.bfloat16()
    far = Far(SMALL, 1, 1, engine)
    g, name = torch.Generator().manual_seed(0), "decoder.layers.1.self_attention.linear_proj.weight"
    rank = far.ranks[0]
    full = checkpoint(SMALL)
    rank.step(full)
    a, b = torch.randn(2, rank.held[name].shape[1], generator=g), torch.randn(rank.held[name].shape[0], 2, generator=g)
    plain = rank.weight
    rank.weight = lambda n: LowRank(rank.held[n], b, a, 0.5) if n == name else plain(n)
    try:
        far.refit(full, 0)
    finally:
        far.close()
    wanted = (rank.held[name].double() + 0.5 * b.double() @ a.double()).float().bfloat16()
    got = torch.cat([w.model.model.layers[1].self_attn.o_proj.weight.data for w in engine.workers], 1)
    assert (got.float() - wanted.float()).abs().max() <= 2**-7 * wanted.float().abs().max()
    norm = engine.workers[0].model.model.norm.weight.data
    assert torch.equal(norm, full["model.norm.weight"].bfloat16())


def test_a_trainer_of_another_version_poisons_and_a_whole_refit_heals():
    engine = Engine(shape_of(SMALL), 2)
    far = Far(SMALL, 2, 1, engine)
    try:
        far.refit(checkpoint(SMALL), 0)
        with pytest.raises(RuntimeError, match="trainer rank . has version 7 in 0 slots, expected 1"):
            far.refit(checkpoint(SMALL), 1, serve=7)
        assert all(w.refit_tell()["refusal"] for w in engine.workers)
        g = torch.Generator().manual_seed(1)
        full = {name: torch.randn(t.shape, generator=g) for name, t in checkpoint(SMALL).items()}
        far.refit(full, 1, again=True)
        assert is_at(engine, 1)
    finally:
        far.close()


def test_bytes_that_change_on_the_way_are_noticed(monkeypatch):
    engine = Engine(shape_of(SMALL), 1)
    far = Far(SMALL, 1, 1, engine)
    whole, flipped = Sender._pack, threading.Event()

    def pack(self, slot, buffer):
        sums = whole(self, slot, buffer)
        if len(slot) > 1 and self._plans and not flipped.is_set():
            flipped.set()
            buffer[5] ^= 1
        return sums

    try:
        far.refit(checkpoint(SMALL), 0)
        with monkeypatch.context() as patched:
            patched.setattr(Sender, "_pack", pack)
            with pytest.raises(RuntimeError, match="1 pieces from trainer rank 0 are other than they were sent"):
                far.refit(checkpoint(SMALL), 1)
        assert "are other than they were sent" in engine.workers[0].refit_tell()["refusal"]
        assert far.refit(checkpoint(SMALL), 1, again=True)[0]["refusal"] == ""
    finally:
        far.close()


def test_a_refit_that_was_refused_lets_the_trainer_go_on():
    engine = Engine(shape_of(SMALL), 2)
    far = Far(SMALL, 2, 1, engine)
    try:
        far.refit(checkpoint(SMALL), 0)
        with pytest.raises(ValueError, match="to version 0, but the weights are of version 0"):
            far.refit(checkpoint(SMALL), 0)
    finally:
        far.close()
