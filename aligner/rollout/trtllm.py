"""A sampler over TensorRT-LLM's AsyncLLM, in the engine's environment; the weights come by refit.extension.

TensorRT-LLM is imported by load_api() alone. What differs between its versions is asked of it in Features, and what is
used of it stands in tests/contracts.
"""

import asyncio
import dataclasses
import queue
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from aligner.data.batch import Rollout
from aligner.rollout.sampling import Response, Sampling, pack_responses, stream_key

ANSWER_S = 600.0  # beyond the engine's own deadlines: a rank that has not answered by then never will
EXTENSION = "aligner.refit.extension.RefitExtension"
OLDEST, NEWEST = (1, 2), (1, 4)  # of the versions whose names were looked at (tests/contracts)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    tensor: int = 1
    """Tensor ranks of an engine."""
    max_batch: int = 256
    """Sequences decoded at once."""
    max_tokens: int = 8192
    """Tokens of one forward pass."""
    kv_fraction: float = 0.85
    """Share of the free GPU memory that the key-value cache takes."""
    drain_s: float = 120.0
    """Seconds that a refit waits for requests to end."""


def load_api() -> SimpleNamespace:
    """The names of TensorRT-LLM that are used. Raises ValueError where it cannot be imported, or is too old or new."""
    try:
        from tensorrt_llm._torch.async_llm import AsyncLLM
        from tensorrt_llm.llmapi import llm_args
        from tensorrt_llm.sampling_params import SamplingParams
        from tensorrt_llm.version import __version__
    except (ImportError, RuntimeError) as error:  # without a GPU it may raise either
        raise ValueError(
            f"TensorRT-LLM cannot be imported here ({error}); run this in its own environment (docs/tensorrt-llm.md)."
        ) from None
    check_version(__version__)
    names = ("CapacitySchedulerPolicy", "CudaGraphConfig", "KvCacheConfig", "SchedulerConfig", "TorchLlmArgs")
    found = {name: getattr(llm_args, name) for name in names} | {"SleepConfig": getattr(llm_args, "SleepConfig", None)}
    memory = getattr(llm_args, "ExecutorMemoryType", None)
    if memory is None:  # 1.2.1 has it elsewhere
        from tensorrt_llm._torch.virtual_memory import ExecutorMemoryType as memory
    return SimpleNamespace(
        AsyncLLM=AsyncLLM, SamplingParams=SamplingParams, ExecutorMemoryType=memory, version=__version__, **found
    )


def check_version(version: str) -> None:
    """Raise ValueError for a version whose names were never looked at."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or not OLDEST <= tuple(map(int, found.groups())) <= NEWEST:
        known = " to ".join(".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise ValueError(f"TensorRT-LLM is {version}, expected {known}; install 1.2.1 (docs/tensorrt-llm.md).")


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a version has. sleep: its switch. sampler_type: whether the engine's sampler is chosen by name.

    modes: whether log-probabilities may be asked for as they are after temperature and cuts.
    weights, cache: the tags by which its weights and its key-value cache sleep.
    """

    sleep: str
    sampler_type: bool
    modes: bool
    weights: str
    cache: str

    @staticmethod
    def of(api: SimpleNamespace) -> "Features":
        """Raises ValueError, which names both switches, for a version that has neither."""
        arguments = _fields(api.TorchLlmArgs)
        sleep = next((name for name in ("sleep_config", "enable_sleep") if name in arguments), None)
        if sleep is None:
            raise ValueError(
                f"TensorRT-LLM {api.version} has neither sleep_config nor enable_sleep; install 1.2.1 or newer."
            )
        modes, memory = "logprobs_mode" in _fields(api.SamplingParams), api.ExecutorMemoryType
        weights = getattr(memory, "MODEL_WEIGHTS_MAIN", memory.MODEL_ENGINE_MAIN)
        tags = {"weights": weights.value, "cache": memory.KV_CACHE.value}
        return Features(sleep=sleep, sampler_type="sampler_type" in arguments, modes=modes, **tags)


