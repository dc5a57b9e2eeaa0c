"""The CUDA kernels compiled for sm_90a, with no GPU, and what the compiler made of them."""

import fcntl
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from threadweaver.whole_file import write_whole
from tw_kernels import cuda_build

CACHE = Path(__file__).parents[2] / "build" / "cubins"
SHARED_LIMIT = 227 * 1024  # bytes that a block on sm_90 can have


def compiled(name: str) -> tuple[Path, str]:
    """The cubin of NAME.cu and what the compiler said; compiled anew if sources changed.

    Skips the test where the compiler or the headers are missing.
    """
    if reason := cuda_build.why_not():
        pytest.skip(reason)
    (source,) = (source for source in cuda_build.sources() if source.stem == name)
    folder = CACHE / f"{name}-{cuda_build.digest(source, *cuda_build.command(source, Path('to')))}"
    cubin, log = folder / f"{name}.cubin", folder / "log"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not log.exists():
            write_whole(log, cuda_build.compile_kernels(source, cubin))
    return cubin, log.read_text()


def figures(cubin: Path) -> dict[str, dict[str, int]]:
    """Of each kernel: registers, stack and static shared memory in bytes, and instructions.

    Instructions count under their whole name and under its first part: LDG.E.128 and LDG.
    """
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
        names = re.findall(r"^\s*/\*\w+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code[name], re.M)
        found[name] = {
            "registers": int(resources["REG"]),
            "stack": int(resources["STACK"]),
            "shared": int(resources["SHARED"]),
            **Counter(n.partition(".")[0] for n in names),
            **Counter(n for n in names if "." in n),
        }
    return found
