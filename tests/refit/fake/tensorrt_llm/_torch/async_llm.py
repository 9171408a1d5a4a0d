"""An engine that answers while it is refitted, put to sleep and asked to stop."""

import asyncio
from pathlib import Path

from aligner.models.shape import ModelShape
from tensorrt_llm._torch.batch import Batch
from tensorrt_llm._torch.loop import Loop
from tensorrt_llm._torch.request import Request
from tensorrt_llm._torch.worker import RayGPUWorker, inject
from tensorrt_llm.llmapi.llm_args import ExecutorMemoryType, TorchLlmArgs
from tensorrt_llm.sampling_params import SamplingParams
from tests.refit.standin import Actor, Executor

NEEDED = {ExecutorMemoryType.MODEL_WEIGHTS_MAIN.value, ExecutorMemoryType.KV_CACHE.value}  # to generate


class AsyncLLM:
    """All tensor ranks of an engine in one process. workers: of each rank.

    fail_resume: tags whose next resume finds no memory; for tests.
    """

    fail_resume: set[str] = set()

    def __init__(
        self, placement_groups=None, placement_bundle_indices=None, per_worker_gpu_share=None, *args, **kwargs
    ):
        self.args = TorchLlmArgs(**kwargs)
        shape, ranks = ModelShape.from_folder(Path(self.args.model)), self.args.tensor_parallel_size
        if shape.heads % ranks or shape.ffn % ranks:
            raise ValueError(f"{shape.heads} heads and {shape.ffn} columns of the MLP are not shared by {ranks} ranks")
        self.executor, kind = Executor(ranks), inject(RayGPUWorker, self.args.ray_worker_extension_cls)
        self.workers = [kind(shape, self.executor, rank, ranks) for rank in range(ranks)]
        self._actors = [Actor() for _ in self.workers]
        self._batch = Batch(shape, [{name: w.captured(name) for name in w.graph} for w in self.workers])
        self._loop = Loop(self._batch, self.executor, self.args.max_batch_size, self.args.max_num_tokens)
        self._context = self.args.max_seq_len or shape.context
        self._released: set[str] = set()

    async def setup_async(self) -> "AsyncLLM":
        return self

    def __await__(self):
        return self.setup_async().__await__()

    async def __aenter__(self) -> "AsyncLLM":
        return await self.setup_async()

    async def __aexit__(self, exc_type, exc_val, exc_tb) -> None:
        self.shutdown()

    def generate_async(self, inputs: list[int], sampling_params: SamplingParams | None = None) -> Request:
        """Raises RuntimeError while what it needs is released, ValueError for what does not fit the engine."""
        params = sampling_params or SamplingParams(end_id=-1)
        if not 0 < len(inputs) <= min(self.args.max_input_len, self.args.max_num_tokens):
            raise ValueError(f"a prompt of {len(inputs)} tokens, expected 1 to max_input_len and max_num_tokens")
        if len(inputs) + params.max_tokens > self._context:
            raise ValueError(f"{len(inputs)} + {params.max_tokens} tokens exceed max_seq_len, {self._context}")
        request = Request(list(inputs), params)
        with self.executor.changed:
            if self.executor.closed or self._released & NEEDED:
                lost = sorted(self._released & NEEDED)
                raise RuntimeError(f"cannot generate: {', '.join(lost) + ' released' if lost else 'shut down'}")
            self._loop.submit(request)
        return request

    async def collective_rpc(
        self, method: str, args=(), kwargs=None, unique_reply_rank: int | None = None, target_ranks=None
    ) -> list:
        """Every rank's answer, or at once what the first of them raises; the others go on."""
        told = list(range(len(self.workers)) if target_ranks is None else target_ranks)
        calls = [getattr(self.workers[rank], method) for rank in told]
        futures = [self._actors[rank].submit(f, *args, **(kwargs or {})) for rank, f in zip(told, calls, strict=True)]
        answers = await asyncio.gather(*map(asyncio.wrap_future, futures))
        return answers if unique_reply_rank is None else [answers[told.index(unique_reply_rank)]]

    async def release(self, tags: list[str] | None = None) -> None:
        """Waits until no request is in flight, as upstream's."""
        tags = self._expect_tags(tags, released=False)
        with self.executor.changed:
            self._released |= tags  # before, so that no request comes any more
        await self.collective_rpc("sleep", (tags,))
        if ExecutorMemoryType.KV_CACHE.value in tags:
            self._batch.clear()

    async def resume(self, tags: list[str] | None = None) -> None:
        tags = self._expect_tags(tags, released=True)
        if failing := tags & self.fail_resume:
            self.fail_resume.difference_update(failing)
            raise RuntimeError("CUDA out of memory")
        await self.collective_rpc("wakeup", (tags,))
        self._released -= tags

    def _expect_tags(self, tags: list[str] | None, released: bool) -> set[str]:
        known = {kind.value for kind in ExecutorMemoryType}
        found = known if tags is None else {str(getattr(tag, "value", tag)) for tag in tags}
        if self.args.sleep_config is None or found - known:
            raise ValueError(f"no sleep_config, or no such tags: {sorted(found - known)}")
        if wrong := sorted(tag for tag in found if (tag in self._released) != released):
            raise RuntimeError(f"{', '.join(wrong)}: {'not released' if released else 'released already'}")
        return found

    def shutdown(self) -> None:
        """Requests fail, and so do control actions that wait."""
        self.executor.close()
        self._loop.join()
