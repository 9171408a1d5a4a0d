"""Options that change what a program does, each seen from outside of it or against a computation of its own."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aligner import grpo, ppo, reinforce
from aligner.data.batch import response_tokens
from aligner.job.actor import Actor
from aligner.models.policy import Policy
from tests.programs import every, rewards
from tests.programs.bandit import write
from tests.programs.observed import TABLE
from tests.programs.runs import metrics, run, samples, start

pytestmark = pytest.mark.slow

WIDE = {"sampling.max-tokens": 10, "batch.sequences": 32, "batch.samples-per-prompt": 4}  # some responses end


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return every.prepare(tmp_path_factory.mktemp("options"))


@pytest.fixture
def rollouts(monkeypatch) -> list:
    """Of every step of the runs to come."""
    seen, sample = [], Actor.sample
    monkeypatch.setattr(Actor, "sample", lambda *a: seen.append(sample(*a)) or seen[-1])
    return seen


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = (load_file(f / "model.safetensors") for f in (one, other))
    assert mine.keys() == theirs.keys()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def trained_rows(done: Path, step: int) -> list[dict]:
    return [row for row in samples(done) if row["split"] == "train" and row["step"] == step]


# PPO


@pytest.mark.parametrize("rank", [0, 4])
def test_critic_warmup_leaves_the_policy_alone(folder: Path, tmp_path, rank: int):
    command = TABLE["ppo"].command(folder, 3, rank=rank) | {"critic-warmup-steps": 2}
    warm = run("ppo", tmp_path / "warm", command | {"steps": 2})
    assert same_weights(warm / "policy", folder / "model")
    rows = metrics(warm)[1:]
    assert all("loss/policy" not in row and row["kl/mean"] == 0 and row["grad_norm/value"] > 0 for row in rows)
    run("ppo", warm, command | {"resume": True})
    assert not same_weights(warm / "policy", folder / "model")
    straight = run("ppo", tmp_path / "straight", command)
    assert metrics(straight)[-1]["grad_norm/policy"] > 0 and same_weights(straight / "policy", warm / "policy")
    assert metrics(straight)[3]["values/mean"] != metrics(straight)[1]["values/mean"]


def test_unfinished_responses_leave_the_policy_loss_and_stay_with_the_critic(folder: Path, tmp_path, monkeypatch):
    made, estimate = [], ppo.estimate
    monkeypatch.setattr(ppo, "estimate", lambda *a: made.append(estimate(*a)) or made[-1])
    command = TABLE["ppo"].command(folder, 1, rank=0) | WIDE
    run("ppo", tmp_path / "run", command | {"policy.mask-unfinished": True})
    ((policy_batch, value_batch),) = made
    rollout = policy_batch.rollout
    assert 4 < int(rollout.finished_B.sum()) < 28
    lengths = (rollout.cu_seqlens[1:] - rollout.cu_seqlens[:-1]).long()
    finished_N = torch.repeat_interleave(rollout.finished_B, lengths)
    assert torch.equal(policy_batch.weights_N, (rollout.action_mask_N & finished_N).float())
    assert torch.equal(value_batch.weights_N, rollout.action_mask_N.float())


def test_where_no_response_ends_masking_leaves_the_policy_alone(folder: Path, tmp_path):
    command = TABLE["ppo"].command(folder, 2, rank=0) | {"policy.mask-unfinished": True, "sampling.top-k": 1}
    done = run("ppo", tmp_path / "run", command)
    assert all(row["finished/mean"] == 0 for row in metrics(done)[1:])  # the likeliest tokens end no response
    assert same_weights(done / "policy", folder / "model")


# Rewards


@pytest.mark.parametrize("module", [ppo, grpo, reinforce], ids=["ppo", "grpo", "reinforce"])
def test_rewards_are_standardised_clipped_and_less_for_no_end(folder: Path, tmp_path, monkeypatch, module):
    given, estimate = [], module.estimate
    monkeypatch.setattr(module, "estimate", lambda *a: given.append(a[1:3]) or estimate(*a))
    name = module.__name__.removeprefix("aligner.")
    shaping = {"reward.mean": 2.0, "reward.std": 0.5, "reward.clip": 1.5, "reward.missing-eos-penalty": 0.7}
    done = run(name, tmp_path / "run", TABLE[name].command(folder, 1, rank=0) | WIDE | shaping)
    ((rollout, shaped_B),) = given
    raw = [row["reward"] for row in trained_rows(done, 1)]  # what is logged is the reward itself
    assert raw == pytest.approx(rewards.digits(None, [row["response"] for row in trained_rows(done, 1)], None))
    assert metrics(done)[1]["reward/mean"] == pytest.approx(sum(raw) / len(raw))
    wanted = [
        min(max((r - 2.0) / 0.5, -1.5), 1.5) - 0.7 * (not ended)
        for r, ended in zip(raw, rollout.finished_B.tolist(), strict=True)
    ]
    assert shaped_B.tolist() == pytest.approx(wanted, abs=1e-5)
    clipped = [abs(w) in (1.5,) or abs(w + 0.7) == pytest.approx(1.5) for w in wanted]
    assert any(clipped) and not all(clipped) and len(set(rollout.finished_B.tolist())) == 2


def test_several_rewards_are_added_with_their_weights(folder: Path, tmp_path):
    functions = ("tests.programs.rewards:digits", "tests.programs.rewards:letters")
    options = {"reward.function": functions, "reward.weights": (2, -0.5)}
    command = TABLE["reinforce"].command(folder, 2, rank=0)
    done = run("reinforce", tmp_path / "run", command | options)
    for row in samples(done):
        text = [row["response"]]
        wanted = 2 * rewards.digits(None, text, None)[0] - 0.5 * rewards.letters(None, text, None)[0]
        assert row["reward"] == pytest.approx(wanted, abs=1e-6)
    joined = {"reward.function": ",".join(functions), "reward.weights": "2,-0.5"}
    again = run("reinforce", tmp_path / "again", command | joined)
    assert samples(again) == samples(done)
    unweighted = run("reinforce", tmp_path / "sum", command | {"reward.function": functions})
    first = samples(unweighted)[0]
    both = [score(None, [first["response"]], None)[0] for score in (rewards.digits, rewards.letters)]
    assert first["reward"] == pytest.approx(sum(both))
    with pytest.raises(ValueError, match="reward.weights has 1 numbers for 2 rewards"):
        start("reinforce", tmp_path / "no", command | options | {"reward.weights": 2})


@pytest.fixture(scope="module")
def judge(folder: Path) -> Path:
    """The run of a reward model on pairs."""
    command = TABLE["reward_model"].command(folder, 6, rank=0) | {"loss": "bt", "optimizer.lr": 1e-2}
    return run("reward_model", folder / "judge", command)


@pytest.fixture(scope="module")
def rater(folder: Path) -> Path:
    """The run of a reward model on ratings of two attributes, with adapters, of the first layer."""
    write(folder / "rated.jsonl", every.rows("rated"))
    command = TABLE["reward_model"].command(folder, 8, rank=4) | {"loss": "regression", "centre": 0.0, "layers": 1}
    data = {"data": folder / "rated.jsonl", "eval-data": folder / "rated.jsonl"}
    return run("reward_model", folder / "rater", command | data | {"optimizer.lr": 1e-2})


def classify(model: Path, sequences: list[list[int]]) -> Tensor:
    """(B, attributes): by transformers, of each sequence alone."""
    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    classifier.config.pad_token_id = None
    with torch.no_grad():
        return torch.cat([classifier(torch.tensor([tokens])).logits for tokens in sequences])


@pytest.mark.parametrize("program", ["ppo", "grpo"])
def test_a_reward_model_rates_the_responses(folder: Path, judge: Path, tmp_path, rollouts, program: str):
    sizes = {"sampling.max-tokens": 8, "batch.sequences": 16}
    options = {"reward.function": "tests.programs.rewards:digits", "reward.model": judge, "reward.weights": (0.5, 3)}
    done = run(program, tmp_path / "run", TABLE[program].command(folder, 2, rank=0) | sizes | options)
    for step, scored in enumerate(rollouts, start=1):
        whole = [prompt + response for prompt, response in response_tokens(scored.rollout)]
        scores_B = classify(judge / "policy", whole)[:, 0]
        rows = trained_rows(done, step)
        counted_B = torch.tensor(rewards.digits(None, [row["response"] for row in rows], None))
        assert scores_B.std() > 0.01 and len({len(tokens) for tokens in whole}) > 3
        rewards_B = torch.tensor([row["reward"] for row in rows])
        assert torch.allclose(rewards_B, 0.5 * counted_B + 3 * scores_B, atol=1e-4)


def test_attributes_of_a_reward_model_are_weighted(folder: Path, judge: Path, rater: Path, tmp_path, rollouts):
    """No function beside it; and what is no reward model, or no language model, is told."""
    command = TABLE["reinforce"].command(folder, 1, rank=0)
    del command["reward.function"]
    done = run("reinforce", tmp_path / "run", command | {"reward.model": rater, "reward.attribute-weights": (2, -1)})
    whole = [prompt + response for prompt, response in response_tokens(rollouts[0].rollout)]
    wanted_B = classify(rater / "policy", whole) @ torch.tensor([2.0, -1.0])
    assert torch.allclose(torch.tensor([row["reward"] for row in trained_rows(done, 1)]), wanted_B, atol=1e-4)
    for options, message in [
        ({"reward.model": rater}, "attribute-weights has 1 numbers, the reward model gives 2"),
        ({"reward.model": folder / "model"}, "is no reward model"),
    ]:
        with pytest.raises(ValueError, match=message):
            start("reinforce", tmp_path / f"no-{len(options)}-{message[:3]}", command | options)
    with pytest.raises(ValueError, match="is a reward model; give --model a language model"):
        start("sft", tmp_path / "sft", TABLE["sft"].command(folder, 1, rank=0) | {"model": judge})


# Reward models


def encoded(model: Path, file: Path) -> list[tuple[list[int], list[int]]]:
    """(chosen, rejected) ids of each pair."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        tuple([*tokenizer(r["prompt"]).input_ids, *tokenizer(r[k]).input_ids, 2] for k in ("chosen", "rejected"))
        for r in rows
    ]


