"""Where training runs: in this process, or in processes that it starts."""

from __future__ import annotations

from typing import Any

import pytest

import npt_fast as npt
from npt_fast.training import train as module


@pytest.mark.parametrize(
    ("processes", "local_rank", "expected"),
    [(1, None, "here"), (2, None, "launched"), (2, "1", "here"), (1, "0", "here")],
)
def test_a_process_of_several_starts_no_others(
    monkeypatch: pytest.MonkeyPatch, processes: int, local_rank: str | None, expected: str
) -> None:
    """``LOCAL_RANK`` says that it is one of several, ours or torchrun's."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(module, "train_here", lambda options: "here")
    monkeypatch.setattr(module, "launch", lambda options: "launched")
    found: Any = npt.train(npt.TrainOptions(train_layers="1", num_processes=processes))
    assert found == expected
