"""Distillation: the teacher's logits, the loss, and what is learnt, against transformers in float64."""

import contextlib
import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported by custom operators; after init_process_group it would keep the group alive
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from transformers import AutoTokenizer

from aligner.models.policy import Policy
from tests.programs import runs
from tests.programs.bandit import VOCABULARY, save_bandit, write
from tests.programs.chats import Oracle
from tests.programs.runs import metrics, run, start

END = VOCABULARY.index("</s>")
ROWS = [
    {"prompt": "w3 w1 w7", "completion": "w2 w4"},
    {"prompt": "w12", "completion": "w5 w5 w9 w16 w0"},
    {"prompt": "w6 w6 w2 w8", "completion": "w1"},
    {"prompt": "w10 w11", "completion": "w13 w14 w15"},
]
HELD_OUT = [{"prompt": "w1 w2", "completion": "w3 w4 w5"}, {"prompt": "w7 w12 w3", "completion": "w8"}]
TOP, HOT = 5, 2.0
FIRST = {"steps": 1, "batch.examples": 4, "batch.tokens-per-micro-batch": 12, "lora.rank": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A student, two teachers, data."""
    folder = tmp_path_factory.mktemp("distill")
    save_bandit(folder / "student")
    save_bandit(folder / "teacher", num_hidden_layers=2, hidden_size=48, initializer_range=0.25)
    save_bandit(folder / "other", num_hidden_layers=2)
    write(folder / "train.jsonl", ROWS)
    write(folder / "held_out.jsonl", HELD_OUT)
    return folder


@pytest.fixture
def command(folder: Path):
    files = {"data": folder / "train.jsonl", "eval-data": folder / "held_out.jsonl"}
    return {"model": folder / "student", "teacher": folder / "teacher", "top-k": TOP} | files | FIRST


def ids(row: dict) -> tuple[list[int], list[int]]:
    """(prompt, response with its end)."""
    prompt, response = ([VOCABULARY.index(word) for word in row[key].split()] for key in ("prompt", "completion"))
    return prompt, [*response, END]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def divergence(kind: str, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    a, b = (log_p, log_q) if kind == "forward_kl" else (log_q, log_p)
    return (a.exp() * (a - b)).sum(-1)


def by_hand(folder: Path, rows: list[dict], kind: str, k: int, temperature: float, *, rest: bool) -> tuple:
    """(mean divergence, mean negative log-likelihood) of the learnt tokens, by both models' float64 logits.

    rest: all other tokens are one more event; else both are renormalised to the k.
    """
    teacher, student = Oracle(folder / "teacher"), Oracle(folder / "student")
    distances, nats = [], []
    for row in rows:
        prompt, response = ids(row)
        span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        t, s = (model.logits(prompt + response)[span] for model in (teacher, student))
        top = t.topk(k).indices
        log_p, log_q = ((z / temperature).log_softmax(-1).gather(1, top) for z in (t, s))
        if rest:
            log_p, log_q = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1) for x in (log_p, log_q))
        else:
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        distances.append(divergence(kind, log_p, log_q))
        nats.append(-s.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return float(torch.cat(distances).mean()), float(torch.cat(nats).mean())


def test_the_cache_holds_the_teachers_logits(folder: Path, command, tmp_path):
    """NeMo's entry t is about the token after token t."""
    cache = tmp_path / "new" / "kept.jsonl"
    run("distill", tmp_path / "run", command | {"cache": cache, "temperature": HOT})
    teacher = Oracle(folder / "teacher")
    for file, rows in ((cache, ROWS), (tmp_path / "new" / "kept.held-out.jsonl", HELD_OUT)):
        written = lines(file)
        assert len(written) == len(rows)
        for line, row in zip(written, rows, strict=True):
            prompt, response = ids(row)
            whole = prompt + response
            assert line["tokens"] == whole[:-1] and line["labels"] == whole[1:]
            assert line["loss_mask"] == [0] * (len(prompt) - 1) + [1] * len(response)
            logits, learnt = teacher.logits(whole)[:-1], torch.tensor(line["loss_mask"]).bool()
            top = logits.topk(TOP)
            assert torch.equal(torch.tensor(line["topk_token_ids"])[learnt], top.indices[learnt])
            values, sums = (torch.tensor(line[key]).double() for key in ("topk_logits", "log_sum_exp_logits"))
            assert (values - top.values)[learnt].abs().max() < 1e-3
            assert (sums - (logits / HOT).logsumexp(1))[learnt].abs().max() < 1e-3
            assert line["teacher"][:2] == [str(folder / "teacher"), HOT]


@pytest.mark.parametrize("kind", ["forward_kl", "backward_kl"])
@pytest.mark.parametrize("temperature", [1.0, HOT])
def test_first_loss_and_evaluation_by_hand(folder: Path, command, tmp_path, kind: str, temperature: float):
    weights = {"loss": kind, "temperature": temperature, "kd-coef": 0.7, "sft-coef": 0.3}
    before, first = metrics(run("distill", tmp_path / "run", command | weights))[:2]
    distance, nats = by_hand(folder, ROWS, kind, TOP, temperature, rest=True)
    assert distance > 0.1 and nats > 1
    assert first["loss/distillation"] == pytest.approx(distance, abs=3e-4)
    assert first["loss/sft"] == pytest.approx(nats, abs=1e-4)
    assert first["loss"] == pytest.approx(0.7 * distance + 0.3 * nats, abs=3e-4)
    distance, nats = by_hand(folder, HELD_OUT, kind, TOP, temperature, rest=True)
    assert before["eval/loss/distillation"] == pytest.approx(distance, abs=3e-4)
    assert before["eval/loss/sft"] == pytest.approx(nats, abs=1e-4)


@pytest.mark.parametrize("kind", ["forward_kl", "backward_kl"])
def test_the_student_becomes_its_teacher(folder: Path, command, tmp_path, kind: str):
    learning = {"loss": kind, "top-k": len(VOCABULARY), "steps": 150, "optimizer.lr": 1e-2}
    learning |= {"optimizer.decay-steps": 150, "batch.tokens-per-micro-batch": 4096}
    done = run("distill", tmp_path / "run", command | learning)
    teacher = Oracle(folder / "teacher")

    def distance(student: Path) -> float:
        found, model = [], Oracle(student)
        for row in ROWS:
            prompt, response = ids(row)
            log_p, log_q = (m.logits(prompt + response)[len(prompt) - 1 : -1].log_softmax(-1) for m in (teacher, model))
            found.append(divergence("forward_kl", log_p, log_q))
        return float(torch.cat(found).mean())

    assert distance(folder / "student") > 0.5 and distance(done / "policy") < 0.005
    assert metrics(done)[-1]["loss"] < 0.005


def test_a_second_run_reads_the_cache(folder: Path, command, tmp_path, monkeypatch):
    asked, real = [], Policy.infer_top_k

    def counting(self, batch, k: int, temperature: float):
        asked.append(len(batch.cu_seqlens) - 1)
        return real(self, batch, k, temperature)

    monkeypatch.setattr(Policy, "infer_top_k", counting)
    cached = command | {"cache": tmp_path / "kept.jsonl", "steps": 2}
    first = run("distill", tmp_path / "first", cached)
    assert sorted(asked) == [len(HELD_OUT), len(ROWS)]
    second = run("distill", tmp_path / "second", cached)
    assert len(asked) == 2 and metrics(second) == metrics(first)
    run("distill", tmp_path / "third", command | {"steps": 2})
    assert len(asked) == 4  # without a cache the run's own is written
    assert (tmp_path / "third" / "teacher.jsonl").read_bytes() == (tmp_path / "kept.jsonl").read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"teacher": "other"}, {"temperature": 3}, {"top-k": 7}, {"data": "held_out.jsonl"}, {"eval-data": "train.jsonl"}],
)
def test_a_cache_of_something_else_is_refused(folder: Path, command, tmp_path, change: dict):
    cached = command | {"cache": tmp_path / "kept.jsonl"}
    run("distill", tmp_path / "first", cached)
    change = {name: folder / value if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=r"kept\.jsonl holds logits of .*; remove it or name another --cache\.$"):
        start("distill", tmp_path / "second", cached | change)


