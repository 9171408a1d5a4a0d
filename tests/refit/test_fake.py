"""The stand-in for the package tensorrt_llm: it answers as transformers does, and forgets as a GPU would."""

import asyncio
import inspect
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner.checkpoint.huggingface import Weights
from aligner.models.shape import ModelShape
from aligner.rollout.sampling import Sampling
from aligner.rollout.trtllm import TrtllmSampler
from aligner.rollout.trtllm_api import EngineConfig, engine_arguments, load_api, sampling_params
from tests.conftest import save_model
from tests.refit.layouts import Model
from tests.refit.test_extension import Trainer
from tests.rollout.test_trtllm import facts

PROMPTS = [[3, 17, 50, 4], [9], [22, 8, 30, 31, 5, 6, 7, 40], [11, 3]]


class Clash:
    def sleep(self):
        """RayGPUWorker has one."""


@pytest.fixture
def api(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "fake")
    yield load_api()
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("fake") / request.param, request.param, vocab_size=51)


def load(llm, folder: Path) -> None:
    read = Weights(folder, ModelShape.from_folder(folder).tensors())
    full = {name: read(name) for name in ModelShape.from_folder(folder).tensors()}
    for worker in llm.workers:
        worker.engine.model_engine.model_loader.reload(worker.model, full)


@pytest.fixture
def make(api):
    """(folder, ranks) -> (sampler, llm), with the folder's weights; three sequences at once."""
    made = []

    def begin(folder: Path, tensor: int = 1):
        config = EngineConfig(tensor=tensor, max_batch=3)
        made.append(api.AsyncLLM(**engine_arguments(api, folder, 64, config)))
        load(made[-1], folder)
        sampler = TrtllmSampler(made[-1], api, config)
        sampler.refusal, sampler.weights_version = "", 0
        return sampler, made[-1]

    yield begin
    for llm in made:
        llm.shutdown()


def reference(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).float()(tokens[None]).logits[0]


@pytest.mark.parametrize("tensor", [1, 2])
def test_it_answers_as_transformers(make, folder: Path, tensor: int):
    """Prompts of several lengths, more of them than the batch holds, at temperatures 0, 1 and another one."""
    sampler, _ = make(folder, tensor)
    for temperature in (0.0, 1.0, 0.7):
        how = Sampling(temperature=temperature, max_tokens=9, stop=(2, 13), seed=4)
        rollout = sampler.generate(PROMPTS, how, 2)
        starts = rollout.cu_seqlens.tolist()
        for begin, end in zip(starts[:-1], starts[1:], strict=True):
            tokens, mask = rollout.tokens_N[begin:end], rollout.action_mask_N[begin:end][1:]
            logits = reference(folder, tokens)[:-1]
            nats = torch.log_softmax(logits / (temperature or 1.0), 1).gather(1, tokens[1:, None])[:, 0]
            assert (rollout.sampler_logprobs_N[begin:end][1:] - nats)[mask].abs().max() < 1e-4
            assert temperature or torch.equal(logits.argmax(1)[mask], tokens[1:][mask])
        assert torch.equal(sampler.generate(PROMPTS, how, 2).tokens_N, rollout.tokens_N)
        assert 0 < int(rollout.finished_B.sum()) < 8 or not temperature


def test_tokens_are_drawn_by_their_probabilities(make, api, folder: Path):
    sampler, llm = make(folder)
    nats = torch.log_softmax(reference(folder, torch.tensor(PROMPTS[0]))[-1], 0)
    likely = nats.argsort(descending=True).tolist()
    drawn = torch.tensor([r.tokens[0] for r in sampler.stream(PROMPTS[:1], Sampling(max_tokens=1), 600)])
    found = drawn.bincount(minlength=51) / 600
    assert (found - nats.exp()).abs().max() < 5 * (0.25 / 600) ** 0.5
    tokens = {r.tokens[0] for r in sampler.stream(PROMPTS[:1], Sampling(max_tokens=1, top_k=3), 60)}
    assert tokens == set(likely[:3])
    mass = float(nats[likely[:2]].exp().sum())
    tokens = {r.tokens[0] for r in sampler.stream(PROMPTS[:1], Sampling(max_tokens=1, top_p=mass - 1e-3), 60)}
    assert tokens == set(likely[:2])
    with pytest.raises(ValueError, match="knows no min_p"):
        sampling_params(api, Sampling(min_p=0.1), 0)


