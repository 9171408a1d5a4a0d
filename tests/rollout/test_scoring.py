"""Rewards are asked for while other responses are still being decoded."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from aligner.data.batch import response_tokens
from aligner.data.examples import Prompt
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from aligner.rollout.scoring import RESPONSES_AT_ONCE, Scored, sample_and_score
from aligner.rollout.transcript import Transcript
from aligner.serving.reward import RewardFunction
from aligner.serving.rewards import Rewards
from aligner.serving.service import resolved


def prompts_of(tokenizer, texts: list[str]) -> list[Prompt]:
    return [Prompt(text=t, tokens=tuple(tokenizer(t)["input_ids"]), metadata={"i": i}) for i, t in enumerate(texts)]


PART_TOKENS = 150


class Judges:
    """Callables, served reward models and a critic; what each is asked is kept, with the samples alive at the time."""

    def __init__(self, sampler: NativeSampler):
        self.sampler, self.requests, self.parts, self.live = sampler, [], [], []

    def submit(self, prompts, responses, metadata):
        self.requests.append([m["i"] for m in metadata])
        self.live.append(self.sampler.engine.num_live)
        return resolved([[len(r) + 1000.0 * m["i"]] for r, m in zip(responses, metadata, strict=True)])

    def ahead(self, part):
        """As a reward model: each sequence's sum of tokens, and their number."""
        self.parts.append((part, self.sampler.engine.num_live))
        pieces = part.tokens_N.tensor_split(part.cu_seqlens[1:-1].long())
        return resolved([[float(piece.sum()), float(len(piece))] for piece in pieces])


@pytest.fixture
def sampling(tiny_llama: Path):
    """(sampler, prompts, transcript, sampling): some responses end early, some reach the limit."""
    transcript = Transcript(AutoTokenizer.from_pretrained(tiny_llama))
    transcript.stop = tuple(range(3, 6000))
    prompts = prompts_of(transcript.tokenizer, [f"A film number {i}" for i in range(30)])
    shared = Sampling(max_tokens=40, seed=3, stop=transcript.stop)
    return NativeSampler.from_pretrained(tiny_llama), prompts, transcript, shared


@pytest.mark.parametrize("n", [1, 3])
def test_rewards_belong_to_their_responses(sampling, n: int):
    sampler, prompts, transcript, how = sampling
    judges = Judges(sampler)
    scored = sample_and_score(sampler, prompts, how, n, transcript, judges)
    rewards_BF = scored.rewards()
    live = judges.live
    assert max(live) > 0 and live[-1] == 0  # the first was asked for while others were decoded
    for ids in judges.requests:
        assert len(ids) >= RESPONSES_AT_ONCE or ids is judges.requests[-1]
        assert all(ids.count(i) == n for i in ids)  # whole prompts
    whole = sampler.generate([list(p.tokens) for p in prompts], how, n)
    assert torch.equal(whole.tokens_N, scored.rollout.tokens_N)
    both = list(response_tokens(whole))
    texts = [transcript.decode(ids) for _, ids in both]
    assert texts == scored.texts[1]
    wanted = [[len(text) + 1000 * (b // n)] for b, text in enumerate(texts)]
    for row, (prompt, ids) in zip(wanted, both, strict=True):
        row += [sum(prompt) + sum(ids), len(prompt) + len(ids)]
    assert rewards_BF.tolist() == wanted


def test_models_are_asked_about_parts_as_responses_finish(sampling):
    """Each sequence is in one part, in the order in which they finish, and the parts are the same another time."""
    sampler, prompts, transcript, how = sampling

    def ask(critic: Judges, reward: Judges | None = None) -> Scored:
        return sample_and_score(sampler, prompts, how, 3, transcript, reward, None, critic, PART_TOKENS)

    critic, again = Judges(sampler), Judges(sampler)
    scored = ask(critic)
    shares = scored.shares()
    assert sorted(b for share in shares for b in share) == list(range(90)) and len(shares) > 5
    for (part, live), share in zip(critic.parts, shares, strict=True):
        assert torch.equal(part.tokens_N, scored.rollout.take(share).tokens_N)
        assert torch.equal(part.action_mask_N, scored.rollout.take(share).action_mask_N)
        lengths = part.cu_seqlens.diff().tolist()
        assert live == 0 or sum(lengths) - lengths[-1] < PART_TOKENS <= sum(lengths)
    assert [live for _, live in critic.parts][0] > 0 == critic.parts[-1][1]
    assert ask(again, again).shares() == shares
    for sequences, values in scored.values():
        assert [row[1] for row in values.result()] == scored.rollout.take(sequences).cu_seqlens.diff().tolist()


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

    reward = Rewards([RewardFunction(score, "mine")], [], [1.0])
    sampler = NativeSampler.from_pretrained(tiny_llama)
    scored = sample_and_score(sampler, prompts, Sampling(max_tokens=3), 2, transcript, reward)
    with pytest.raises(ValueError, match="reward function mine raised ValueError: the reward broke"):
        scored.rewards()