def _fields(kind: type) -> set[str]:
    """Of a pydantic model or a dataclass."""
    return set(getattr(kind, "model_fields", None) or (f.name for f in dataclasses.fields(kind)))


def engine_arguments(api: SimpleNamespace, folder: Path, context: int, c: EngineConfig) -> dict:
    """Of AsyncLLM: dummy weights, which the first refit overwrites. context: tokens of a sequence, at most."""
    features = Features.of(api)
    policy = api.CapacitySchedulerPolicy.MAX_UTILIZATION
    arguments = {
        "model": str(folder),
        "orchestrator_type": "ray",
        "ray_worker_extension_cls": EXTENSION,
        "tensor_parallel_size": c.tensor,
        "load_format": "dummy",
        "max_batch_size": c.max_batch,
        "max_num_tokens": c.max_tokens,
        "max_seq_len": context,
        "max_input_len": context,  # its default refuses prompts of more than 1024
        "kv_cache_config": api.KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=c.kv_fraction),
        "cuda_graph_config": api.CudaGraphConfig(enable_padding=True, max_batch_size=c.max_batch),
        "scheduler_config": api.SchedulerConfig(capacity_scheduler_policy=policy),
        features.sleep: api.SleepConfig() if features.sleep == "sleep_config" else True,
    }
    return arguments | ({"sampler_type": "TorchSampler"} if features.sampler_type else {})


def sampling_params(api: SimpleNamespace, sampling: Sampling, seed: int):
    """SamplingParams of one response. Raises ValueError for what its log-probabilities would not be comparable with."""
    features = Features.of(api)
    cut = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0 or sampling.repetition_penalty != 1
    heated = sampling.temperature not in (0.0, 1.0)
    if heated and (cut or not features.modes):
        known = ", or after it and the cuts" if features.modes else ""
        raise ValueError(
            f"sampling.temperature is {sampling.temperature}; TensorRT-LLM gives log-probabilities before the "
            f"temperature{known}, and the trainer's are after it and before cuts; sample at temperature 1."
        )
    greedy = sampling.temperature == 0
    optional = {"top_k": sampling.top_k, "min_p": sampling.min_p, "min_tokens": sampling.min_tokens}
    named = {name: value for name, value in optional.items() if value}
    if sampling.repetition_penalty != 1:
        named["repetition_penalty"] = sampling.repetition_penalty
    if sampling.stop_strings:
        named["stop"] = list(sampling.stop_strings)
    if greedy:
        named["top_k"] = 1
    if heated:
        named["logprobs_mode"] = "processed"
    return api.SamplingParams(
        end_id=-1,  # the end comes as a stop token, so that it and its log-probability belong to the response
        stop_token_ids=list(sampling.stop),
        include_stop_str_in_output=True,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        logprobs=0,  # of the sampled token alone
        detokenize=bool(sampling.stop_strings),
        **named,
    )


