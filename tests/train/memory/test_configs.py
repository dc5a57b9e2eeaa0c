"""The files in configs for Qwen3-8B fit what they say that they are for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.train.memory.test_plan import QWEN3_8B
from threadweaver.train.__main__ import main

CONFIGS = Path(__file__).parents[3] / "configs"
RANKS = ["--compute.ranks", "8"]


def options_of(name: str, after: str) -> list[str]:
    """The options that the comment at the start of a file names after some words."""
    text = (CONFIGS / name).read_text()
    lines = text.partition(after)[2].split("\n")[1:]
    comments = (line for line in lines if line.startswith("#   "))
    first = next(i for i, line in enumerate(lines) if not line.startswith("#   "))
    words = " ".join(line.strip("#\\ ") for line in list(comments)[:first])
    return re.findall(r"--(?:\w+\.)*optimization\.\w+ \S+|--compute\.\w+ \S+", words)


@pytest.mark.slow  # seconds for each
@pytest.mark.parametrize(
    ("name", "after", "options"),
    [
        ("sft-qwen3-8b.yaml", "On one GPU", []),
        ("sft-qwen3-8b.yaml", "for eight GPUs", RANKS),
        ("sft-qwen3-8b-lora.yaml", None, []),
        ("pipeline-qwen3-8b.yaml", "On one GPU", []),
        ("pipeline-qwen3-8b.yaml", "SFT:", RANKS),
        ("pipeline-qwen3-8b-lora.yaml", None, []),
    ],
)
def test_a_config_fits_the_gpus_that_it_is_for(name, after, options, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    if after:
        found = options_of(name, after)
        assert found
        options = [*options, *" ".join(found).split()]
    kind = name.partition("-")[0]
    fixed = ["--config", str(CONFIGS / name), "--model.path", str(tmp_path), "--plan"]
    code = main([kind, *fixed, "--compute.device_gb", "80", *options])
    out = capsys.readouterr().out
    assert code == 0 and "\nfits: at most" in out, out
    # Whole batches, not parts of them.
    assert "in passes of" not in out
