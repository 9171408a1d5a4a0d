"""csrc stands alone: it builds and runs without torch and without Python, and its memory accesses are in bounds."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_csrc_builds_and_passes_under_sanitizers(tmp_path):
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DALIGNER_TESTS=ON", "-DALIGNER_SANITIZE=ON"],
        ["cmake", "--build", str(tmp_path), "-j", "2"],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