def test_two_validation_files_are_told_apart(folder: Path, tmp_path):
    """The second one has chosen and rejected the other way round: what is right in one is wrong in the other."""
    rows = every.rows("pairs")
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:5]]
    files = write(tmp_path / "same.jsonl", rows), write(tmp_path / "swapped.jsonl", swapped)
    options = {"loss": "bt", "centre": 0.0, "eval-data": ",".join(map(str, files)), "eval-examples": 50}
    done = run("reward_model", tmp_path / "run", TABLE["reward_model"].command(folder, 4, rank=0) | options)
    first, last = metrics(done)[0], metrics(done)[-1]
    assert first["eval/same/loss"] == pytest.approx(math.log(2)) and "eval/loss" not in last
    for file in files:
        pairs = encoded(folder / "model", file)
        chosen_B, rejected_B = (classify(done / "policy", [pair[k] for pair in pairs])[:, 0] for k in (0, 1))
        d_B, prefix = chosen_B - rejected_B, f"eval/{file.stem}/"
        assert last[prefix + "accuracy"] == pytest.approx(float((d_B > 0).float().mean()))
        assert last[prefix + "loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(d_B).mean()), rel=1e-4)
        assert last[prefix + "rewards/margin"] == pytest.approx(float(d_B.mean()), abs=1e-5)
        assert 0 <= last[prefix + "calibration_error"] <= 1
    assert last["eval/same/accuracy"] > 0.5 > last["eval/swapped/accuracy"]
    one = run("reward_model", tmp_path / "one", TABLE["reward_model"].command(folder, 1, rank=0))
    assert "eval/accuracy" in metrics(one)[-1]  # a single file has no name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("which", ["judge", "rater", "smollm2"])
def test_transformers_reads_an_exported_reward_model(folder: Path, tiny_llama: Path, tmp_path, request, which, side):
    """In a batch of different lengths too: its pad token is not what a response ends in."""
    if which == "smollm2":  # whose tokenizer pads with the end of a response
        options = {"model": tiny_llama, "layers": 1, "lora.rank": 4, "eval-examples": 0}
        done = run("reward_model", tmp_path / "run", TABLE["reward_model"].command(folder, 2, rank=4) | options)
    else:
        done = request.getfixturevalue(which)
    tokenizer = AutoTokenizer.from_pretrained(done / "policy", padding_side=side)
    classifier = AutoModelForSequenceClassification.from_pretrained(done / "policy").eval()
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert classifier.config.pad_token_id == tokenizer.pad_token_id
    texts = [" ".join(f"w{i}" for i in range(n)) for n in (1, 7, 3, 12)]
    sequences = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    padded = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
    with torch.no_grad():
        together_BK = classifier(**padded).logits
    alone_BK = classify(done / "policy", sequences)
    assert together_BK.shape[1] == (2 if which == "rater" else 1) and alone_BK.std(0).min() > 1e-4
    assert torch.allclose(together_BK, alone_BK, atol=1e-5)


def test_a_reward_model_is_trained_on(folder: Path, judge: Path, tmp_path):
    """Where --model is one, its head is kept."""
    options = {"loss": "bt", "model": judge}
    done = run("reward_model", tmp_path / "run", TABLE["reward_model"].command(folder, 1, rank=4) | options)
    before, after = metrics(judge)[-1], metrics(done)[0]
    names = [name for name in after if name.startswith("eval/")]
    assert len(names) >= 5 and after["eval/loss"] < math.log(2) - 0.01
    assert all(after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-6) for name in names)


