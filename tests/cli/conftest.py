"""Fixtures of the tests of verbs: a tiny model on disk, a checkpoint of it, our signal handler."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training import runs
from tests.training.runs import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A tiny base model, and text."""
    with runs.place(tmp_path_factory.mktemp("place")) as found:
        yield found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 1 and 2 of it, untrained."""
    return runs.start(tmp_path_factory.mktemp("checkpoint") / "a", 1, 2)


@pytest.fixture(autouse=True)
def restore_sigterm() -> Iterator[None]:
    """main() installs its own handler."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
