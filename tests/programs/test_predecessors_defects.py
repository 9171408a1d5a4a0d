"""Defects that were found by reading NeMo-Aligner's source, and that this library must not have: one test each."""

import json
import math
import os
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner import ppo, rejection_sampling
from aligner.data.batch import response_tokens
from aligner.job.actor import Actor
from aligner.models.critic import Critic
from aligner.models.policy import Policy
from aligner.serving.local import LocalCritic
from tests.programs import every, observed
from tests.programs.observed import EXPERIMENTS, LAYOUTS, TABLE
from tests.programs.runs import metrics, run, samples, start
from tests.programs.test_ppo import checkpoint_tensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return every.prepare(tmp_path_factory.mktemp("defects"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list]:
    """Every experiment in one process, in folder/alone-<name>."""
    return {name: observed.experiment(name, folder, folder / f"alone-{name}", {}) for name in EXPERIMENTS}


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict]:
    """Of each of two ranks; runs are in folder/<layout>-<name>."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.start_processes(observed.run, (2, folder), nprocs=2, start_method="forkserver")
    finally:
        os.environ["OMP_NUM_THREADS"] = threads or "2"
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(2)]


def flat(groups: list[list[int]]) -> list[int]:
    return sorted(i for group in groups for i in group)


def logprobs(model, prompt: list[int], response: list[int]) -> Tensor:
    """(response tokens,) float64, nats: by transformers, of one sequence alone."""
    with torch.no_grad():
        logp = model(torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(-1)
    return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]


def test_every_data_parallel_rank_trains_on_its_own_share_of_a_reinforce_step(alone, seen):
    first, second = (rank["data", "shares"] for rank in seen)
    assert len(first) == len(second) == len(alone["shares"]) == 2  # optimizer steps: as many as in one process
    for mine, theirs, all_of_them in zip(first, second, alone["shares"], strict=True):
        assert flat(all_of_them) == list(range(8))
        assert mine and theirs and sorted(flat(mine) + flat(theirs)) == list(range(8))  # each sequence once


def test_kto_starts_and_labels_its_rewards_by_their_own_preferences_on_two_ranks(folder: Path, seen):
    done = folder / "data-labels"
    start_model, tuned = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (folder / "model", done / "policy"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()][:11]
    gains: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        prompt, response = tokenizer(row["prompt"]).input_ids, [*tokenizer(row["completion"]).input_ids, 2]
        gain = logprobs(tuned, prompt, response).sum() - logprobs(start_model, prompt, response).sum()
        gains[row["label"]].append(TABLE["kto"].options["beta"] * float(gain))
    last = metrics(done)[-1]
    wanted = {name: sum(g) / len(g) for name, g in (("chosen", gains[True]), ("rejected", gains[False]))}
    assert abs(wanted["chosen"] - wanted["rejected"]) > 0.01 and len(gains[True]) != len(gains[False])
    for name, reward in wanted.items():
        assert last[f"eval/rewards/{name}"] == pytest.approx(reward, rel=1e-3)
    assert last["eval/desirable"] == pytest.approx(len(gains[True]) / 11)


def test_a_nested_reward_loss_option_is_read_and_a_wrong_name_is_refused(folder: Path, tmp_path):
    command = TABLE["reward_model"].command(folder, 1, rank=0)
    plain = {k: v for k, v in command.items() if k not in ("optimizer.lr", "optimizer.eps")} | {"eval-examples": 0}

    def given(number: int, tree: dict) -> dict:
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return {"config": file} | {k: v for k, v in plain.items() if k not in TABLE["reward_model"].options}

    margin = 0.75
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    data = every.write(tmp_path / "pairs.jsonl", [row | {"chosen_reward": 1 + margin} for row in rows])
    for number, (loss, factor) in enumerate((("bt", 1.0), ("scaled", margin))):
        options = given(number, {"loss": loss, "optimizer": {"lr": 0.003}}) | {"data": data, "eval-data": data}
        done = run("reward_model", tmp_path / loss, options)
        assert metrics(done)[1]["loss"] == pytest.approx(factor * math.log(2), rel=1e-5)  # all scores start at 0
        saved = yaml.safe_load((done / "config.yaml").read_text())
        assert saved["loss"] == loss and saved["optimizer"]["lr"] == 0.003
    wrong = [
        ({"loss": "scaled_bt"}, "scaled_bt"),
        ({"regression": {"loss": "scaled"}}, "regression"),
        ({"loss_func": "scaled"}, "loss-func"),
        ({"optimizer": {"learning_rate": 1.0}}, "optimizer.learning-rate"),
    ]
    for number, (tree, message) in enumerate(wrong):
        with pytest.raises(ValueError, match=message):
            start("reward_model", tmp_path / "wrong", given(10 + number, tree))
    assert not (tmp_path / "wrong").exists()


def test_the_mask_of_rejection_sampling_never_counts_padding(folder: Path, tmp_path, monkeypatch):
    drawn, trained = [], []
    sample, update = Actor.sample, rejection_sampling.update
    monkeypatch.setattr(Actor, "sample", lambda *a: drawn.append(sample(*a)) or drawn[-1])
    monkeypatch.setattr(rejection_sampling, "update", lambda policy, mini: trained.append(mini) or update(policy, mini))
    sizes = {"batch.sequences": 48, "batch.minibatch-sequences": 48, "batch.samples-per-prompt": 4, "top-n": 2}
    command = TABLE["rejection_sampling"].command(folder, 1, rank=0) | sizes | {"sampling.max-tokens": 16}
    done = run("rejection_sampling", tmp_path / "run", command)
    said, (mini,) = list(response_tokens(drawn[0].rollout)), trained
    rewards = [row["reward"] for row in samples(done) if row["split"] == "train"]
    kept = [i for g in range(0, 48, 4) for i in sorted(sorted(range(g, g + 4), key=lambda i: -rewards[i])[:2])]
    assert len({len(response) for _, response in said}) > 4 and sum(2 in response for _, response in said) > 4
    packed = list(response_tokens(mini))
    assert sorted(map(str, packed)) == sorted(str(said[i]) for i in kept)  # tokens and mask of each
    assert int(mini.action_mask_N.sum()) == sum(len(said[i][1]) for i in kept)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    wanted = -torch.cat([logprobs(model, *said[i]) for i in kept]).mean()
    assert metrics(done)[1]["loss/policy"] == pytest.approx(float(wanted), rel=1e-5)


def test_a_micro_batch_of_padding_only_gives_no_nan(folder: Path, alone, seen):
    """Two ranks share optimizer steps of one response; and steps whose responses are all masked are left out."""
    shares = [rank["data", "padding"] for rank in seen]
    assert all(sorted((flat(mine), flat(theirs))) == [[], [0]] for mine, theirs in zip(*shares, strict=True))
    of_critic = 2 * 2 * 8  # steps, epochs, responses
    assert of_critic < len(shares[0]) == len(alone["padding"]) < 2 * of_critic  # the policy had some of them
    for layout in LAYOUTS:
        rows, wanted = (metrics(folder / f"{name}-padding") for name in (layout, "alone"))
        for row, want in zip(rows, wanted, strict=True):
            assert all(math.isfinite(x) for x in row.values())
            for name in ("loss/value", "loss/policy", "grad_norm/value", "grad_norm/policy"):
                if row["step"]:
                    assert row[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), (layout, name)
        assert all(
            x.isfinite().all() for x in load_file(folder / f"{layout}-padding/policy/model.safetensors").values()
        )


def test_resume_reads_the_step_from_inside_the_checkpoint_not_from_file_names(folder: Path, tmp_path):
    """And policy and critic are of the same step, since they are in one checkpoint."""
    command = TABLE["ppo"].command(folder, 4, rank=0)
    whole = run("ppo", tmp_path / "whole", command)
    done = run("ppo", tmp_path / "run", command | {"steps": 2})
    checkpoints = done / "checkpoints"
    (checkpoints / "step-2").rename(checkpoints / "step-7")
    (checkpoints / "step-9").mkdir()  # what a crash left: it is no checkpoint
    (checkpoints / "step-9" / "metadata.json").write_text("{}")
    run("ppo", done, command | {"resume": True})
    assert [row["step"] for row in metrics(done)] == [0, 1, 2, 3, 4]
    assert metrics(done) == metrics(whole)


def failed_future(*_) -> Future:
    future: Future = Future()
    future.set_exception(OSError("the critic's server is gone"))
    return future


def breaks(*_):
    raise OSError("the critic's server is gone")


@pytest.mark.parametrize(
    ("owner", "name", "broken"), [(Critic, "update", breaks), (LocalCritic, "train", failed_future)]
)
def test_a_failed_critic_update_stops_the_step_at_once(folder: Path, tmp_path, monkeypatch, owner, name, broken):
    """In the second step: nothing is logged or saved of it, and it is not the next inference that finds out."""
    whole, steps, calls = getattr(owner, name), [], []
    step, infer = ppo.step, LocalCritic.infer
    updates, update = [], Policy.update

    def second_breaks(*arguments):
        return broken() if len(steps) == 2 else whole(*arguments)

    monkeypatch.setattr(ppo, "step", lambda r, number: steps.append(number) or step(r, number))
    monkeypatch.setattr(LocalCritic, "infer", lambda *a: calls.append(steps[-1]) or infer(*a))
    monkeypatch.setattr(Policy, "update", lambda *a: updates.append(steps[-1]) or update(*a))
    monkeypatch.setattr(owner, name, second_breaks)
    with pytest.raises(OSError, match="the critic's server is gone"):
        start("ppo", tmp_path / "run", TABLE["ppo"].command(folder, 4, rank=0) | {"save-every": 1})
    assert steps == [1, 2] == calls
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1]
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    if owner is Critic:
        assert set(updates) == {1}  # the policy was not touched


def test_training_and_inference_log_probabilities_agree_without_environment_variables(folder: Path, alone, seen):
    """The ratio of the first optimizer step is 1, and the sampler's log-probabilities are the trainer's."""
    for layout in ("alone", *LAYOUTS):
        rows = metrics(folder / f"{layout}-agreement")[1:]
        assert len(rows) == 3
        for row in rows:
            assert row["ratio/mean"] == pytest.approx(1, abs=1e-6) and abs(row["approx_kl"]) < 1e-9
            assert row["clip_fraction"] == 0 and 0 < row["sampler_gap/max"] < 2e-5
        assert rows[-1]["kl/mean"] != 0  # it did train


def test_two_runs_of_dpo_give_identical_bits(folder: Path, tmp_path):
    command = TABLE["dpo"].command(folder, 4, rank=4)
    one, two = (run("dpo", tmp_path / name, command) for name in ("one", "two"))
    assert metrics(one) == metrics(two)
    mine, theirs = (load_file(done / "policy" / "model.safetensors") for done in (one, two))
    assert len(mine) > 10 and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    mine, theirs = (checkpoint_tensors(done / "checkpoints" / "step-4", tmp_path / "all.pt") for done in (one, two))
    assert len(mine) > 20 and mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key], key
    other = run("dpo", tmp_path / "other", command | {"seed": 1})
    assert metrics(other)[-1]["loss"] != metrics(one)[-1]["loss"]


def test_the_order_of_samples_is_reproducible(folder: Path, alone, seen, tmp_path):
    """However long each reward takes, and however many replicas share the prompts."""
    observed.experiment("order", folder, tmp_path / "again", {})
    runs = [tmp_path / "again", *(folder / f"{layout}-order" for layout in LAYOUTS)]
    wanted = samples(folder / "alone-order")
    assert len(wanted) > 30 and len({row["prompt"] for row in wanted}) > 8
    assert samples(runs[0]) == wanted
    for done in runs[1:]:
        assert [{**row, "reward": pytest.approx(row["reward"])} for row in samples(done)] == wanted
