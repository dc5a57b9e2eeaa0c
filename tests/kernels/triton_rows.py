"""What the compiler made of the Triton kernels: rows of the scripts that compile them."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import triton

from tests.kernels.cubins import CACHE
from threadweaver.whole_file import write_whole

ROOT = Path(__file__).parents[2]


BFLOAT16 = ("bfloat16", "64", "128")


def rows_of(script: str, *arguments: str) -> list[dict]:
    """The rows that tests/kernels/SCRIPT.py prints, by default for bfloat16 and sm_90.

    Kept in build/ for as long as Triton, tw_kernels and the scripts stay as they are.
    """
    sources = [*(ROOT / "tw_kernels").rglob("*.py"), *Path(__file__).parent.glob("compile_*.py")]
    content = b"".join(source.read_bytes() for source in sorted(sources))
    digest = hashlib.sha256(content + triton.__version__.encode()).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    arguments = arguments or BFLOAT16
    file = CACHE / f"{script}-{'-'.join(arguments)}-{digest}.jsonl"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not file.exists():
            write_whole(file, _printed_by(script, arguments))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    print("\n" + "  ".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>16}" for value in row.values()))
    return rows


def _printed_by(script: str, arguments: tuple[str, ...]) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.kernels.{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
