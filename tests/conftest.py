"""Where there is no GPU, Triton runs in its interpreter and tests that need a GPU are skipped."""

import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch

# Inductor's cache does not tell a machine that is held to AVX2 from the same one that is not: code
# compiled for the one corrupted the heap in the other.
CAPABILITY = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
CACHE = Path(tempfile.gettempdir()) / f"torchinductor-{getpass.getuser()}-{CAPABILITY}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which any test file may be the one to do.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars_of_transformers():
    """Tests that save a model and then read a command's stderr must not find its bar there."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
