"""Refit into a stand-in of TensorRT-LLM's engine: against its own reload and transformers, and through faults."""

import socket
import threading
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import wait
from dataclasses import asdict

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from aligner.checkpoint.huggingface import Weights
from aligner.models.low_rank import LowRank
from aligner.models.rope import Rope
from aligner.models.shape import ModelShape
from aligner.models.weights import manifest, megatron_entry, window
from aligner.refit import execute
from aligner.refit.shared import SharedWeights
from aligner.refit.trtllm_layout import check_shape
from tests.conftest import save_model
from tests.refit.layouts import Model, checkpoint, megatron_rank
from tests.refit.standin import Engine, FP8BlockScalesLinearMethod

SOON = 10.0  # seconds; nothing here takes as long


def shape_of(m: Model) -> ModelShape:
    sizes = {
        name: getattr(m, name) for name in ("num_layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab")
    }
    kinds = {"tied": m.tied, "qkv_bias": m.bias, "qk_norm": m.qk_norm}
    return ModelShape(**sizes, **kinds, context=64, norm_eps=1e-5, rope=Rope())


class TrainerRank:
    """A rank's part of a checkpoint, in Megatron's layout."""

    def __init__(self, m: Model, tp: int, pp: int, rank: int):
        self.m, self.place = m, (tp, pp, rank % tp, rank // tp)
        self.step(checkpoint(m))
        first = (rank // tp) * (m.num_layers // pp)
        entries = [megatron_entry(n, t, m, rank=rank % tp, ranks=tp, first_layer=first) for n, t in self.held.items()]
        self._manifest = manifest(shape_of(m).tensors(), entries)

    def step(self, full: dict) -> None:
        tp, pp, tr, pr = self.place
        self.held = megatron_rank(self.m, full, tp, pp, tr, pr, 4)

    def manifest(self) -> dict:
        return self._manifest

    def weights(self, names: Iterable[str]) -> list:
        return [self.weight(name) for name in names]

    def weight(self, name: str) -> torch.Tensor:
        return self.held[name]


class Trainer:
    """All ranks of a trainer, which publish in shared memory; closed by the test."""

    rank, publisher = TrainerRank, SharedWeights

    def __init__(self, m: Model, tp: int, pp: int):
        self.ranks = [self.rank(m, tp, pp, rank) for rank in range(tp * pp)]
        self.names = [f"test-{uuid.uuid4().hex}" for _ in self.ranks]
        self.published = [self.publisher(*pair) for pair in zip(self.names, self.ranks, strict=True)]

    @property
    def told(self) -> list[dict]:
        """Of the ranks, as refit.pull.Pulled is told."""
        return [{"host": socket.gethostname(), "name": name, "manifest": None} for name in self.names]

    def publish(self, full: dict, version: int) -> None:
        for rank, published in zip(self.ranks, self.published, strict=True):
            rank.step(full)
            published.publish(version)

    def close(self) -> None:
        for published in self.published:
            published.close()


def attach(engine: Engine, trainer: Trainer) -> str:
    """The plan's digest, of all ranks."""
    told = [f.result(SOON) for f in engine.rpc("refit_attach", asdict(engine.shape), trainer.told, None, 1.0)]
    assert [t["rank"] for t in told] == list(range(len(told)))
    return [t["plan"] for t in told]


def refit(engine: Engine, version: int, plans: list[str], **named) -> list[dict]:
    waiting = engine.rpc("refit", version, plans, deadline=time.time() + SOON, **named)
    wait(waiting, SOON)  # for all of them, also where one has failed
    return [f.result(0) for f in waiting]


def stored(engine: Engine) -> list[dict]:
    return [{name: worker.read(name) for name in worker.graph} for worker in engine.workers]


def reloaded(m: Model, full: dict, ranks: int) -> list[dict]:
    """What upstream's own path makes of the checkpoint; rows that pad the vocabulary are 0 in both."""
    engine = Engine(shape_of(m), ranks)
    for worker in engine.workers:
        worker.engine.model_engine.model_loader.reload(worker.model, full)
    return stored(engine)


@st.composite
def cases(draw):
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    m = Model(
        num_layers=4,
        hidden=draw(st.integers(1, 9)),
        ffn=8 * draw(st.integers(1, 2)),
        heads=4,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 2)),
        vocab=draw(st.integers(5, 40)),
        tied=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )
    ranks = draw(st.sampled_from([1, 2, 4]))
    bias = ranks <= kv_heads and draw(st.booleans())
    whole = Model(**vars(m) | {"bias": bias})
    return whole, draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2])), ranks, draw(st.booleans())


