"""Starts the stand-in engine as a process of an environment of its own, as a trainer starts TensorRT-LLM."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FAKE = ROOT / "tests" / "refit" / "fake"  # a package tensorrt_llm


def engine_python(folder: Path, *, without: bool = False) -> Path:
    """A Python whose environment has the stand-in; without: one that has none."""
    path = folder / ("python-without" if without else "python")
    places = f"{ROOT}" if without else f"{ROOT}:{FAKE}"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{places}" OMP_NUM_THREADS=1 exec "{sys.executable}" -W ignore "$@"\n')
    path.chmod(0o755)
    return path
