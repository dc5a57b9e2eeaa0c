from argparse import ArgumentError
from pathlib import Path

import pytest
import yaml

from threadweaver.command import explain
from threadweaver.train.__main__ import main
from threadweaver.train.config import ConfigError, config_of, parser_of
from threadweaver.train.stages import PipelineConfig, RLConfig, SFTConfig

ROOT = Path(__file__).parents[2]
NEEDED = ["--run_dir", "r", "--data.train", "t.jsonl", "--model.path", "m"]


def parse(*arguments: str) -> SFTConfig:
    parser = parser_of(SFTConfig)
    return config_of(SFTConfig, parser.parse_args([*NEEDED, *arguments]))


def test_defaults_are_the_published_ones():
    o = parse().optimization
    assert (o.epochs, o.learning_rate, o.weight_decay, o.warmup) == (8, 1e-5, 1e-4, 0.05)
    assert (o.betas, o.batch_tokens, o.gradient_clip) == ((0.9, 0.95), 40960, 1.0)


def test_the_defaults_of_rl_are_the_published_ones():
    parser = parser_of(RLConfig)
    config = config_of(RLConfig, parser.parse_args(["--run_dir", "r", "--model.path", "m"]))
    assert (config.rollouts.problems, config.rollouts.samples) == (128, 8)
    o, p = config.optimization, config.policy
    assert (o.steps, o.learning_rate, o.updates) == (350, 1e-6, 1)
    assert (p.advantage, p.clip_low, p.clip_high, p.kl, p.entropy) == ("mean", 0.2, 0.28, 0, 0)
    assert (config.reward.rho, config.reward.clip, config.reward.accel) == (0.5, 0.2, "clipped")
    sampling = config.rollouts.generation.sampling
    assert (sampling.temperature, sampling.top_p) == (1, 1)


def test_options_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optimization: {learning_rate: 3e-4, epochs: 2}\n")
    o = parse("--config", str(file), "--optimization.epochs", "5").optimization
    assert (o.learning_rate, o.epochs) == (3e-4, 5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sft-demo.yaml", SFTConfig),
        ("sft-qwen3-8b.yaml", SFTConfig),
        ("sft-qwen3-8b-lora.yaml", SFTConfig),
        ("demo.yaml", PipelineConfig),
        ("pipeline-qwen3-8b.yaml", PipelineConfig),
        ("pipeline-qwen3-8b-lora.yaml", PipelineConfig),
    ],
)
def test_the_files_in_configs_are_valid(name, kind):
    parser = parser_of(kind)
    settings = parser.parse_args(["--config", str(ROOT / "configs" / name)])
    config = config_of(kind, settings)
    assert Path(config.run_dir).parts[0] == "runs"
    assert (config.model.path is None) != (config.model.arch is None)


def error_of(*arguments: str) -> str:
    with pytest.raises(ArgumentError) as error:
        parse(*arguments)
    return explain(str(error.value), parser_of(SFTConfig).get_defaults())


def test_typo_on_the_command_line_names_the_nearest_setting():
    line = error_of("--optimization.learning_rte", "1e-3")
    assert line == (
        "unknown setting 'optimization.learning_rte': did you mean 'optimization.learning_rate'?"
    )


def test_typo_in_a_file_names_the_nearest_setting(new_run, fails):
    run = new_run()
    run.settings["optimization"]["gradient_clp"] = 2.0
    line = fails(run(), 2)
    assert "'optimization.gradient_clp': did you mean 'optimization.gradient_clip'?" in line


def test_typo_in_a_section_names_the_nearest_setting(new_run, fails):
    run = new_run()
    run.settings["optimisation"] = {"epochs": 3}
    line = fails(run(), 2)
    assert "did you mean 'optimization.epochs'?" in line


def test_a_value_of_the_wrong_type_names_the_setting(new_run, fails):
    assert "optimization.epochs" in fails(new_run()("--optimization.epochs", "many"), 2)


