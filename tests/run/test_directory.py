"""The run folder: preflight before long work, what log and samples leave on disk, and what resume drops."""

import json
import os
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aligner.run.directory import RunDirectory, read_jsonl


def create(path, resume=False, needed_bytes=0):
    return RunDirectory.create(path, "ppo", "steps: 3\n", resume, needed_bytes)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_default_folder_is_named_after_program_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = create(None)
    assert run.path.parent.name == "runs" and run.path.name.startswith("ppo-2") and len(run.path.name) == 19
    assert (run.path / "config.yaml").read_text() == "steps: 3\n"
    assert os.listdir(run.path) == ["config.yaml"]


def test_a_folder_that_holds_a_run_needs_resume(tmp_path):
    create(tmp_path / "run").close()
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        create(tmp_path / "run")
    assert create(tmp_path / "run", resume=True).path == tmp_path / "run"


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        create(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="--resume needs the folder"):
        create(None, resume=True)


def test_too_little_disk_space(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ValueError, match="free, the run needs"):
        create(tmp_path / "run", needed_bytes=free + 10**12)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the run folder"):
        create(tmp_path / "file" / "run")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(self, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    with pytest.raises(ValueError, match=r"cannot write to the run folder .*\(Permission denied\)"):
        create(tmp_path / "run")


def test_log_writes_jsonl_at_once_and_tensorboard(tmp_path):
    run = create(tmp_path / "run")
    run.log(1, {"reward/mean": 0.25, "loss": 2})
    assert lines(run.path / "metrics.jsonl") == [{"step": 1, "reward/mean": 0.25, "loss": 2.0}]  # before close
    run.log(2, {"reward/mean": 0.5})
    run.close()
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_not_finite_is_named_and_nothing_is_written(tmp_path, value):
    run = create(tmp_path / "run")
    with pytest.raises(ValueError, match="metric 'kl/mean' is (nan|inf|-inf) at step 3"):
        run.log(3, {"loss": 1.0, "kl/mean": value})
    assert not (run.path / "metrics.jsonl").exists()


def test_samples_keep_text_exactly(tmp_path):
    run = create(tmp_path / "run")
    row = {"step": 1, "split": "eval", "prompt": 'a "b"\n', "response": "caf\u00e9 \u2028 x", "reward": 0.1}
    run.samples([row, row])
    assert read_jsonl(run.path / "samples.jsonl") == [row, row]


def test_truncate_drops_later_rows_and_a_torn_line_and_the_run_goes_on(tmp_path):
    run = create(tmp_path / "run")
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
        run.samples([{"step": step, "split": "train", "prompt": "p", "response": "r", "reward": 0.0}])
    run.close()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    run = create(tmp_path / "run", resume=True)
    run.truncate(2)
    run.log(3, {"loss": 30.0})
    run.close()
    assert [(r["step"], r["loss"]) for r in lines(run.path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [r["step"] for r in lines(run.path / "samples.jsonl")] == [1, 2]
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_torn_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2 is not valid JSON"):
        read_jsonl(file)
