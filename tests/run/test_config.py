"""Config: precedence of defaults, YAML and command line; every mistake is one sentence that names the option."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from aligner.run.config import flat, parse, to_yaml, user_errors


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-6
    """Learning rate, dimensionless."""
    fused: bool = True
    """Use the fused kernel."""

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(
                f"optimizer.lr is {self.lr}, expected a positive number; give it more than zero, and not a minus sign."
            )


@dataclass(frozen=True, kw_only=True)
class Policy:
    optimizer: Optimizer = field(default_factory=Optimizer)
    weight_decay: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Config:
    policy: Policy = field(default_factory=Policy)
    data: tuple[Path, ...] = ()
    resume: bool = False
    kind: Literal["ppo", "grpo"] = "ppo"
    output: Path | None = None
    targets: tuple[str, ...] = ("qkv", "proj")
    name: str = ""
    steps: int = 3


def test_defaults_are_the_dataclass():
    assert parse(Config, []) == Config()


def test_command_line_reaches_nested_fields():
    config = parse(Config, ["--policy.optimizer.lr", "3e-4", "--policy.weight-decay=0.5", "--steps", "-7", "--resume"])
    assert (config.policy.optimizer.lr, config.policy.weight_decay) == (3e-4, 0.5)
    assert (config.steps, config.resume) == (-7, True)


def test_underscores_and_dashes_are_the_same():
    assert parse(Config, ["--policy.weight_decay", "0.25"]) == parse(Config, ["--policy.weight-decay", "0.25"])


@pytest.mark.parametrize("words", [["--data", "a,b"], ["--data=a,b"], ["--data", "a", "b"]])
def test_tuples_take_commas_or_spaces(words):
    assert parse(Config, words).data == (Path("a"), Path("b"))


def test_a_nested_switch_can_be_turned_off():
    assert parse(Config, ["--policy.optimizer.no-fused"]).policy.optimizer.fused is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy.optimizer.lrr", "1"], "unknown option --policy.optimizer.lrr; did you mean --policy.optimizer.lr?"),
        (["--lr", "1"], "unknown option --lr; did you mean --policy.optimizer.lr?"),
        (["--no-steps"], "unknown option --no-steps; did you mean --steps?"),
        (["--qqq=1"], "unknown option --qqq; run with --help for the list of options."),
    ],
)
def test_unknown_option_names_the_nearest(words, message, capsys):
    with pytest.raises(ValueError) as error:
        parse(Config, words)
    assert str(error.value) == message
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--policy.optimizer.lr", "abc"], ["--policy.optimizer.lr", "'abc'"]),
        (["--kind", "pp"], ["--kind", "'pp'", "'grpo'"]),
        (["--policy.optimizer.lr"], ["missing value", "--policy.optimizer.lr"]),
        (["stray"], ["unrecognized", "stray"]),
        (["--steps", "1.5"], ["--steps", "'1.5'"]),
    ],
)
def test_bad_value_is_one_sentence(words, parts, capsys):
    with pytest.raises(ValueError) as error:
        parse(Config, words)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value) and "│" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_post_init_error_is_passed_on_word_for_word():
    with pytest.raises(ValueError) as error:
        parse(Config, ["--policy.optimizer.lr", "-2"])
    assert str(error.value) == (
        "optimizer.lr is -2.0, expected a positive number; give it more than zero, and not a minus sign."
    )


def test_yaml_overrides_defaults_and_the_command_line_overrides_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("policy:\n  optimizer: {lr: 2e-5, fused: false}\n  weight-decay: 0.3\ndata: [a, b]\nsteps: 9\n")
    config = parse(Config, ["--config", str(file), "--steps", "4"])
    expected = Config(
        policy=Policy(optimizer=Optimizer(lr=2e-5, fused=False), weight_decay=0.3),
        data=(Path("a"), Path("b")),
        steps=4,
    )
    assert config == expected
    assert parse(Config, [f"--config={file}", "--policy.optimizer.fused"]).policy.optimizer.fused is True


def test_to_yaml_is_read_back_equal(tmp_path):
    config = parse(
        Config, ["--data", "x,y", "--policy.optimizer.no-fused", "--targets", "--steps", "-1", "--name=--odd"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert config.targets == ()
    assert parse(Config, ["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: {optimizer: {lrr: 1}}", "unknown key 'policy.optimizer.lrr'; did you mean policy.optimizer.lr?"),
        ("polcy: {weight-decay: 1}", "unknown key 'polcy'; did you mean policy?"),
        ("policy: 3", "policy is 3, expected a mapping of its options to values."),
        ("- 1", "got a list at the top, expected a mapping of options to values."),
        ("policy: {optimizer: {fused: 3}}", "policy.optimizer.fused is 3, expected true or false."),
        ("steps: [1, 2]", "steps is a list, expected a single value."),
        ("name:", "name has no value; write one or remove the key."),
        ("a: [", "not valid YAML"),
    ],
)
def test_yaml_mistakes_name_file_and_key(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        parse(Config, ["--config", str(file)])
    assert str(error.value).startswith(f"{file}: {message}")


def test_missing_config_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        parse(Config, ["--config", str(tmp_path / "no.yaml")])
    with pytest.raises(ValueError, match="--config got no value"):
        parse(Config, ["--config"])


def test_help_lists_options_with_their_docstrings(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--policy.optimizer.lr" in text and "Learning rate, dimensionless." in text and "--config FILE" in text


def test_flat_uses_the_option_names():
    values = flat(Config(steps=5))
    assert values["steps"] == 5 and values["policy.weight-decay"] == 0.1 and values["policy.optimizer.lr"] == 1e-6
    assert len(values) == 10


def test_user_errors_is_one_line_and_status_two(capsys):
    with pytest.raises(SystemExit) as stop:
        user_errors(lambda: parse(Config, ["--stepz", "1"]))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unknown option --stepz; did you mean --steps?\n"
    with pytest.raises(SystemExit) as stop:
        user_errors(Path("/no/such/file").read_text)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_user_errors_keeps_the_traceback_of_a_defect():
    with pytest.raises(ZeroDivisionError):
        user_errors(lambda: 1 // 0)
    with pytest.raises(ValueError, match="not enough values"):  # raised outside the package: a defect, not a mistake
        user_errors(_unpack)


def _unpack():
    first, second = [1]
    return first + second


def test_user_errors_passes_the_status_on():
    for status in (0, 3):
        with pytest.raises(SystemExit) as stop:
            user_errors(lambda status=status: status)
        assert stop.value.code == status


def test_a_program_started_with_m(tmp_path):
    done = subprocess.run([sys.executable, "-m", "aligner.report", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "metrics.jsonl" in done.stderr and done.stderr.count("\n") == 1
