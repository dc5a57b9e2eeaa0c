"""`python -m tests.train.memory.measured_peak FIRST SECOND` runs SFT on the CPU with the settings
of two files, and prints by how many bytes the resident set grew at most in the second run. The
first is one of a tiny model, after which all that a run imports and sets up is there."""

from __future__ import annotations

import sys
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of a field of the process: VmRSS as it is, VmHWM the most that it was."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main() -> int:
    from threadweaver.train.__main__ import main as train

    first, second = sys.argv[1:]
    train(["sft", "--config", first])
    before = resident("VmRSS")
    code = train(["sft", "--config", second])
    print(f"grew by {resident('VmHWM') - before}")
    return code


if __name__ == "__main__":
    sys.exit(main())
