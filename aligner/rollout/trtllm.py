"""A sampler over TensorRT-LLM's AsyncLLM, in the engine's environment; the weights come by refit.extension."""

import asyncio
import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from aligner.data.batch import Rollout
from aligner.rollout.sampling import Response, Sampling, pack_responses, stream_key
from aligner.rollout.trtllm_api import EngineConfig, Features, sampling_params

ANSWER_S = 600.0  # beyond the engine's own deadlines: a rank that has not answered by then never will


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
        self._mixed = False  # ranks may hold several versions
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
        return [t["host"] for t in sorted(self._all("refit_where"), key=lambda t: t["rank"])]

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
        with self._alone():
            try:
                self._drain(deadline)
                self._all("refit_ready", version, self._plans, again=self._mixed)
                self._wake(self._features.weights)
                told = self._refit(version, deadline)
            finally:
                self._each("refit_end")
            self._wake(self._features.cache)
            return told

    def _refit(self, version: int, deadline: float) -> list[dict]:
        before, self.refusal = self.refusal, f"the refit to version {version} was interrupted"
        told, errors = self._each("refit", version, self._plans, deadline=deadline, again=self._mixed)
        now, lost = self._each("refit_tell")
        if errors and not lost and all((t["version"], t["state"]) == (self.weights_version, "idle") for t in now):
            self.refusal = before  # nothing was written anywhere
            raise errors[0]
        self._mixed = bool(errors or lost) or any((t["version"], t["refusal"]) != (version, "") for t in now)
        if self._mixed:
            self.refusal = f"the refit to version {version} did not reach all ranks ({(errors + lost or now)[0]})"
            raise RuntimeError(f"sampler: {self.refusal}; refit all of them again.")
        self.weights_version, self.refusal = version, ""
        return told

    def sleep(self) -> None:
        """Give the memory of weights and cache back until the next pull; what they held is lost.

        Raises TimeoutError when requests do not end; nothing was changed then.
        """
        with self._alone():
            self._drain(time.time() + self._config.drain_s)
            if self._asleep:
                return
            tags, self.refusal = [self._features.weights, self._features.cache], "its weights were released"
            self._all("refit_sleep")  # its prefixes too: releasing the cache would keep their index
            try:
                self._wait(self._llm.release(tags))
            except Exception:
                self._each("refit_awake")
                raise
            self._asleep = tags

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

    def _drain(self, deadline: float) -> None:
        with self._lock:
            if not self._lock.wait_for(lambda: not self._live, deadline - time.time()):
                raise TimeoutError(f"refit: {self._live} streams have not ended; exhaust or close them.")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No stream is opened meanwhile."""
        with self._lock:
            if self._busy:
                raise RuntimeError("refit: another one is under way; wait for it.")
            self._busy = True
        try:
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
        waiting = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return waiting.result(self._config.drain_s + ANSWER_S)
        except concurrent.futures.TimeoutError:
            waiting.cancel()
            raise TimeoutError(f"the engine has not answered in {self._config.drain_s + ANSWER_S:g} s") from None

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
        room, done = asyncio.Semaphore(2 * self._config.max_batch), queue.SimpleQueue()
        asked = asyncio.run_coroutine_threadsafe(self._ask(prompts, sampling, n, room, done), self._loop)
        return Stream(n * len(prompts), room, done, asked, self._loop, self._ended)

    def _ended(self) -> None:
        with self._lock:
            self._live -= 1
            self._lock.notify_all()

    async def _ask(
        self, prompts: list[list[int]], sampling: Sampling, n: int, room: asyncio.Semaphore, done: queue.SimpleQueue
    ) -> None:
        async def one(i: int, j: int) -> None:
            await room.acquire()
            params = sampling_params(self._api, sampling, stream_key(sampling.seed, j, prompts[i]) >> 1)
            request = self._llm.generate_async(prompts[i], params)
            try:
                result = await request.aresult()
            finally:
                if not request.finished:
                    request.abort()
            done.put(_response(i, j, result.outputs[0]))

        tasks = [asyncio.ensure_future(one(i, j)) for i in range(len(prompts)) for j in range(n)]
        try:
            await asyncio.gather(*tasks)
        except Exception as error:
            done.put(error)
        finally:
            for task in tasks:  # one that fails takes the others along
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Stream:
    """Responses as they finish.

    room: of requests in flight and responses that nobody has taken. done: responses, or what was raised. asked: puts
    them there, and knows nothing of the stream, which is closed when nobody has it any more.
    """

    def __init__(
        self,
        count: int,
        room: asyncio.Semaphore,
        done: queue.SimpleQueue,
        asked: concurrent.futures.Future,
        loop: asyncio.AbstractEventLoop,
        ended: Callable[[], None],
    ):
        self._room, self._done, self._asked = room, done, asked
        self._left, self._loop, self._ended, self._lock = count, loop, ended, threading.Lock()

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Response:
        response = self._done.get() if self._left else None
        if not isinstance(response, Response):
            self.close()
            raise response or StopIteration
        self._left -= 1
        self._loop.call_soon_threadsafe(self._room.release)
        return response

    def close(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, None
        if ended:
            self._asked.cancel()
            self._left = 0
            self._done.put(None)  # to who waits for a response
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
