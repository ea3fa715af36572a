"""Layers that several inputs have: which one is taken, and when that is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from tests.checkpoint.merging import one_layer, only
from tests.checkpoints import (
    assert_same_tensors,
    layer_weights,
    read_weights,
    write_checkpoint,
    write_shards,
)


def test_the_first_wins_and_a_warning_names_the_layer(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", {**layer_weights(11), **layer_weights(12)})
    # more tensors than in the first: none of them may slip through
    second = write_checkpoint(
        tmp_path / "b", {**layer_weights(11, seed=5, num_ranks=3), **layer_weights(13)}
    )
    report = npt.merge([first, second], tmp_path / "out", verify=True)
    (warning,) = [line for line in report.warnings if "already exists" in line]
    assert "Layer 11 already exists" in warning
    assert str(first) in warning and str(second) in warning
    expected = {**read_weights(first), **only(read_weights(second), 13)}
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_last_takes_the_whole_layer_from_the_last(tmp_path: Path) -> None:
    first = one_layer(tmp_path / "a", 11, num_ranks=3)
    second = one_layer(tmp_path / "b", 11, seed=5)
    options = npt.MergeOptions(on_conflict="last")
    report = npt.merge([first, second], tmp_path / "out", options=options)
    assert_same_tensors(read_weights(tmp_path / "out"), read_weights(second))
    assert report.layers[0].source == str(second)
    assert any("Layer 11 already exists" in line for line in report.warnings)


def test_error_refuses_a_conflict_and_nothing_else(tmp_path: Path) -> None:
    options = npt.MergeOptions(on_conflict="error")
    first, second = one_layer(tmp_path / "a", 11), one_layer(tmp_path / "b", 12)
    npt.merge([first, second], tmp_path / "fine", options=options)
    with pytest.raises(npt.MergeError, match="Layer 11 already exists") as caught:
        npt.merge([first, second, first], tmp_path / "out", options=options)
    assert str(first) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_identical_accepts_equal_bytes_in_any_form(tmp_path: Path) -> None:
    weights = layer_weights(11, num_ranks=2)
    first = write_checkpoint(tmp_path / "a", weights)
    second = write_shards(tmp_path / "b", [weights])
    options = npt.MergeOptions(on_conflict="identical")
    npt.merge([first, second], tmp_path / "out", verify=True, options=options)
    assert_same_tensors(read_weights(tmp_path / "out"), weights)


def other_value(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = list(weights)[4]
    changed = weights[name].clone()
    changed[-1, -1] = torch.nextafter(changed[-1, -1], torch.tensor(torch.inf))
    return {**weights, name: changed}


def other_dtype(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in weights.items()}


def other_rank(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return layer_weights(11, rank=5)


@pytest.mark.parametrize("change", [other_value, other_dtype, other_rank], ids=lambda c: c.__name__)
def test_identical_refuses_any_difference(tmp_path: Path, change: Callable[..., Any]) -> None:
    weights = layer_weights(11)
    first = write_checkpoint(tmp_path / "a", weights)
    second = write_checkpoint(tmp_path / "b", change(weights))
    options = npt.MergeOptions(on_conflict="identical")
    with pytest.raises(npt.MergeError, match=r"Layer 11 already exists.*not identical"):
        npt.merge([first, second], tmp_path / "out", options=options)
