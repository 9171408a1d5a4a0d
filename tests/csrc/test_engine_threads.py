"""The sampler's threads race nowhere: test_engine.cpp under the thread sanitizer, which must find seeded races."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CSRC = Path(__file__).parents[2] / "csrc"
# Plain threads in place of OpenMP's: the sanitizer does not see that those wait for each other.
COMPILE = ["g++", "-std=c++17", "-O1", "-g1", "-fopenmp", "-fsanitize=thread", "-DALIGNER_PTHREADS", "-Wno-psabi"]
COMPILE += ["-DALIGNER_ISA=portable"]
# Portable kernels only: the calls of other instruction sets' stay unresolved, since none is made.
LINK = ["g++", "-fopenmp", "-fsanitize=thread", "-no-pie", "-Wl,--unresolved-symbols=ignore-in-object-files"]
RACES = {
    "one drawer for all": ("engine/engine.cpp", "drawers_[thread].draw", "drawers_[0].draw"),
    "two threads write a row": ("engine/attention_cpu.cpp", "i < tasks; i += threads", "i < tasks; ++i"),
    "parts overlap": ("engine/matmul_cpu.cpp", "begin * TILE_OUTPUTS,", "0,"),
}


def compile_object(source: Path, target: Path) -> Path:
    command = [*COMPILE, "-I", str(CSRC), "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def run(objects: list[Path], program: Path) -> subprocess.CompletedProcess:
    subprocess.run([*LINK, *map(str, objects), "-o", str(program)], check=True)
    # At fixed addresses: the sanitizer's shadow memory leaves no room for random ones.
    fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    settings = {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([*fixed, str(program), "portable"], capture_output=True, text=True, env=os.environ | settings)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engine")
    sources = [*CSRC.glob("engine/*.cpp"), CSRC / "dispatch.cpp", Path(__file__).parent / "test_engine.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {path.stem: pool.submit(compile_object, path, folder / f"{path.stem}.o") for path in sources}
        return {name: future.result() for name, future in futures.items()}


def test_no_data_race(objects, tmp_path):
    done = run(list(objects.values()), tmp_path / "test")
    assert done.returncode == 0, done.stdout + done.stderr[:4000]


@pytest.mark.parametrize("race", RACES)
def test_a_seeded_race_is_found(objects, tmp_path, race: str):
    file, text, replacement = RACES[race]
    source = (CSRC / file).read_text()
    assert source.count(text) == 1, f"{file} has {source.count(text)} times {text!r}"
    changed = tmp_path / Path(file).name
    changed.write_text(source.replace(text, replacement))
    changed_object = compile_object(changed, tmp_path / "changed.o")
    done = run(list((objects | {changed.stem: changed_object}).values()), tmp_path / "test")
    assert "data race" in done.stderr, done.stdout + done.stderr[:4000]
