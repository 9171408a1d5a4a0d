"""Starts the stand-in engine as a process of an environment of its own, as a trainer starts TensorRT-LLM."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FAKE = ROOT / "tests" / "refit" / "fake"  # a package tensorrt_llm


def engine_python(folder: Path, *, without: bool = False, host: str = "") -> Path:
    """A Python whose environment has the stand-in; without: one that has none. host: of another machine's name."""
    path = folder / f"python{'-without' if without else ''}{host}"
    places = f"{ROOT}" if without else f"{ROOT}:{FAKE}"
    if host:
        (there := folder / f"on{host}").mkdir()
        (there / "sitecustomize.py").write_text(f"import socket\nsocket.gethostname = lambda: {host!r}\n")
        places += f":{there}"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{places}" OMP_NUM_THREADS=1 exec "{sys.executable}" -W ignore "$@"\n')
    path.chmod(0o755)
    return path
