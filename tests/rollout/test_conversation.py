"""Conversations of several turns: their tokens, masks and log-probabilities, when they end, and training on them."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from aligner import ppo
from aligner.data.encoder import Encoder
from aligner.data.examples import Prompt
from aligner.rollout.conversation import Dialogue, load_environment
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from aligner.rollout.scoring import sample_and_score
from aligner.rollout.transcript import Transcript
from aligner.serving.reward import RewardFunction
from aligner.serving.rewards import Rewards
from tests.programs.bandit import write
from tests.programs.chats import END, Oracle, assistant, chatml, save_chat_model, user
from tests.programs.environments import Counts, asks_why
from tests.programs.runs import metrics, run, samples

SPOKEN = tuple(f"w{i}" for i in range(6))
WORDS = (*SPOKEN, "why", "long", *map(str, range(1, 9)))
CHATS = [[user("w1 w2")], [user("w4"), assistant("w5"), user("w3")], [{"role": "system", "content": "w0"}, user("w1")]]
TEXTS = ["w1 w2", "w4 w5 w3"]


@dataclass
class Talker:
    """A sampler with what conversations need."""

    folder: Path
    sampler: NativeSampler
    encoder: Encoder
    transcript: Transcript

    def ids(self, text: str) -> list[int]:
        return self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompts(self, given: list) -> list[Prompt]:
        """Of raw texts or chats, each with its number."""
        texts = [g if isinstance(g, str) else chatml(g, opened=True) for g in given]
        rows = enumerate(zip(texts, given, strict=True))
        return [Prompt(text=t, tokens=tuple(self.ids(t)), given=g, metadata={"i": i}) for i, (t, g) in rows]

    def talk(
        self, environment, given: list, n: int = 1, *, turns: int = 3, tokens: int = 6, seed: int = 3, reward=None
    ):
        dialogue = Dialogue(environment=environment, encoder=self.encoder, max_turns=turns)
        sampling = Sampling(max_tokens=tokens, seed=seed, stop=(END,), temperature=0.8)
        shared = (self.transcript, reward, dialogue if environment else None)
        return sample_and_score(self.sampler, self.prompts(given), sampling, n, *shared)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Talker:
    folder = tmp_path_factory.mktemp("talker") / "model"
    save_chat_model(folder, WORDS, spoken=SPOKEN, end=1, initializer_range=0.15, num_hidden_layers=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Talker(folder, NativeSampler.from_pretrained(folder, threads=1), Encoder(tokenizer), Transcript(tokenizer))


def said(scored, b: int) -> list[str]:
    """All turns of a conversation, the policy's first."""
    metadata = scored.texts[2][b]
    return metadata["turns"] if "turns" in metadata else [scored.texts[1][b]]


