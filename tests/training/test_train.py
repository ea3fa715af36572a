"""Where training runs: in this process, or in processes that it starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.training import train as module


@pytest.mark.parametrize(
    ("processes", "local_rank", "parallel", "expected"),
    [
        (1, None, "ddp", ["here"]),
        (2, None, "ddp", ["sampled", "launched"]),
        (2, None, "fsdp2", ["sampled", "launched"]),
        (2, None, "layers", ["named", "launched"]),
        (2, "1", "ddp", ["sampled", "here"]),
        (1, "0", "ddp", ["sampled", "here"]),
    ],
)
def test_a_process_of_several_starts_no_others(
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    local_rank: str | None,
    parallel: Any,
    expected: list[str],
) -> None:
    """``LOCAL_RANK`` says that it is one of several, ours or torchrun's.

    Those that will form a group have their text sampled before, since a group does not wait. Others
    are told its name.
    """
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    done: list[str] = []
    options = npt.TrainOptions(train_layers="1", num_processes=processes, parallel=parallel)

    def sampled(given: npt.TrainOptions, *_: Any) -> npt.TrainOptions:
        done.append("sampled")
        return replace(given, data="self")

    def named(given: npt.TrainOptions, *_: Any) -> npt.TrainOptions:
        done.append("named")
        return replace(given, data="self")

    def here(given: npt.TrainOptions, *_: Any) -> None:
        done.append("here")
        assert (given.data == "self") is ("sampled" in done)

    monkeypatch.setattr(module, "sampled_beforehand", sampled)
    monkeypatch.setattr(module, "with_data", named)
    monkeypatch.setattr(module, "train_here", here)
    monkeypatch.setattr(module, "launch", lambda given: done.append("launched"))
    npt.train(options)
    assert done == expected
