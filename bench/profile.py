"""Time of our peers by kernel: `python -m bench profile SUITE [--json FILE]`.

Each of our peers is called a few times on each setup (a long call once), after a warm-up, under
PyTorch's profiler; options are those of the suite. A line of the table is one kernel of one call:

    us          median microseconds on the device; on a CPU, of an operator with all that it calls
    share       fraction of the time of all lines together
    registers, shared, grid, block, occupancy
                of a launch on CUDA: registers per thread, bytes of shared memory per block, sizes
                of grid and block, estimated occupancy of a multiprocessor in %
    spills      bytes of registers that Triton's compiler spilled to memory; the maximum over the
                kernels of that name in this process

Without --json no profiler is attached; one call runs between cudaProfilerStart and
cudaProfilerStop, for Nsight Compute:

    ncu --profile-from-start off --clock-control none python -m bench profile decode --device cuda
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity

from bench.environment import environment
from bench.record import write_json
from bench.running import show_on
from bench.selection import Selection, select
from bench.suite import SUITES, Options, Peer, Row, Setup, Skip, Suite, UsageError, load_suite
from bench.table import console
from threadweaver.command import explain, fail
from threadweaver.progress import Status

CALLS = 5
LONG = 0.2  # seconds; a longer call is profiled once: its kernels are many
LEAST_SHARE = 0.01  # of a kernel that the table shows
KERNEL_NAME = 60  # characters of a kernel's name in the table
# Entry of a row -> the profiler's name for that property of a launch.
LAUNCH = {
    "registers": "registers per thread",
    "shared": "shared memory",
    "grid": "grid",
    "block": "block",
    "occupancy": "est. achieved occupancy %",
}
FIGURES = ("launches", "us", "share", *LAUNCH, "spills")


def kernels(call: Callable[[int], Any], input_sets: int, device: str) -> list[Row]:
    """A row for each kernel that the profiler saw in a call, by decreasing share of the time."""
    start = perf_counter()
    call(0)
    _synchronize(device)
    calls = CALLS if perf_counter() - start <= LONG else 1
    cuda = device == "cuda"
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(calls):
            call(i % input_sets)
        _synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    by_name: dict[str, list[dict]] = {}
    for event in events:
        if event.get("cat") == ("kernel" if cuda else "cpu_op"):
            by_name.setdefault(event["name"], []).append(event)
    total = sum(event["dur"] for events in by_name.values() for event in events)
    spills = triton_spills()
    rows = [
        {
            "kernel": name,
            "launches": len(events) / calls,
            "us": statistics.median(event["dur"] for event in events),
            "share": sum(event["dur"] for event in events) / total,
            **{entry: events[-1].get("args", {}).get(key) for entry, key in LAUNCH.items()},
            "spills": spills.get(name),
        }
        for name, events in by_name.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])


def triton_spills() -> dict[str, int]:
    """Kernel -> bytes of spilled registers, of the kernels that our Triton modules have launched in
    this process."""
    jit = sys.modules.get("triton.runtime.jit")
    spills: dict[str, int] = {}
    ours = [m for n, m in list(sys.modules.items()) if n.startswith("tw_kernels") and "triton" in n]
    for function in (f for module in ours for f in vars(module).values()):
        if jit and isinstance(function, jit.JITFunction):
            for launched, *_ in function.device_caches.values():
                for kernel in launched.values():
                    if kernel.module is not None:  # else compiled, but never loaded
                        spills[kernel.name] = max(spills.get(kernel.name, 0), kernel.n_spills)
    return spills


def profile(suite: Suite, selection: Selection, options: Options) -> Iterator[Row]:
    """Rows of each of our peers on each setup. Without a result file it makes the calls and yields
    nothing."""
    status = Status(Console(stderr=True))
    while selection.setups:
        with contextlib.closing(selection.setups.pop(0)) as setup, status:
            show = show_on(status, suite, setup)
            for peer in selection.peers:
                if peer.ours:
                    show(f"profiling {peer.name}", None)
                    yield from _profile_peer(peer, setup, options)


def _profile_peer(peer: Peer, setup: Setup, options: Options) -> Iterator[Row]:
    try:
        call = peer.prepare(setup)
    except Skip:
        return
    for i in range(setup.input_sets):
        call(i)
    _synchronize(options.device)
    if options.json is None:
        with (
            torch.cuda.profiler.profile() if options.device == "cuda" else contextlib.nullcontext()
        ):
            call(0)
            _synchronize(options.device)
        return
    for row in kernels(call, setup.input_sets, options.device):
        yield {**setup.key, "peer": peer.name, **row}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(rows: Sequence[Row]) -> Table:
    """The kernels with at least LEAST_SHARE of the time of their call."""
    names = [name for name in ("case", "dtype", "pass", "peer", "kernel") if name in rows[0]]
    figures = [name for name in FIGURES if any(row[name] is not None for row in rows)]
    out = Table()
    for name in names:
        out.add_column(name, overflow="fold")
    for name in figures:
        out.add_column(name, justify="right")
    for row in rows:
        if row["share"] >= LEAST_SHARE:
            cells = (str(row[name])[:KERNEL_NAME] for name in names)
            out.add_row(*cells, *(_show(row[name]) for name in figures))
    return out


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    name = arguments[0] if arguments else ""
    if name in ("--help", "-h"):
        print(__doc__)
        return 0
    if name not in SUITES:
        return fail(f"python -m bench profile SUITE: one of {', '.join(SUITES)}", 2)
    suite = load_suite(name)
    parser = suite.parser(f"python -m bench profile {name}")
    try:
        options = suite.options(**vars(parser.parse_args(arguments[1:])))
        rows = []
        for row in profile(suite, select(suite, options), options):
            rows.append(row)
            if options.json:
                content = {"env": environment(options.device), "suite": name, "kernels": rows}
                write_json(options.json, content)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except (UsageError, OSError) as error:
        return fail(error, 2)
    if rows:
        console().print(table(rows))
    return 0
