import io

import pytest
from rich.console import Console

from threadweaver import progress
from threadweaver.train.log import MetricsLog, ProgressLog


def record(step: int) -> dict:
    return {"step": step, "loss": 1 / step, "tokens_per_second": 10.0, "seconds": 2.0 * step}


def test_records_of_steps_to_be_redone_and_a_cut_line_are_taken_out(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(record(step))
    log.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    lines = path.read_text().splitlines()
    log = MetricsLog(tmp_path, 2)
    assert log.last == record(2)
    log.write(record(3))
    log.close()
    assert path.read_text().splitlines() == lines[:3]


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(record(1))
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    log.close()


def shown(terminal: bool, log_every: int = 2) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with ProgressLog(console, 0, 5, log_every) as progress:
        for step in range(1, 6):
            extra = {"validation_loss": 0.5} if step == 3 else {}
            progress.update(record(step) | extra)
    return out.getvalue()


def test_without_a_terminal_progress_is_plain_lines():
    lines = shown(terminal=False).splitlines()
    assert [line.split(":")[0] for line in lines if line] == [f"step {n}/5" for n in (2, 3, 4, 5)]
    assert lines[1] == "step 3/5: loss 0.3333, 10 tokens/s, validation 0.5000, 4 s left"


@pytest.mark.parametrize(
    ("seconds", "log_every", "steps"),
    [
        (0.2, 10, [10, 20, 30]),  # quick steps: as often as was asked for
        (2.0, 10, [3, 6, 9, 10, 13, 16, 19, 20, 23, 26, 29, 30]),
        (60.0, 10, list(range(1, 31))),
    ],
)
def test_slow_steps_have_a_line_every_few_seconds_besides(monkeypatch, seconds, log_every, steps):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    with ProgressLog(Console(file=out), 0, 30, log_every) as shown:
        for step in range(1, 31):
            now[0] += seconds
            shown.update(record(step))
    assert [line.split(":")[0] for line in out.getvalue().splitlines()] == [
        f"step {step}/30" for step in steps
    ]


def test_on_a_terminal_progress_is_a_bar_with_speed_and_time_left():
    text = shown(terminal=True)
    assert "5/5" in text and "loss 0.2000" in text and "10 tokens/s" in text
    assert "step 2/5" not in text
