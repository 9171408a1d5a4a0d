"""`python -m aligner.data FILE`: what it says of good and of bad files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aligner.validate import guess_use, main
from tests.conftest import save_model
from tests.data.words import word_tokenizer, write

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of few words, with a context of 8 tokens."""
    folder = save_model(tmp_path_factory.mktemp("words"), "llama", vocab_size=14, max_position_embeddings=8)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_good_file(tmp_path, model, capsys):
    rows = [{"prompt": "the " * num, "completion": "good"} for num in (1, 2, 2, 9)]
    assert main([str(write(tmp_path / "a", *rows)), "--model", model]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"{tmp_path / 'a'}: 4 lines"
    assert lines[1].startswith("use: supervised (its keys also fit prompts; --use takes another)")
    assert lines[2:5] == [
        "format: prompt and completion: prompt, completion",
        "examples: 4, good 4, bad 0",
        "tokens: min 4, median 5, 95th percentile 11, max 12",
    ]
    bars = {line.split()[0]: line.split()[1:] for line in lines[5:-1]}
    assert bars["4-4"] == ["1", "#" * 20] and bars["5-5"] == ["2", "#" * 40] and bars["6-6"] == ["0"]
    assert sum(int(bar[0]) for bar in bars.values()) == 4
    assert lines[-1] == "longer than the model's context of 8 tokens: 1"


def test_a_bad_file(tmp_path, model, capsys):
    good = {"text": "the", "label": [1.0]}
    bad = [{"text": "", "label": [1]}, {"text": " ", "label": [1]}, {"text": "a", "label": [1, 2]}, "{"]
    path = write(tmp_path / "a", good, *bad, good)
    assert main([str(path), "--use", "rated", "--model", model]) == 1
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "examples: 6, good 2, bad 4" in lines and "use" not in "".join(lines)
    assert lines[-5].startswith(f"first bad line: {path}:2: \"text\" is ''")
    assert lines[-3:] == [
        '2 "text" is ...',
        "1 got ... mark...",
        "1 not valid JSON ...",
    ]


def test_mistakes_that_end_it(tmp_path, model):
    with pytest.raises(ValueError, match=r"a:1: got the keys \['x'\], which no format has; docs/data.md"):
        main([str(write(tmp_path / "a", {"x": 1})), "--model", model])
    with pytest.raises(ValueError, match=r"a:1: got the keys \['text'\], expected"):
        main([str(write(tmp_path / "a", {"text": "the"})), "--use", "pairs", "--model", model])


@pytest.mark.parametrize(
    ("keys", "uses"),
    [
        (["text"], ["prompts", "supervised", "comparisons"]),
        (["text", "label"], ["comparisons", "rated", "prompts", "supervised"]),
        (["prompt", "chosen", "rejected"], ["pairs", "comparisons", "prompts"]),
        (["prompt", "response", "preference"], ["judged", "prompts"]),
        (["prompt", "completion", "label"], ["judged", "supervised", "prompts"]),
    ],
)
def test_guesses(keys, uses):
    assert guess_use(dict.fromkeys(keys)) == uses


def test_both_names_of_the_program(tmp_path, model):
    path = write(tmp_path / "a", {"text": "the"}, {"text": 3})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "aligner.data", str(path), "--use", "prompts", "--model", model]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f'first bad line: {path}:2: "text" is 3' in done.stdout, done.stderr
