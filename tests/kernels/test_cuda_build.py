"""The build of the CUDA kernels: what decides on it, and what it says when it cannot."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from threading import Barrier

import pytest

from tests.kernels.cubins import figures
from tw_kernels import cuda_build

KERNEL = 'extern "C" __global__ void twice(float *x) { x[threadIdx.x] *= 2; }\n'
needs_nvcc = pytest.mark.skipif(cuda_build.why_not() is not None, reason=str(cuda_build.why_not()))


@pytest.fixture
def one_kernel(tmp_path, monkeypatch) -> Path:
    """csrc with one file of kernels that compiles in a second."""
    monkeypatch.setattr(cuda_build, "SOURCES", tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / "op" / "one.cu"
    source.parent.mkdir(parents=True)
    source.write_text(KERNEL)
    return source


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Path:
    """An nvcc in CUDA_HOME, whatever else the machine has."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    return nvcc


def test_nothing_is_built_without_a_gpu_unless_asked(one_kernel, tmp_path, monkeypatch):
    monkeypatch.delenv("TW_CUDA", raising=False)
    monkeypatch.setattr(cuda_build, "_gpu_is_visible", lambda: False)
    cuda_build.build(tmp_path / "cubins")
    assert not (tmp_path / "cubins").exists()


def test_nothing_is_built_where_it_is_turned_off(one_kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TW_CUDA", "0")
    monkeypatch.setattr(cuda_build, "_gpu_is_visible", lambda: True)
    cuda_build.build(tmp_path / "cubins")
    assert not (tmp_path / "cubins").exists()


@needs_nvcc
def test_every_source_becomes_a_cubin_of_sm_90a(one_kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TW_CUDA", "1")
    cuda_build.build(tmp_path / "cubins")
    (cubin,) = (tmp_path / "cubins").glob("*.cubin")
    assert cubin.name == "one.cubin" and "twice" in figures(cubin)


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """The sources that a compiler, which takes any text, is given; two at a time."""
    compiled, both = [], Barrier(2)

    def compile_kernels(source: Path, cubin: Path) -> None:
        both.wait(10)
        if "error" in source.read_text():
            raise RuntimeError("nvcc failed")
        cubin.write_text(source.read_text())
        compiled.append(source.stem)

    monkeypatch.setenv("TW_CUDA", "1")
    monkeypatch.setattr(cuda_build, "why_not", lambda: None)
    monkeypatch.setattr(cuda_build, "compile_kernels", compile_kernels)
    return compiled


def test_sources_are_compiled_side_by_side_and_only_when_they_changed(
    one_kernel, tmp_path, compilations, monkeypatch
):
    cubins, two = tmp_path / "cubins", one_kernel.with_name("two.cu")
    header = tmp_path / "csrc" / "common.h"
    header.write_text("#pragma once\n")
    for source in (one_kernel, two):
        source.write_text('#include "common.h"\n' + KERNEL)
    cuda_build.build(cubins)
    assert sorted(compilations) == ["one", "two"]
    # They are taken where there is no compiler, too, as on the machine that they were carried to.
    monkeypatch.setattr(cuda_build, "why_not", lambda: "no nvcc")
    cuda_build.build(cubins)
    monkeypatch.setattr(cuda_build, "why_not", lambda: None)
    header.write_text("#pragma once\n\n")
    assert cuda_build.missing(cubins) == [one_kernel, two]
    cuda_build.build(cubins)
    assert sorted(compilations) == ["one", "one", "two", "two"]
    # A cubin of unknown sources, and one that did not compile.
    (cubins / "two.digest").unlink()
    assert cuda_build.missing(cubins) == [two]
    one_kernel.write_text("error")
    with pytest.raises(RuntimeError, match="nvcc failed"):
        cuda_build.build(cubins)
    assert cuda_build.missing(cubins) == [one_kernel]


@needs_nvcc
def test_an_error_comes_with_the_compilers_words(one_kernel, tmp_path):
    one_kernel.write_text(KERNEL.replace("x[", "y["))
    with pytest.raises(RuntimeError, match=r'one\.cu(?s:.*)identifier "y" is undefined'):
        cuda_build.compile_kernels(one_kernel, tmp_path / "one.cubin")


def test_what_is_missing_ends_the_build_if_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TW_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
    with pytest.raises(SystemExit, match="TW_CUDA=1, but no nvcc in CUDA_HOME"):
        cuda_build.build(tmp_path / "cubins")


def test_what_is_missing_leaves_them_out_where_only_a_gpu_is_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TW_CUDA", raising=False)
    monkeypatch.setattr(cuda_build, "_gpu_is_visible", lambda: True)
    monkeypatch.setattr(cuda_build, "cutlass", lambda: None)
    monkeypatch.setattr(cuda_build, "nvcc", lambda: Path("nvcc"))
    cuda_build.build(tmp_path / "cubins")
    assert "left out: no CUTLASS headers: pip install" in capsys.readouterr().out
    assert not (tmp_path / "cubins").exists()


def test_a_choice_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("TW_CUDA", "yes")
    with pytest.raises(SystemExit, match="TW_CUDA=yes: 1 builds the CUDA kernels, 0 does not"):
        cuda_build.is_wanted()


def test_the_compiler_of_cuda_home_wins(toolkit):
    assert cuda_build.nvcc() == toolkit


def test_the_newest_toolkit_is_the_one_with_the_greatest_number():
    found = [Path(f"/usr/local/cuda-{v}/bin/nvcc") for v in ("12.9", "13.0", "12.10")]
    assert max(found, key=cuda_build._version) == found[1]
    assert max(found[::2], key=cuda_build._version) == found[2]


def test_setup_can_load_the_build_before_anything_is_installed():
    # -I -S: the standard library alone, no installed packages.
    code = f"import runpy; runpy.run_path({cuda_build.__file__!r})['build']"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def program(path: Path, code: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport pathlib, sys\n{code}")
    path.chmod(0o755)


def test_kernels_built_in_place_lie_where_they_are_launched_from(tmp_path):
    """setup.py with stand-ins for CMake and nvcc."""
    tree, root = tmp_path / "tree", Path(cuda_build.__file__).parents[1]
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "tw_kernels/cuda_build.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tree / name)
    for name in ("tw_kernels/__init__.py", "csrc/cuda/op/one.cu"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    (tmp_path / "site" / "cutlass_library" / "source" / "include").mkdir(parents=True)
    (tmp_path / "site" / "cutlass_library" / "__init__.py").touch()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    option = "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY="
    program(
        tmp_path / "bin" / "cmake",
        f"for word in sys.argv:\n if word.startswith({option!r}):\n"
        f"  folder = pathlib.Path(word[{len(option)}:])\n"
        "  folder.mkdir(parents=True, exist_ok=True)\n"
        f"  (folder / '_C{suffix}').touch()\n",
    )
    program(
        tmp_path / "bin" / "nvcc",
        "pathlib.Path(next(w for w in sys.argv if w[:3] == '-o=')[3:]).touch()\n",
    )
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "CUDA_HOME": str(tmp_path), "TW_CUDA": "1"}
    env["PYTHONPATH"] = str(tmp_path / "site")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tree / "tw_kernels" / f"_C{suffix}").exists()
    cubins = {file.name for file in (tree / "tw_kernels" / "cubins").iterdir()}
    assert cubins == {"one.cubin", "one.digest"} and "Compiling one.cu" in done.stdout
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Compiling" not in done.stdout  # they are there
