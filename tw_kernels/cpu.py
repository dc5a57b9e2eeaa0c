"""What this processor is, and with which instructions the libraries behind torch multiply bfloat16
on it."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from pathlib import Path

import torch


@cache
def processor_name() -> str:
    """As the processor calls itself; its architecture where the system does not tell."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@cache
def bfloat16_instructions() -> tuple[str, ...]:
    """Of AMX, AVX512_BF16 and BF16 (ARM's) those that products of bfloat16 matrices run on here.

    Empty: they are emulated, several times slower than in float32. So they are too where macOS
    multiplies by Accelerate, which knows no bfloat16, and where oneDNN is held to less than the
    processor has by its environment variable ONEDNN_MAX_CPU_ISA.
    """
    if sys.platform != "linux" or not torch.backends.mkldnn.is_available():
        return ()
    info = _cpuinfo()
    flags = info.get("flags") or info.get("Features") or ""  # of x86, of ARM
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return usable_bfloat16_instructions(set(flags.split()), limit)


def usable_bfloat16_instructions(flags: set[str], limit: str) -> tuple[str, ...]:
    """The same for a processor with these flags of /proc/cpuinfo, where oneDNN may use no more than
    the instruction set `limit`, a value of ONEDNN_MAX_CPU_ISA or empty."""
    limit = limit.upper()
    free = limit in ("", "ALL", "DEFAULT")
    found = []
    if {"amx_tile", "amx_bf16"} <= flags and (free or "AMX" in limit):
        found.append("AMX")
    with_dot_products = ("BF16", "FP16", "AVX10", "AMX")  # the sets from AVX512_CORE_BF16 on
    if "avx512_bf16" in flags and (free or any(name in limit for name in with_dot_products)):
        found.append("AVX512_BF16")
    if "bf16" in flags:
        found.append("BF16")
    return tuple(found)


def _cpuinfo() -> dict[str, str]:
    """/proc/cpuinfo of the first processor; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}