def test_a_teacher_with_another_tokenizer_is_refused(folder: Path, command, tmp_path):
    for name, swap in (("swapped", {"w3": "w5", "w5": "w3"}), ("more", {"w3": "w3", "w99": 20})):
        theirs = tmp_path / name
        save_bandit(theirs, vocab_size=21)
        tokens = json.loads((theirs / "tokenizer.json").read_text())
        vocabulary = tokens["model"]["vocab"]
        vocabulary |= {word: vocabulary[i] if isinstance(i, str) else i for word, i in swap.items()}
        (theirs / "tokenizer.json").write_text(json.dumps(tokens))
        assert len(AutoTokenizer.from_pretrained(theirs)) == (21 if name == "more" else 20)
        counts = {"swapped": r"20 tokens, the model's 20, and 2 ", "more": r"21 tokens, the model's 20, and 1 "}
        with pytest.raises(ValueError, match=rf"teacher '{re.escape(str(theirs))}' has another .*has {counts[name]}"):
            start("distill", tmp_path / "run", command | {"teacher": theirs})
        assert not (tmp_path / "run").exists()


def test_weights_of_files_are_refused(folder: Path, command, tmp_path):
    """The cache is one file."""
    data = ",".join(f"{folder / name}:1" for name in ("train.jsonl", "held_out.jsonl"))
    with pytest.raises(ValueError, match=r"one file .* weights; write .* as often as it is to be read\.$"):
        start("distill", tmp_path / "run", command | {"data": data})


