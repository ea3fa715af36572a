"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data" / "smollm2_135m"


@pytest.fixture
def layer11() -> Path:
    """A real checkpoint: layer 11 of SmolLM2-135M, 800 steps, no training state."""
    return DATA / "layer11" / "checkpoint-800"


@pytest.fixture
def layer13() -> Path:
    """A real checkpoint: layer 13 of SmolLM2-135M, 600 steps, no training state."""
    return DATA / "layer13" / "checkpoint-600"
