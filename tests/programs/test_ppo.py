"""The PPO program from the outside: its files, resume, Ctrl-C, and what it says to wrong input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from aligner import generate, ppo
from aligner.checkpoint import training
from aligner.checkpoint.huggingface import Weights
from aligner.data.batch import response_tokens
from aligner.job import job
from aligner.models.critic import Critic, CriticConfig
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.policy import Policy
from aligner.models.shape import ModelShape
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.conftest import save_llama
from tests.models.test_policy import logits, make_policy, random_rollout

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
NOT_REPRODUCIBLE = ("time/", "tokens_per_second", "sampled_tokens_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    words = [
        "the",
        "film",
        "was",
        "a",
        "long",
        "slow",
        "bright",
        "strange",
        "happy",
        "tale",
        "of",
        "two",
        "old",
        "friends",
    ]
    lines = [json.dumps({"text": " ".join(words[i % 7 : i % 7 + 2 + i % 4]) + f" {i}", "id": i}) for i in range(23)]
    file.write_text("\n".join(lines))
    return file


def small_run(tiny_llama: Path, prompts: Path) -> list[str]:
    options = {
        "model": tiny_llama,
        "data": prompts,
        "eval-data": prompts,
        "eval-prompts": 5,
        "threads": 2,
        "reward.function": "tests.programs.rewards:letters",
        "batch.sequences": 8,
        "batch.samples-per-prompt": 2,
        "batch.minibatch-sequences": 4,
        "batch.epochs": 2,
        "sampling.max-tokens": 6,
        "critic.layers": 2,
        "policy.lora.rank": 4,
    }
    return [str(x) for name, value in options.items() for x in (f"--{name}", value)]


def run_program(arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-m", "aligner.ppo", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(NOT_REPRODUCIBLE)} for row in rows]


def checkpoint_tensors(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(folder, scratch)
    return flatten(torch.load(scratch, weights_only=False)) | flatten(training.read_plain(folder), "plain")


def flatten(state, at="") -> dict[str, torch.Tensor]:
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flatten(value, f"{at}.{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for key, value in enumerate(state) for k, v in flatten(value, f"{at}.{key}").items()}
    return {at: torch.as_tensor(state) if isinstance(state, (int, float, torch.Tensor)) else state}


@pytest.fixture
def arguments(tiny_llama: Path, prompts: Path) -> list[str]:
    return small_run(tiny_llama, prompts)


@pytest.fixture(scope="module")
def straight(tiny_llama, prompts, tmp_path_factory) -> Path:
    """A run of six steps without a break."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    done = run_program([*small_run(tiny_llama, prompts), "--steps", "6", "--output", str(run)])
    assert done.returncode == 0, done.stderr
    assert f"report: {run / 'report.html'}" in done.stdout
    return run


def test_sampler_of_fewer_bits_and_stop_strings(arguments, tmp_path):
    run = tmp_path / "run"
    changed = ["--sampling.dtype", "bfloat16", "--sampling.stop-strings", "e", "a", "--sampling.max-tokens", "12"]
    done = run_program([*arguments, *changed, "--steps", "2", "--output", str(run)])
    assert done.returncode == 0, done.stderr
    for row in metrics(run)[1:]:
        assert 1e-4 < row["sampler_gap/max"] < 0.2  # the trainer holds all bits
    responses = [json.loads(line)["response"] for line in (run / "samples.jsonl").read_text().splitlines()]
    ended = [r for r in responses if "e" in r or "a" in r]
    assert len(ended) > len(responses) / 2
    assert all(set(r.rstrip()[:-12]).isdisjoint("ea") for r in ended)  # within the last token, however long it is


