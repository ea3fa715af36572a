"""Joining layers that several inputs have, by concat and by mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from tests.checkpoint.merging import EXACT, json_of, one_layer
from tests.checkpoints import (
    assert_same_tensors,
    layer_weights,
    raw,
    read_weights,
    write_checkpoint,
)
from tests.reference import Situation, delta, modulated_mlp, relative_error

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1+1": ({}, {}),
    "2+3": ({"num_ranks": 2}, {"num_ranks": 3}),
    "unlike-ranks": ({"rank": 3, "num_ranks": 2}, {"rank": 5}),
    "single": ({"modulation": "single"}, {"modulation": "single", "num_ranks": 2}),
    "dual": ({"modulation": "dual"}, {"modulation": "dual"}),
    "single+dual": ({"modulation": "single", "num_ranks": 2}, {"modulation": "dual", "rank": 6}),
    "dual+triple": ({"modulation": "dual"}, {"modulation": "triple", "num_ranks": 2}),
    "plain": ({"modulation": "plain", "rank": 3}, {"modulation": "plain", "num_ranks": 2}),
    "triple+single": ({"modulation": "triple", "rank": 2}, {"modulation": "single"}),
}


def joined(
    tmp_path: Path, policy: Any, parts: Sequence[Mapping[str, Tensor]], **options: Any
) -> dict[str, Tensor]:
    paths = [write_checkpoint(tmp_path / f"in{n}", part) for n, part in enumerate(parts)]
    chosen = npt.MergeOptions(on_conflict=policy, **options)
    npt.merge(paths, tmp_path / "out", verify=True, options=chosen)
    return read_weights(tmp_path / "out")


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize(("policy", "scale"), [("concat", 1.0), ("mean", 0.5)])
def test_joined_layers_add_up(tmp_path: Path, case: str, policy: str, scale: float) -> None:
    parts = [layer_weights(11, seed=n, **kind) for n, kind in enumerate(PAIRS[case])]
    merged = joined(tmp_path, policy, parts)
    where = Situation.random()
    m = torch.randn(7, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for projection, x in (("gate", where.x), ("up", where.x), ("down", m)):
        sums = [delta(part, 11, projection, where.attention, x) for part in parts]
        expected = scale * (sums[0] + sums[1])
        if expected.any():
            found = delta(merged, 11, projection, where.attention, x)
            assert relative_error(found, expected) <= EXACT
    whole = modulated_mlp(parts, 11, where, scale)
    assert relative_error(modulated_mlp([merged], 11, where), whole) <= EXACT


def test_concat_only_renames(tmp_path: Path) -> None:
    parts = [layer_weights(11, seed=1, num_ranks=2), layer_weights(11, seed=2)]
    merged = joined(tmp_path, "concat", parts)
    expected = dict(parts[0])
    expected |= {f"{name}.2": tensor for name, tensor in parts[1].items()}
    assert_same_tensors(merged, expected)


def test_mean_changes_nothing_but_b_up(tmp_path: Path) -> None:
    parts = [layer_weights(11, seed=n) for n in (1, 2)]
    merged = joined(tmp_path, "mean", parts)
    assert len(merged) == 18
    for index, part in enumerate(parts):
        for name, tensor in part.items():
            expected = tensor / 2 if "W_b_up" in name else tensor
            assert raw(merged[f"{name}.{index}"]) == raw(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_mean_is_rounded_once(tmp_path: Path, dtype: torch.dtype, count: int) -> None:
    parts = [layer_weights(11, seed=n, dtype=dtype) for n in range(count)]
    merged = joined(tmp_path, "mean", parts)
    for index, part in enumerate(parts):
        for name, tensor in part.items():
            if "W_b_up" in name:
                expected = (tensor.double() / count).to(dtype)
                assert raw(merged[f"{name}.{index}"]) == raw(expected)


def test_concat_of_one_is_the_layer(tmp_path: Path) -> None:
    weights = layer_weights(11, num_ranks=2)
    for policy in ("concat", "mean"):
        assert_same_tensors(joined(tmp_path / policy, policy, [weights]), weights)


def test_concat_pads_ranks_exactly(tmp_path: Path) -> None:
    parts = [layer_weights(11, seed=1, rank=3), layer_weights(11, seed=2, rank=5)]
    merged = joined(tmp_path, "concat", parts)
    for name, tensor in parts[0].items():
        found = merged[f"{name}.0"]
        rows, columns = tensor.shape
        assert torch.equal(found[:rows, :columns], tensor)
        if "W_down" in name:
            assert found.shape == (16, 5)  # what the new columns hold is multiplied by zero
        else:
            assert not found[3:].any() and found.shape[0] == 5
    for name, tensor in parts[1].items():
        assert raw(merged[f"{name}.1"]) == raw(tensor)


def test_mixed_dtypes_need_a_choice(tmp_path: Path) -> None:
    parts = [layer_weights(11, seed=1), layer_weights(11, seed=2, dtype=torch.bfloat16)]
    with pytest.raises(npt.MergeError, match="BF16, F32; choose one with --dtype"):
        joined(tmp_path / "a", "concat", parts)
    merged = joined(tmp_path / "b", "concat", parts, dtype="float32")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    for name, tensor in parts[1].items():
        assert raw(merged[f"{name}.1"]) == raw(tensor.float())


def test_parts_are_recorded(tmp_path: Path) -> None:
    parts = [layer_weights(11, seed=1, num_ranks=2), layer_weights(11, seed=2)]
    joined(tmp_path, "mean", parts)
    facts = json_of(tmp_path / "out" / "merge_summary.json")["layers"]["11"]
    assert facts["source"] == f"{tmp_path / 'in0'} + {tmp_path / 'in1'}"
    found = [(part["source"], part["num_ranks"], part["divisor"]) for part in facts["parts"]]
    assert found == [(str(tmp_path / "in0"), 2, 2), (str(tmp_path / "in1"), 1, 2)]


def test_residuals_that_differ_cannot_be_joined(tmp_path: Path) -> None:
    paths = []
    for name, residual in (("a", "kept"), ("b", "removed")):
        path = one_layer(tmp_path / name, 11, modulation="dual")
        npt_config = {"format_version": 1, "layers": {"11": {"residual": residual}}}
        (path / "npt_config.json").write_text(json.dumps(npt_config))
        paths.append(path)
    with pytest.raises(npt.MergeError, match="with and without the residual"):
        npt.merge(paths, tmp_path / "out", options=npt.MergeOptions(on_conflict="concat"))