def test_memory_that_is_released(make, folder: Path):
    sampler, llm = make(folder, 2)
    how, tags = Sampling(temperature=0, max_tokens=4), ["model_weights", "kv_cache"]
    before = sampler.generate(PROMPTS, how)
    addresses = [dict(w.graph) for w in llm.workers]
    asyncio.run(llm.release(tags))
    with pytest.raises(RuntimeError, match="kv_cache, model_weights released"):
        sampler.generate(PROMPTS, how)
    with pytest.raises(RuntimeError, match="kv_cache: released already"):
        asyncio.run(llm.release(["kv_cache"]))
    llm.fail_resume.add("model_weights")
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        asyncio.run(llm.resume(["model_weights"]))
    asyncio.run(llm.resume(["model_weights"]))
    with pytest.raises(RuntimeError, match="cannot generate: kv_cache released"):
        sampler.generate(PROMPTS, how)
    asyncio.run(llm.resume(["kv_cache"]))
    with pytest.raises(RuntimeError, match="model_weights: not released"):
        asyncio.run(llm.resume(["model_weights"]))
    assert sampler.generate(PROMPTS, how).sampler_logprobs_N.isnan().any()
    for worker, held in zip(llm.workers, addresses, strict=True):
        assert all(worker.read(name).isnan().all() for name in worker.graph)
        assert {name: p.data_ptr() for name, p in worker.model.named_parameters(remove_duplicate=False)} == {
            name: address for name, (address, _) in held.items()
        }
    load(llm, folder)
    after = sampler.generate(PROMPTS, how)
    assert torch.equal(after.tokens_N, before.tokens_N) and not after.sampler_logprobs_N.isnan().any()


def test_a_parameter_that_was_rebound_is_not_read(make, folder: Path):
    sampler, llm = make(folder)
    before = sampler.generate(PROMPTS, Sampling(max_tokens=4))
    for p in llm.workers[0].model.parameters():
        p.data = torch.zeros_like(p)
    assert torch.equal(sampler.generate(PROMPTS, Sampling(max_tokens=4)).tokens_N, before.tokens_N)


def test_actions_of_all_ranks_between_iterations(make, api, folder: Path):
    _, llm = make(folder, 2)
    decode = llm._batch.decode
    llm._batch.decode = lambda tokens: time.sleep(0.01) or decode(tokens)  # so that it does not end before the action
    request = llm.generate_async([5], sampling_params(api, Sampling(max_tokens=60), 0))
    gate, inside = threading.Event(), threading.Barrier(3)

    def act(worker, drain: bool) -> int:
        with worker.engine.control_action(drain=drain):
            inside.wait(10)
            assert gate.wait(10)
            return len(request.outputs[0].token_ids)

    with ThreadPoolExecutor(4) as pool:
        hasty = [pool.submit(act, worker, False) for worker in llm.workers]
        inside.wait(10)
        tokens = len(request.outputs[0].token_ids)
        gate.set()
        assert [f.result(10) for f in hasty] == [tokens] * 2 and tokens < 60
        patient = [pool.submit(act, worker, True) for worker in llm.workers]
        inside.wait(10)
        assert request.finished and [f.result(10) for f in patient] == [60, 60]
        request = llm.generate_async([5], sampling_params(api, Sampling(max_tokens=60), 0))
        request.abort()
        assert request.result(10).outputs[0].finish_reason == "cancelled"
        alone = pool.submit(act, llm.workers[0], True)
        llm.shutdown()
        with pytest.raises(RuntimeError, match="the engine was shut down"):
            alone.result(10)


