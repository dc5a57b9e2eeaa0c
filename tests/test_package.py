"""What is installed: the files of both distributions, the extras, and the scripts."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from threadweaver.__main__ import MODULES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Top-level modules of what the extra `train` brings.
TRAIN_MODULES = (
    *("datasets", "jsonargparse", "matplotlib", "rich"),
    *("safetensors", "tensorboard", "transformers", "yaml"),
)


def run(*command, cwd=ROOT, **env):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )


def run_bare(runner, target):
    """runpy.RUNNER(TARGET) where nothing that the extra `train` brings can be imported."""
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({TRAIN_MODULES}))
sys.argv = [{target!r}]
runpy.{runner}({target!r}, run_name="__main__")
"""
    return run(sys.executable, "-c", code, PYTHONPATH=str(ROOT))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The files of the source distribution, and of the wheel but for the compiled module."""
    folder = tmp_path_factory.mktemp("distributions")
    base = ("egg_info", "--egg-base", folder)
    done = run(sys.executable, "setup.py", "-q", *base, "build_py", "--build-lib", folder / "wheel")
    assert done.returncode == 0, done.stderr
    listed = (folder / "threadweaver.egg-info" / "SOURCES.txt").read_text().splitlines()
    wheel = [path for path in (folder / "wheel").rglob("*") if path.is_file()]
    return set(listed), {path.relative_to(folder / "wheel").as_posix() for path in wheel}


def files(*patterns):
    return {
        path.relative_to(ROOT).as_posix()
        for pattern in patterns
        for path in ROOT.glob(pattern)
        if "__pycache__" not in path.parts
    }


def test_the_source_distribution_holds_all_that_builds_and_tests_the_package(distributions):
    source, _ = distributions
    wanted = files("csrc/**/*.*", "configs/*.yaml", "examples/**/*.*", "tests/**/*.py", "*.txt")
    wanted |= {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py"}
    assert wanted <= source
    assert not [name for name in source if name.endswith((".so", ".cubin", ".pyc"))]


def test_the_wheel_holds_both_packages_with_their_types(distributions):
    _, wheel = distributions
    wanted = files("tw_kernels/**/*.py", "threadweaver/**/*.py", "threadweaver/view/pages/*")
    wanted |= files("threadweaver/annotate/prompts/*.md")
    wanted |= {"tw_kernels/py.typed", "tw_kernels/_C.pyi", "threadweaver/py.typed"}
    assert wanted <= wheel
    assert {name.partition("/")[0] for name in wheel} == {"tw_kernels", "threadweaver"}


def test_tw_kernels_needs_torch_and_numpy_alone():
    assert {re.split(r"[^\w-]", name)[0] for name in PROJECT["dependencies"]} == {"numpy", "torch"}
    done = run_bare("run_path", str(ROOT / "examples" / "attention.py"))
    assert done.returncode == 0 and done.stdout.startswith("out (6, 4, 64)"), done.stderr


@pytest.mark.parametrize("module", sorted(set(MODULES.values())))
def test_a_command_without_its_extra_says_so_in_one_line(module):
    done = run_bare("run_module", module)
    assert done.returncode == 2 and "pip install 'threadweaver[train]'" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_is_saved_and_loaded_with_the_extra_train_alone(tmp_path):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["accelerate", "gguf", "triton", "math_verify", "reasoning_gym"]))
from threadweaver.model import build_tokenizer, load_model, new_model, save_model
tokenizer = build_tokenizer()
sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
arch = dict(model_type="llama", hidden_size=16, intermediate_size=16, **sizes)
save_model(new_model(tokenizer, arch), tokenizer, {str(tmp_path)!r})
load_model({str(tmp_path)!r})
"""
    done = run(sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_messages_name_only_extras_that_there_are():
    named = {
        extra
        for path in files("tw_kernels/**/*.py", "threadweaver/**/*.py", "bench/*.py")
        for extra in re.findall(r"threadweaver\[([\w,]+)\]", (ROOT / path).read_text())
    }
    assert "train" in named and named <= set(EXTRAS)


def test_every_command_of_the_script_is_a_module_that_runs():
    assert PROJECT["scripts"] == {"threadweaver": "threadweaver.__main__:main"}
    for module in MODULES.values():
        spec = importlib.util.find_spec(module)
        assert spec is not None
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__") is not None


def test_the_script_passes_arguments_on():
    done = run(sys.executable, "-m", "threadweaver", "tasks", "multiplication", "--nonsense", "1")
    assert done.returncode == 2 and "nonsense" in done.stderr
    done = run(sys.executable, "-m", "threadweaver", "trian")
    assert done.returncode == 2
    assert done.stderr == "error: unknown command 'trian': did you mean 'train'?\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_each_distribution_installs_into_an_empty_environment(tmp_path, monkeypatch, kind):
    """Bare, the kernels work and the trainer says what it lacks; with `train` it has its --help."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # pip takes what is there for installed
    python, constraints = tmp_path / "env" / "bin" / "python", ROOT / "constraints.txt"
    venv.create(tmp_path / "env", with_pip=True)

    def install(*arguments):
        done = run(python, "-m", "pip", "install", "-q", "-c", constraints, *arguments)
        assert done.returncode == 0, done.stderr

    install("build")
    done = run(python, "-m", "build", f"--{kind}", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    distribution = next(tmp_path.glob("threadweaver-*"))
    install("torch")
    install(distribution)
    done = run(python, ROOT / "examples" / "attention.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(python, "-m", "threadweaver.train", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'threadweaver[train]'" in done.stderr
    install(f"{distribution}[train]")
    done = run(tmp_path / "env" / "bin" / "threadweaver", "train", "sft", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--data.train" in done.stdout, done.stderr
