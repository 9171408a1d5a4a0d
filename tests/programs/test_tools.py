"""Tools that sample, judge and measure: what they write, against what can be computed again from it."""

import json
import math
import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from aligner.constitutional import read_constitution
from aligner.data.batch import response_tokens
from aligner.data.dataset import DataConfig, Dataset
from aligner.data.encoder import Encoder
from aligner.data.formats import JUDGED, PAIRS, SUPERVISED
from aligner.evaluate import distinct
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.programs.bandit import write
from tests.programs.chats import END, Oracle, assistant, chatml, save_chat_model, user
from tests.programs.runs import run, start

SPOKEN = tuple(f"w{i}" for i in range(8))
REQUESTS = {"critique": "say what is bad", "revision": "say it again", "preference": "which is good ?"}
QUESTION = "Consider this conversation.\n{talk}\n\nwhich is good ?\nA: {a}\nB: {b}\nAnswer with A or B only."
WORDS = (*SPOKEN, *" ".join([*REQUESTS.values(), QUESTION]).split(), "user:", "assistant:", "fine")
TALK = [user("w1"), assistant("fine"), user("w2 w3")]
TEXTS = ["w1 w2 w3", "w5", "w0 w7"]
CHATS = [TALK, [user("w4 w4")], [user("w6")], [user("w0 w1"), assistant("w2"), user("w3")]]
PROMPTS = [{"text": text} for text in TEXTS] + [{"messages": chat} for chat in CHATS]
DIGITS = {"reward.function": "tests.programs.rewards:digits"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models, prompts: raw texts in one file and chats in another."""
    folder = tmp_path_factory.mktemp("tools")
    shared = {"spoken": SPOKEN, "max_position_embeddings": 256, "initializer_range": 0.1}
    save_chat_model(folder / "model", WORDS, **shared)
    save_chat_model(folder / "other", WORDS, **shared, num_hidden_layers=2, end=1)
    save_chat_model(folder / "judge", WORDS, **shared | {"initializer_range": 0.3}, num_hidden_layers=3, end=-2)
    write(folder / "texts.jsonl", [row for row in PROMPTS if "text" in row])
    write(folder / "chats.jsonl", [row for row in PROMPTS if "messages" in row])
    return folder


@pytest.fixture(scope="module")
def tokens(folder: Path):
    """Ids of a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def drawn(folder: Path):
    """(model, prompts in tokens, n, settings) -> (tokens, text, whether it ended) of each response."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def again(model: str, prompts: list[list[int]], n: int, **settings) -> list[tuple[list[int], str, bool]]:
        sampler = NativeSampler.from_pretrained(folder / model, threads=1)
        rollout = sampler.generate(prompts, Sampling(stop=(END,), **settings), n)
        said = [ids for _, ids in response_tokens(rollout)]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        assert [ids[-1] == END for ids in said] == rollout.finished_B.tolist()
        return list(zip(said, texts, rollout.finished_B.tolist(), strict=True))

    return again


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def digits(text: str) -> float:
    return sum(int(c) for c in text if c.isdigit()) / 10


def prompts_of(kind: str, tokens) -> tuple[list, list[list[int]]]:
    """(what stands in the file, its tokens) of each prompt."""
    key = {"texts": "text", "chats": "messages"}[kind]
    given = [row[key] for row in PROMPTS if key in row]
    return given, [tokens(chatml(x, opened=True) if key == "messages" else x) for x in given]


SEED, N, LIMIT = 3, 5, 4


def preferences(folder: Path, output: Path, kind: str, options: dict) -> list[dict]:
    shared = {"model": folder / "model", "data": folder / f"{kind}.jsonl", "n": N, "seed": SEED, "batch.prompts": 2}
    return lines(run("preferences", output, shared | DIGITS | {"sampling.max-tokens": LIMIT} | options))


def groups(kind: str, tokens, drawn) -> list[tuple[object, list[int], list[tuple[float, str, bool]]]]:
    """(prompt, its tokens, (reward, text, whether it ended) of its responses), drawn again; none of them is empty."""
    given, ids = prompts_of(kind, tokens)
    found = []
    for number, begin in enumerate(range(0, len(ids), 2)):
        said = drawn("model", ids[begin : begin + 2], N, seed=SEED * 2**32 + number, max_tokens=LIMIT)
        for i in range(len(ids[begin : begin + 2])):
            rated = [(digits(text), text, ended) for _, text, ended in said[i * N : (i + 1) * N] if text]
            found.append((given[begin + i], ids[begin + i], rated))
    return found


def reader(folder: Path, file: Path, use) -> Dataset:
    encoder = Encoder(AutoTokenizer.from_pretrained(folder / "model"))
    return Dataset.open(str(file), DataConfig(), use, encoder, room=200, seed=0)


@pytest.mark.parametrize("kind", ["texts", "chats"])
def test_pairs_are_the_best_and_the_worst(folder: Path, tokens, drawn, tmp_path, kind: str):
    rows = preferences(folder, tmp_path / "pairs.jsonl", kind, {})
    want = groups(kind, tokens, drawn)
    assert len(rows) == len(want)
    data, ends = reader(folder, tmp_path / "pairs.jsonl", PAIRS), set()
    for i, (row, (prompt, ids, rated)) in enumerate(zip(rows, want, strict=True)):
        best, worst = max(rated, key=lambda x: x[0]), min(rated, key=lambda x: x[0])
        assert row["prompt"] == prompt and best[0] > worst[0]
        for name, (reward, text, ended), read in (
            ("chosen", best, data[i].chosen),
            ("rejected", worst, data[i].rejected),
        ):
            assert (row[name], row[f"{name}_finished"]) == (text, ended)
            assert row[f"{name}_reward"] == pytest.approx(reward, abs=1e-6)
            response = tokens(text) + [END] * ended  # what was cut gets no end
            assert list(read.tokens) == ids + response
            assert list(read.mask) == [False] * len(ids) + [True] * len(response)
            ends |= {ended}
        assert data[i].margin == pytest.approx(best[0] - worst[0], abs=1e-6)
    assert kind == "chats" or ends == {True, False}


def test_pairs_closer_than_the_gap_are_left_out(folder: Path, tokens, drawn, tmp_path):
    gaps = [max(r)[0] - min(r)[0] for _, _, r in groups("texts", tokens, drawn)]
    gap = sorted(gaps)[-2] + 1e-4
    rows = preferences(folder, tmp_path / "pairs.jsonl", "texts", {"gap": gap})
    assert len(rows) == sum(g > gap for g in gaps) == 1


def test_judged_responses(folder: Path, tokens, drawn, tmp_path):
    rows = preferences(folder, tmp_path / "judged.jsonl", "chats", {"kind": "judged", "threshold": 0.75})
    want = [(prompt, ids, one) for prompt, ids, rated in groups("chats", tokens, drawn) for one in rated]
    data = reader(folder, tmp_path / "judged.jsonl", JUDGED)
    assert len(rows) == len(want) == len(data) > 6
    for i, (row, (prompt, ids, (reward, text, ended))) in enumerate(zip(rows, want, strict=True)):
        assert row["prompt"] == prompt and row["completion"] == text and row["finished"] == ended
        assert row["label"] == (reward > 0.75) == data[i].desirable
        assert list(data[i].prompt) == ids and list(data[i].response) == tokens(text) + [END] * ended
    assert {row["label"] for row in rows} == {row["finished"] for row in rows} == {True, False}


def test_the_best_responses(folder: Path, tokens, drawn, tmp_path):
    rows = preferences(folder, tmp_path / "best.jsonl", "texts", {"kind": "best", "prompts": 2})
    want = groups("texts", tokens, drawn)[:2]
    data = reader(folder, tmp_path / "best.jsonl", SUPERVISED)
    assert len(rows) == 2
    for i, (row, (prompt, ids, rated)) in enumerate(zip(rows, want, strict=True)):
        reward, text, ended = max(rated, key=lambda x: x[0])
        assert row["reward"] == pytest.approx(reward) and (row["prompt"], row["completion"]) == (prompt, text)
        assert list(data[i].tokens) == ids + tokens(text) + [END] * ended


def test_a_bad_text_is_told_before_anything_is_sampled(folder: Path, tmp_path, monkeypatch):
    monkeypatch.setattr(NativeSampler, "stream", None)
    file = write(tmp_path / "bad.jsonl", [{"text": "w1"}, {"text": ""}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: \"text\" is "):
        evaluate(folder, tmp_path / "row.json", {"text": file})


@pytest.mark.parametrize("program", ["preferences", "evaluate", "constitutional"])
def test_an_output_that_is_there_is_kept(program: str, folder: Path, tmp_path):
    (tmp_path / "out").write_text("mine")
    given = {"model": folder / "model", "data": folder / "chats.jsonl"}
    with pytest.raises(ValueError, match="--output .*out' is there already; remove it or choose another file"):
        start(program, tmp_path / "out", given)
    with pytest.raises(ValueError, match="--output .* is in no folder that exists; make .*nowhere' first"):
        start(program, tmp_path / "nowhere" / "out", given)
    assert (tmp_path / "out").read_text() == "mine"


HOT = 1.3


def evaluate(folder: Path, output: Path, options: dict) -> dict:
    shared = {"model": folder / "model", "data": folder / "texts.jsonl", "seed": SEED, "sampling.max-tokens": 6}
    return json.loads(run("evaluate", output, shared | DIGITS | options).read_text())


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def test_a_model_against_another(folder: Path, tokens, drawn, tmp_path):
    files = [write(tmp_path / "a.jsonl", [{"text": "w1 w2 w3 w1"}, {"text": "w0"}])]
    files.append(write(tmp_path / "b.jsonl", [{"prompt": "w7", "completion": "w5 w5"}]))
    options = {
        "reference": folder / "other",
        "against": folder / "other",
        "text": ",".join(map(str, files)),
        "label": "mine",
    }
    row = evaluate(folder, tmp_path / "row.json", options | {"sampling.temperature": HOT})
    _, ids = prompts_of("texts", tokens)
    mine, theirs = (drawn(m, ids, 1, seed=SEED, max_tokens=6, temperature=HOT) for m in ("model", "other"))
    rewards, others = ([digits(text) for _, text, _ in said] for said in (mine, theirs))
    assert row["label"] == "mine" and row["model"] == str(folder / "model") and row["prompts"] == len(ids) == 3
    assert (row["reward/mean"], row["reward/standard_error"]) == pytest.approx(mean_and_error(rewards), abs=1e-6)
    assert row["response_length/mean"] == pytest.approx(sum(len(said) for said, _, _ in mine) / 3)
    assert row["finished/mean"] == pytest.approx(sum(ended for _, _, ended in mine) / 3)
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(rewards, others, strict=True)]
    assert row["win_rate"] == pytest.approx(sum(wins) / 3)
    one, other = Oracle(folder / "model"), Oracle(folder / "other")
    pairs = [(prompt, said) for prompt, (said, _, _) in zip(ids, mine, strict=True)]
    gaps = [one.response(p, said, HOT) - other.response(p, said, HOT) for p, said in pairs]
    assert (row["kl/mean"], row["kl/standard_error"]) == pytest.approx(mean_and_error(gaps), abs=1e-4)
    assert abs(row["kl/mean"]) > 0.01
    for n in (1, 2):
        grams = [gram for _, text, _ in mine for gram in zip(*(text.split()[k:] for k in range(n)), strict=False)]
        assert len(grams) > 4 and row[f"distinct-{n}"] == pytest.approx(len(set(grams)) / len(grams))
    learnt = [one.logprobs(tokens(text) + [END])[1:] for text in ("w1 w2 w3 w1", "w0", "w7 w5 w5")]
    nats = -torch.cat(learnt)  # of the first token nobody says anything
    assert len(nats) == 4 + 1 + 3 and row["perplexity"] == pytest.approx(float(nats.mean().exp()), rel=1e-4)


def test_a_model_against_itself(folder: Path, tmp_path):
    same = {"reference": folder / "model", "against": folder / "model"}
    row = evaluate(folder, tmp_path / "row.json", same)
    assert row["win_rate"] == 0.5 and row["kl/mean"] == 0 == row["kl/standard_error"]
    assert "perplexity" not in row


def test_one_prompt_has_no_standard_error(folder: Path, tmp_path):
    row = evaluate(folder, tmp_path / "row.json", {"reference": folder / "other", "prompts": 1})
    assert row["prompts"] == 1 and row["reward/standard_error"] == 0 == row["kl/standard_error"]


def test_distinct_n_by_hand():
    responses = ["a b a b", "b a", "", "c"]
    assert distinct(responses, 1) == 3 / 7 and distinct(responses, 2) == 2 / 4 and distinct(responses, 5) == 0


def test_a_frontier_has_a_line_for_every_label(folder: Path, tmp_path):
    evaluate(folder, tmp_path / "real.json", {"reference": folder / "other", "label": "real"})
    points = [("dpo", 3.0, 0.5), ("dpo", 1.0, 0.1), ("", 2.0, 0.4), ("dpo", 2.0, 0.7)]
    files = [tmp_path / "real.json"]
    for i, (label, kl, reward) in enumerate(points):
        files.append(tmp_path / f"{i}.json")
        row = {"label": label, "model": "runs/<x>", "kl/mean": kl, "reward/mean": reward}
        files[-1].write_text(json.dumps(row))
    svg = run("evaluate", tmp_path / "frontier.svg", {"frontier": files})
    tree = ElementTree.fromstring(svg.read_text())
    name = "{http://www.w3.org/2000/svg}"
    drawn_lines = [line.get("points").split() for line in tree.iter(f"{name}polyline")]
    assert [len(line) for line in drawn_lines] == [1, 3, 1]
    steps, heights = zip(*(map(float, point.split(",")) for point in drawn_lines[1]), strict=True)
    assert list(steps) == sorted(steps)  # in order of KL
    assert heights[1] < heights[2] < heights[0]  # a picture's y grows downwards
    labels = [text.text for text in tree.iter(f"{name}text")]
    assert {"real", "dpo", "runs/<x>"} <= set(labels)


def test_a_frontier_without_a_divergence_is_refused(folder: Path, tmp_path):
    evaluate(folder, tmp_path / "row.json", {})
    with pytest.raises(ValueError, match=r"row\.json has no KL and reward; evaluate it with --reference"):
        start("evaluate", tmp_path / "frontier.svg", {"frontier": tmp_path / "row.json"})
    assert not (tmp_path / "frontier.svg").exists()


@pytest.fixture(scope="module")
def constitution(folder: Path) -> Path:
    return write(folder / "constitution.jsonl", [REQUESTS])


def constitutional(folder: Path, output: Path, constitution: Path, stage: str, options: dict) -> list[dict]:
    shared = {"model": folder / "model", "data": folder / "chats.jsonl", "stage": stage, "constitution": constitution}
    return lines(run("constitutional", output, shared | {"seed": SEED, "sampling.max-tokens": 5} | options))


def answers(chats: list[list[dict]], call: int, n: int, tokens, drawn) -> list[tuple[list[int], str, bool]]:
    """What the model says to these chats when it is asked for the `call`th time."""
    opened = [tokens(chatml(chat, opened=True)) for chat in chats]
    return drawn("model", opened, n, seed=SEED * 2**32 + call, max_tokens=5)


@pytest.mark.parametrize("revisions", [1, 2])
def test_answers_are_criticised_and_revised(folder: Path, constitution: Path, tokens, drawn, tmp_path, revisions: int):
    rows = constitutional(folder, tmp_path / "new.jsonl", constitution, "revise", {"revisions": revisions})
    given = prompts_of("chats", tokens)[0]
    said = [text for _, text, _ in answers(given, 1, 1, tokens, drawn)]
    talks = [[*chat, assistant(text)] for chat, text in zip(given, said, strict=True)]
    first = said
    for turn in range(revisions):
        talks = [[*talk, user(REQUESTS["critique"])] for talk in talks]
        critiques = [text for _, text, _ in answers(talks, 2 + 2 * turn, 1, tokens, drawn)]
        talks = [[*t, assistant(c), user(REQUESTS["revision"])] for t, c in zip(talks, critiques, strict=True)]
        said, ended = zip(*[pair[1:] for pair in answers(talks, 3 + 2 * turn, 1, tokens, drawn)], strict=True)
        talks = [[*talk, assistant(text)] for talk, text in zip(talks, said, strict=True)]
    wanted = [
        {"prompt": chat, "completion": after, "finished": finished, "initial": before, "critique": critique}
        for chat, before, critique, after, finished in zip(given, first, critiques, said, ended, strict=True)
        if after
    ]
    assert rows == wanted and len(rows) >= 2
    assert all(row["initial"] != row["completion"] for row in rows)
    assert len({row["finished"] for row in rows}) == 2 or revisions == 1
    data = reader(folder, tmp_path / "new.jsonl", SUPERVISED)
    for i, row in enumerate(rows):
        last = tokens(row["completion"]) + [END] * row["finished"]
        assert list(data[i].tokens[-len(last) :]) == last
    trained = {"model": folder / "model", "data": tmp_path / "new.jsonl", "steps": 1, "batch.examples": 2}
    assert start("sft", tmp_path / "sft", trained) == 0


def test_the_models_own_preference(folder: Path, constitution: Path, tokens, drawn, tmp_path):
    """The verdict, asked in both orders, is the model's and does not depend on the temperature of the answers."""
    options = {"model": folder / "judge", "sampling.temperature": 2.5}
    rows = constitutional(folder, tmp_path / "pairs.jsonl", constitution, "prefer", options)
    given = prompts_of("chats", tokens)[0]
    opened = [tokens(chatml(chat, opened=True)) for chat in given]
    said = drawn("judge", opened, 2, seed=SEED * 2**32 + 1, max_tokens=5, temperature=2.5)
    model, (a_id,), (b_id,) = Oracle(folder / "judge"), tokens("A"), tokens("B")
    assert len(rows) == len(given) == 4
    for i, (row, chat) in enumerate(zip(rows, given, strict=True)):
        talk = "\n".join(f"{m['role']}: {m['content']}" for m in chat)
        (_, one, one_ended), (_, two, two_ended) = said[2 * i : 2 * i + 2]
        shares = []
        for (first, second), mine, yours in (((one, two), a_id, b_id), ((two, one), b_id, a_id)):
            asked = user(QUESTION.format(talk=talk, a=first, b=second))
            z = model.logits(tokens(chatml([asked], opened=True)))[-1]
            shares.append(1 / (1 + math.exp(float(z[yours] - z[mine]))))
        p = sum(shares) / 2
        assert abs(p - 0.5) > 1e-4 and abs(shares[0] - shares[1]) > 1e-3  # the order matters
        best, worst = ((one, one_ended), (two, two_ended))[:: 1 if p >= 0.5 else -1]
        assert row["prompt"] == chat
        assert (row["chosen"], row["chosen_finished"]) == best and (row["rejected"], row["rejected_finished"]) == worst
        assert row["chosen_reward"] == pytest.approx(max(p, 1 - p), abs=1e-5)
        assert row["rejected_reward"] == pytest.approx(min(p, 1 - p), abs=1e-5)
    data = reader(folder, tmp_path / "pairs.jsonl", PAIRS)
    for i, row in enumerate(rows):
        response = tokens(row["chosen"]) + [END] * row["chosen_finished"]
        assert list(data[i].chosen.tokens) == opened[i] + response
    trained = {"model": folder / "model", "data": tmp_path / "pairs.jsonl", "steps": 1, "batch.examples": 2}
    assert start("dpo", tmp_path / "dpo", trained) == 0


def test_principles_are_drawn_for_every_answer(folder: Path, tokens, drawn, tmp_path):
    principles = [REQUESTS, {name: f"{text} w{i}" for i, (name, text) in enumerate(REQUESTS.items())}]
    rows = constitutional(folder, tmp_path / "new.jsonl", write(tmp_path / "two.jsonl", principles), "revise", {})
    draw, given = random.Random(SEED), prompts_of("chats", tokens)[0]
    chosen = [draw.choice(principles) for _ in given]
    said = [text for _, text, _ in answers(given, 1, 1, tokens, drawn)]
    talks = [[*c, assistant(s), user(p["critique"])] for c, s, p in zip(given, said, chosen, strict=True)]
    critiques = [text for _, text, _ in answers(talks, 2, 1, tokens, drawn)]
    kept = [chat[-1]["content"] for chat in (row["prompt"] for row in rows)]
    asked = [chat[-1]["content"] for chat in given]
    assert len(rows) >= 3  # where the revision is not empty
    assert [row["critique"] for row in rows] == [critiques[asked.index(last)] for last in kept]
    assert len({p["critique"] for p in chosen}) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"critique": "say", "revision": "say"}, r'constitution\.jsonl:2: got no "preference", expected "critique", '),
        (REQUESTS | {"revision": ""}, r'constitution\.jsonl:2: "revision" is .*, expected a string that is not empty'),
        (REQUESTS | {"critique": 3}, r'constitution\.jsonl:2: "critique" is 3, expected a string that is not empty'),
    ],
)
def test_a_bad_line_of_a_constitution_is_named(folder: Path, tmp_path, line: dict, message: str):
    file = write(tmp_path / "constitution.jsonl", [REQUESTS, line])
    with pytest.raises(ValueError, match=message):
        constitutional(folder, tmp_path / "out.jsonl", file, "revise", {})
    assert not (tmp_path / "out.jsonl").exists()


def test_the_built_in_constitution_is_whole():
    for principle in read_constitution(None):
        assert principle.keys() == REQUESTS.keys() and all(principle.values())
