"""The CUDA kernels compiled for sm_90a, with no GPU, and what the compiler made of them."""

import fcntl
import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from tw_kernels.backends import cuda_build

CACHE = Path(__file__).parents[2] / "build" / "cubins"
SHARED_LIMIT = 227 * 1024  # bytes that a block on sm_90 can have


def compiled(name: str) -> tuple[Path, str]:
    """The cubin of csrc/cuda/NAME.cu and what the compiler said; compiled anew if sources changed.

    Skips the test where the compiler or the headers are missing.
    """
    if reason := cuda_build.why_not():
        pytest.skip(reason)
    source = cuda_build.SOURCES / "cuda" / f"{name}.cu"
    command = cuda_build.command(source, Path("to"))
    digest = hashlib.sha256(repr(command).encode())
    for file in [source, *sorted(source.parent.glob("*.h")), *sorted(source.parent.glob("*.cuh"))]:
        digest.update(file.read_bytes())
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    cubin, log = folder / f"{name}.cubin", folder / "log"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not log.exists():
            log.write_text(cuda_build.compile_kernels(source, cubin))
    return cubin, log.read_text()


def figures(cubin: Path) -> dict[str, dict[str, int]]:
    """Registers, stack and static shared memory in bytes, barriers and instructions, by kernel."""
    triton = pytest.importorskip("triton")
    bin_folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage, sass = (
        subprocess.run(
            [bin_folder / tool, flag, cubin], check=True, capture_output=True, text=True
        ).stdout
        for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
    )
    code = dict(re.findall(r"\.text\.(\w+):\n(.*?)(?=\n\t?\.section|\Z)", sass, re.DOTALL))
    found = {}
    for name, line in re.findall(r"Function (\w+):\n(.*)", usage):
        resources = dict(re.findall(r"(\w+):(\d+)", line))
        instructions = re.findall(r"^\s*/\*\w+\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", code[name], re.M)
        found[name] = {
            "registers": int(resources["REG"]),
            "stack": int(resources["STACK"]),
            "shared": int(resources["SHARED"]),
            **{i: instructions.count(i) for i in set(instructions)},
        }
    return found
