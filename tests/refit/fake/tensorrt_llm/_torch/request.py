"""A request, as generate_async gives it, and the drawing of tokens."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace

import torch
from torch import Tensor

from tensorrt_llm.sampling_params import SamplingParams


class Request:
    """Its tokens come from the engine's loop; any thread may wait for it or abort it."""

    def __init__(self, prompt: list[int], params: SamplingParams):
        self.prompt, self.params, self._aborted, self._done = prompt, params, False, Future()
        self._done.set_running_or_notify_cancel()  # who waits may be cancelled, the request may not
        self._generator = torch.Generator().manual_seed(params.seed or 0)
        self.outputs = [SimpleNamespace(index=0, token_ids=[], logprobs=[], finish_reason=None, stop_reason=None)]

    @property
    def finished(self) -> bool:
        return self._done.done()

    def abort(self) -> None:
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    async def aresult(self) -> "Request":
        return await asyncio.wrap_future(self._done)

    def __await__(self):
        return self.aresult().__await__()

    def result(self, timeout: float | None = None) -> "Request":
        return self._done.result(timeout)

    def uniform(self) -> float:
        """A draw of the request's own stream, so that its tokens do not depend on who else is in the batch."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def push(self, token: int, nats: float) -> str | None:
        """Append a token. Returns the reason why it is the last one, or None."""
        output, p = self.outputs[0], self.params
        output.token_ids.append(token)
        if p.logprobs is not None:
            output.logprobs.append({token: SimpleNamespace(logprob=nats, rank=None)})
        if token in (p.stop_token_ids or ()):
            output.stop_reason = token
            return "stop"
        return "length" if len(output.token_ids) >= p.max_tokens else None

    def finish(self, reason: str) -> None:
        self.outputs[0].finish_reason = reason
        self._done.set_result(self)

    def fail(self, error: Exception) -> None:
        self._done.set_exception(error)


def draw(logits: Tensor, requests: list[Request]) -> tuple[list[int], list[float]]:
    """A token of each request, logits (n, vocab), and its log-probability in nats."""
    params = [r.params for r in requests]
    scale = [1.0 if p.greedy or p.temperature is None else p.temperature for p in params]
    raw = torch.log_softmax(logits, 1)
    heated = raw if set(scale) == {1.0} else torch.log_softmax(logits / torch.tensor(scale)[:, None], 1)
    for i, p in enumerate(params):
        if not p.greedy and (p.top_k or (p.top_p or 1.0) < 1):
            heated = heated.clone() if heated is raw else heated
            heated[i] = _cut(heated[i], p)
    tokens = logits.argmax(1)
    drawn = [i for i, p in enumerate(params) if not p.greedy]
    if drawn:
        cdf = heated[drawn].exp().double().cumsum(1)
        at = torch.tensor([[requests[i].uniform()] for i in drawn], dtype=torch.float64) * cdf[:, -1:]
        found = torch.searchsorted(cdf, at, right=True)[:, 0]
        tokens[drawn] = found.clamp(max=logits.shape[1] - 1)  # weights that were lost give any token
    processed = torch.tensor([p.logprobs_mode == "processed" for p in params])
    nats = torch.where(processed, *(z.gather(1, tokens[:, None])[:, 0] for z in (heated, raw)))
    return tokens.tolist(), nats.tolist()


def _cut(nats: Tensor, p: SamplingParams) -> Tensor:
    """Log-probabilities of what top_k and then top_p keep."""
    order = nats.argsort(descending=True)
    kept = order[: p.top_k or len(order)]
    probabilities = torch.softmax(nats[kept], 0)
    kept = kept[probabilities.cumsum(0) - probabilities < (p.top_p or 1.0)]
    only = torch.full_like(nats, -torch.inf)
    only[kept] = torch.log_softmax(nats[kept], 0)
    return only
