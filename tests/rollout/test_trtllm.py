"""The sampler over TensorRT-LLM: what it asks of each version; on a stand-in engine what it samples and survives."""

import asyncio
import enum
import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aligner.refit.extension import RefitExtension
from aligner.rollout import trtllm, trtllm_api
from aligner.rollout.sampling import Sampling
from aligner.rollout.trtllm import TrtllmSampler
from aligner.rollout.trtllm_api import EngineConfig, Features, engine_arguments, load_api, sampling_params
from tests.refit.standin import Engine
from tests.refit.test_extension import SMALL, Trainer, after, is_at, shape_of

ROOT = Path(__file__).parent.parent.parent
VERSIONS = ("1.2.1", "main")


def facts_of(version: str) -> dict:
    return json.loads((ROOT / "tests" / "contracts" / f"trtllm-{version}.json").read_text())


def facts(version: str, name: str) -> dict:
    modules = facts_of(version)["modules"].values()
    return next((m["names"][name] for m in modules if name in m["names"]), None)


def strict(name: str, fields: dict) -> type:
    """Takes these fields and no others."""

    def begin(self, **given):
        unknown = set(given) - set(fields)
        assert not unknown, f"{name} has no {unknown}"
        self.given = given

    return type(name, (), {"__init__": begin, "model_fields": fields})