def test_more_logits_than_tokens_are_refused(command, tmp_path):
    with pytest.raises(ValueError, match="top-k is 21, and the teacher has 20 tokens"):
        start("distill", tmp_path / "run", command | {"top-k": 21})


@pytest.mark.parametrize("known", [True, False], ids=["with_log_sum", "without"])
def test_a_teachers_logits_in_the_data(folder: Path, command, tmp_path, known: bool):
    """NeMo's file, whose sequences may go on after the last learnt token."""
    teacher, written = Oracle(folder / "teacher"), []
    for row in ROWS:
        prompt, response = ids(row)
        tokens = [*prompt, *response, 5]
        logits = teacher.logits(tokens)[:-1]
        top, mask = logits.topk(TOP), [0] * (len(prompt) - 1) + [1] * len(response) + [0]
        line = {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask}
        line |= {"topk_logits": top.values.tolist(), "topk_token_ids": top.indices.tolist()}
        written.append(line | ({"log_sum_exp_logits": (logits / HOT).logsumexp(1).tolist()} if known else {}))
    taught = write(tmp_path / "taught.jsonl", written)
    given = {name: value for name, value in command.items() if name not in ("teacher", "top-k")}
    given |= {"data": taught, "eval-data": taught, "temperature": HOT, "steps": 20, "optimizer.lr": 3e-3}
    rows = metrics(run("distill", tmp_path / "run", given))
    distance, nats = by_hand(folder, ROWS, "forward_kl", TOP, HOT, rest=known)
    assert rows[1]["loss"] == pytest.approx(distance, abs=1e-4) == rows[0]["eval/loss/distillation"]
    assert rows[1]["loss/sft"] == pytest.approx(nats, abs=1e-4)
    assert rows[-1]["eval/loss/distillation"] < rows[0]["eval/loss/distillation"] / 2


def rank_of_two(rank: int, work: Path, options: dict) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{work}/meeting", rank=rank, world_size=2)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        runs.run("distill", work / "two", options)
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_tensor_ranks_train_as_one_does(folder: Path, command, tmp_path):
    options = command | {"steps": 3, "sft-coef": 0.5, "optimizer.lr": 1e-3, "optimizer.eps": 1e-5}
    one = metrics(run("distill", tmp_path / "one", options))
    two_ranks = partial(mp.start_processes, nprocs=2, start_method="forkserver")
    two_ranks(rank_of_two, (tmp_path, options | {"parallel.tensor": 2}))
    two = metrics(tmp_path / "two")
    assert len(two) == 4
    for row, want in zip(two, one, strict=True):
        for name in (name for name in want if "loss" in name or name == "grad_norm"):
            assert row[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), (row["step"], name)
    for mine, theirs in zip(*(lines(tmp_path / d / "teacher.jsonl") for d in ("two", "one")), strict=True):
        assert mine["topk_token_ids"] == theirs["topk_token_ids"]
