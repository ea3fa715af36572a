"""Silence transformers and huggingface_hub: our own errors say what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from npt_fast.hub import quiet_hub


def silence() -> None:
    """Turn warnings and progress bars of the libraries off for the rest of the process."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


@contextmanager
def quiet() -> Iterator[None]:
    """Turn them off within the block; afterwards they are as the caller had them."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    with quiet_hub():  # around the others: transformers switches the Hub's bars with its own
        silence()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
