"""GGUF files: transformers loads them, and parses one several times for it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within the context, keep what the package gguf makes of a file.

    transformers reads the whole header for the config, the tokenizer and the weights, and makes a
    table of all tensor names for every module of the model.
    """
    if importlib.util.find_spec("gguf") is None:  # which transformers says in a better place
        yield
        return
    gguf: Any = importlib.import_module("gguf")
    own = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(cache, own)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = own
