"""Small merges and what is read of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import npt_fast as npt
from tests.checkpoints import layer_weights, trained_checkpoint, write_checkpoint

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


FORMS: dict[str, dict[str, Any]] = {
    "pt": {},
    "safetensors": {"format": "safetensors"},
    "shards": {"format": "safetensors", "max_shard_size": 2000},
}


def merged(root: Path, *, verify: bool = True, **options: Any) -> Path:
    paths = [trained_checkpoint(root / f"in{n}", n, steps=n, num_ranks=n) for n in (1, 2)]
    npt.merge(paths, root / "out", verify=verify, options=npt.MergeOptions(**options))
    return root / "out"


def forget_sources(root: Path) -> Path:
    """Move the output and remove its inputs, as if on another machine."""
    shutil.move(root / "out", root / "elsewhere" / "copy")
    for path in root.glob("in*"):
        shutil.rmtree(path)
    return root / "elsewhere" / "copy"
