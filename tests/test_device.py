"""What `precision: auto` means on which device, and what is said of it."""

import os
import subprocess
import sys

import pytest
import torch

from threadweaver import device
from threadweaver.device import choose, emulation_ratio, find_device, resolve
from tw_kernels.cpu import processor_name, usable_bfloat16_instructions

CPU = torch.device("cpu")
AVX2 = {"fma", "avx2"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("flags", "limit", "found"),
    [
        (AVX2, "", ()),
        (AVX512, "", ()),  # products of bfloat16 are emulated without its own instructions
        (AVX512 | {"avx512_bf16"}, "", ("AVX512_BF16",)),
        (AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}, "", ("AMX", "AVX512_BF16")),
        (AVX512 | {"amx_tile", "amx_int8"}, "", ()),
        (AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}, "AVX2", ()),
        (AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}, "AVX512_CORE", ()),
        (AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}, "avx512_core_bf16", ("AVX512_BF16",)),
        (AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}, "DEFAULT", ("AMX", "AVX512_BF16")),
        (
            AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
            "AVX512_CORE_AMX",
            ("AMX", "AVX512_BF16"),
        ),
        ({"fp", "asimd", "fphp"}, "", ()),  # ARM without and with its instructions
        ({"fp", "asimd", "fphp", "bf16"}, "", ("BF16",)),
    ],
)
def test_bfloat16_is_native_by_the_processors_flags_and_onednns_limit(flags, limit, found):
    assert usable_bfloat16_instructions(flags, limit) == found


@pytest.mark.parametrize(
    ("found", "precision", "part"),
    [((), "fp32", "emulate"), (("AVX512_BF16",), "bf16", "AVX512_BF16")],
)
def test_auto_on_a_cpu_follows_its_instructions_and_says_why(monkeypatch, found, precision, part):
    monkeypatch.setattr(device, "bfloat16_instructions", lambda: found)
    choice = choose(CPU)
    assert choice.precision == resolve("auto", CPU) == precision
    assert part in choice.reason and processor_name() in choice.reason


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_auto_on_a_gpu_follows_its_compute_capability(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = choose(torch.device("cuda"))
    assert choice.precision == precision and "a card" in choice.reason


def test_emulated_bfloat16_is_given_when_asked_for_and_warned_of_once(monkeypatch, capsys):
    monkeypatch.setattr(device, "bfloat16_instructions", lambda: ())
    monkeypatch.setattr(device, "emulation_ratio", lambda device: 7.25)
    device._warn.cache_clear()
    assert [resolve("bf16", CPU) for _ in range(3)] == ["bf16"] * 3
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: precision bf16") and "7.2 times as long" in line
    assert resolve("fp32", CPU) == "fp32" and not capsys.readouterr().err


def test_native_bfloat16_is_not_warned_of(monkeypatch, capsys):
    monkeypatch.setattr(device, "bfloat16_instructions", lambda: ("AMX",))
    device._warn.cache_clear()
    assert resolve("bf16", CPU) == "bf16" and not capsys.readouterr().err


def test_the_ratio_is_a_measurement():
    assert 0.01 < emulation_ratio("cpu") < 1000


def test_a_device_that_is_not_here_is_refused():
    assert find_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert find_device("auto") == CPU
        with pytest.raises(ValueError, match="device: no CUDA device here"):
            find_device("cuda")


@pytest.mark.parametrize(("given", "found"), [(None, "passive"), ("active", "active")])
def test_idle_threads_sleep_unless_told_otherwise(given, found):
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given:
        env["OMP_WAIT_POLICY"] = given
    for module in ("threadweaver.command", "bench.environment"):
        code = f"import os, {module}; print(os.environ['OMP_WAIT_POLICY'])"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == found, done.stderr
