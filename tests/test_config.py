"""What options accept."""

from __future__ import annotations

from typing import Any

import pytest

from npt_fast.config import TrainOptions, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("12", 12), ("3kb", 3000), ("5 GB", 5 * 10**9), ("1TB", 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1.5GB", "5XB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("np_rank", 0),
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("weight_decay", float("inf")),
        ("max_length", 0),
        ("stride", 600),
        ("loss", "l1"),
        ("wandb_mode", "maybe"),
        ("teacher_cache", "much"),
        ("keep_last", 0),
        ("num_processes", 0),
    ],
)
def test_training_options_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name if name != "teacher_cache" else "not a size"):
        TrainOptions(train_layers="1", **{name: value})


def test_training_options_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        TrainOptions(train_layers="1", mixed_precision=True, fp16=True)
    with pytest.raises(ValueError, match="nothing to learn"):
        TrainOptions(train_layers="1", direct_mlp_weight=0)
