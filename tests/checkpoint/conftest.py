"""Fixtures for tests of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from npt_fast.checkpoint.source_file import SourceFile


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every read of tensor data fail."""

    def windows(self: SourceFile, *arguments: Any) -> Iterator[bytes]:
        raise AssertionError(f"read data of {self.path}")

    monkeypatch.setattr(SourceFile, "windows", windows)
