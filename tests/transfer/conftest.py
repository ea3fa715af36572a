"""Fixtures: sessions on a tiny model with a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from npt_fast.transfer.session import Session
from tests.transfer.sessions import new_session


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return new_session(tmp_path / "checkpoint")


@pytest.fixture
def two(session: Session) -> Session:
    """A session with modulations a and b on its shelf."""
    session.extract("a", "first")
    session.extract("b", "second thing", position=2)
    return session
