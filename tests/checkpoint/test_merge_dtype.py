"""Casting while merging, and values that do not fit or are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from tests.checkpoint.merging import one_layer
from tests.checkpoints import assert_same_tensors, layer_weights, read_weights, write_checkpoint

FLOATS = ["float64", "float32", "float16", "bfloat16"]


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_every_cast_equals_torch(tmp_path: Path, source: str, target: str, form: Any) -> None:
    weights = layer_weights(1, dtype=getattr(torch, source))
    path = write_checkpoint(tmp_path / "a", weights)
    options = npt.MergeOptions(dtype=target, format=form)  # type: ignore[arg-type]
    npt.merge([path], tmp_path / "out", verify=True, options=options)
    expected = {name: tensor.to(getattr(torch, target)) for name, tensor in weights.items()}
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_a_value_that_does_not_fit_is_named(tmp_path: Path) -> None:
    weights = layer_weights(1)
    weights["layer_1_np.W_a_up_up"][2, 3] = 1e6
    path = write_checkpoint(tmp_path / "a", weights)
    with pytest.raises(
        npt.MergeError, match=r"layer_1_np\.W_a_up_up: a value is too large for F16"
    ):
        npt.merge([path], tmp_path / "out", options=npt.MergeOptions(dtype="float16"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        pytest.param({"dtype": "float32"}, [{}], id="dtype"),
        pytest.param({"on_conflict": "mean"}, [{}, {}], id="mean"),
        pytest.param({"uniform": True}, [{}, {"layer": 2, "rank": 7}], id="uniform-rank"),
        pytest.param({"uniform": True}, [{}, {"layer": 2, "num_ranks": 2}], id="uniform-num_ranks"),
    ],
)
def test_fp8_cannot_be_computed_with(
    tmp_path: Path, options: dict[str, Any], kinds: list[dict[str, Any]]
) -> None:
    paths = [
        one_layer(tmp_path / str(n), **{"layer": 1, "dtype": torch.float8_e4m3fn, **kind})
        for n, kind in enumerate(kinds)
    ]
    with pytest.raises(npt.MergeError, match="F8_E4M3 cannot be converted") as caught:
        npt.merge(paths, tmp_path / "out", options=npt.MergeOptions(**options))
    assert "layer_1_np." in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_fp8_is_copied(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1, dtype=torch.float8_e5m2)
    npt.merge([path], tmp_path / "out", verify=True)
    assert_same_tensors(read_weights(tmp_path / "out"), read_weights(path))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_verify_finds_values_that_are_not_finite(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    weights = layer_weights(1, dtype=dtype)
    weights["layer_1_np.W_a_up_down"][3, 5] = bad
    path = write_checkpoint(tmp_path / "a", weights)
    with pytest.raises(npt.VerificationError) as caught:
        npt.merge([path], tmp_path / "out", verify=True)
    (problem,) = caught.value.problems
    assert problem.startswith(str(path / "npt_weights.pt"))  # the source is to blame
    assert "layer_1_np.W_a_up_down: 1 value is NaN or infinite" in problem
    assert str(caught.value) == f"{tmp_path / 'out'}: not written: {problem}"
    assert caught.value.exit_code == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    npt.merge([path], tmp_path / "out")  # only --verify looks at values
    assert_same_tensors(read_weights(tmp_path / "out"), weights)