def adapt(trainer: Trainer, full: dict) -> None:
    """Put adapters on every linear layer of a trainer. Integers, so that sums are exact and bits can be compared."""
    for name, t in full.items():
        full[name] = t.mul(8).round()
    for rank in trainer.ranks:
        plain, adapters, g = rank.weight, {}, torch.Generator().manual_seed(rank.place[2])

        def weight(name: str, rank=rank, plain=plain, adapters=adapters, g=g):
            base = plain(name)
            if "linear" not in name or base.dim() == 1:
                return base
            if name not in adapters:
                adapters[name] = (
                    torch.randint(-2, 3, (base.shape[0], 2), generator=g).float(),
                    torch.randint(-2, 3, (2, base.shape[1]), generator=g).float(),
                )
            return LowRank(base, *adapters[name], 2.0)

        rank.weight = weight


def merged(trainer: Trainer, m: Model, full: dict) -> dict:
    """The checkpoint of a trainer under adapters, read back through its manifests, by the slice."""
    found = {name: torch.full_like(t, torch.nan) for name, t in full.items()}
    for rank in trainer.ranks:
        for item in rank.manifest()["tensors"]:
            w = rank.weight(item["name"])
            w = w.base.double() + w.scale * w.b.double() @ w.a.double() if isinstance(w, LowRank) else w
            for s in item["segments"]:
                if s["tensor"]:
                    window(found[s["tensor"]], s["start"], s["size"]).copy_(window(w, s["at"], s["size"]))
    assert not any(t.isnan().any() for t in found.values())
    return found


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(cases())
def test_every_layout_is_what_reload_makes_of_it(case):
    """Bit by bit, and read at the addresses that were captured before."""
    m, tp, pp, ranks, adapted = case
    engine, trainer = Engine(shape_of(m), ranks), Trainer(m, tp, pp)
    try:
        full = checkpoint(m)
        if adapted:
            adapt(trainer, full)
            for rank in trainer.ranks:
                rank.step(full)
        plans = attach(engine, trainer)
        trainer.publish(full, 0)
        told = refit(engine, 0, plans)
        assert [(t["version"], t["state"]) for t in told] == [(0, "idle")] * ranks
        assert engine.executor.resets == ranks
        wanted = merged(trainer, m, full) if adapted else full
        for mine, theirs in zip(stored(engine), reloaded(m, wanted, ranks), strict=True):
            for name, wanted in theirs.items():
                rows = wanted.abs().flatten(1).amax(1) > 1e-3 if "embed" in name or "lm_head" in name else slice(None)
                assert torch.equal(mine[name][rows], wanted[rows]), name
        total = sum(t["bytes"] for t in told)
        padding = sum(4 * m.hidden * (rows_of(m, ranks) * ranks - m.vocab) for _ in range(1 if m.tied else 2))
        assert total + padding == sum(4 * p.numel() for w in engine.workers for p in w.model.parameters())
    finally:
        trainer.close()


