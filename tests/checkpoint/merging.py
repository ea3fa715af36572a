"""Small merges and what is read of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import npt_fast as npt
from tests.checkpoints import layer_weights, write_checkpoint

EXACT = 4e-15  # float64, another order of summation (design.md#merge-laws)


def one_layer(root: Path, layer: int, **architecture: Any) -> Path:
    return write_checkpoint(root, layer_weights(layer, **architecture))


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def only(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {name: t for name, t in weights.items() if name.startswith(f"layer_{layer}_np.")}


def refuse(tmp_path: Path, inputs: Sequence[object], match: str, **options: Any) -> None:
    """The merge must fail with one line, without creating or changing any file."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(npt.NPTError, match=match) as caught:
        npt.merge(
            [str(path) for path in inputs], tmp_path / "out", options=npt.MergeOptions(**options)
        )
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert sorted(tmp_path.rglob("*")) == before
