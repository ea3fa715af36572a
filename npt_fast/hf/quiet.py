"""Silence transformers and huggingface_hub: our own errors say what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging


def silence() -> None:
    """Turn warnings and progress bars of the libraries off for the rest of the process."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


@contextmanager
def quiet() -> Iterator[None]:
    """Turn them off within the block; afterwards they are as the caller had them."""
    transformers_verbosity = transformers_logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    silence()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(transformers_verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        # each of the two switches the Hub's bars as well, so these come last
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_bars:
            enable_progress_bars()
        else:
            disable_progress_bars()
