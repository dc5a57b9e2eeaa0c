import io

from rich.console import Console

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


def test_on_a_terminal_progress_is_a_bar_with_speed_and_time_left():
    text = shown(terminal=True)
    assert "5/5" in text and "loss 0.2000" in text and "10 tokens/s" in text
    assert "step 2/5" not in text
