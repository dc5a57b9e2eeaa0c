"""Where there is no GPU, Triton runs in its interpreter and tests that need a GPU are skipped."""

import itertools
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which any test file may be the one to do.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars_of_transformers():
    """Tests that save a model and then read a command's stderr must not find its bar there."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture
def ticking_clock(monkeypatch):
    """The clock of threadweaver.progress goes on a second at each look: all work is long."""
    monkeypatch.setattr("threadweaver.progress.monotonic", itertools.count().__next__)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
