"""Fixtures that several training tests share."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from npt_fast.training import launch
from tests.forked import forkserver
from tests.training import runs
from tests.training.runs import Place


@pytest.fixture
def offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fail a test that tries to reach the network; libraries would hide the refusal itself."""
    tried = []

    def refuse(*args: Any, **options: Any) -> None:
        tried.append(args)
        raise OSError("offline")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
    yield
    assert not tried


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with runs.place(tmp_path_factory.mktemp("place")) as found:
        yield found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of sampled texts of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "npt_fast"


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes have one thread and share imports, which are most of a short run's time.

    A case of `tests/cli/test_train.py` starts processes as in use.
    """
    monkeypatch.setattr("npt_fast.training.launch.os.cpu_count", lambda: 1)
    forkserver()
    start = partial(start_processes, start_method="forkserver")
    monkeypatch.setattr(torch.multiprocessing, "spawn", start)
    monkeypatch.setattr(launch, "_GRACE", 600.0)  # a loaded machine takes its time to start them


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """All tests here train tiny models."""