def test_run_folder_holds_everything(straight: Path):
    rows = metrics(straight)
    assert [row["step"] for row in rows] == list(range(7))
    wanted = {
        "reward/mean", "kl/mean", "entropy/mean", "clip_fraction", "approx_kl", "explained_variance", "loss/policy",
        "loss/value", "grad_norm/policy", "sampler_gap/max", "response_length/mean",
    }  # fmt: skip
    assert all(wanted <= row.keys() for row in rows[1:])
    assert {"eval/reward/mean", "eval/kl/mean"} <= rows[0].keys() & rows[6].keys()
    assert rows[0]["eval/kl/mean"] == 0 < abs(rows[6]["eval/kl/mean"])
    assert all(row["sampler_gap/max"] < 1e-4 for row in rows[1:])
    assert rows[1]["kl/mean"] == 0 != rows[2]["kl/mean"]
    samples = [json.loads(line) for line in (straight / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 * 8 + 2 * 5
    for row in samples:
        letters = sum(c.isalpha() for c in row["response"]) / 20
        assert row["reward"] == pytest.approx(letters)
    assert "steps: 6" in (straight / "config.yaml").read_text()
    assert list((straight / "tensorboard").iterdir())
    assert (straight / "checkpoints" / "step-6" / "metadata.json").is_file()
    html = (straight / "report.html").read_text()
    assert "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html


def test_interrupted_run_resumes_bit_for_bit(straight: Path, arguments: list[str], tmp_path):
    run = tmp_path / "broken"
    common = [*arguments, "--steps", "6", "--output", str(run)]
    first = run_program([*common, "--reward.function", "tests.programs.rewards:InterruptInStep3"])
    assert first.returncode == 130, first.stderr
    assert [row["step"] for row in metrics(run)] == [0, 1, 2, 3]
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["step-3"]
    (run / "metrics.jsonl").open("a").write('{"step": 4, "torn')  # what a crash leaves
    second = run_program([*common, "--resume"])
    assert second.returncode == 0, second.stderr
    assert metrics(run) == metrics(straight)
    assert (run / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()
    a, b = (checkpoint_tensors(r / "checkpoints" / "step-6", tmp_path / "all.pt") for r in (run, straight))
    assert a.keys() == b.keys() and len(a) > 20
    assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
    left, right = (load_file(r / "policy" / "model.safetensors") for r in (run, straight))
    assert all(torch.equal(left[k], right[k]) for k in right)


def test_interrupted_before_the_first_step(straight: Path, arguments: list[str], tmp_path):
    common = [*arguments, "--steps", "1", "--output", str(tmp_path / "run")]
    assert ppo.main([*common, "--reward.function", "tests.programs.rewards:InterruptInEvaluation"]) == 130
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0"]
    assert ppo.main([*common, "--resume"]) == 0
    resumed, whole = metrics(tmp_path / "run"), metrics(straight)
    assert resumed[0] == whole[0] and [row["step"] for row in resumed] == [0, 1]
    assert whole[1].items() <= resumed[1].items()
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 5 + 8 + 5


def test_seed_changes_the_run(straight: Path, arguments: list[str], tmp_path):
    assert ppo.main([*arguments, "--steps", "1", "--seed", "1", "--output", str(tmp_path / "r")]) == 0
    assert metrics(tmp_path / "r")[1]["reward/mean"] != metrics(straight)[1]["reward/mean"]


def make_critic(folder: Path) -> Critic:
    shape = ModelShape.from_folder(folder)
    return Critic(
        CriticConfig(layers=2).shape(shape),
        Weights(folder, shape.tensors()),
        lora=LoRAConfig(),
        optimizer=OptimizerConfig(),
        tokens_per_micro_batch=64,
        seed=0,
    )


def test_exported_policy_is_the_trained_policy(straight: Path, tiny_llama: Path):
    policy = make_policy(tiny_llama, rank=4)
    untouched = policy.infer(rollout := random_rollout(49152, [(4, 9), (2, 5)]))[0]
    whole = make_critic(tiny_llama)  # a checkpoint is read with all that it holds
    training.restore(straight / "checkpoints" / "step-6", {"policy": policy, "critic": whole})
    exported = AutoModelForCausalLM.from_pretrained(straight / "policy").eval()
    for prompt, response in response_tokens(rollout):
        with torch.no_grad():
            trained = logits(policy.network, prompt + response)
            assert (exported(torch.tensor([prompt + response])).logits[0] - trained).abs().max() <= 1e-4
    assert (policy.infer(rollout)[0] - untouched).abs().max() > 1e-3


def test_generate_from_a_run(straight: Path, capsys):
    options = ["--checkpoint", str(straight), "--prompt", "The film", "--max-tokens", "5", "--n", "2", "--seed", "3"]
    assert generate.main(options) == 0
    printed = capsys.readouterr().out
    assert printed.count("The film") == 2
    sampler = NativeSampler.from_pretrained(straight / "policy")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(straight / "policy")
    rollout = sampler.generate([tokenizer("The film")["input_ids"]], Sampling(max_tokens=5, stop=(2,), seed=3), n=2)
    for _, response in response_tokens(rollout):
        assert tokenizer.decode(response, skip_special_tokens=True) in printed
    with pytest.raises(ValueError, match="neither a run"):
        generate.main(["--checkpoint", str(straight / "checkpoints"), "--prompt", "x"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--policy.optimizer.lrr", "1"], r"unknown option --policy.optimizer.lrr.*--policy.optimizer.lr"),
        (["--model", "/no/such/folder"], r"/no/such/folder"),
        (["--reward.function", "no_such_module:f"], r"no_such_module"),
        (["--reward.function", "tests.programs.rewards:nothing"], r"no callable 'nothing'"),
        (["--reward.function", "tests.programs.rewards:raises"], r"raises raised KeyError: 'no such judge'"),
        (["--reward.function", "tests.programs.rewards:nan"], r"returned nan for response 0"),
        (["--reward.function", "tests.programs.rewards:too_few"], r"returned 2 numbers for 1 responses"),
        (["--batch.minibatch-sequences", "3"], r"batch.sequences is 8, not a multiple of batch.minibatch-sequences 3"),
        (["--batch.samples-per-prompt", "5"], r"not a multiple of batch.samples-per-prompt 5"),
        (["--batch.sequences", "64", "--batch.samples-per-prompt", "1"], r"takes 64 examples, but there are only 23"),
        (["--sampling.max-tokens", "126"], r"prompts.jsonl:1.* 2"),
        (["--sampling.temperature", "0"], r"temperature is 0"),
        (["--policy.lora.targets", "linear_q"], r"linear_q"),
        (["--critic.layers", "4"], r"critic.layers is 4, expected 0 \(all\) to 3"),
        (["--steps", "0"], r"steps must be 1 or more"),
        (["--resume"], r"holds no run|no checkpoints"),
    ],
)
def test_wrong_input_is_told_before_any_long_work(arguments, tmp_path, extra, message, monkeypatch):
    monkeypatch.setattr(job, "repeat", lambda *a, **k: pytest.fail("the run started"))
    monkeypatch.setattr(Policy, "__init__", lambda *a, **k: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match=message) as caught:
        ppo.main([*arguments, "--output", str(tmp_path / "run"), *extra])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported; expected one of llama"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_type = 'yarn' is not supported"),
        ({"intermediate_size": 100}, r"gate_proj.weight' has shape \(96, 64\), expected \(100, 64\)"),
        ({"num_hidden_layers": 4}, r"9 tensors.*missing.*model.layers.3"),
    ],
)
def test_wrong_models_are_refused(tmp_path, arguments, smollm2, change, message):
    folder = save_llama(tmp_path / "model", smollm2, tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        ppo.main([*arguments, "--model", str(folder), "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written(arguments: list[str], tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="cannot write to the run folder"):
        ppo.main([*arguments, "--output", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(ValueError, match="cannot write to the run folder"):
        ppo.main([*arguments, "--output", "/proc/run"])


def test_used_output_is_kept(straight: Path, arguments: list[str]):
    before = (straight / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="already holds a run"):
        ppo.main([*arguments, "--output", str(straight)])
    assert (straight / "metrics.jsonl").read_text() == before


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_disk_full_keeps_the_older_checkpoint(arguments: list[str], tmp_path):
    """A file-size limit stands in for a full disk: the second checkpoint does not fit."""
    run = tmp_path / "run"
    common = [*arguments, "--output", str(run), "--steps", "2"]
    assert ppo.main([*common[:-1], "1"]) == 0
    kept = contents(run / "checkpoints" / "step-1")
    limit = (
        "import resource, sys; from aligner import ppo; from aligner.run import config; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); "
        "config.user_errors(lambda: ppo.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", limit, *common, "--resume"]
    full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert full.returncode == 2, full.stderr
    assert full.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in full.stderr
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["step-1"]
    assert contents(run / "checkpoints" / "step-1") == kept
    assert ppo.main([*common, "--resume"]) == 0


def test_reward_that_breaks_later_leaves_the_last_checkpoint(arguments: list[str], tmp_path):
    run = tmp_path / "run"
    extra = ["--reward.function", "tests.programs.rewards:BreaksInStep2", "--save-every", "1", "--steps", "4"]
    with pytest.raises(ValueError, match="returned inf for response 0"):
        ppo.main([*arguments, "--output", str(run), *extra])
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["step-1"]
    assert ppo.main([*arguments, "--output", str(run), "--steps", "2", "--resume"]) == 0
    assert [row["step"] for row in metrics(run)] == [0, 1, 2]


def test_a_mistake_on_the_command_line_is_one_line_and_status_2(arguments: list[str]):
    done = run_program([*arguments, "--polcy.clip-low", "1"])
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown option --polcy.clip-low; did you mean --policy.clip-low?"
