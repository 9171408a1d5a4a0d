"""SteerLM from rated answers to answers with the attributes that are asked for; bandit-sized models."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from aligner import generate
from aligner.annotate import tenths
from aligner.data.dataset import DataConfig, Dataset
from aligner.data.encoder import Encoder
from aligner.data.formats import SUPERVISED
from tests.programs.bandit import write
from tests.programs.chats import Oracle, assistant, chatml, save_chat_model, scores, user
from tests.programs.runs import metrics, run, start, words

NAMES = ("quality", "humour")
QUALITY, HUMOUR = {"good": 4, "bad": 0}, {"funny": 3, "dull": 1}
ASKED = tuple(f"p{i}" for i in range(6))
LABELS = tuple(f"quality:{q},humour:{h}" for q in range(5) for h in range(5))
ANSWERS = [f"{a} {b}" for a in QUALITY for b in HUMOUR]
TRAINING = {"lora.rank": 0, "optimizer.lr": 1e-2, "batch.tokens-per-micro-batch": 4096}


def wanted(answer: str) -> str:
    """The label of an answer."""
    first, second = answer.split()
    return f"quality:{QUALITY[first]},humour:{HUMOUR[second]}"


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A language model over these words, and chats: every prompt with every answer."""
    folder = tmp_path_factory.mktemp("steerlm")
    vocabulary = (*QUALITY, *HUMOUR, *ASKED, *LABELS, "be", "kind")
    shared = {"spoken": (*QUALITY, *HUMOUR), "initializer_range": 0.1}
    save_chat_model(folder / "model", vocabulary, **shared)
    save_chat_model(folder / "proposer", vocabulary, **shared, end=-3, num_hidden_layers=2)
    chats = [[user(prompt), assistant(answer)] for prompt in ASKED for answer in ANSWERS]
    write(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    ratings = [[QUALITY[a], HUMOUR[b]] for _, said in chats for a, b in [said["content"].split()]]
    rated = [{"messages": chat, "label": label} for chat, label in zip(chats, ratings, strict=True)]
    write(folder / "rated.jsonl", rated)
    return folder


@pytest.fixture(scope="module")
def tokens(folder: Path):
    """Ids of a text, which has blanks around every word but the special ones."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def judge(folder: Path) -> Path:
    """The attribute model."""
    options = {"model": folder / "model", "data": folder / "rated.jsonl", "loss": "regression", "steps": 150}
    options |= TRAINING | {"batch.examples": len(ASKED) * len(ANSWERS), "optimizer.decay-steps": 150}
    return run("reward_model", folder / "judge", options) / "policy"


def annotate(judge: Path, data: Path, output: Path, options: dict | None = None) -> Path:
    return run("annotate", output, {"model": judge, "data": data, "names": NAMES} | (options or {}))


@pytest.fixture(scope="module")
def labelled(folder: Path, judge: Path) -> Path:
    return annotate(judge, folder / "chats.jsonl", folder / "labelled.jsonl")


@pytest.fixture(scope="module")
def steered(folder: Path, labelled: Path) -> Path:
    options = {"model": folder / "model", "data": labelled, "steps": 80, "optimizer.decay-steps": 80} | TRAINING
    return run("steerlm", folder / "steered", options | {"batch.examples": len(ASKED) * len(ANSWERS)}) / "policy"


def test_the_attribute_models_labels_are_the_ratings(labelled: Path):
    rows = lines(labelled)
    assert len(rows) == len(ASKED) * len(ANSWERS)
    for row in rows:
        question, answer = row["conversations"]
        assert row["type"] == "VALUE_TO_TEXT" and row["mask"] == "User" and row["system"] == ""
        assert question["from"] == "User" and question["value"] in ASKED and question["label"] is None
        assert answer["from"] == "Assistant" and answer["label"] == wanted(answer["value"])


@pytest.mark.parametrize(("low", "high"), [(0, 9), (1, 3)])
def test_labels_are_the_rounded_scores_of_transformers(judge: Path, tokens, tmp_path, low: int, high: int):
    """Every answer of the assistant is judged with all that was said before it, and nothing after."""
    system = {"role": "system", "content": "be kind"}
    chats = [
        [user("p1 good"), assistant("funny"), user("p2"), assistant("bad bad bad"), user("p3")],
        [system, user("p0 bad"), assistant("dull good kind"), user("p5 good"), assistant("good good funny")],
        [user("p4"), user("be kind"), assistant("kind")],
    ]
    rows = [{"messages": chat} for chat in chats]
    said = [{"from": m["role"].capitalize(), "value": m["content"]} for m in chats[1][1:]]
    rows.append({"system": "be kind", "conversations": said, "mask": "User"})
    options = {"low": low, "high": high, "batch.prompts": 2}
    found = lines(annotate(judge, write(tmp_path / "chats.jsonl", rows), tmp_path / "out.jsonl", options))
    assert [row["system"] for row in found] == ["", "be kind", "", "be kind"]
    assert found[1]["conversations"] == found[3]["conversations"]
    seen = set()
    for chat, row in zip([*chats, chats[1]], found, strict=True):
        turns = row["conversations"]
        spoken = [(m["role"], m["content"]) for m in chat if m["role"] != "system"]
        assert [(t["from"].lower(), t["value"]) for t in turns] == spoken
        assert all((t["label"] is None) == (t["from"] == "User") for t in turns)
        for i, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            turn = turns[i - len(chat)]
            text = chatml(chat[: i + 1]).removesuffix("\n")
            values = scores(judge, [tokens(text)])[0].tolist()
            assert all(abs(v - math.floor(v) - 0.5) > 1e-3 for v in values)
            clipped = [min(max(round(v), low), high) for v in values]
            assert turn["label"] == ",".join(f"{name}:{v}" for name, v in zip(NAMES, clipped, strict=True))
            seen |= {turn["label"]}
    assert len(seen) >= 3


def test_labels_by_tenths(judge: Path, tokens, tmp_path):
    """A value's tenth is ten times the share of smaller ones, rounded down."""
    assert tenths([[2.0, 0.0], [1.0, 0.0], [2.0, -1.0], [3.0, 0.0]]) == [[2, 2], [0, 2], [2, 0], [7, 2]]
    answers = [" ".join([word] * n) for word in ("good", "bad", "funny", "dull") for n in (1, 2, 3)]
    rows = [{"messages": [user("p1"), assistant(answer)]} for answer in answers]
    found = lines(annotate(judge, write(tmp_path / "chats.jsonl", rows), tmp_path / "out.jsonl", {"tenths": True}))
    texts = [chatml(row["messages"]).removesuffix("\n") for row in rows]
    values = [scores(judge, [tokens(text)])[0].tolist() for text in texts]
    for row, own in zip(found, values, strict=True):
        own_tenths = [sum(v[k] < own[k] - 1e-9 for v in values) * 10 // len(values) for k in range(len(NAMES))]
        wanted = ",".join(f"{name}:{v}" for name, v in zip(NAMES, own_tenths, strict=True))
        assert row["conversations"][1]["label"] == wanted
    assert len({row["conversations"][1]["label"] for row in found}) > 6


def test_a_number_of_names_that_is_not_the_models_is_refused(folder: Path, judge: Path, tmp_path):
    chats = folder / "chats.jsonl"
    with pytest.raises(ValueError, match=r"--names has 1 names, and .* gives 2 attributes; .* one name for each"):
        annotate(judge, chats, tmp_path / "out.jsonl", {"names": "quality"})
    with pytest.raises(ValueError, match=r"--names has 2 names, and .* gives 0 attributes; give a reward model"):
        annotate(folder / "model", chats, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: got the keys \['text'\], expected \"messages\""):
        annotate(judge, write(tmp_path / "bad.jsonl", [*lines(chats)[:1], {"text": "p1"}]), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_label_stands_where_the_answer_would_begin(labelled: Path, folder: Path, tokens):
    encoder = Encoder(AutoTokenizer.from_pretrained(folder / "model"))
    data = Dataset.open(str(labelled), DataConfig(), SUPERVISED, encoder, room=99, seed=0)
    row, example = lines(labelled)[5], data[5]
    question, answer = row["conversations"]
    before = tokens(chatml([user(question["value"])], opened=True) + answer["label"] + "\n")
    assert example.tokens == (*before, *tokens(answer["value"] + "<|im_end|>"))
    assert example.mask == (False,) * len(before) + (True,) * 3
    assert encoder.steer([user(question["value"])], answer["label"])[1] == tuple(before)


def test_generate_says_what_is_asked_for(steered: Path, capsys):
    n, right = 12, []
    for answer in ANSWERS:
        for prompt in ASKED[:3]:
            capsys.readouterr()
            options = {"checkpoint": steered, "prompt": prompt, "chat": True, "attributes": wanted(answer), "n": n}
            assert generate.main(words(options | {"max-tokens": 5, "threads": 1})) == 0
            said = capsys.readouterr().out.splitlines()
            assert len(said) == n
            right += [text == answer for text in said]
    assert sum(right) / len(right) > 0.9, sum(right) / len(right)


def test_attributes_are_of_chats(steered: Path):
    with pytest.raises(ValueError, match="add --chat"):
        generate.main(words({"checkpoint": steered, "prompt": "p1", "attributes": LABELS[0]}))


SIGMA, N = 0.7, 3


@pytest.fixture(scope="module")
def proposals(folder: Path, judge: Path) -> Path:
    """Drawn by a model that is told the label, against one that is not."""
    said = [
        ("p1", "good dull", "quality:4,humour:1"),
        ("p3", "bad dull", "quality:2,humour:0"),
        ("p5", "bad", LABELS[3]),
    ]
    rows = []
    for i, (prompt, answer, label) in enumerate(said):
        before = [{"from": "User", "value": "p0"}, {"from": "Assistant", "value": "good", "label": "quality:9"}] * (
            i == 1
        )
        turns = [*before, {"from": "User", "value": prompt}, {"from": "Assistant", "value": answer, "label": label}]
        rows.append({"system": "be kind" if i == 2 else "", "type": "VALUE_TO_TEXT", "conversations": turns})
    options = {"model": folder / "proposer", "base": folder / "model", "attribute-model": judge, "n": N, "sigma": SIGMA}
    options |= {"data": write(folder / "asked.jsonl", rows), "sampling.max-tokens": 4, "sampling.temperature": 1.7}
    return run("propose", folder / "proposals.jsonl", options | {"batch.prompts": 2})


def parts(row: dict, tokens) -> list[tuple]:
    """(prompt, prompt with the label, response) in tokens, of each response."""
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    chat = system + [{"role": t["from"].lower(), "content": t["value"]} for t in row["prompt_turns"]]
    opened = chatml(chat, opened=True)
    told = tokens(opened + row["label"] + "\n")
    return [(tokens(opened), told, tokens(r["value"] + "<|im_end|>")) for r in row["responses"]]


def test_what_propose_says_of_its_responses(folder: Path, judge: Path, proposals: Path, tokens):
    q, p = Oracle(folder / "proposer"), Oracle(folder / "model")
    rows = lines(proposals)
    assert len(rows) == 3
    for row in rows:
        values = [float(part.split(":")[1]) for part in row["label"].split(",")]
        assert len(row["responses"]) == N
        for response, (plain, told, said) in zip(row["responses"], parts(row, tokens), strict=True):
            assert response["from"] == "Assistant"
            assert response["log(Q(y|a,x))"] == pytest.approx(q.response(told, said, 1.7), abs=1e-4)
            assert response["log(P(y|x))"] == pytest.approx(p.response(plain, said), abs=1e-4)
            f = scores(judge, [[*plain, *said]])[0].tolist()
            squares = sum((v - x) ** 2 for v, x in zip(values, f, strict=True))
            assert response["log(P(a|x,y))"] == pytest.approx(-squares / (2 * SIGMA**2), abs=1e-4)
    assert len({r["value"] for row in rows for r in row["responses"]}) >= 6


def test_first_loss_of_steerlm2_by_hand_and_its_distance_falls(folder: Path, proposals: Path, tokens, tmp_path):
    """The policy that it starts from is not the one that proposed."""
    start_from, losses = Oracle(folder / "model"), []
    for row in lines(proposals):
        names = ("log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))")
        attributes, log_p, log_q = (torch.tensor([r[n] for r in row["responses"]]).double() for n in names)
        log_pi = torch.tensor([start_from.response(told, said) for _, told, said in parts(row, tokens)]).double()
        wanted_n, held_n = (attributes + log_p - log_q).log_softmax(0), (log_pi - log_q).log_softmax(0)
        losses.append(float((wanted_n.exp() * (wanted_n - held_n)).sum()))
    options = {"model": folder / "model", "data": proposals, "loss": "steerlm2", "steps": 30, "batch.examples": 3}
    options |= TRAINING | {"eval-data": proposals, "batch.tokens-per-micro-batch": 40, "optimizer.lr": 2e-3}
    rows = metrics(run("steerlm", tmp_path / "run", options))
    mean = sum(losses) / 3
    assert mean > 0.05
    assert rows[1]["loss"] == pytest.approx(mean, abs=1e-4) == rows[1]["distance"]
    assert rows[0]["eval/distance"] == pytest.approx(mean, abs=1e-4)
    distances = [row["distance"] for row in rows[1:]]
    assert distances[-1] < distances[0] / 10 and all(
        b < a + 1e-3 for a, b in zip(distances, distances[1:], strict=False)
    )


def test_propose_refuses_what_does_not_fit(folder: Path, judge: Path, tmp_path):
    models = {"model": folder / "proposer", "base": folder / "model", "attribute-model": judge}
    turns = [{"from": "User", "value": "p1"}, {"from": "Assistant", "value": "good", "label": "quality:4"}]
    file = write(tmp_path / "one.jsonl", [{"conversations": turns}])
    with pytest.raises(ValueError, match=r"one\.jsonl:1: .* has 1 attributes, and .* gives 2; take the one"):
        start("propose", tmp_path / "out.jsonl", models | {"data": file})
    file = write(tmp_path / "none.jsonl", [{"conversations": [turns[0], {"from": "Assistant", "value": "good"}]}])
    with pytest.raises(ValueError, match=r"none\.jsonl:1: the last turn .* with a \"label\""):
        start("propose", tmp_path / "out.jsonl", models | {"data": file})
    two = [turns[0], turns[1] | {"label": "quality:4,humour:1"}]
    file = write(tmp_path / "mixed.jsonl", [{"conversations": two}, {"conversations": turns}])
    with pytest.raises(ValueError, match=r"mixed\.jsonl:2: the label 'quality:4' has 1 attributes"):
        start("propose", tmp_path / "out.jsonl", models | {"data": file})
