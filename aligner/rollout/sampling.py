"""What every sampler takes and gives."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from aligner.data.batch import Rollout, pack_rollout


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    temperature: dimensionless; 0 takes the most likely token.
    top_p: keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
    top_k: keep the k most likely tokens; 0 keeps all.
    min_p: keep tokens of at least min_p times the largest probability; 0 keeps all.
    repetition_penalty: dimensionless; positive logits of tokens that the prompt or the response holds are divided by
        it, negative ones multiplied; 1 changes nothing.
    min_tokens: a stop token cannot come before that many tokens, nor does a stop string count that is complete by then.
    max_tokens: length limit of a response, in tokens.
    stop: token ids that end a response; the stop token belongs to the response.
    stop_strings: texts that end a response as soon as it contains one, however its tokens split it. The tokens that
        hold it belong to the response; the last one may carry text beyond it. Special tokens have no text.
    seed: of the random streams; the same (seed, prompt, sample index) draws the same response in any batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 64
    stop: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"Sampling: temperature is {self.temperature}, expected 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p is {self.top_p}, expected a value in (0, 1].")
        if self.top_k < 0:
            raise ValueError(f"Sampling: top_k is {self.top_k}, expected 0 (all tokens) or more.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"Sampling: min_p is {self.min_p}, expected a value in [0, 1].")
        if self.repetition_penalty <= 0:
            raise ValueError(f"Sampling: repetition_penalty is {self.repetition_penalty}, expected more than 0.")
        if self.max_tokens < 1:
            raise ValueError(f"Sampling: max_tokens is {self.max_tokens}, expected 1 or more.")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(f"Sampling: stop_strings is {self.stop_strings!r}, expected a tuple of texts, none empty.")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"Sampling: min_tokens is {self.min_tokens}, expected 0 to max_tokens, which is {self.max_tokens}."
            )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    temperature: float = 1.0
    """Sampling temperature, > 0; the trainer's log-probabilities use it too."""
    top_p: float = 1.0
    """Nucleus; 1 keeps all tokens. Log-probabilities ignore the cut."""
    top_k: int = 0
    """Most likely tokens kept; 0 keeps all. Log-probabilities ignore the cut."""
    max_tokens: int = 16
    """Length limit of a response, tokens."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response, besides the end-of-text token; they belong to it."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of the sampler's weights; fewer bits are faster and move its log-probabilities away from the trainer's."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"sampling.temperature is {self.temperature}; training needs it above 0.")
        self.sampling(seed=0, stop=())

    def sampling(self, seed: int, stop: tuple[int, ...]) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            stop=stop,
            stop_strings=self.stop_strings,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Response:
    """One finished response.

    prompt, sample: index of its prompt in the call, and which of that prompt's n samples it is.
    tokens: ids, the stop token and those of a stop string included.
    logprobs: nats; of each token under softmax(logits / temperature), temperature 1 when greedy: what the trainer
        computes too, before penalties and cuts.
    sampling_logprobs: nats; of each token under the distribution that it was drawn from, after penalties and cuts.
    finished: True when a stop token or a stop string ended it, False at the length limit.
    """

    prompt: int
    sample: int
    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finished: bool


def check_prompts(prompts: list[list[int]], sampling: Sampling, n: int, context: int) -> None:
    """Raise ValueError for an empty prompt, and for one that with its response would exceed the context, in tokens."""
    if n < 1:
        raise ValueError(f"n is {n}, expected 1 or more samples a prompt.")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give it at least one token (a begin-of-text token will do).")
        if len(prompt) + sampling.max_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}, together over the "
                f"model's context of {context}; shorten the prompt or lower max_tokens."
            )


def stream_key(seed: int, sample: int, prompt: list[int]) -> int:
    """The key of a sequence's random stream, 64 bits: a response depends on nothing else that is in the batch."""
    words = np.asarray([seed, sample, *prompt], dtype=np.int64)
    return int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=8).digest(), "little")


def pack_responses(prompts: list[list[int]], responses: list[Response], weights_version: int) -> Rollout:
    """One packed Rollout, ordered by prompt, then sample, of responses in any order."""
    ordered = sorted(responses, key=lambda r: (r.prompt, r.sample))
    return pack_rollout(
        [prompts[r.prompt] for r in ordered],
        [r.tokens for r in ordered],
        [r.logprobs for r in ordered],
        [r.finished for r in ordered],
        weights_version,
    )


class Sampler(Protocol):
    """An engine that samples responses and whose weights are refitted in place."""

    weights_version: int

    def generate(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> Rollout:
        """n responses to each prompt, as one packed Rollout ordered by prompt, then sample."""
        ...

    def stream(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> Iterator[Response]:
        """The same responses one by one, as they finish."""
        ...

    def manifest(self) -> dict:
        """Where its parameters stand in the Hugging Face checkpoint (see models.weights)."""
        ...

    def refit(self, plan, source, version: int) -> None:
        """Overwrite its weights by executing `plan` from `source` (refit.plan); `version` becomes weights_version."""
        ...
