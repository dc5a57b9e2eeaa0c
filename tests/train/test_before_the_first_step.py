"""What can be known before the first step is refused before it, and can then be repaired."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml

from threadweaver.train import pipeline
from threadweaver.train.__main__ import main
from threadweaver.train.config import ConfigError, config_of, parser_of
from threadweaver.train.run_dir import check_same_config, write_config
from threadweaver.train.sft import SFTTrainer
from threadweaver.train.stages import PipelineConfig

from .easy_task import pipeline_settings, write_task

HUGE = "100000000000000000000000"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a pipeline that must not take a step."""
    task_file = write_task(tmp_path / "seven.jsonl")
    folder = tmp_path / "run"

    def never(self):
        raise AssertionError("it took a step")

    def run(*options: str) -> int:
        monkeypatch.setattr(SFTTrainer, "train_step", never)
        config = tmp_path / "settings.yaml"
        config.write_text(yaml.safe_dump(pipeline_settings(folder, task_file)))
        return main(["pipeline", "--config", str(config), *options])

    return run


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("self_train.problems", "1000", "self_train.problems: "),
        ("self_train.rollouts.engine.kv_gigabytes", "1e-5", "self_train.rollouts: "),
        ("self_train.rollouts.generation.max_threads", "0", "self_train.rollouts: "),
        ("self_train.optimization.batch_tokens", "2", "self_train.rollouts: none of 12 prompts"),
        ("rl.rollouts.engine.kv_gigabytes", "1e-5", "rl.rollouts: "),
        ("rl.rollouts.engine.kv_gigabytes", "1e9", "GB of memory in all"),
        ("evaluate.engine.kv_gigabytes", "1e-5", "evaluate: "),
        ("evaluate.generation.max_tokens", "0", "evaluate: "),
        ("rl.policy.kl", "-1", "rl.policy.kl is -1"),
        ("sft.optimization.batch_tokens", "2", "optimization.batch_tokens"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(
    start, fails, tmp_path, option, value, message
):
    assert message in fails(start(f"--{option}", value), 2)
    assert not (tmp_path / "run").exists()


def test_prompts_that_do_not_fit_are_counted_before_the_first_step(start, tmp_path, capsys):
    path = tmp_path / "seven.jsonl"
    rows = [{"question": f"{i}" + 600 * "x", "ground_truth": "7"} for i in range(20)]
    long = "".join(json.dumps(row) + "\n" for row in rows)
    sft = tmp_path / "sft.jsonl"
    sft.write_text(path.read_text())
    path.write_text(path.read_text() + long)
    options = ["--self_train.problems", "null", "--evaluate.problems", "15"]
    with pytest.raises(AssertionError, match="it took a step"):
        start("--sft.data", str(sft), *options)
    lines = capsys.readouterr().out.splitlines()
    for section in ("evaluate", "self_train.rollouts", "rl.rollouts"):
        assert any(x.startswith(f"{section}: ") and "prompts are skipped" in x for x in lines)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sft.optimization.learning_rate", "-1"),
        ("sft.optimization.weight_decay", ".inf"),
        ("sft.demonstrations", "0"),
        ("self_train.optimization.epochs", HUGE),
        ("self_train.problems", "-3"),
        ("self_train.rollouts.chunk", "1000001"),
        ("self_train.rollouts.engine.page_size", "0"),
        ("rl.optimization.learning_rate", ".inf"),
        ("rl.optimization.updates", "129"),
        ("rl.rollouts.samples", HUGE),
        ("rl.rollouts.engine.kv_gigabytes", ".nan"),
        ("rl.rollouts.engine.max_sequences", HUGE),
        ("rl.rollouts.generation.sampling.top_p", "0"),
        ("rl.reward.rho", "-1"),
        ("evaluate.problems", "0"),
        ("evaluate.engine.kv_gigabytes", "-1"),
        ("compute.threads", "100000"),
        ("report.checkpoint_every", "0"),
        ("task.problems", HUGE),
        ("seed", HUGE),
    ],
)
def test_a_refused_setting_has_its_whole_name(name, value):
    parser = parser_of(PipelineConfig)
    settings = parser.parse_args(["--run_dir", "r", "--model.path", "m", f"--{name}", value])
    with pytest.raises(ConfigError, match=rf"^{name.replace('samples', '(samples|problems)')} is "):
        config_of(PipelineConfig, settings)


@pytest.mark.parametrize("run_dir", ["", "x" * 5000, "a\0b"])
def test_a_name_that_no_folder_can_have_is_refused(new_run, fails, run_dir):
    run = new_run()
    run.settings["run_dir"] = run_dir
    assert len(fails(run(), 2)) < 3000


def config_in(folder: Path, **settings) -> PipelineConfig:
    """Settings of a pipeline, some replaced by dotted name."""
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    fixed = ["--run_dir", str(folder), "--model.path", "m", "--compute.precision", "fp32"]
    return config_of(PipelineConfig, parser_of(PipelineConfig).parse_args([*fixed, *options]))


@pytest.mark.parametrize(
    "name",
    [
        "rl.rollouts.engine.kv_gigabytes",
        "self_train.rollouts.engine.max_sequences",
        "evaluate.generation.max_tokens",
        "compute.threads",
        "report.keep_checkpoints",
    ],
)
def test_what_does_not_reach_the_weights_may_change(tmp_path, name):
    write_config(config_in(tmp_path), None)
    check_same_config(config_in(tmp_path, **{name: 3}))


