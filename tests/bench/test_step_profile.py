"""`python -m bench step`: one engine step by kernel."""

import json

import pytest

from bench.__main__ import main


def test_a_profile_has_every_kernel_of_a_step_and_what_the_step_costs_beside_them(tmp_path, capsys):
    path = tmp_path / "step.json"
    assert main(["step", "--threads", "2", "--prompt", "20", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    step, truncated = written["step"], written["truncated_step"]
    assert (truncated["sampling"]["top_k"], truncated["sampling"]["top_p"]) == (20, 0.95)
    assert truncated["ms"] > 0 and truncated["kernels"]
    counts = step["counts"]
    assert counts["steps"] == counts["copies_to_device"] == counts["copies_to_host"] == 50
    assert counts["captures"] == counts["casts"] == 0
    assert sum(row["share"] for row in step["kernels"]) == pytest.approx(1)
    assert step["launches"] > 10 and step["us"] > 0 and step["ms"] > 0
    assert any("softmax" in r["kernel"] or "mm" in r["kernel"] for r in step["kernels"])
    out = capsys.readouterr().out
    assert f"{step['ms']:.2f} ms a step" in out and f"{truncated['ms']:.2f} ms a step" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads is 0"),
        (["--prompt", "-1"], "--prompt is -1"),
        (["--model", "70B"], "70B"),
        (["--jsn", "x"], "json"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_in_one_line(arguments, message, capsys):
    assert main(["step", *arguments]) == 2
    assert message in capsys.readouterr().err
