"""Builds tw_kernels._C with CMake and ninja. Needs a C++ compiler and pybind11, not torch.

Where a GPU is seen or TW_CUDA=1, the CUDA kernels too (tw_kernels/cuda_build.py).
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def run(self) -> None:
        super().run()
        # In place setuptools itself copies the extension, and nothing beside it.
        package = (ROOT if self.inplace else Path(self.build_lib)) / "tw_kernels"
        cuda_build = runpy.run_path(str(ROOT / "tw_kernels" / "cuda_build.py"))
        cuda_build["build"](package / "cubins")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            # pip builds in a throw-away environment: a cached path into an old one must not win
            "--fresh",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(ext_modules=[Extension("tw_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