def test_data_may_lie_elsewhere_and_a_task_stays_a_task(tmp_path):
    was = {"task.name": "/gone/folder", "sft.data": "/gone/t.jsonl"}
    write_config(config_in(tmp_path, **was), None)
    data = tmp_path / "data"
    data.mkdir()
    for moved in (str(data), "p.parquet", f"{data}/*.json"):
        check_same_config(config_in(tmp_path, **{"task.name": moved, "sft.data": "t"}))
    with pytest.raises(ConfigError, match=r"task\.name is multiplication, but"):
        check_same_config(config_in(tmp_path, **{**was, "task.name": "multiplication"}))
    with pytest.raises(ConfigError, match=r"sft\.data is None, but .* with /gone/t\.jsonl"):
        check_same_config(config_in(tmp_path, **{"task.name": "/gone/folder"}))
    write_config(config_in(tmp_path), None)
    with pytest.raises(ConfigError, match=r"task\.name is p\.jsonl, but .* with multiplication"):
        check_same_config(config_in(tmp_path, **{"task.name": "p.jsonl"}))


def test_settings_of_a_stage_that_has_not_begun_may_change(tmp_path):
    write_config(config_in(tmp_path), None)
    (tmp_path / "sft/checkpoints/step-1").mkdir(parents=True)

    def find_state(**settings):
        pipeline.Pipeline(config_in(tmp_path, **settings), None).find_state()  # type: ignore

    find_state(**{"rl.optimization.steps": 3, "self_train.rollouts.samples": 2})
    with pytest.raises(ConfigError, match=r"sft.optimization.epochs is 3, but .* with 8, and it"):
        find_state(**{"sft.optimization.epochs": 3})
    (tmp_path / "rl/checkpoints/step-1").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"reaches the weights.*may change: .*rl\.rollouts\.eng"):
        find_state(**{"rl.optimization.steps": 3})
    find_state(**{"self_train.rollouts.samples": 2})


def test_checkpoints_that_will_not_fit_on_the_disk_are_refused(new_run, fails, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    run = new_run()
    line = fails(run(), 2)
    assert "0.0 GB free, and 3 checkpoints of 0.0 GB are to come" in line
    assert not run.folder.exists()
    assert run("--report.checkpoint_every", "6") == 0  # one, and there is room for that


def test_a_stage_that_was_stopped_says_how_to_continue_the_pipeline(
    start, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(SFTTrainer, "_take_steps", lambda self: 15)
    assert start() == 143
    line = capsys.readouterr().out.splitlines()[-1]
    config = tmp_path / "run" / "config.yaml"
    assert line.endswith(f"python -m threadweaver.train pipeline --config {config} --resume")


def test_data_that_is_not_there_is_refused_before_the_model_is_loaded(
    new_run, fails, tmp_path, monkeypatch
):
    def never(*_):
        raise AssertionError("it made a model")

    monkeypatch.setattr("threadweaver.train.trainer.build_passes", never)
    gone = str(tmp_path / "gone.jsonl")
    for option in ("--data.train", "--data.validation", "--evaluate.data"):
        assert f"{gone}: no such file" in fails(new_run("sft")(option, gone), 2)


def test_settings_beside_a_run_are_none_of_a_whole_run(tmp_path, monkeypatch):
    """Another model is refused, also where somebody's config.yaml lies beside the run."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("")
    write_config(config_in(Path("run")), None)
    with pytest.raises(ConfigError, match=r"model\.path is other, but run/config\.yaml was made"):
        check_same_config(config_in(Path("run"), **{"model.path": "other"}))


def test_a_resumed_pipeline_checks_prompts_under_its_template(start, monkeypatch):
    seen = []

    def look(self, model, codec):
        seen.append(codec.encode_prompt("<Thread>"))
        raise AssertionError("it looked")

    monkeypatch.setattr(pipeline.Pipeline, "_check_stages_of", look)
    for is_resumed in (False, True):
        if is_resumed:  # SFT is finished
            monkeypatch.setattr(pipeline.Pipeline, "_prepare", lambda *_: None)
            monkeypatch.setattr(pipeline.Pipeline, "_checkpoint", lambda *_: None)
        with pytest.raises(AssertionError, match="it looked"):
            start("--template.use", "none")
    fresh, resumed = seen
    assert resumed == fresh and len(fresh) == 1  # taken as it stands: the tag


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("data.train: x: no such file", "sft.data: x: no such file"),
        ("loss is 3, but x was made with 2", "sft.loss is 3, but x was made with 2"),
        ("optimization.epochs is 0", "sft.optimization.epochs is 0"),
        ("data/run/sft/state: cannot be read", "data/run/sft/state: cannot be read"),
        ("data.run/sft/state: cannot be read", "data.run/sft/state: cannot be read"),
        ("data.train/sft/state: cannot be read", "data.train/sft/state: cannot be read"),
    ],
)
def test_a_setting_of_a_stage_gets_its_name_in_the_pipeline_and_a_path_stays(
    start, fails, monkeypatch, error, said
):
    monkeypatch.setattr(SFTTrainer, "load", MagicMock(side_effect=ConfigError(error)))
    assert fails(start(), 2) == f"error: {said}\n"