def test_recomputed_layers_are_all_none_or_a_number(new_run, fails):
    for text, value in (("true", True), ("false", False), ("1", 1), ("0", 0)):
        got = parse("--compute.gradient_checkpointing", text).compute.gradient_checkpointing
        assert got == value and type(got) is type(value)
    line = fails(new_run()("--compute.gradient_checkpointing", "some"), 2)
    assert "compute.gradient_checkpointing" in line
    line = fails(new_run()("--compute.gradient_checkpointing", "100"), 2)
    assert "compute.gradient_checkpointing is 100: the model has" in line


def test_a_choice_that_does_not_exist_lists_those_that_do(new_run, fails):
    line = fails(new_run()("--data.loss", "all"), 2)
    assert "data.loss" in line and "completions" in line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("compute: true", "compute is True: it must be a section"),
        ("evaluate: {generation: {max_tokens: null}}", "evaluate.generation.max_tokens is null"),
        ("evaluate: {generation: .nan}", "evaluate.generation is nan: it must be a section"),
    ],
)
def test_a_section_that_is_one_value_or_a_setting_that_is_null_is_named(
    new_run, fails, text, named
):
    run = new_run()
    arguments = run.arguments()
    path = Path(arguments[-1])
    path.write_text(yaml.safe_dump({**run.settings, **yaml.safe_load(text)}))
    assert named in fails(main(arguments), 2)


def test_aliases_that_multiply_a_config_file_are_refused(new_run, fails):
    arguments = new_run().arguments()
    lines = ["x0: &x0 lol"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 12)]
    path = Path(arguments[-1])
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
    assert "aliases stand for more than" in fails(main(arguments), 2)


def test_a_config_file_that_is_not_utf_8_is_an_error_in_one_line(new_run, fails):
    arguments = new_run().arguments()
    path = Path(arguments[-1])
    path.write_bytes(path.read_bytes() + b"seed: \xff\n")
    assert f"{path}: not UTF-8" in fails(main(arguments), 2)


@pytest.mark.parametrize("text", ["seed: [", f"seed: {'9' * 10_000}"])
def test_a_config_file_that_cannot_be_parsed_is_named(new_run, fails, text):
    arguments = new_run().arguments()
    path = Path(arguments[-1])
    path.write_text(f"{path.read_text()}{text}\n")
    assert str(path) in fails(main(arguments), 2)


def test_an_option_whose_name_is_no_text_is_refused(new_run, fails):
    run = new_run()
    run.settings["evaluate"] = {"data": "multiplication", "options": {1: 2}}
    assert "evaluate.options: an option is called 1" in fails(run(), 2)


def test_an_option_for_a_config_file_without_one_is_an_error_in_one_line(fails):
    for arguments in (["sft", "--config"], ["sft", "--config", "--resume"]):
        assert "--config" in fails(main(arguments), 2)


def test_a_missing_config_file_is_named(fails, tmp_path):
    from threadweaver.train.__main__ import main

    path = str(tmp_path / "none.yaml")
    assert path in fails(main(["sft", "--config", path]), 2)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("optimization.epochs", "0"),
        ("optimization.max_steps", "0"),
        ("optimization.learning_rate", "-1"),
        ("optimization.learning_rate", ".nan"),
        ("optimization.betas", "[0.9, 1.0]"),
        ("optimization.warmup", "1.5"),
        ("optimization.gradient_clip", "0"),
        ("compute.threads", "0"),
        ("compute.gradient_checkpointing", "-1"),
        ("report.keep_checkpoints", "0"),
    ],
)
def test_a_value_out_of_range_names_the_setting_and_the_range(setting, value):
    with pytest.raises(ConfigError, match=f"^{setting} is .*: it must be "):
        parse(f"--{setting}", value)


def test_model_is_either_a_path_or_an_architecture():
    with pytest.raises(ConfigError, match="exactly one"):
        parse("--model.arch", "{model_type: qwen3}")
    with pytest.raises(ConfigError, match="exactly one"):
        parse("--model.path", "null")
