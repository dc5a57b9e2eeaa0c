"""The commands of docs/from-a-model.md, one after the other, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.annotate.problems import save_student
from threadweaver.annotate.__main__ import main as annotate
from threadweaver.evaluate.__main__ import main as evaluate
from threadweaver.train.__main__ import main as train

pytest.importorskip("openai")
pytest.importorskip("math_verify")

ROOT = Path(__file__).parents[2]
QUICK = {
    "annotate": ["--limit", "2"],
    "train": ["--optimization.max_steps", "1", "--compute.precision", "fp32"],
    "eval": ["--n", "2", "--max_tokens", "4", "--kv_gigabytes", "0.01", "--precision", "fp32"],
}
MAINS = {"annotate": annotate, "train": train, "eval": evaluate}


PAGE = (ROOT / "docs" / "from-a-model.md").read_text()


def commands() -> list[str]:
    """Those that run anywhere: the ones that name files of the repository, or the stub's."""
    lines = re.findall(r"^(?:python|threadweaver) .*$", PAGE, re.M)
    return [line for line in lines if "MODEL" not in line]


def test_the_commands_of_the_page_go_from_problems_to_evaluation(tmp_path, monkeypatch, capsys):
    problems, serve, *others = commands()
    student = save_student(tmp_path / "student")
    monkeypatch.chdir(tmp_path)

    def script(line: str) -> list[str]:
        path, *rest = shlex.split(line)[1:]
        return [sys.executable, str(ROOT / path), *rest]

    subprocess.run(script(problems), check=True)
    server = subprocess.Popen(script(serve.replace("8123", "0")), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        url = server.stdout.readline().strip()
        for line in others:
            if line.startswith("python"):
                subprocess.run(script(line), check=True)
                continue
            line = line.replace("http://127.0.0.1:8123/v1", url).replace("smollm2", student)
            line = re.sub(r"\$\((.*?)\)", lambda m: subprocess.getoutput(m[1]).strip(), line)
            command, *arguments = shlex.split(line)[1:]
            assert MAINS[command]([*arguments, *QUICK[command]]) == 0, capsys.readouterr().err
    finally:
        server.kill()
        server.communicate()
    kept = Path("runs/annotate/out/kept.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in kept]
    assert len(rows) == 2 and all(row["acceleration"] > 0.2 for row in rows)
    assert "2 problems" in capsys.readouterr().out
    trained, held_out = (
        {
            json.loads(row)["question"]
            for row in Path(f"runs/annotate/{name}.jsonl").read_text().splitlines()
        }
        for name in ("problems", "held-out")
    )
    assert len(trained) == len(held_out) == 20 and not trained & held_out


def test_the_page_evaluates_the_newest_checkpoint(tmp_path):
    folder = tmp_path / "runs" / "annotate" / "sft" / "checkpoints"
    for step in (50, 900, 1000):
        (folder / f"step-{step}").mkdir(parents=True)
    (newest,) = re.findall(r"\$\((ls .*?)\)", PAGE)
    found = subprocess.run(newest, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == "runs/annotate/sft/checkpoints/step-1000"
