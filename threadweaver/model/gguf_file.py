"""GGUF files, as transformers reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, a GGUF file is parsed once. transformers parses it anew for the config, the tokenizer
    and the weights, eight times for a model, and a vocabulary of 49,152 takes seconds each time."""
    try:
        import gguf
    except ImportError:  # transformers says what for
        yield
        return
    with patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)):
        yield