class TrtllmSampler:
    """Samples with an AsyncLLM whose weights are refitted in place by its workers.

    llm: a running one. api: of load_api().
    weights_version: -1 before the first refit. refusal: why nothing is sampled; empty when all ranks hold one version.
    """

    def __init__(self, llm, api: SimpleNamespace, config: EngineConfig):
        self._llm, self._api, self._config, self._features = llm, api, config, Features.of(api)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="trtllm", daemon=True).start()
        self._busy, self._lock = False, threading.Condition()
        self._live, self._plans, self._asleep = 0, [], []
        self.weights_version, self.refusal = -1, "no weights have come yet"

    @staticmethod
    def start(api: SimpleNamespace, arguments: dict, config: EngineConfig) -> "TrtllmSampler":
        """Over an AsyncLLM of its own, which lives on the sampler's event loop. arguments: of engine_arguments()."""
        sampler = TrtllmSampler(None, api, config)

        async def make():
            return await api.AsyncLLM(**arguments)

        sampler._llm = asyncio.run_coroutine_threadsafe(make(), sampler._loop).result()
        return sampler

    def where(self) -> list[str]:
        """The machines that the ranks are on."""
        return [t["host"] for t in self._all("refit_where")]

    def attach(self, shape: dict, ranks: list[dict], meeting: dict | None = None) -> list[dict]:
        """Let every rank compile its plan; arguments as of refit.extension. Returns what the ranks say.

        Raises ValueError unless all of them answer.
        """
        told = self._all("refit_attach", shape, ranks, meeting)
        self._plans = [t["plan"] for t in sorted(told, key=lambda t: t["rank"])]
        return told

    def pull(self, version: int) -> list[dict]:
        """Every rank takes the version that the trainer has published; nothing is sampled meanwhile.

        An engine that sleeps is woken: its weights before, its cache after. Returns what the ranks say.
        Raises TimeoutError when requests do not end, ValueError for what is wrong before the first write, RuntimeError
        when there is no memory to wake up; nothing was changed then. RuntimeError when ranks differ afterwards: nothing
        is sampled until a pull succeeds on all.
        """
        deadline = time.time() + self._config.drain_s
        with self._alone(deadline):
            again = bool(self.refusal) and self.weights_version >= 0
            try:
                self._all("refit_ready", version, self._plans, again=again)
                self._wake(self._features.weights)
                told = self._refit(version, deadline, again)
            finally:
                self._each("refit_end")
            self._wake(self._features.cache)
            return told

    def _refit(self, version: int, deadline: float, again: bool) -> list[dict]:
        before, self.refusal = self.refusal, f"the refit to version {version} was interrupted"
        told, errors = self._each("refit", version, self._plans, deadline=deadline, again=again)
        now, lost = self._each("refit_tell")
        if errors and not lost and all((t["version"], t["refusal"]) == (self.weights_version, "") for t in now):
            self.refusal = before  # nothing was written anywhere
            raise errors[0]
        if errors or lost or any((t["version"], t["refusal"]) != (version, "") for t in now):
            self.refusal = f"the refit to version {version} did not reach all ranks ({(errors + lost or now)[0]})"
            raise RuntimeError(f"sampler: {self.refusal}; refit all of them again.")
        self.weights_version, self.refusal = version, ""
        return told

    def sleep(self) -> None:
        """Give the memory of weights and cache back until the next pull; what they held is lost.

        Raises TimeoutError when requests do not end; nothing was changed then.
        """
        with self._alone(time.time() + self._config.drain_s):
            if self._asleep:
                return
            self.refusal = "its weights were released"
            self._all("refit_sleep")  # its prefixes too: releasing the cache would keep their index
            self._asleep = [self._features.weights, self._features.cache]
            self._wait(self._llm.release(self._asleep))

    def _wake(self, tag: str) -> None:
        if tag not in self._asleep:
            return
        try:
            self._wait(self._llm.resume([tag]))
        except Exception as error:
            self.refusal = f"its {tag} found no memory to wake up in"
            raise RuntimeError(
                f"sampler: {tag} found no memory to wake up in ({error}); lower --trtllm.kv-fraction, or give the "
                "trainer less of the GPU."
            ) from None
        self._asleep.remove(tag)
        if tag == self._features.weights:
            self._all("refit_awake")

    @contextmanager
    def _alone(self, deadline: float) -> Iterator[None]:
        """No stream is open, and none is opened meanwhile."""
        with self._lock:
            if self._busy:
                raise RuntimeError("refit: another one is under way; wait for it.")
            self._busy = True
        try:
            with self._lock:
                if not self._lock.wait_for(lambda: not self._live, deadline - time.time()):
                    raise TimeoutError(f"refit: {self._live} streams have not ended; exhaust or close them.")
            yield
        finally:
            with self._lock:
                self._busy = False
                self._lock.notify_all()

    def _all(self, method: str, *arguments, **named) -> list[dict]:
        told, errors = self._each(method, *arguments, **named)
        if errors:
            raise errors[0]
        return told

    def _each(self, method: str, *arguments, **named) -> tuple[list[dict], list[Exception]]:
        """What the ranks answer, and what was raised; the answer of every rank counts."""
        try:
            told = self._wait(self._llm.collective_rpc(method, args=arguments, kwargs=named))
        except Exception as error:
            return [], [error]
        if len(told) != self._config.tensor:
            return told, [ValueError(f"refit: {len(told)} of {self._config.tensor} ranks have answered {method}.")]
        return told, []

    def _wait(self, call):
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(ANSWER_S)

    def generate(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> Rollout:
        """As of rollout.sampling.Sampler."""
        return pack_responses(prompts, list(self.stream(prompts, sampling, n)), self.weights_version)

    def stream(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> "Stream":
        """As of rollout.sampling.Sampler. Closing the iterator, from any thread, cancels what has not finished.

        The engine works on twice its batch at most, responses that nobody has taken yet among them.
        """
        with self._lock:
            self._lock.wait_for(lambda: not self._busy)
            if self.refusal:
                raise RuntimeError(f"sampler: {self.refusal}; refit all of them.")
            self._live += 1
        stream = Stream(n * len(prompts), asyncio.Semaphore(2 * self._config.max_batch), self._loop, self._ended)
        stream.begin(self._ask(prompts, sampling, n, stream))
        return stream

    def _ended(self) -> None:
        with self._lock:
            self._live -= 1
            self._lock.notify_all()

    async def _ask(self, prompts: list[list[int]], sampling: Sampling, n: int, stream: "Stream") -> None:
        async def one(i: int, j: int) -> None:
            await stream.room.acquire()
            params = sampling_params(self._api, sampling, stream_key(sampling.seed, j, prompts[i]) >> 1)
            request = self._llm.generate_async(prompts[i], params)
            try:
                result = await request.aresult()
            finally:
                if not request.finished:
                    request.abort()
            stream.done.put(_response(i, j, result.outputs[0]))

        try:
            await asyncio.gather(*(one(i, j) for i in range(len(prompts)) for j in range(n)))
        except Exception as error:
            stream.done.put(error)


class Stream:
    """Responses as they finish.

    room: of requests in flight and responses that nobody has taken. done: responses, or what was raised.
    """

    def __init__(self, count: int, room: asyncio.Semaphore, loop: asyncio.AbstractEventLoop, ended: Callable[[], None]):
        self.room, self.done = room, queue.SimpleQueue()
        self._left, self._loop, self._ended, self._lock = count, loop, ended, threading.Lock()

    def begin(self, asking: Coroutine) -> None:
        self._asked = asyncio.run_coroutine_threadsafe(asking, self._loop)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Response:
        response = self.done.get() if self._left else None
        if not isinstance(response, Response):
            self.close()
            raise response or StopIteration
        self._left -= 1
        self._loop.call_soon_threadsafe(self.room.release)
        return response

    def close(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, None
        if ended:
            self._asked.cancel()
            self._left = 0
            self.done.put(None)  # to who waits for a response
            ended()

    def __del__(self):
        self.close()


def _response(prompt: int, sample: int, output) -> Response:
    """Of a CompletionOutput. Raises RuntimeError when it was cancelled."""
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"the engine ended a response by {output.finish_reason!r}, expected stop or length.")
    tokens = list(output.token_ids)
    logprobs = [_nats(each, token) for each, token in zip(output.logprobs, tokens, strict=True)]
    shared = {"logprobs": logprobs, "sampling_logprobs": logprobs, "finished": output.finish_reason == "stop"}
    return Response(prompt=prompt, sample=sample, tokens=tokens, **shared)


def _nats(given, token: int) -> float:
    """A log-probability as a number, as a Logprob, or by token."""
    given = given[token] if isinstance(given, dict) else given
    return float(getattr(given, "logprob", given))
