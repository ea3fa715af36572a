"""Fixtures of the tests of verbs: a tiny model on disk, a checkpoint of it, our signal handler."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cli.shell.piped import Shell
from tests.training import runs, tiny
from tests.training.runs import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A tiny base model and a text."""
    with runs.place(tmp_path_factory.mktemp("place")) as found:
        yield found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of its layers 1 and 2, untrained."""
    return runs.start(tmp_path_factory.mktemp("checkpoint") / "a", 1, 2)


@pytest.fixture(autouse=True)
def restore_sigterm() -> Iterator[None]:
    """Restore the handler that main() replaces."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base model whose text never ends, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("model")
    base = tiny.save(folder / "base", initializer_range=0.2, eos_token_id=None)
    return base, runs.start(folder / "np", 1, 2)


@pytest.fixture(scope="module")
def bos_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model whose tokenizer puts BOS in front of each text."""
    changes = {"initializer_range": 0.2, "eos_token_id": None, "vocab_size": 258}
    return tiny.save(tmp_path_factory.mktemp("bos") / "base", tiny.bos_tokenizer(), **changes)


@pytest.fixture
def shell(
    files: tuple[Path, Path], capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Shell:
    """`interact` on these files, in a folder of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return Shell(capsys, monkeypatch, *files)


@pytest.fixture
def bos_shell(shell: Shell, bos_base: Path) -> Shell:
    """The same on the model with BOS."""
    return replace(shell, base=bos_base)
