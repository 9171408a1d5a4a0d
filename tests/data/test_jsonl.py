"""Rows of JSONL files: the index against splitting the bytes, the kept index, errors with file and line."""

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aligner.data import jsonl
from aligner.data.jsonl import JsonLines, Rows

PIECES = ['{"a": 1}', '{"b": "x\u2028y\x85z\u2029"}', '  {"c": "\u00e9"} ', "", " ", "\t\r", "\v", '{"d": []}']


def expected(content: bytes) -> list[tuple[int, dict]]:
    """(line number, object) of each line that is not blank."""
    lines = content.decode().split("\n")
    return [(number, json.loads(line)) for number, line in enumerate(lines, start=1) if line.strip(" \t\r\v\f")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    lines=st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(["\n", "\r\n", "\n\n"])), max_size=12),
    last=st.sampled_from(PIECES),
    chunk=st.integers(1, 40),
)
def test_rows_are_the_lines_that_are_not_blank(tmp_path, monkeypatch, lines, last, chunk):
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk)
    content = ("".join(text + end for text, end in lines) + last).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    rows = expected(content)
    if not rows:
        with pytest.raises(ValueError, match="is empty; expected at least one JSON object"):
            JsonLines(path)
        return
    file = JsonLines(path)
    assert [(file.where(i), file.row(i)) for i in range(len(file))] == [(f"{path}:{n}", row) for n, row in rows]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "the"', "not valid JSON (Expecting ',' delimiter at column 15); write one object a line."),
        (b'["the"]', "got a JSON list, expected an object"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 11 of the line); save the file as UTF-8."),
        (b'{"n": ' + b"1" * 5000 + b"}", "JSON that cannot be read"),
        (b"[" * 200_000, "JSON that cannot be read"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a byte order mark is no mistake"}\n\n \n' + line + b'\n{"text": "b"}')
    file = JsonLines(path)
    assert file.row(0)["text"].startswith("a byte") and file.row(2) == {"text": "b"}
    with pytest.raises(ValueError) as error:
        file.row(1)
    assert str(error.value).startswith(f"{path}:4: {message}"), str(error.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give a JSONL file"):
        JsonLines(tmp_path / "no.jsonl")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty; expected"):
        JsonLines(tmp_path / "empty")
    with pytest.raises(ValueError, match="no rows"):
        Rows("nothing", [])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own, in which every file's index is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jsonl, "KEEP_INDEX_BYTES", 0)
    return tmp_path / "cache" / "aligner" / "lines"


def forbid_scans(monkeypatch):
    monkeypatch.setattr(jsonl, "_scan", lambda file: pytest.fail("the file was scanned again"))


def test_a_kept_index_is_used_until_the_file_changes(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert len(JsonLines(path)) == 2
    (kept,) = cache.glob("*.npy")
    with monkeypatch.context() as patch:
        forbid_scans(patch)
        again = JsonLines(path)
        assert isinstance(again._starts, np.memmap)
        assert [again.row(1), again.where(1)] == [{"a": 2}, f"{path}:3"]
    path.write_text('{"a": 3}\n{"a": 4}\n\n')  # as long as before
    os.utime(path, ns=(1, 1))
    changed = JsonLines(path)
    assert [changed.row(i) for i in range(2)] == [{"a": 3}, {"a": 4}]
    assert len(list(cache.glob("*.npy"))) == 1 and not kept.exists()
    assert again.row(0) != {"a": 1}, "an open file shows its new bytes; training must not start on a changing file"


def test_a_damaged_index_is_made_again(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    JsonLines(path)
    (kept,) = cache.glob("*.npy")
    for content in (b"", b"nonsense", kept.read_bytes()[:-4]):
        kept.write_bytes(content)
        assert JsonLines(path).row(0) == {"a": 1}


def test_a_cache_that_cannot_be_written_is_no_mistake(tmp_path, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    assert JsonLines(path).row(0) == {"a": 1}


def test_small_files_leave_nothing_in_the_cache(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(jsonl, "KEEP_INDEX_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    assert len(JsonLines(path)) == 1 and not cache.exists()


def test_rows_in_memory():
    rows = Rows("default prompts", [{"a": 1}, {"a": 2}])
    assert len(rows) == 2 and rows.row(1) == {"a": 2} and rows.where(1) == "default prompts:2"
