"""A run that was stopped or killed ends as one that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from threadweaver.train import setup
from threadweaver.train.__main__ import main
from threadweaver.train.config import ConfigError, config_of, parser_of
from threadweaver.train.run_dir import check_same_config, check_same_settings, settings_of
from threadweaver.train.same_on_ranks import generator_states, restore_generators
from threadweaver.train.sft import SFTTrainer
from threadweaver.train.stages import PipelineConfig, RLConfig, SelfTrainConfig, SFTConfig


def start(run, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "threadweaver.train", *run.arguments(*options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_steps(run, process: subprocess.Popen, steps: int) -> None:
    metrics = run.folder / "metrics.jsonl"
    for _ in range(30_000):
        if metrics.exists() and metrics.read_text().count("\n") >= steps:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise TimeoutError(f"not {steps} steps in five minutes")


def test_a_run_killed_at_random_times_ends_bit_for_bit_like_one_that_was_not(new_run):
    whole, killed = new_run("whole"), new_run("killed")
    for run in (whole, killed):
        run.settings["optimization"]["max_steps"] = 60
        run.settings["report"] = {"validate_every": 7, "checkpoint_every": 9}
    assert whole() == 0
    rng = random.Random(0)
    for resume in ((), ("--resume",)):
        # More than were there: it has taken back what came after the checkpoint, and gone on.
        steps = (len(killed.metrics()) if resume else 0) + rng.randint(1, 20)
        process = start(killed, *resume)
        wait_for_steps(killed, process, steps)
        time.sleep(rng.random() * 0.05)  # in the midst of a step or of a checkpoint
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert killed("--resume") == 0
    assert killed.metrics() == whole.metrics()
    assert [m["step"] for m in killed.metrics()] == list(range(1, 61))
    assert killed.weights() == whole.weights()
    optimizers = [
        torch.load(run.folder / "checkpoints/step-60/trainer_state.pt")["optimizer"]["state"]
        for run in (whole, killed)
    ]
    for i, moments in optimizers[0].items():
        for name, value in moments.items():
            assert torch.equal(value, optimizers[1][i][name])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_leaves_nothing(new_run, monkeypatch, fails, number):
    run = new_run()
    monkeypatch.setattr(SFTTrainer, "load_data", lambda self: os.kill(os.getpid(), number))
    assert "nothing is lost" in fails(run(), 128 + number)
    assert not run.folder.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_says_how_to_resume_and_sets_the_exit_code(
    new_run, monkeypatch, capsys, number
):
    whole, stopped = new_run("whole"), new_run("stopped")
    assert whole() == 0
    step = SFTTrainer.train_step

    def send_in_third(self, *arguments):
        record = step(self, *arguments)
        if self.steps_done == 2:
            os.kill(os.getpid(), number)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "train_step", send_in_third)
        assert stopped() == 128 + number
    assert [m["step"] for m in stopped.metrics()] == [1, 2, 3]
    assert (stopped.folder / "checkpoints/step-3").is_dir()
    shown = capsys.readouterr().out
    assert f"--config {stopped.folder / 'config.yaml'} --resume" in shown
    assert not (stopped.folder / "summary.json").exists()
    assert stopped("--resume") == 0
    assert stopped.metrics() == whole.metrics()
    assert stopped.weights() == whole.weights()


def test_a_second_signal_stops_at_once(new_run, monkeypatch, fails):
    def send_twice(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    run = new_run()
    monkeypatch.setattr(SFTTrainer, "train_step", send_twice)
    assert "--resume" in fails(run(), 130)


def stop_before(run, monkeypatch, what: str) -> None:
    """Runs until the trainer is about to do something, then dies."""

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, what, die)
        assert run() == 130


@pytest.mark.parametrize("what", ["train_step", "_save", "finish"])
def test_a_run_that_died_before_something_does_it_when_resumed(new_run, monkeypatch, what):
    whole, dead = new_run("whole"), new_run("dead")
    assert whole() == 0
    stop_before(dead, monkeypatch, what)
    assert dead("--resume") == 0
    assert dead.metrics() == whole.metrics()
    assert dead.weights() == whole.weights()
    timed = ("seconds", "tokens_per_second", "checkpoint")
    a, b = ({k: v for k, v in r.summary().items() if k not in timed} for r in (whole, dead))
    assert a == b


def test_records_after_the_checkpoint_are_taken_back(new_run, monkeypatch):
    whole, dead = new_run("whole"), new_run("dead")
    assert whole() == 0
    dead.dies_in_step(6, SFTTrainer, monkeypatch)
    assert len(dead.metrics()) == 5  # one more than the checkpoint at step 4 knows
    with (dead.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert dead("--resume") == 0
    assert dead.metrics() == whole.metrics()


def test_a_finished_run_says_so(new_run, capsys):
    run = new_run()
    assert run() == 0
    weights = run.weights()
    assert run("--resume") == 0
    assert "finished" in capsys.readouterr().out
    assert run.weights() == weights


def test_a_run_dir_that_holds_a_run_is_refused_without_resume(new_run, fails, capsys):
    run = new_run()
    assert run() == 0
    capsys.readouterr()
    assert "holds a run already" in fails(run(), 2)


def test_resume_without_a_run_is_refused(new_run, fails):
    run = new_run()
    line = fails(run("--resume"), 2)
    assert str(run.folder) in line and "leave out --resume" in line


def test_a_run_dir_that_is_a_file_is_refused(new_run, fails):
    run = new_run()
    run.folder.write_text("")
    assert "is a file" in fails(run(), 2)


@pytest.fixture
def stopped(new_run, monkeypatch, capsys):
    """A run with all its steps done and not finished."""
    run = new_run()
    stop_before(run, monkeypatch, "finish")
    capsys.readouterr()
    return run


def test_a_setting_that_reaches_the_weights_cannot_change(stopped, fails):
    line = fails(stopped("--resume", "--optimization.learning_rate", "1e-3"), 2)
    assert "optimization.learning_rate is 0.001" in line and "0.003" in line


@pytest.mark.parametrize(
    ("name", "other"),
    [("template.use", "none"), ("data.max_depth", "2"), ("model.lora.alpha", "8.0")],
)
def test_a_setting_that_a_run_of_an_older_version_lacks_counts_as_its_default(new_run, name, other):
    def config(*options: str) -> SFTConfig:
        run = new_run()
        run.settings["model"] = {**run.settings["model"], "lora": {"rank": 4}}
        arguments = run.arguments(*options)[1:]
        return config_of(SFTConfig, parser_of(SFTConfig).parse_args(arguments))

    saved = settings_of(config())
    del saved[name]
    check_same_settings(config(), saved, Path("made"))
    with pytest.raises(ConfigError, match=f"{name} is {other}, but made was made with"):
        check_same_settings(config(f"--{name}", other), saved, Path("made"))


def test_a_setting_that_does_not_reach_the_weights_may_change(stopped):
    assert stopped("--resume", "--report.keep_checkpoints", "5") == 0


def test_a_checkpoint_of_another_shape_is_refused(stopped, fails):
    """As left by settings changed in between, or by a folder copied from another run."""
    line = fails(stopped("--resume", "--model.arch.hidden_size", "48"), 2)
    assert "model.arch.hidden_size is 48" in line and "with 32" in line and "step-6" in line


def test_a_checkpoint_that_lacks_a_weight_is_refused(stopped, fails):
    file = stopped.folder / "checkpoints/step-6/model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})
    line = fails(stopped("--resume"), 2)
    assert str(file.parent) in line and "model.norm.weight" in line
    assert "delete the folder step-6" in line


def test_weights_that_do_not_fit_the_optimizer_state_are_refused(stopped, new_run, fails):
    other = new_run("other")
    other.settings["model"]["arch"] = {**other.settings["model"]["arch"], "intermediate_size": 96}
    assert other() == 0
    theirs, ours = (r.folder / "checkpoints/step-6" for r in (other, stopped))
    for name in ("model.safetensors", "config.json"):
        (ours / name).write_bytes((theirs / name).read_bytes())
    line = fails(stopped("--resume"), 2)
    assert "trainer_state.pt: made for another model" in line and "_proj" in line


def test_other_data_is_refused(stopped, fails, data_files):
    line = fails(stopped("--resume", "--data.train", str(data_files[1])), 2)
    assert "data.train" in line and str(data_files[1]) in line


def test_the_same_data_under_another_name_is_taken(stopped, tmp_path, data_files):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(data_files[0].read_bytes())
    assert stopped("--resume", "--data.train", str(moved)) == 0


def test_a_resumed_run_takes_the_threads_it_had(stopped, monkeypatch):
    stopped.settings["compute"].pop("threads")
    seen = []
    monkeypatch.setattr(setup.torch, "set_num_threads", seen.append)
    assert stopped("--resume") == 0
    state = torch.load(stopped.folder / "checkpoints/step-6/trainer_state.pt")
    assert seen[0] == state["threads"] == 1


def test_wall_clock_goes_on_where_it_stopped(stopped):
    records = (stopped.folder / "metrics.jsonl").read_text().splitlines()
    before = json.loads(records[-1])["seconds"]
    assert stopped("--resume") == 0
    assert stopped.summary()["seconds"] > before


OLD_CONFIGS = Path(__file__).parent / "old_configs"  # config.yaml as version 0.1.0 wrote it


@pytest.mark.parametrize("kind", [SFTConfig, SelfTrainConfig, RLConfig, PipelineConfig])
def test_the_config_of_a_run_of_version_0_1_0_has_the_settings_of_that_run(kind, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text((OLD_CONFIGS / f"{kind.command}.yaml").read_text())
    parser = parser_of(kind)
    config = config_of(kind, parser.parse_args(["--config", str(path), "--run_dir", str(tmp_path)]))
    check_same_config(config)
    assert settings_of(config)["seed"] == 0
    config.seed = 1
    with pytest.raises(ConfigError, match=r"seed is 1, but .* was made with 0"):
        check_same_config(config)


def test_a_run_of_version_0_1_0_goes_on_bit_for_bit(new_run, monkeypatch, data_files):
    whole, old = new_run("whole"), new_run("old")
    assert whole() == 0
    stop_before(old, monkeypatch, "finish")
    shutil.rmtree(old.folder / "checkpoints/step-6")
    text = (OLD_CONFIGS / "sft.yaml").read_text().replace("RUN", str(old.folder))
    for name, path in zip(("TRAIN", "VALIDATION"), data_files, strict=True):
        text = text.replace(name, str(path))
    config = old.folder / "config.yaml"
    config.write_text(text)
    path = old.folder / "checkpoints/step-4/trainer_state.pt"
    state = torch.load(path)
    torch.save({**state, "settings": dict(flat(yaml.safe_load(text)))}, path)
    assert main(["sft", "--config", str(config), "--resume"]) == 0
    assert old.weights() == whole.weights()
    assert old.summary()["accuracy"] == 0
    evaluate = yaml.safe_load(config.read_text())["evaluate"]
    assert evaluate["generation"]["max_tokens"] == 8
    assert evaluate["engine"]["max_sequences"] == 3
    assert evaluate["engine"]["kv_gigabytes"] == 0.01


FREE = ("run_dir", "compute.device", "compute.threads", "data.train", "data.validation")


def flat(settings: dict, section: str = ""):
    """The settings that a checkpoint of version 0.1.0 holds, by dotted name."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{section}{name}.")
        elif f"{section}{name}" not in FREE and section not in ("report.", "evaluate."):
            yield f"{section}{name}", value


def test_a_run_goes_on_where_fewer_gpus_are_seen(monkeypatch):
    """On a stand-in for a GPU."""
    cuda, state, restored = torch.cuda, torch.get_rng_state(), []
    monkeypatch.setattr(cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(cuda, "get_rng_state_all", lambda: 8 * [state])
    monkeypatch.setattr(cuda, "set_rng_state", restored.append)
    saved = generator_states()
    assert len(saved["cuda_rng"]) == 1
    older = {**saved, "cuda_rng": [state, *7 * [torch.zeros(0)]]}  # of all GPUs
    for of_checkpoint in (saved, older):
        restore_generators(of_checkpoint, seed=0)
    assert len(restored) == 2 and all(got is state for got in restored)
