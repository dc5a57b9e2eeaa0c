"""Compiles the CUDA kernels (csrc/cuda/*/*.cu) for Hopper, one cubin a source file. Needs no GPU.

Beside NAME.cubin stands NAME.digest, of what it was compiled from: a cubin that another machine
made of the same sources is taken as it is.

setup.py and the tests compile with the same command. Only the standard library is used: setup.py
loads this file before anything else is installed.
"""

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
CUBINS = Path(__file__).resolve().with_name("cubins")
COMMAND = "TW_CUDA=1 python setup.py build_ext --inplace"


def why_not() -> str | None:
    """None if the kernels can be compiled here, else what is missing, in one line."""
    if nvcc() is None:
        return "no nvcc in CUDA_HOME, on the PATH or in /usr/local: install CUDA 12.4 or later"
    if cutlass() is None:
        return "no CUTLASS headers: pip install 'threadweaver[cuda]', or --no-deps nvidia-cutlass"
    return None


def nvcc() -> Path | None:
    """The compiler: CUDA_HOME's, else that on the PATH, else the newest below /usr/local."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found:
        return Path(found)
    toolkits = Path("/usr/local").glob("cuda-*/bin/nvcc")
    return max(toolkits, key=_version, default=None)


def _version(nvcc: Path) -> list[int]:
    """13.0 of /usr/local/cuda-13.0/bin/nvcc."""
    return [int(part) for part in nvcc.parts[-3][len("cuda-") :].split(".") if part.isdigit()]


def cutlass() -> Path | None:
    """The include folder of the package nvidia-cutlass, which the kernels use CuTe from."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None or not package.submodule_search_locations:
        return None
    include = Path(package.submodule_search_locations[0]) / "source" / "include"
    return include if include.is_dir() else None


def sources() -> list[Path]:
    """The files of CUDA kernels."""
    return sorted((SOURCES / "cuda").glob("*/*.cu"))


def command(source: Path, cubin: Path) -> list[str]:
    """What compiles one file; `why_not` must be None."""
    return [
        str(nvcc()),
        "-cubin",
        # wgmma needs the architecture's own target. The short form -arch=sm_90a is not the same.
        "-gencode=arch=compute_90a,code=sm_90a",
        "-std=c++17",
        "-O3",
        "-lineinfo",
        "-DNDEBUG",  # an assertion is a function call, and wgmma cannot be in flight across one
        "--expt-relaxed-constexpr",
        "-Xptxas=-v",
        f"-I{SOURCES}",
        f"-I{cutlass()}",
        f"-o={cubin}",
        str(source),
    ]


def digest(source: Path, *others: str) -> str:
    """Of a source, the headers of ours that it includes, and what else the result depends on."""
    files, seen = [source], {source}
    for file in files:
        for name in re.findall(r'#include "(.+)"', file.read_text()):
            found = next(f for f in (file.parent / name, SOURCES / name) if f.exists())
            if found not in seen:
                seen.add(found)
                files.append(found)
    content = b"".join(file.read_bytes() for file in files) + repr(others).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def cubin_digest(source: Path) -> str:
    """Of what a cubin is compiled from: sources and options, not which compiler it is nor where
    they are, so that another machine has the same."""
    words = command(source, Path("to"))
    return digest(source, *(w for w in words if w[:1] == "-" and w[:2] not in ("-I", "-o")))


def missing(folder: Path) -> list[Path]:
    """The sources whose cubin in `folder` is not there, or of other sources than these."""

    def is_there(source: Path) -> bool:
        mark = folder / f"{source.stem}.digest"
        is_current = mark.exists() and mark.read_text() == cubin_digest(source)
        return is_current and (folder / f"{source.stem}.cubin").exists()

    return [source for source in sources() if not is_there(source)]


def compile_kernels(source: Path, cubin: Path) -> str:
    """Compiles one file of kernels.

    Returns:
        What the compiler said: registers, spills and barriers of each kernel, and its warnings.

    Raises:
        RuntimeError: the compiler failed; with what it said.
    """
    done = subprocess.run(command(source, cubin), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def is_wanted() -> bool:
    """TW_CUDA=1 or 0 decides; without it, whether the CUDA driver sees a GPU."""
    choice = os.environ.get("TW_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"TW_CUDA={choice}: 1 builds the CUDA kernels, 0 does not")
    return choice == "1" or (choice == "" and _gpu_is_visible())


def _gpu_is_visible() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value > 0
    )


def build(folder: Path) -> None:
    """Compiles into `folder` what is missing there, side by side, if that is wanted here."""
    if not is_wanted() or not (needed := missing(folder)):
        return
    if reason := why_not():
        if os.environ.get("TW_CUDA") == "1":
            raise SystemExit(f"TW_CUDA=1, but {reason}")
        print(f"The CUDA kernels are left out: {reason}")
        return
    folder.mkdir(parents=True, exist_ok=True)

    def make(source: Path) -> None:
        print(f"Compiling {source.name}", flush=True)
        mark = folder / f"{source.stem}.digest"
        mark.unlink(missing_ok=True)  # while the cubin is written it is of no sources
        compile_kernels(source, folder / f"{source.stem}.cubin")
        mark.write_text(cubin_digest(source))

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, needed))
