"""GGUF files, as transformers reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from unittest.mock import patch

from threadweaver.model.files import ModelSource

_LOADING = RLock()  # of one thread at a time: what it puts in its place is seen by all


@contextmanager
def parsed_once(source: ModelSource) -> Iterator[None]:
    """Inside, a model's GGUF file is parsed once, if it is one. transformers parses it anew for the
    config, the tokenizer and the weights, eight times for a model, and a vocabulary of 49,152 takes
    seconds each time."""
    if not source.gguf:
        yield
        return
    try:
        import gguf
    except ImportError:  # transformers says what for
        yield
        return
    with _LOADING, patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)):
        yield