# Offline programs


@pytest.fixture
def inferred(monkeypatch) -> list:
    """Batches that any policy infers."""
    seen, infer = [], Policy.infer
    monkeypatch.setattr(Policy, "infer", lambda self, batch: seen.append(batch) or infer(self, batch))
    return seen


@pytest.mark.parametrize("rank", [0, 4])
def test_reference_log_probabilities_are_computed_once(folder: Path, tmp_path, inferred, rank: int):
    command = TABLE["dpo"].command(folder, 3, rank=rank) | {"eval-data": ""}
    cache = {"reference-cache": tmp_path / "cache" / "reference.npz"}
    asked = run("dpo", tmp_path / "asked", command)
    assert not inferred
    first = run("dpo", tmp_path / "first", command | cache)
    assert sum(len(batch.cu_seqlens) - 1 for batch in inferred) == 24  # every response of the data, once
    kept = cache["reference-cache"].read_bytes()
    inferred.clear()
    second = run("dpo", tmp_path / "second", command | cache | {"beta": 0.1})
    assert not inferred and cache["reference-cache"].read_bytes() == kept
    for row, want in zip(metrics(first), metrics(asked), strict=True):
        assert row.keys() == want.keys()
        assert all(row[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5) for name in want)
    assert metrics(second)[1]["rewards/margin"] == pytest.approx(0, abs=1e-5)  # the policy still is the reference
    assert abs(metrics(second)[3]["rewards/margin"]) > 1e-4
    more = write(tmp_path / "more.jsonl", [*every.rows("pairs"), every.rows("pairs")[0] | {"prompt": "w9 w9 w9"}])
    run("dpo", tmp_path / "third", command | cache | {"data": more})
    assert 0 < sum(len(batch.cu_seqlens) - 1 for batch in inferred) <= 12  # the batch of the new one
    assert cache["reference-cache"].read_bytes() != kept