def api(version: str) -> SimpleNamespace:
    """The names that load_api() gives, as that version has them."""
    graph = dict(facts(version, "CudaGraphConfig")["fields"])
    for base in ("DecodeCudaGraphConfig", "BaseCudaGraphConfig"):
        graph |= (facts(version, base) or {}).get("fields", {})
    found = {name: strict(name, facts(version, name)["fields"]) for name in ("KvCacheConfig", "SchedulerConfig")}
    arguments = facts(version, "BaseLlmArgs")["fields"] | facts(version, "TorchLlmArgs")["fields"]
    sleep = facts(version, "SleepConfig")
    policies = SimpleNamespace(**facts(version, "CapacitySchedulerPolicy")["fields"])
    tags = {name: value.strip('"') for name, value in facts(version, "ExecutorMemoryType")["fields"].items()}
    return SimpleNamespace(
        TorchLlmArgs=strict("TorchLlmArgs", arguments),
        CudaGraphConfig=strict("CudaGraphConfig", graph),
        SamplingParams=strict("SamplingParams", facts(version, "SamplingParams")["fields"]),
        SleepConfig=sleep and strict("SleepConfig", sleep["fields"]),
        CapacitySchedulerPolicy=policies,
        ExecutorMemoryType=enum.Enum("ExecutorMemoryType", tags),
        version="1.4.0" if version == "main" else version,
        **found,
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_takes_the_arguments(version: str):
    known = api(version)
    given = engine_arguments(known, Path("model"), 512, EngineConfig(tensor=4))
    known.TorchLlmArgs(**given)  # which refuses what it does not know
    assert given["tensor_parallel_size"] == 4 and given["max_input_len"] == given["max_seq_len"] == 512
    assert given["load_format"].upper() in facts(version, "LoadFormat")["fields"]
    assert ("sleep_config" in given, "sampler_type" in given) == ((True, False) if version == "main" else (False, True))
    if version == "main":  # a copy in host memory would be made and thrown away
        memory = known.ExecutorMemoryType
        modes = {memory.MODEL_WEIGHTS_MAIN: "NONE", memory.KV_CACHE: "NONE"}
        assert given["sleep_config"].given == {"restore_modes": modes}
    package, _, name = given["ray_worker_extension_cls"].rpartition(".")
    assert (package, name) == (RefitExtension.__module__, RefitExtension.__name__)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_takes_the_sampling_parameters(version: str):
    known = api(version)
    everything = Sampling(
        top_p=0.9,
        top_k=5,
        min_tokens=2,
        max_tokens=7,
        stop=(3, 4),
        stop_strings=("x",),
    )
    given = sampling_params(known, everything, 11).given
    assert given["stop_token_ids"] == [3, 4] and given["end_id"] == -1 and given["include_stop_str_in_output"]
    assert (given["max_tokens"], given["top_k"], given["seed"], given["stop"]) == (7, 5, 11, ["x"])
    late = Sampling(min_p=0.1, repetition_penalty=1.2)
    if version == "main":
        given = sampling_params(known, late, 0).given
        assert (given["min_p"], given["repetition_penalty"]) == (0.1, 1.2)
    else:
        with pytest.raises(ValueError, match="TensorRT-LLM 1.2.1 ignores min_p and repetition_penalty; leave them out"):
            sampling_params(known, late, 0)
    greedy = sampling_params(known, Sampling(temperature=0), 0).given
    assert greedy["temperature"] == 0 and greedy["top_k"] == 1 and not greedy["detokenize"]
    if version == "main":
        assert sampling_params(known, Sampling(temperature=0.7), 0).given["logprobs_mode"] == "processed"
    else:
        with pytest.raises(ValueError, match="log-probabilities before the temperature, and"):
            sampling_params(known, Sampling(temperature=0.7), 0)
    with pytest.raises(ValueError, match="sample at temperature 1"):
        sampling_params(known, Sampling(temperature=0.7, top_p=0.5), 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_called_as_it_is_written(version: str):
    """collective_rpc, generate_async, what a request and its output have."""
    rpc = facts(version, "AsyncLLM")["methods"]["collective_rpc"]["parameters"]
    assert rpc[:4] == ["self", "method", "args=()", "kwargs=None"]
    methods = facts(version, "AsyncLLM")["methods"]
    assert "__await__" in methods and all(
        methods[name]["parameters"][1].partition("=")[0] == "tags" for name in ("release", "resume")
    )
    assert {"MODEL_ENGINE_MAIN", "KV_CACHE"} <= facts(version, "ExecutorMemoryType")["fields"].keys()
    assert facts(version, "BaseLLM")["methods"]["generate_async"]["parameters"][1:3] == [
        "inputs",
        "sampling_params=None",
    ]
    assert {"aresult", "abort", "finished"} <= facts(version, "GenerationResult")["methods"].keys()
    assert "outputs" in facts(version, "GenerationResultBase")["methods"]
    assert {"token_ids", "logprobs", "finish_reason"} <= facts(version, "CompletionOutput")["fields"].keys()
    assert "logprob" in facts(version, "Logprob")["fields"]


def test_versions_and_machines_without_it():
    with pytest.raises(ValueError, match="TensorRT-LLM 0.9 has neither .* install 1.2.1 or newer"):
        Features.of(
            SimpleNamespace(
                version="0.9", TorchLlmArgs=strict("T", {"model": None}), SamplingParams=strict("S", {"n": 1})
            )
        )
    for good in ("1.2.1", "1.3.0rc15", "1.4.0rc1"):
        trtllm_api.check_version(good)
    for bad in ("1.1.0", "1.5.0", "2.0", "what"):
        with pytest.raises(ValueError, match=f"TensorRT-LLM is {bad}, expected 1.2 to 1.4"):
            trtllm_api.check_version(bad)
    with pytest.raises(ValueError, match="cannot be imported here .* in its own environment"):
        load_api()


class Request:
    """As generate_async gives it: its tokens are drawn one by one by the stand-in engine."""

    def __init__(self, llm: "StandInLLM", prompt: list[int], params):
        self.llm, self.prompt, self.params, self.finished, self.aborted = llm, prompt, params.given, False, False
        self.tokens, self.outputs = [], []

    async def aresult(self) -> "Request":
        p, generator, logprobs = self.params, torch.Generator().manual_seed(self.params["seed"]), []
        reason = "length"
        with self.llm.engine.executor.request():
            while len(self.tokens) < p["max_tokens"]:
                await asyncio.sleep(0.05 if self.llm.slow else 0)
                logits = self.llm.engine.logits(torch.tensor(self.prompt + self.tokens))[-1]
                nats = torch.log_softmax(logits, 0)
                drawn = (
                    nats.argmax() if p["temperature"] == 0 else torch.multinomial(nats.exp(), 1, generator=generator)
                )
                self.tokens.append(int(drawn))
                logprobs.append({int(drawn): SimpleNamespace(logprob=float(nats[int(drawn)]), rank=1)})
                if int(drawn) in p["stop_token_ids"]:
                    reason = "stop"
                    break
        self.finished = True
        self.outputs = [SimpleNamespace(token_ids=self.tokens, logprobs=logprobs, finish_reason=reason)]
        return self

    def abort(self) -> None:
        self.aborted = True


class StandInLLM:
    """AsyncLLM over the stand-in engine.

    broken: what a rank raises in place of a method, once each: once all have come to it for "refit"; at once, as when
    the rank has died, for "gone".
    """

    def __init__(self, engine: Engine):
        self.engine, self.slow, self.requests, self.broken, self.silent = engine, False, [], {}, None

    def generate_async(self, inputs: list[int], sampling_params) -> Request:
        self.requests.append(Request(self, inputs, sampling_params))
        return self.requests[-1]

    async def collective_rpc(self, method: str, args=(), kwargs=None) -> list:
        def call(worker):
            rank = worker.engine.model_engine.mapping.tp_rank
            if error := self.broken.pop((method if method != "refit" else "gone", rank), None):
                raise error
            if method == "refit" and (error := self.broken.pop((method, rank), None)):
                worker._refit_plan.preflight = lambda *_: self._raise(worker, error)
            return getattr(worker, method)(*args, *([1.0] if method == "refit_attach" else []), **(kwargs or {}))

        pairs = zip(self.engine.actors, self.engine.workers, strict=True)
        told = [pair for rank, pair in enumerate(pairs) if rank != self.silent]
        futures = [asyncio.wrap_future(actor.submit(call, worker)) for actor, worker in told]
        return list(await asyncio.gather(*futures))

    def _raise(self, worker, error: Exception) -> None:
        del worker._refit_plan.preflight
        raise error


@pytest.fixture
def setup():
    """(sampler at version 0, its engine, the trainer)."""
    engine, trainer = Engine(shape_of(SMALL), 2), Trainer(SMALL, 2, 1)
    llm = StandInLLM(engine)
    sampler = TrtllmSampler(llm, api("main"), EngineConfig(tensor=2, max_batch=2, drain_s=0.5))
    with pytest.raises(RuntimeError, match="no weights have come yet"):
        next(sampler.stream([[1]], Sampling()))
    sampler.attach(asdict(engine.shape), trainer.told)
    trainer.publish(after(0), 0)
    sampler.pull(0)
    yield sampler, llm, trainer
    trainer.close()


PROMPTS = [[5, 6, 7], [9], [11, 3]]


def test_responses_with_their_log_probabilities(setup):
    sampler, llm, _ = setup
    how = Sampling(max_tokens=6, stop=(2, 13, 20, 8), seed=4)
    rollout = sampler.generate(PROMPTS, how, 2)
    assert rollout.weights_version == 0 and len(llm.requests) == 6
    starts = rollout.cu_seqlens.tolist()
    for b, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        tokens, prompt = rollout.tokens_N[begin:end], PROMPTS[b // 2]
        assert tokens[: len(prompt)].tolist() == prompt
        nats = torch.log_softmax(llm.engine.logits(tokens), 1)[:-1].gather(1, tokens[1:, None])[:, 0]
        mask = rollout.action_mask_N[begin:end][1:]
        assert (rollout.sampler_logprobs_N[begin:end][1:] - nats)[mask].abs().max() < 1e-5
        last = int(tokens[-1])
        assert bool(rollout.finished_B[b]) == (last in how.stop) and (last in how.stop or mask.sum() == 6)
    again = sampler.generate(PROMPTS, how, 2)
    assert torch.equal(again.tokens_N, rollout.tokens_N)
    assert len({tuple(request.tokens) for request in llm.requests[:6]}) == 6
    greedy = sampler.generate([[5, 6]], Sampling(temperature=0, max_tokens=3))
    sequence = [5, 6]
    for _ in range(3):
        sequence.append(int(llm.engine.logits(torch.tensor(sequence))[-1].argmax()))
    assert greedy.tokens_N.tolist() == sequence


def test_a_stream_that_is_closed_cancels_the_rest(setup):
    sampler, llm, trainer = setup
    llm.slow = True
    stream = sampler.stream(PROMPTS, Sampling(max_tokens=40), 3)
    next(stream)
    assert len(llm.requests) <= 5  # twice the batch at once, and what followed the first
    trainer.publish(after(1), 1)
    with pytest.raises(TimeoutError, match="1 streams have not ended; exhaust or close them"):
        sampler.pull(1)
    assert sampler.weights_version == 0 and sampler.refusal == ""
    stream.close()
    end = time.monotonic() + 10
    while not any(request.aborted for request in llm.requests) and time.monotonic() < end:
        time.sleep(0.01)
    assert any(request.aborted for request in llm.requests)
    sampler.pull(1)
    assert sampler.weights_version == 1 and is_at(llm.engine, 1)


def test_responses_that_nobody_takes_hold_back_new_requests(setup):
    """Twice the batch of two, whether in flight or waiting to be read."""
    sampler, llm, _ = setup
    stream = sampler.stream(PROMPTS, Sampling(max_tokens=1), 5)
    end = time.monotonic() + 10
    while not (len(llm.requests) == 4 and all(r.finished for r in llm.requests)) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(llm.requests) == 4 and all(r.finished for r in llm.requests)
    assert len(list(stream)) == 15 == len(llm.requests)


def test_new_requests_wait_while_weights_come(setup):
    sampler, llm, trainer = setup
    trainer.publish(after(1), 1)
    whole, go, entered = RefitExtension.refit, threading.Event(), threading.Event()

    def slow(self, *given, **named):
        entered.set()
        go.wait(10)
        return whole(self, *given, **named)

    for worker in llm.engine.workers:
        worker.refit = slow.__get__(worker)
    pool = ThreadPoolExecutor(2)
    pulling = pool.submit(sampler.pull, 1)
    assert entered.wait(10)
    asked = pool.submit(sampler.generate, [[5]], Sampling(max_tokens=1))
    with pytest.raises(RuntimeError, match="another one is under way"):
        sampler.pull(1)
    time.sleep(0.1)
    assert not llm.requests
    go.set()
    pulling.result(10)
    assert asked.result(10).weights_version == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_poisons_all_until_every_rank_has_the_version(setup, rank: int):
    sampler, llm, trainer = setup
    trainer.publish(after(1), 1)
    llm.broken["refit", rank] = MemoryError("out of memory")
    with pytest.raises(RuntimeError, match="the refit to version 1 did not reach all ranks .*out of memory"):
        sampler.pull(1)
    with pytest.raises(RuntimeError, match="did not reach all ranks"):
        next(sampler.stream([[1]], Sampling()))
    sampler.pull(1)
    assert (sampler.weights_version, sampler.refusal) == (1, "") and is_at(llm.engine, 1)
    assert sampler.generate([[5]], Sampling(max_tokens=1)).weights_version == 1


def test_a_rank_that_died_leaves_the_others_waiting_but_not_the_sampler(setup, monkeypatch):
    """Upstream's control action has no deadline of its own."""
    sampler, llm, trainer = setup
    trainer.publish(after(1), 1)
    monkeypatch.setattr(trtllm, "ANSWER_S", 0.2)
    llm.broken["gone", 1] = OSError("the actor has died")
    with pytest.raises(RuntimeError, match="the refit to version 1 did not reach all ranks .the actor has died"):
        sampler.pull(1)
    with pytest.raises(RuntimeError, match="did not reach all ranks"):
        next(sampler.stream([[1]], Sampling()))
    with llm.engine.executor.control_action():  # what lets the other go, so that the test can end
        pass


def test_requests_that_the_engine_does_not_end(setup, monkeypatch):
    """The drain hangs: the sampler does not, and once it has come through nothing was written."""
    sampler, llm, trainer = setup
    trainer.publish(after(1), 1)
    monkeypatch.setattr(trtllm, "ANSWER_S", 0.2)
    words = "did not reach all ranks .the engine has not answered in 0.7 s"
    with llm.engine.executor.request(), pytest.raises(RuntimeError, match=words):
        sampler.pull(1)
    monkeypatch.undo()
    for future in [actor.submit(int) for actor in llm.engine.actors]:
        future.result(10)
    assert is_at(llm.engine, 0)
    sampler.pull(1)
    assert is_at(llm.engine, 1) and sampler.generate([[5]], Sampling(max_tokens=1)).weights_version == 1


def test_the_first_refit_can_be_repeated_when_a_rank_failed():
    engine, trainer = Engine(shape_of(SMALL), 2), Trainer(SMALL, 2, 1)
    llm = StandInLLM(engine)
    sampler = TrtllmSampler(llm, api("main"), EngineConfig(tensor=2, max_batch=2, drain_s=0.5))
    try:
        sampler.attach(asdict(engine.shape), trainer.told)
        trainer.publish(after(0), 0)
        llm.broken["refit", 1] = MemoryError("out of memory")
        with pytest.raises(RuntimeError, match="did not reach all ranks"):
            sampler.pull(0)
        sampler.pull(0)
        assert is_at(engine, 0) and sampler.generate([[5]], Sampling(max_tokens=1)).weights_version == 0
    finally:
        trainer.close()


def test_a_response_that_fails_takes_the_others_along(setup):
    sampler, llm, trainer = setup
    llm.slow = True
    stream = sampler.stream(PROMPTS, Sampling(max_tokens=40), 1)
    while len(llm.requests) < 3:
        time.sleep(0.01)
    llm.requests[1].tokens = None  # which its loop cannot go on with
    with pytest.raises(TypeError):
        list(stream)
    end = time.monotonic() + 10
    while llm.engine.executor.active and time.monotonic() < end:
        time.sleep(0.01)
    assert all(request.aborted for request in llm.requests)
    trainer.publish(after(1), 1)
    sampler.pull(1)


def test_a_stream_that_nobody_has_any_more_is_closed(setup):
    sampler, llm, trainer = setup
    llm.slow = True
    next(sampler.stream(PROMPTS, Sampling(max_tokens=20), 3))
    gc.collect()
    trainer.publish(after(1), 1)
    sampler.pull(1)
    assert any(request.aborted for request in llm.requests)


def test_a_rank_that_does_not_answer_is_noticed(setup):
    """Upstream's integrations look at the first rank's answer alone."""
    sampler, llm, trainer = setup
    trainer.publish(after(1), 1)
    llm.silent = 1
    with pytest.raises(ValueError, match="1 of 2 ranks have answered refit_ready"):
        sampler.pull(1)
    assert (sampler.weights_version, sampler.refusal) == (0, "") and is_at(llm.engine, 0)
    llm.silent = None
    sampler.pull(1)
    assert is_at(llm.engine, 1)


def test_what_is_wrong_on_one_rank_changes_nothing_anywhere(setup):
    sampler, llm, trainer = setup
    trainer.publish(after(1), 1)
    llm.broken["refit_ready", 1] = ValueError("refit: something is odd here")
    with pytest.raises(ValueError, match="something is odd here"):
        sampler.pull(1)
    assert (sampler.weights_version, sampler.refusal) == (0, "") and is_at(llm.engine, 0)
    with pytest.raises(ValueError, match="to version 0, but the weights are of version 0"):
        sampler.pull(0)


def test_log_probabilities_in_every_form():
    assert trtllm._nats(-1.5, 3) == trtllm._nats({3: -1.5}, 3) == -1.5
    assert trtllm._nats({3: SimpleNamespace(logprob=-2.0)}, 3) == trtllm._nats(SimpleNamespace(logprob=-2.0), 3) == -2.0
    with pytest.raises(RuntimeError, match="ended a response by 'cancelled'"):
        trtllm._response(0, 0, SimpleNamespace(finish_reason="cancelled", token_ids=[1], logprobs=[0.0]))