def test_what_upstream_would_refuse(make, api, folder: Path):
    _, llm = make(folder, 2)
    for kind in (api.KvCacheConfig, api.CudaGraphConfig, api.SchedulerConfig, api.SleepConfig, api.SamplingParams):
        with pytest.raises(ValueError, match=f"{kind.__name__} has no field sampler_type"):
            kind(sampler_type=1)
    given = engine_arguments(api, folder, 64, EngineConfig())
    with pytest.raises(ValueError, match="TorchLlmArgs has no field enable_sleep"):
        api.AsyncLLM(**given, enable_sleep=True)
    with pytest.raises(ValueError, match="RayGPUWorker already defines sleep"):
        api.AsyncLLM(**given | {"ray_worker_extension_cls": f"{__name__}.Clash"})
    with pytest.raises(ValueError, match="4 heads and 96 columns of the MLP are not shared by 3 ranks"):
        api.AsyncLLM(**given | {"tensor_parallel_size": 3})
    for prompt, words in (([1] * 64, "exceed max_seq_len, 64"), ([1] * 65, "a prompt of 65 tokens")):
        with pytest.raises(ValueError, match=words):
            llm.generate_async(prompt, sampling_params(api, Sampling(max_tokens=1), 0))
    with pytest.raises(AttributeError, match="no_such_method"):
        asyncio.run(llm.collective_rpc("no_such_method"))
    for name in ("release", "resume", "collective_rpc", "setup_async"):
        wanted = [p.partition("=")[0] for p in facts("main", "AsyncLLM")["methods"][name]["parameters"]]
        assert ["self", *inspect.signature(getattr(llm, name)).parameters] == wanted


@pytest.fixture
def fed(make, folder: Path):
    """(sampler, llm, what gives the engine a version): an engine of two ranks with a trainer of its own."""
    sampler, llm = make(folder, 2)
    shape = ModelShape.from_folder(folder)
    names = ("num_layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "tied")
    trainer = Trainer(Model(**{n: getattr(shape, n) for n in names}, qk_norm=shape.qk_norm), 2, 1)
    sampler.weights_version = -1
    sampler.attach(asdict(shape), trainer.told)
    read = Weights(folder, shape.tensors())
    full = {name: read(name) for name in shape.tensors()}

    def give(version: int) -> None:
        trainer.publish(full, version)
        sampler.pull(version)

    yield sampler, llm, give
    trainer.close()


GREEDY = Sampling(temperature=0, max_tokens=4)


@pytest.mark.parametrize("tag", ["model_weights", "kv_cache"])
def test_an_engine_that_finds_no_memory_to_wake_up_in(fed, tag: str):
    """It says what to lower, samples nothing, and wakes up when there is memory again."""
    sampler, llm, give = fed
    give(0)
    wanted = sampler.generate(PROMPTS, GREEDY)
    sampler.sleep()
    llm.fail_resume = {tag}
    with pytest.raises(RuntimeError, match=f"{tag} found no memory to wake up in .CUDA out of memory.; lower --trtllm"):
        give(1)
    with pytest.raises(RuntimeError, match="refit all of them"):
        sampler.generate(PROMPTS, GREEDY)
    give(2)
    again = sampler.generate(PROMPTS, GREEDY)
    assert torch.equal(again.tokens_N, wanted.tokens_N) and again.weights_version == 2


def test_a_refit_of_an_engine_that_sleeps(fed):
    """A worker writes into no memory that was released, whoever tells it to."""
    sampler, llm, give = fed
    give(0)
    sampler.sleep()
    plans = sampler._plans
    for worker in llm.workers:
        worker._refit_source.wait = lambda version: False
    with pytest.raises(ValueError, match="the engine's weights are released; wake them first"):
        asyncio.run(llm.collective_rpc("refit", (1, plans), {"deadline": time.time() + 5}))
    assert all(torch.isnan(p).all() for worker in llm.workers for p in worker.model.parameters())


def test_a_layout_that_upstream_has_otherwise_fails_the_golden_gate(fed):
    """Upstream's reload puts up before gate: the plan would be wrong, and is never used."""
    sampler, llm, give = fed
    for worker in llm.workers:
        loader = worker.engine.model_engine.model_loader
        whole = loader.reload

        def swapped(model, weights, allow_partial_loading=False, whole=whole):
            names = {name: name.replace("gate_proj", "x").replace("up_proj", "gate_proj") for name in weights}
            weights = {names[name].replace(".x.", ".up_proj."): t for name, t in weights.items()}
            whole(model, weights, allow_partial_loading=allow_partial_loading)

        loader.reload = swapped
    layers = ModelShape.from_folder(llm.args.model).num_layers
    words = f"{layers} parameters differ from what TensorRT-LLM's own reload makes .* model.layers.0.mlp.gate_up_proj"
    for version in (0, 1):  # the second time too
        with pytest.raises(RuntimeError, match=words):
            give(version)
        with pytest.raises(RuntimeError, match="refit all of them"):
            sampler.generate(PROMPTS, GREEDY)
