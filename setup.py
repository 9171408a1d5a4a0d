"""Packaging only: CMakeLists.txt is the build, and this file calls it once."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent


def torch_dir() -> str:
    """Folder of the torch installed into, found by path: pip's isolated build hides it from import, not from disk."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        return list(spec.submodule_search_locations)[0]
    for key in ("platlib", "purelib"):
        folder = pathlib.Path(sysconfig.get_paths()[key]) / "torch"
        if (folder / "include").is_dir():
            return str(folder)
    sys.exit("aligner: torch was not found beside this Python, install it first: pip install torch==2.13.0")


def generator() -> list[str]:
    """Ninja when it is on PATH or beside this Python, else CMake's default."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_paths()["scripts"])
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []


class BuildWithCMake(build_ext):
    """One CMake build makes every library and installs it into the package folder itself."""

    def run(self) -> None:
        self.in_source = bool(self.inplace or getattr(self, "editable_mode", False))  # super().run() clears inplace
        super().run()

    def build_extension(self, ext: Extension) -> None:
        prefix = ROOT if self.in_source else pathlib.Path(self.build_lib).resolve()
        kept = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        define = [f"-DCMAKE_INSTALL_PREFIX={prefix}", f"-DTORCH_DIR={torch_dir()}"]
        define += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        # A generator or compiler recorded by an earlier build may be gone: configure once more from nothing.
        configure = ["cmake", "-S", str(ROOT), "-B", str(kept), *generator(), *define]
        if subprocess.call(configure) != 0:
            shutil.rmtree(kept, ignore_errors=True)
            subprocess.check_call(configure)
        jobs = str(os.cpu_count() or 1)
        subprocess.check_call(["cmake", "--build", str(kept), "--target", "install", "-j", jobs])

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: CMake installed the library there."""

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    packages=[*find_packages(include=["aligner", "aligner.*"]), *find_packages("kernels")],
    package_dir={"aligner_kernels": "kernels/aligner_kernels"},
    ext_modules=[Extension("aligner._C", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
)