def rows_of(m: Model, ranks: int) -> int:
    return -(-m.vocab // ranks)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_are_those_of_transformers(tmp_path, family: str, ranks: int):
    folder = save_model(tmp_path / "m", family, vocab_size=51)
    shape = ModelShape.from_folder(folder)
    read = Weights(folder, shape.tensors())
    full = {name: read.window(name, [0] * len(size), size) for name, size in shape.tensors().items()}
    names = ("num_layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "tied")
    m = Model(**{n: getattr(shape, n) for n in names}, bias=shape.qkv_bias, qk_norm=shape.qk_norm)
    engine, trainer = Engine(shape, ranks), Trainer(m, 2, 1)
    try:
        trainer.ranks[0].m = m
        plans = attach(engine, trainer)
        trainer.publish(full, 0)
        refit(engine, 0, plans)
    finally:
        trainer.close()
    tokens = torch.tensor([3, 17, 50, 4, 9, 22])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder).float()(tokens[None]).logits[0]
    assert (engine.logits(tokens) - wanted).abs().max() < 1e-4 < wanted.abs().max()


SMALL = Model(num_layers=2, hidden=8, ffn=8, heads=4, kv_heads=2, head_dim=4, vocab=21)


def after(steps: int) -> dict:
    g = torch.Generator().manual_seed(steps)
    return {name: torch.randn(t.shape, generator=g) for name, t in checkpoint(SMALL).items()}


@pytest.fixture
def pair():
    """(engine of two ranks at version 0, trainer of four, plans)."""
    engine, trainer = Engine(shape_of(SMALL), 2), Trainer(SMALL, 2, 2)
    plans = attach(engine, trainer)
    trainer.publish(after(0), 0)
    refit(engine, 0, plans)
    yield engine, trainer, plans
    trainer.close()


def is_at(engine: Engine, steps: int) -> bool:
    found = stored(engine)
    names = [n for n in found[0] if "embed" not in n and "lm_head" not in n]
    wanted = reloaded(SMALL, after(steps), 2)
    return all(torch.equal(a[n], b[n]) for a, b in zip(found, wanted, strict=True) for n in names)


def refused(engine: Engine, call, words: str, kind=ValueError) -> None:
    """The weights of before are intact, and are sampled from."""
    with pytest.raises(kind, match=words):
        call()
    assert is_at(engine, 0)
    assert [w.refit_tell()["refusal"] for w in engine.workers] == ["", ""]


def test_what_is_wrong_before_the_first_write_changes_nothing(pair):
    engine, trainer, plans = pair
    trainer.publish(after(1), 1)
    refused(engine, lambda: refit(engine, 1, ["0" * 64, "1" * 64]), "asked for the plan 000000000000")
    refused(engine, lambda: refit(engine, 0, plans), "to version 0, but the weights are of version 0 already")
    refused(engine, lambda: refit(engine, 2, plans), "holds version 1 after 1 s, expected 2", TimeoutError)
    refit(engine, 1, plans)
    assert is_at(engine, 1)
    with pytest.raises(ValueError, match="to version 1, but the weights are of version 1"):  # a second commit
        refit(engine, 1, plans)


def test_weights_that_have_moved(pair):
    engine, trainer, plans = pair
    module = engine.workers[1].model.model.layers[0].mlp.down_proj
    kept = module.weight.data
    trainer.publish(after(1), 1)
    for again in (lambda t: nn.Parameter(t.clone()), lambda t: nn.Parameter(t.double())):
        module.weight = again(kept)
        for call in (lambda: engine.workers[1].refit_ready(1, plans), lambda: refit(engine, 1, plans, again=True)):
            with pytest.raises(ValueError, match="lie elsewhere than when the plan was compiled"):
                call()
    module.weight = nn.Parameter(kept)
    refit(engine, 1, plans, again=True)
    assert is_at(engine, 1)


def test_requests_that_do_not_end(pair):
    """The drain has a deadline though upstream's has none: who comes too late writes nothing."""
    engine, trainer, plans = pair
    trainer.publish(after(1), 1)
    busy = engine.executor.request()
    busy.__enter__()
    waiting = engine.rpc("refit", 1, plans, deadline=time.time() + 0.3)
    time.sleep(0.5)
    assert not any(f.done() for f in waiting)
    busy.__exit__(None, None, None)
    for future in waiting:
        with pytest.raises(TimeoutError, match="requests did not end in time"):
            future.result(SOON)
    assert is_at(engine, 0) and [w.refit_tell()["state"] for w in engine.workers] == ["idle"] * 2
    refit(engine, 1, plans)
    assert is_at(engine, 1)


def test_a_rank_that_is_not_told(pair):
    """The others wait in the control action; nothing is written until it comes."""
    engine, trainer, plans = pair
    trainer.publish(after(1), 1)
    given = {"deadline": time.time() + SOON}
    first = engine.actors[0].submit(engine.workers[0].refit, 1, plans, **given)
    time.sleep(0.3)
    assert not first.done() and is_at(engine, 0)
    second = engine.actors[1].submit(engine.workers[1].refit, 1, plans, **given)
    assert [f.result(SOON)["version"] for f in (first, second)] == [1, 1] and is_at(engine, 1)


@pytest.mark.parametrize("fault", ["byte", "overtaken", "dead"])
def test_a_failure_after_the_first_write_poisons_until_all_is_written_again(pair, monkeypatch, fault: str):
    engine, trainer, plans = pair
    trainer.publish(after(1), 1)
    if fault == "byte":  # a byte flips between the write and the reading back
        verify, flipped = execute.verify, threading.Event()

        def flip(written, into, names):
            if not flipped.is_set():
                flipped.set()
                into[3].view(-1)[0] += 1
            verify(written, into, names)

        monkeypatch.setattr(execute, "verify", flip)
        words = "pieces read back other than they were written"
    else:  # the trainer's next version comes while the engine copies, or the trainer goes away
        write, both = execute.write, threading.Barrier(2)  # a rank that is still asking would be refused

        def interrupted(*given):
            both.wait(SOON)
            trainer.published[0]._board.tell(7) if fault == "overtaken" else trainer.published[0].close()
            return write(*given)

        monkeypatch.setattr(execute, "write", interrupted)
        words = "holds version 7, expected 1" if fault == "overtaken" else "has died; start that rank again"
    with pytest.raises(RuntimeError, match=words):
        refit(engine, 1, plans)
    monkeypatch.undo()
    poisoned = [w.refit_tell() for w in engine.workers if w.refit_tell()["refusal"]]
    assert poisoned and all(t["state"] == "poisoned" and "is a mixture" not in t["refusal"] for t in poisoned)
    if fault == "dead":
        trainer.published[0] = SharedWeights(trainer.names[0], trainer.ranks[0])
    trainer.publish(after(1), 1)
    told = refit(engine, 1, plans, again=True)  # also on the rank that had it
    assert [(t["version"], t["state"], t["refusal"]) for t in told] == [(1, "idle", "")] * 2 and is_at(engine, 1)


def test_modules_that_must_not_be_written_go_by_reload(tmp_path):
    engine, trainer = Engine(shape_of(SMALL), 2), Trainer(SMALL, 2, 2)
    for worker in engine.workers:
        worker.model.model.layers[1].mlp.gate_up_proj.transform_weights = lambda t: 0.5 * t
    try:
        told = [f.result(SOON) for f in engine.rpc("refit_attach", asdict(engine.shape), trainer.told, None, 1.0)]
        names = [f"model.layers.1.mlp.{c}_proj.weight" for c in ("gate", "up")]
        assert [t["reloaded"] for t in told] == [names] * 2
        trainer.publish(after(1), 1)
        refit(engine, 1, [t["plan"] for t in told])
    finally:
        trainer.close()
    for rank, (mine, theirs) in enumerate(zip(stored(engine), reloaded(SMALL, after(1), 2), strict=True)):
        for name in mine:
            if "embed" not in name and "lm_head" not in name:
                scale = 0.5 if name == "model.layers.1.mlp.gate_up_proj.weight" else 1.0
                assert torch.equal(mine[name], scale * theirs[name]), (rank, name)


def test_what_modules_derive_from_their_weights_is_derived_anew_where_graphs_read_it(pair):
    """And a load hook that changes the weights themselves does not pass the golden gate."""
    engine, trainer, _ = pair
    for worker in engine.workers:
        norm = worker.model.model.norm
        norm.doubled = 2 * norm.weight.data
        norm.post_load_weights = lambda norm=norm: setattr(norm, "doubled", 2 * norm.weight.data)
    places = [w.model.model.norm.doubled.data_ptr() for w in engine.workers]
    plans = attach(engine, trainer)
    for version in (1, 2):
        trainer.publish(after(version), version)
        refit(engine, version, plans)
        for worker, place in zip(engine.workers, places, strict=True):
            norm = worker.model.model.norm
            assert (
                torch.equal(norm.doubled, 2 * after(version)["model.norm.weight"]) and norm.doubled.data_ptr() == place
            )
    for worker in engine.workers:
        norm = worker.model.model.norm
        norm.post_load_weights = lambda norm=norm: norm.weight.data.mul_(2)
    plans = attach(engine, trainer)
    trainer.publish(after(3), 3)
    with pytest.raises(RuntimeError, match="1 parameters differ from what .* own reload makes .* model.norm.weight"):
        refit(engine, 3, plans)


def test_a_newer_loader_is_told_when_an_update_begins_and_ends(pair):
    engine, trainer, _ = pair
    said = []
    for worker in engine.workers:
        loader = worker.engine.model_engine.model_loader
        for step in ("begin", "finalize", "abort"):
            setattr(loader, f"{step}_update_weights", lambda step=step: said.append(step))
    plans = attach(engine, trainer)
    trainer.publish(after(1), 1)
    refit(engine, 1, plans)
    assert sorted(said) == ["begin"] * 2 + ["finalize"] * 2
    plans = attach(engine, trainer)
    for worker in engine.workers:
        worker.engine.model_engine.model_loader.reload = lambda *given, **named: 1 / 0
    trainer.publish(after(2), 2)
    with pytest.raises(ZeroDivisionError):
        refit(engine, 2, plans)
    assert said.count("abort") == 2 and all(w.refit_tell()["state"] == "poisoned" for w in engine.workers)


def test_engines_that_cannot_be_refitted_are_told_all_at_once():
    engine, trainer = Engine(shape_of(SMALL), 2), Trainer(SMALL, 2, 2)
    try:
        model = engine.workers[0].model.model
        model.layers[0].mlp.register_buffer("scale_of_something", torch.ones(3))
        model.layers[1].self_attn.o_proj.weight = nn.Parameter(torch.zeros(8, 9))
        model.layers[1].mlp.gate_up_proj.quant_method = FP8BlockScalesLinearMethod()
        model.layers[1].mlp.gate_up_proj.weight_scale = nn.Parameter(torch.ones(1))
        with pytest.raises(ValueError) as error:
            engine.workers[0].refit_attach(asdict(engine.shape), trainer.told, None, 1.0)
        said = str(error.value)
        assert "4 things of the engine fit no refit" in said
        assert "model.layers.1.mlp.gate_up_proj is quantised (FP8BlockScalesLinearMethod)" in said
        assert "manifest of model.layers.1.mlp.gate_up_proj.weight_scale: segments fill 8 rows, expected 1" in said
        assert "model.layers.0.mlp.scale_of_something [3] is no part of the model" in said
        assert "o_proj.weight: segments fill 8 columns, expected 9" in said
        other = shape_of(Model(**vars(SMALL) | {"vocab": 22}))
        with pytest.raises(ValueError, match="both sides must hold the same model"):
            engine.workers[1].refit_attach(asdict(other), trainer.told, None, 1.0)
    finally:
        trainer.close()
    with pytest.raises(ValueError) as error:
        check_shape(shape_of(Model(**vars(SMALL) | {"bias": True, "ffn": 9, "kv_heads": 1})), 2)
    assert "9 columns of the MLP" in str(error.value) and "a bias of 1 key-value heads on 2 ranks" in str(error.value)
