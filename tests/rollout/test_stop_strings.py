"""Stop strings: where a response ends, against a run without them and the tokenizer's own decoding."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from aligner import generate
from aligner.data.tokenizer import token_bytes
from aligner.models.shape import ModelShape
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.conftest import save_llama


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "stop"),
    [
        ("\u65e5\u672c\u8a9e\u3001\u65e5\u672c\u8a9e\u3001\u65e5\u672c\u8a9e\u3001\u65e5\u672c\u8a9e\u3001", "\u8a9e"),
        ("I love it " + 6 * "\U0001f642", "\U0001f60d\U0001f60d"),
        ("one two three four five", "numbers are 1234"),
        ("The capital of France is", "aris."),
    ],
)
def test_greedy_response_ends_with_the_token_that_completes_it(smollm2: Path, prompt: str, stop: str):
    tokenizer, sampler = AutoTokenizer.from_pretrained(smollm2), NativeSampler.from_pretrained(smollm2)
    ids = tokenizer(prompt)["input_ids"]
    (free,) = sampler.stream([ids], Sampling(temperature=0, max_tokens=24))
    ends = [i for i in range(25) if stop in tokenizer.decode(free.tokens[:i], skip_special_tokens=True)]
    assert ends, tokenizer.decode(free.tokens)
    assert len(tokenizer.decode(free.tokens[ends[0] - 1 : ends[0]])) < len(stop) or "\ufffd" in tokenizer.decode(
        free.tokens[ends[0] - 1 : ends[0]]
    )
    (cut,) = sampler.stream([ids], Sampling(temperature=0, max_tokens=24, stop_strings=("nothing like it", stop)))
    assert cut.tokens == free.tokens[: ends[0]] and cut.logprobs == free.logprobs[: ends[0]]
    assert cut.finished and not free.finished


def test_parallel_samples_end_each_by_itself(tiny_llama: Path):
    """Random tokens, so that matches begin and end anywhere in a token; an oracle searches the whole text."""
    texts, sampler = token_bytes(AutoTokenizer.from_pretrained(tiny_llama)), NativeSampler.from_pretrained(tiny_llama)
    stops = (" an", "ti", "re s", "\u00e9")
    common = {"max_tokens": 40, "seed": 6, "stop": (7, 8)}
    prompts = [[5, 6], [700, 800, 900], [31]]
    for min_tokens in (0, 3):
        unstopped = Sampling(**common, min_tokens=min_tokens)
        free = {(r.prompt, r.sample): r for r in sampler.stream(prompts, unstopped, n=20)}
        sampling = Sampling(**common, stop_strings=stops, min_tokens=min_tokens)
        lengths = set()
        for r in sampler.stream(prompts, sampling, n=20):
            whole = free[r.prompt, r.sample].tokens
            end = first_end([texts[i] for i in whole], [s.encode() for s in stops], min_tokens)
            assert r.tokens == whole[:end] and r.finished == (bool(end) or free[r.prompt, r.sample].finished)
            lengths.add(len(r.tokens))
        assert min(lengths) == min_tokens + 1 and len(lengths) > 3
    rollout = sampler.generate(prompts, sampling, n=20)
    assert rollout.finished_B.sum() > 50 and rollout.action_mask_N.sum() < 60 * 20


def first_end(pieces: list[bytes], stops: list[bytes], min_tokens: int) -> int | None:
    for i in range(min_tokens + 1, len(pieces) + 1):
        text, before = b"".join(pieces[:i]), len(b"".join(pieces[: i - 1]))
        if any(text.find(stop, max(0, before + 1 - len(stop))) >= 0 for stop in stops):
            return i
    return None


def test_a_small_cache_and_preemption_change_nothing(tiny_llama: Path):
    wide = NativeSampler.from_pretrained(tiny_llama)
    narrow = NativeSampler(wide.shape, cache_bytes=1 << 17, tokenizer=tiny_llama)
    for name, tensor in wide.weights.items():
        narrow.weights[name].copy_(tensor)
    sampling = Sampling(max_tokens=60, seed=2, stop_strings=("e th", "ing", "ed "))
    runs = [{(r.prompt, r.sample): r for r in s.stream([[4] * 30, [9]], sampling, n=8)} for s in (wide, narrow)]
    assert narrow.engine.counters.preemptions > 0 and runs[0] == runs[1]


def test_generate_takes_stop_strings(smollm2: Path, capsys):
    argv = ["--checkpoint", str(smollm2), "--prompt", "one two three four five", "--temperature", "0"]
    assert generate.main([*argv, "--max-tokens", "16", "--stop-strings", "zzz", "are 1234"]) == 0
    assert capsys.readouterr().out.strip() == "one two three four five-digit numbers are 1234"


def test_errors(tmp_path):
    for bad in ("end", ("",)):
        with pytest.raises(ValueError, match="stop_strings is"):
            Sampling(stop_strings=bad)
    folder = save_llama(tmp_path / "m", None, vocab_size=311)
    sampling = Sampling(stop_strings=("x",))
    with pytest.raises(ValueError, match="give NativeSampler a tokenizer folder"):
        NativeSampler(ModelShape.from_folder(folder)).generate([[5]], sampling)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        NativeSampler.from_pretrained(folder).generate([[5]], sampling)