def spans(scored) -> list[slice]:
    starts = scored.rollout.cu_seqlens.tolist()
    return [slice(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]


def written_out(talker: Talker, given, turns: list[str], finished: bool) -> tuple[list[int], list[bool]]:
    """(tokens, mask) of a conversation, by the template of the whole, or one text behind the other."""
    policy = [f"{text} <|im_end|>" for text in turns[0:-1:2]] + [turns[-1] + (" <|im_end|>" if finished else "")]
    if isinstance(given, str):
        pieces = [(given, False)]
        for i, text in enumerate(policy):
            pieces += [(text, True)] + ([(turns[2 * i + 1], False)] if 2 * i + 1 < len(turns) else [])
    else:
        chat = list(given)
        pieces = [(chatml(chat, opened=True), False)]
        for i, text in enumerate(policy):
            pieces.append((text, True))
            if 2 * i + 1 < len(turns):
                message = user(turns[2 * i + 1])
                pieces.append(("\n" + chatml([message], opened=True), False))
                chat += [assistant(turns[2 * i]), message]
        whole = chatml([*chat, assistant(turns[-1])]).removesuffix("\n")
        whole = whole if finished else whole.removesuffix("<|im_end|>")
        assert talker.ids(whole) == [i for text, _ in pieces for i in talker.ids(text)]
    tokens = [(i, action) for text, action in pieces for i in talker.ids(text)]
    return [i for i, _ in tokens], [action for _, action in tokens]


@pytest.mark.parametrize("given", [CHATS, TEXTS], ids=["chats", "texts"])
def test_a_conversation_is_the_whole_of_its_template(talker: Talker, given: list):
    n = 16
    scored = talker.talk(asks_why, given, n, turns=3)
    rollout, oracle = scored.rollout, Oracle(talker.folder)
    lengths = set()
    for b, span in enumerate(spans(scored)):
        turns = said(scored, b)
        tokens, mask = written_out(talker, given[b // n], turns, bool(rollout.finished_B[b]))
        assert rollout.tokens_N[span].tolist() == tokens
        assert rollout.action_mask_N[span].tolist() == mask
        want = oracle.logprobs(tokens, temperature=0.8).float()
        found_N = rollout.sampler_logprobs_N[span]
        action_N = torch.tensor(mask)
        assert torch.allclose(found_N[action_N], want[action_N], atol=1e-4)
        assert (found_N[~action_N] == 0).all()
        lengths.add(len(turns))
        messages = [f"why {k}" for k in range(1, len(turns) // 2 + 1)]
        assert turns[1::2] == messages
        assert scored.texts[0][b] == (
            given[b // n] if isinstance(given[0], str) else chatml(given[b // n], opened=True)
        )
        assert scored.texts[2][b]["i"] == b // n
    assert lengths == {1, 3, 5}


def test_it_ends_for_one_of_four_reasons(talker: Talker):
    """The environment's None, a response that is cut, max_turns."""
    scored = talker.talk(asks_why, CHATS, 24, turns=3, tokens=4)
    reasons = {"none": 0, "cut": 0, "turns": 0}
    for b, finished in enumerate(scored.rollout.finished_B.tolist()):
        turns = said(scored, b)
        if not finished:
            reasons["cut"] += 1
        elif len(turns) == 5:
            reasons["turns"] += 1
        else:
            assert asks_why([""], [turns], [{}]) == [None]
            reasons["none"] += 1
        for k in range(1, len(turns), 2):  # and not before
            assert asks_why([""], [turns[:k]], [{}]) == [turns[k]]
    assert all(count > 3 for count in reasons.values()), reasons
    alone = talker.talk(asks_why, CHATS, 4, turns=1)
    assert all(len(said(alone, b)) == 1 for b in range(12))


def test_it_ends_where_the_next_response_might_not_fit(talker: Talker, tmp_path):
    """The fourth reason: 40 tokens of context."""
    folder = save_chat_model(tmp_path / "m", WORDS, spoken=SPOKEN, end=1, max_position_embeddings=40)
    short = Talker(folder, NativeSampler.from_pretrained(folder, threads=1), talker.encoder, talker.transcript)
    message = "long " * 6
    scored = short.talk(lambda p, t, m: [message] * len(p), CHATS[:2], 48, turns=9, tokens=5)
    full = 0
    for b, span in enumerate(spans(scored)):
        turns, size = said(scored, b), span.stop - span.start
        assert size <= 40 and len(turns) < 2 * 9 - 1
        if scored.rollout.finished_B[b]:
            added = 1 + len(talker.ids(chatml([user(message)], opened=True)))
            assert size + added + 5 > 40
            full += 1
        begins = [i for i, x in enumerate(scored.rollout.action_mask_N[span].tolist()) if x]
        assert all(i + 5 <= 40 for i in begins if not scored.rollout.action_mask_N[span][i - 1])
    assert full > 5


def test_samples_that_are_still_alike_go_on_differently(talker: Talker):
    scored = talker.talk(lambda p, t, m: ["why"] * len(p), [CHATS[0], CHATS[1], CHATS[0]], 64, turns=2)
    later: dict[tuple, list] = {}
    for b in range(64 * 3):
        turns = said(scored, b)
        if len(turns) == 3:
            later.setdefault((scored.texts[0][b], turns[0]), []).append(turns[2])
    alike = [answers for answers in later.values() if len(answers) >= 8]
    assert len(alike) >= 2 and all(len(set(answers)) > len(answers) / 4 for answers in alike)
    streams = [[said(scored, 64 * i + k) for k in range(64)] for i in (0, 2)]  # the prompt that comes twice
    assert sum(a == b for a, b in zip(*streams, strict=True)) < 32
    again = talker.talk(lambda p, t, m: ["why"] * len(p), [CHATS[0], CHATS[1], CHATS[0]], 64, turns=2)
    assert torch.equal(again.rollout.tokens_N, scored.rollout.tokens_N)
    other = talker.talk(lambda p, t, m: ["why"] * len(p), CHATS[:1], 64, turns=2, seed=4)
    assert [said(other, b) for b in range(64)] != streams[0]


def test_without_an_environment_it_is_one_response(talker: Talker):
    scored = talker.talk(None, CHATS, 5)
    sampling = Sampling(max_tokens=6, seed=3, stop=(END,), temperature=0.8)
    whole = talker.sampler.generate([list(p.tokens) for p in talker.prompts(CHATS)], sampling, 5)
    for name in ("tokens_N", "cu_seqlens", "action_mask_N", "sampler_logprobs_N", "finished_B"):
        assert torch.equal(getattr(whole, name), getattr(scored.rollout, name)), name
    first = talker.talk(asks_why, CHATS, 5)
    for b, one in enumerate(spans(scored)):  # and the first one of a conversation
        begin = spans(first)[b].start
        size = one.stop - one.start
        assert torch.equal(first.rollout.tokens_N[begin : begin + size], whole.tokens_N[one])
    assert all("turns" not in metadata for metadata in scored.texts[2])


def test_the_reward_is_told_the_turns(talker: Talker):
    seen = []

    def score(prompts, responses, metadata):
        seen.extend(zip(prompts, responses, metadata, strict=True))
        return [float(len(m.get("turns", [""]))) for m in metadata]

    scored = talker.talk(asks_why, CHATS, 8, reward=Rewards([RewardFunction(score, "score")], [], [1.0]))
    rewards_B = scored.rewards()[:, 0]
    counts = [len(said(scored, b)) for b in range(24)]
    assert rewards_B.tolist() == counts and set(counts) == {1, 3, 5}
    assert len(seen) == 24
    for prompt, response, metadata in seen:
        i = metadata["i"]
        assert prompt == chatml(CHATS[i], opened=True)
        if "turns" in metadata:  # the response is all that came after the prompt
            words = re.sub(r"\n(user|assistant)\n|\n", " ", response).split()
            assert [w for w in words if w not in ("user", "assistant")] == " ".join(metadata["turns"]).split()


def test_the_environment_is_told_prompts_turns_and_metadata(talker: Talker):
    calls = []

    def environment(prompts, turns, metadata):
        calls.append((prompts, [list(t) for t in turns], metadata))
        return ["why"] * len(prompts)

    scored = talker.talk(environment, CHATS, 8, turns=3)
    assert len(calls) == 2
    for k, (prompts, turns, metadata) in enumerate(calls):
        assert all(p == chatml(CHATS[m["i"]], opened=True) for p, m in zip(prompts, metadata, strict=True))
        assert all(len(t) == 2 * k + 1 and t[1::2] == ["why"] * k for t in turns)
        ended = [said(scored, b) for b in range(24) if len(said(scored, b)) > 2 * k + 1]
        assert sorted(t[: 2 * k + 1] for t in ended) == sorted(turns)


def test_an_answer_ended_by_a_stop_string_is_closed(tiny_llama: Path):
    """The template's end of the turn is there, but nobody sampled it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    encoder, transcript = Encoder(tokenizer), Transcript(tokenizer)
    sampler = NativeSampler.from_pretrained(tiny_llama, threads=1)
    chat = [{"role": "system", "content": "Be kind."}, user("Hello!")]
    text = chatml(chat, opened=True)
    prompt = Prompt(text=text, tokens=tuple(tokenizer(text)["input_ids"]), given=chat, metadata={})
    dialogue = Dialogue(environment=lambda p, t, m: ["Go on."] * len(p), encoder=encoder, max_turns=2)
    sampling = Sampling(max_tokens=12, stop=transcript.stop, stop_strings=("e", "a", "i"), seed=1)
    scored = sample_and_score(sampler, [prompt], sampling, 8, transcript, None, dialogue)
    follow = tokenizer("<|im_end|>\n" + chatml([user("Go on.")], opened=True))["input_ids"]
    found = 0
    for span in spans(scored):
        tokens, mask = scored.rollout.tokens_N[span], scored.rollout.action_mask_N[span]
        between = (~mask).nonzero()[:, 0].tolist()[len(prompt.tokens) :]
        if between:
            assert between == list(range(between[0], between[0] + len(follow)))
            assert tokens[between].tolist() == follow and tokens[between[0] - 1] != tokenizer.eos_token_id
            found += 1
    assert found > 3


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (lambda p, t, m: 1 / 0, r"the environment raised ZeroDivisionError: division by zero\.$"),
        (
            lambda p, t, m: ["why"],
            r"the environment returned \['why'\] for \d+ conversations, expected a string or None",
        ),
        (
            lambda p, t, m: [3] * len(p),
            r"the environment returned \[3, .* conversations, expected a string or None for",
        ),
        (lambda p, t, m: None, r"the environment raised TypeError"),
    ],
)
def test_a_broken_environment_is_told_in_one_sentence(talker: Talker, environment, message: str):
    with pytest.raises(ValueError, match=message) as error:
        talker.talk(environment, CHATS, 4)
    assert "\n" not in str(error.value)
    assert talker.sampler.engine.num_live == 0


def test_environments_are_found_by_name():
    assert load_environment("tests.programs.environments:asks_why") is asks_why
    made = load_environment("tests.programs.environments:Counts")
    assert isinstance(made, Counts) and made(["x"], [["y"]], [{}]) == ["1"]
    for spec, message in (
        ("asks_why", r"environment 'asks_why' is not MODULE:CALLABLE; write for example"),
        ("tests.programs.environments:nothing", r"tests\.programs\.environments has no callable 'nothing'"),
        ("tests.programs.environments:not_callable", r"tests\.programs\.environments has no callable 'not_callable'"),
        ("no_such_module:x", r"importing no_such_module raised ModuleNotFoundError: No module named"),
    ):
        with pytest.raises(ValueError, match=message):
            load_environment(spec)


def test_advantages_skip_what_the_environment_said(talker: Talker):
    """GAE of a conversation is that of the policy's tokens alone, one after the other."""
    scored = talker.talk(asks_why, CHATS, 8)
    (b, *_) = [b for b in range(24) if len(said(scored, b)) == 5]
    rollout, g = scored.rollout.take([b]), torch.Generator().manual_seed(0)
    mask_N = rollout.action_mask_N
    logprobs_N, reference_N, values_N = torch.randn(3, len(mask_N), generator=g).unbind()
    config = ppo.Config(gamma=0.9, lam=0.8, kl_coef=0.3)
    known = torch.tensor([2.0]), logprobs_N * mask_N, reference_N * mask_N, values_N * mask_N
    policy_batch, value_batch = ppo.estimate(config, rollout, *known, 0.3)

    actions = mask_N.nonzero()[:, 0].tolist()
    assert actions != list(range(actions[0], actions[-1] + 1))  # the environment speaks in between
    nats, old, values = ([float(x[t]) for t in actions] for x in (logprobs_N, reference_N, values_N))
    rewards = [-0.3 * (a - b) for a, b in zip(nats, old, strict=True)]
    rewards[-1] += 2.0
    advantages, carry = [], 0.0
    for k in reversed(range(len(actions))):
        after = values[k + 1] if k + 1 < len(actions) else 0.0
        carry = rewards[k] + 0.9 * after - values[k] + 0.9 * 0.8 * carry
        advantages.insert(0, carry)
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    mean = sum(advantages) / len(advantages)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages))
    white = [(a - mean) / deviation for a in advantages]
    assert policy_batch.advantages_N[mask_N].tolist() == pytest.approx(white, abs=1e-4)
    assert value_batch.returns_N[mask_N].tolist() == pytest.approx(returns, abs=1e-5)
    assert (policy_batch.advantages_N[~mask_N] == 0).all() and (policy_batch.weights_N[~mask_N] == 0).all()


@pytest.mark.parametrize("program", ["ppo", "grpo"])
def test_training_on_conversations(talker: Talker, tmp_path, program: str):
    data = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS] * 2)
    options = {"model": talker.folder, "data": data, "eval-data": data, "eval-prompts": 3, "steps": 2}
    options |= {"environment.function": "tests.programs.environments:asks_why", "environment.max-turns": 3}
    options |= {"reward.function": "tests.programs.rewards:digits", "sampling.max-tokens": 6}
    options |= {"batch.sequences": 12, "batch.samples-per-prompt": 4, "batch.minibatch-sequences": 6}
    options |= {"critic.layers": 1} if program == "ppo" else {}
    done = run(program, tmp_path / "run", options)
    rows = metrics(done)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for row in rows[1:]:
        assert row["sampler_gap/max"] < 1e-4  # the trainer reads the conversation that the sampler did
        assert row["sampled_tokens"] < row["tokens"]
    texts = [row["response"] for row in samples(done)]
    assert any("why 1" in text for text in texts) and any("why 2" in text for text in texts)
    assert json.loads((done / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