def test_a_reference_cache_of_another_model_is_refused(folder: Path, tmp_path):
    cache = {"reference-cache": tmp_path / "reference.npz"}
    command = TABLE["dpo"].command(folder, 1, rank=4) | cache
    run("dpo", tmp_path / "run", command)
    other = every.save_bandit(tmp_path / "model", num_hidden_layers=2, rms_norm_eps=1e-4)
    with pytest.raises(ValueError, match="was computed with another model; remove the file or name another one"):
        start("dpo", tmp_path / "other", command | {"model": other})
    tuned = {"model": tmp_path / "run"}  # of the same config: the weights tell
    with pytest.raises(ValueError, match="was computed with another model"):
        start("dpo", tmp_path / "tuned", command | tuned)
    cache["reference-cache"].write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="no reference cache"):
        start("dpo", tmp_path / "broken", command)


def test_a_run_with_a_reference_cache_resumes(folder: Path, tmp_path):
    command = TABLE["dpo"].command(folder, 4, rank=0) | {"reference-cache": tmp_path / "reference.npz"}
    straight = run("dpo", tmp_path / "straight", command)
    (tmp_path / "reference.npz").unlink()  # so that the resumed one has to compute it again, of the initial weights
    done = run("dpo", tmp_path / "run", command | {"steps": 2})
    (tmp_path / "reference.npz").unlink()
    run("dpo", done, command | {"resume": True})
    assert metrics(done) == metrics(straight)


def test_sft_answers_held_out_prompts(folder: Path, tmp_path):
    """Until it has learnt them by heart."""
    rows = [{"prompt": f"w{i} w{2 * i}", "completion": f"w{i + 1} w{16 - i}"} for i in range(6)]
    data = write(tmp_path / "data.jsonl", rows)
    options = {"data": data, "eval-data": data, "eval-samples": 4, "sampling.temperature": 0.05, "eval-every": 0}
    learning = {"optimizer.lr": 1e-2, "sampling.max-tokens": 6}
    done = run("sft", tmp_path / "run", TABLE["sft"].command(folder, 60, rank=0) | options | learning)
    first, last = metrics(done)[0], metrics(done)[-1]
    assert first["eval/exact_match"] == 0 and first["eval/word_f1"] < 0.5
    assert last["eval/exact_match"] == last["eval/word_f1"] == 1
    said = samples(done)
    assert [(row["step"], row["split"]) for row in said] == [(0, "eval")] * 4 + [(60, "eval")] * 4
    for row, want in zip(said[4:], rows, strict=False):
        assert row["prompt"] == want["prompt"] and row["response"] == want["completion"] and row["reward"] == 1
    for row, want in zip(said[:4], rows, strict=False):  # the reward is the F1 of words
        given, wanted = row["response"].split(), want["completion"].split()
        shared = sum(min(given.count(word), wanted.count(word)) for word in set(given))
        assert row["reward"] == pytest.approx(2 * shared / (len(given) + len(wanted)))
    f1 = [row["reward"] for row in said[:4]]
    assert first["eval/word_f1"] == pytest.approx(sum(f1) / 4)
