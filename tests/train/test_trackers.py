"""Trackers get the figures of metrics.jsonl under its names, and never end a run."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from .conftest import Run


class FakeService(SimpleNamespace):
    """A stand-in for the package wandb or trackio.

    Attributes:
        fails: the call that raises an error: init, log or finish.
    """

    def __init__(self, fails: str | None = None):
        super().__init__(fails=fails, started=[], logged=[], finished=0)

    def _maybe_fail(self, call: str) -> None:
        if call == self.fails:
            raise ConnectionError("no route\nto the host")

    def init(self, **options: Any) -> FakeService:
        self._maybe_fail("init")
        self.started.append(options)
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self._maybe_fail("log")
        self.logged.append((step, figures))

    def finish(self) -> None:
        self._maybe_fail("finish")
        self.finished += 1


@pytest.fixture
def install(monkeypatch):
    def install(name: str, fails: str | None = None) -> FakeService:
        module = FakeService(fails)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def track(run: Run, *names: str) -> Run:
    run.settings["report"]["trackers"] = list(names)
    return run


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_every_figure_under_the_name_of_metrics_jsonl(new_run, install, name):
    module, run = install(name), track(new_run(), name)
    assert run() == 0
    for (step, figures), record in zip(module.logged, run.metrics(), strict=True):
        timed = {k for k in figures if "second" in k}
        assert step == record.pop("step")
        record.pop("epoch")
        assert {k: v for k, v in figures.items() if k not in timed} == record
    [options] = module.started
    assert options["project"] == "threadweaver" and options["resume"] == "allow"
    assert options["config"]["optimization"]["max_steps"] == 6
    assert module.finished == 1
    assert not list(run.folder.glob("events.out.*"))


def test_tensorboard_has_the_same_names(new_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = new_run()
    assert run() == 0
    events = EventAccumulator(str(run.folder))
    events.Reload()
    records = run.metrics()
    names = {k for r in records for k in r} - {"step", "epoch"}
    assert {tag for tag in events.Tags()["scalars"] if "second" not in tag} == names
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in records]


def test_a_resumed_run_goes_on_under_its_own_id(new_run, install, monkeypatch):
    from threadweaver.train.sft import SFTTrainer

    module, run = install("wandb"), track(new_run(), "wandb")
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "finish", lambda self: exec("raise KeyboardInterrupt"))
        assert run() == 130
    assert run("--resume") == 0
    first, second = module.started
    assert first["id"] == second["id"] and len(first["id"]) == 12


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_given_up_with_one_warning(new_run, install, capsys, call):
    module, run = install("trackio", fails=call), track(new_run(), "trackio", "tensorboard")
    assert run() == 0
    shown = capsys.readouterr()
    warnings = [line for line in (shown.out + shown.err).splitlines() if "trackio" in line]
    assert len(warnings) == 1
    assert "trackio failed (ConnectionError: no route to the host)" in warnings[0]
    assert len(run.metrics()) == 6 and list(run.folder.glob("events.out.*"))
    assert len(module.logged) == (6 if call == "finish" else 0)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_the_run_starts(
    new_run, monkeypatch, fails, name
):
    monkeypatch.setitem(sys.modules, name, None)
    run = track(new_run(), name)
    assert f"report.trackers: {name} cannot be used" in (line := fails(run(), 2))
    assert f"pip install {name}" in line
    assert not run.folder.exists()


def test_an_unknown_tracker_lists_those_that_there_are(new_run, fails):
    line = fails(track(new_run(), "mlflow")(), 2)
    assert "report.trackers" in line and "trackio" in line


def test_a_run_without_trackers_writes_metrics_alone(new_run):
    run = track(new_run())
    assert run() == 0
    assert len(run.metrics()) == 6 and not list(run.folder.glob("events.out.*"))
