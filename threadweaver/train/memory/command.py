"""What `--plan` prints."""

from __future__ import annotations

from rich.console import Console

from threadweaver.device import SHARE_KEPT_FREE
from threadweaver.progress import print_line
from threadweaver.train.config import RunConfig
from threadweaver.train.memory.advice import advice
from threadweaver.train.memory.plan import Part, Phase, Plan
from threadweaver.train.memory.planner import Planner


def show_plan(config: RunConfig, console: Console) -> int:
    """Shows what a run will hold in memory, before anything is loaded, and, if it does not fit,
    with which settings it would. Returns the exit code: 0 if it fits, else 2.

    Raises:
        ConfigError: settings that cannot be.
    """
    planner = Planner(config)
    plan = planner.plan(config)
    for phase in plan.phases:
        _show(phase, console)
    print_line(console, _verdict(plan))
    if plan.fits:
        return 0
    if (found := advice(planner, config)) is None:
        print_line(
            console,
            "no setting that --plan tries makes it fit: take a smaller model, more ranks "
            "(compute.ranks), or train adapters (model.lora)",
        )
    else:
        changes, changed = found
        options = " ".join(map(str, changes))
        print_line(console, f"it fits, in {_gb(changed.fullest.total)} GB, with: {options}")
    return 2


def _show(phase: Phase, console: Console) -> None:
    print_line(console, phase.title)
    summed = sum(part.bytes for part in phase.parts)
    rows = list(phase.parts)
    if phase.total > summed:
        rows.append(Part("what runs", phase.total - summed))
    elif phase.total < summed:
        rows.append(Part("not at the same time", phase.total - summed))
    rows.append(Part("in all", phase.total))
    for part in rows:
        note = f"  ({part.note})" if part.note else ""
        print_line(console, f"  {part.name:<22} {_gb(part.bytes):>9} GB{note}")
    if phase.host:
        print_line(console, f"  {'on the host':<22} {_gb(phase.host):>9} GB")


def _verdict(plan: Plan) -> str:
    target, most = plan.target, plan.fullest.total
    verdict = "fits" if plan.fits else "does not fit"
    device = target.device if target.ranks == 1 else f"each of {target.ranks} {target.device} ranks"
    return (
        f"{verdict}: at most {_gb(most)} GB on {device}, which has {_gb(target.memory)} GB, "
        f"{SHARE_KEPT_FREE:.0%} of it kept free for libraries and what an allocator cannot use"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f}"
