"""A pipeline on two ranks, end to end."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.train.easy_task import pipeline_settings, write_task
from tests.train.on_ranks import on_ranks


@pytest.mark.slow
def test_a_pipeline_on_ranks_leaves_what_one_in_one_process_leaves(tmp_path):
    settings = pipeline_settings(tmp_path / "run", write_task(tmp_path / "seven.jsonl"))
    for stage in ("sft", "self_train"):
        settings[stage]["optimization"]["accumulation"] = 2
    settings["report"]["validate_every"] = 3
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(settings))
    ended = on_ranks(["pipeline", "--config", str(path)], tmp_path, 2)
    assert ended.codes == [0, 0], ended.err
    assert ended.out.count("final model: ") == 1
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["stages"]) == ["sft", "self_train", "rl"]
    for stage in summary["stages"]:
        for mode in ("parallel", "sequential"):
            responses = json.loads((folder / f"evaluation/{stage}-{mode}.json").read_text())
            assert len(responses) == summary["stages"][stage][mode]["detail"]["problems"] == 4
    assert summary["stages"]["rl"]["parallel"]["accuracy"] > 0
    assert (folder / "stages.png").exists() and (folder / "rl.png").exists()
    records = [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 5 and all(r["decode_imbalance"] >= 1 for r in records)
    assert [r["step"] for r in records if "validation_speedup" in r] == [3, 5]
    ended = on_ranks(["pipeline", "--config", str(path), "--resume"], tmp_path, 2)
    assert ended.codes == [0, 0] and ended.out.count("this run is finished") == 3
