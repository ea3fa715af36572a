"""Fixtures for tests of checkpoints."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from npt_fast.checkpoint import linux
from npt_fast.checkpoint.source_file import SourceFile
from tests.checkpoint.merging import FORMS, merged
from tests.checkpoints import trained_checkpoint


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every read of tensor data fail."""

    def windows(self: SourceFile, *arguments: Any) -> Iterator[bytes]:
        raise AssertionError(f"read data of {self.path}")

    monkeypatch.setattr(SourceFile, "windows", windows)


@pytest.fixture
def no_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate a kernel or file system without renameat2."""

    def refuse(folder: int, old: str, new: str, flags: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(linux, "rename", refuse)


@pytest.fixture(params=["renameat2", "no renameat2"])
def either_kernel(request: pytest.FixtureRequest) -> None:
    if request.param == "no renameat2":
        request.getfixturevalue("no_renameat2")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Layer 11 after 3 steps, and layer 13 after 5 and its warm-up, with other ranks."""
    return [
        trained_checkpoint(tmp_path / "a", 11, steps=3, num_ranks=2),
        trained_checkpoint(tmp_path / "b", 13, steps=5, rank=6, numpy_lr=True),
    ]


@pytest.fixture(params=FORMS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return merged(tmp_path, **FORMS[request.param])
