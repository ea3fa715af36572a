"""Results as lines."""

from __future__ import annotations

import pytest

from npt_fast.cli.shell.views import arrow


@pytest.mark.parametrize(
    ("before", "after", "sign"),
    [(0.1, 0.3, "↑↑"), (0.1, 0.13, "↑"), (0.1, 0.11, "="), (0.13, 0.1, "↓"), (0.3, 0.1, "↓↓"),
     (0.0, 0.1, "↑↑"), (0.0, 0.0, "=")],
)  # fmt: skip
def test_arrows(before: float, after: float, sign: str) -> None:
    assert arrow(before, after, 1.0, 0.2) == sign
