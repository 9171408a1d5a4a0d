"""Rewards are asked for while other responses are still being decoded."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from aligner.data.batch import response_tokens
from aligner.data.examples import Prompt
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from aligner.rollout.scoring import RESPONSES_AT_ONCE, sample_and_score
from aligner.rollout.transcript import Transcript


def prompts_of(tokenizer, texts: list[str]) -> list[Prompt]:
    return [Prompt(text=t, tokens=tuple(tokenizer(t)["input_ids"]), metadata={"i": i}) for i, t in enumerate(texts)]


@pytest.mark.parametrize("n", [1, 3])
def test_rewards_belong_to_their_responses(tiny_llama: Path, n: int):
    transcript = Transcript(AutoTokenizer.from_pretrained(tiny_llama))
    transcript.stop = tuple(range(3, 6000))  # some responses end early, some reach the limit
    prompts = prompts_of(transcript.tokenizer, [f"A film number {i}" for i in range(30)])
    sampler = NativeSampler.from_pretrained(tiny_llama)
    sampling = Sampling(max_tokens=40, seed=3, stop=transcript.stop)
    requests, live, told = [], [], []

    def score(texts, responses, metadata, sequences):
        requests.append(metadata)
        told.extend(sequences)
        return [len(r) + 1000 * m["i"] for r, m in zip(responses, metadata, strict=True)]

    with ThreadPoolExecutor(max_workers=1) as worker:

        def submit(*columns):
            live.append(sampler.engine.num_live)
            return worker.submit(score, *columns)

        scored = sample_and_score(sampler, prompts, sampling, n, transcript, SimpleNamespace(submit=submit))
        rewards_B = scored.rewards()
    assert max(live) > 0 and live[-1] == 0  # the first was asked for while others were decoded
    for group in requests:
        ids = [m["i"] for m in group]
        assert len(group) >= RESPONSES_AT_ONCE or group is requests[-1]
        assert all(ids.count(i) == n for i in ids)  # whole prompts
    whole = sampler.generate([list(p.tokens) for p in prompts], sampling, n)
    assert torch.equal(whole.tokens_N, scored.rollout.tokens_N)
    both = [(prompt, ids) for prompt, ids in response_tokens(whole)]
    texts = [transcript.decode(ids) for _, ids in both]
    assert sorted(told) == sorted([*prompt, *ids] for prompt, ids in both)
    assert texts == scored.texts[1]
    assert rewards_B.tolist() == [len(text) + 1000 * (b // n) for b, text in enumerate(texts)]


def test_a_prompt_that_comes_twice_is_given_other_responses(tiny_llama: Path):
    transcript = Transcript(AutoTokenizer.from_pretrained(tiny_llama))
    first, other = prompts_of(transcript.tokenizer, ["A film", "A play"])
    sampler, sampling = NativeSampler.from_pretrained(tiny_llama), Sampling(max_tokens=8, seed=3)

    def texts(prompts: list[Prompt]) -> list[str]:
        return sample_and_score(sampler, prompts, sampling, 2, transcript, None).texts[1]

    alone, both = texts([first]), texts([first, other, first, first])
    assert both[:2] == alone and both[2:4] == texts([other])  # the first time as without the others
    assert len({*both}) == 8


def test_what_a_request_raises_is_raised(tiny_llama: Path):
    transcript = Transcript(AutoTokenizer.from_pretrained(tiny_llama))
    prompts = prompts_of(transcript.tokenizer, ["A film"])

    def score(*columns):
        raise ValueError("the reward broke")

    with ThreadPoolExecutor(max_workers=1) as worker:
        scored = sample_and_score(
            NativeSampler.from_pretrained(tiny_llama),
            prompts,
            Sampling(max_tokens=3),
            2,
            transcript,
            SimpleNamespace(submit=lambda *columns: worker.submit(score, *columns)),
        )
    with pytest.raises(ValueError, match="the reward broke"):
        scored.rewards()
