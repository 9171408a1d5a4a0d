"""Atomic writes: after any failure the old content stands whole, and nothing temporary is left."""

import os

import pytest

from aligner.run import atomic
from aligner.run.atomic import atomic_folder, atomic_write, recover_folder


def test_write_replaces_text_and_bytes(tmp_path):
    atomic_write(tmp_path / "a", "caf\u00e9")
    assert (tmp_path / "a").read_bytes() == b"caf\xc3\xa9"
    atomic_write(tmp_path / "a", b"\x00\x01")
    assert (tmp_path / "a").read_bytes() == b"\x00\x01"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a", "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_folder_appears_only_when_whole(tmp_path):
    with atomic_folder(tmp_path / "deep" / "x") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "f").write_text("1")
        assert not (tmp_path / "deep" / "x").exists()
    assert (tmp_path / "deep" / "x" / "sub" / "f").read_text() == "1"
    assert os.listdir(tmp_path / "deep") == ["x"]


def test_folder_replaces_an_old_one_wholly(tmp_path):
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "x") as folder:
            (folder / name).write_text(name)
    assert os.listdir(tmp_path / "x") == ["second"]
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_folder_leaves_the_old_one(tmp_path, error):
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "f").write_text("old")
    with pytest.raises(error), atomic_folder(tmp_path / "x") as folder:
        (folder / "f").write_text("new")
        raise error
    assert (tmp_path / "x" / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_crash_between_the_two_renames_is_recovered(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "f").write_text("old")
    rename = os.rename

    def crash(source, target):
        if str(source).endswith(".tmp"):
            raise SystemExit("power cut")
        rename(source, target)

    monkeypatch.setattr(atomic.os, "rename", crash)
    with pytest.raises(SystemExit), atomic_folder(tmp_path / "x") as folder:
        (folder / "f").write_text("new")
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(atomic.os, "rename", rename)
    recover_folder(tmp_path / "x")
    assert (tmp_path / "x" / "f").read_text() == "old"
    with atomic_folder(tmp_path / "x") as folder:  # what the crash left of the new one does not leak in
        assert os.listdir(folder) == []
    assert os.listdir(tmp_path) == ["x"]
