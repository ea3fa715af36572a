"""Checkpoints that the original wrote, and loading a merge its way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
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
from tests.reference import Situation, modulated_mlp, relative_error


def original_loader(weights: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """Find tensors like the original: two prefixes per layer; other names are ignored."""
    found = {}
    for layer in layers:
        for prefix in (f"layer_{layer}_np", f"model.layers.{layer}.np_component"):
            for name, tensor in weights.items():
                if name.startswith(prefix):
                    found[f"{layer}:{name[len(prefix) + 1 :]}"] = tensor
    return found


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_real_checkpoints(tmp_path: Path, layer11: Path, layer13: Path, form: Any) -> None:
    options = npt.MergeOptions(format=form)
    report = npt.merge([layer11, layer13], tmp_path / "out", verify=True, options=options)
    sources = {**read_weights(layer11), **read_weights(layer13)}
    assert len(sources) == 72
    views = []
    if form == "pt":
        file = tmp_path / "out" / "npt_weights.pt"
        views += [torch.load(file, weights_only=True, mmap=mmap) for mmap in (False, True)]
        assert list(views[0]) == list(sources)
    else:
        with safe_open(tmp_path / "out" / "npt_weights.safetensors", "pt") as opened:
            views.append({name: opened.get_tensor(name) for name in opened.keys()})
    for view in views:
        assert_same_tensors(view, sources)
    loaded = original_loader(views[0], [11, 13])
    assert len(loaded) == 72
    assert torch.equal(loaded["13:W_b_up_down.3"], sources["layer_13_np.W_b_up_down.3"])
    assert report.verification is not None and report.verification.compared == 72
    assert sum(report.ways.values()) - report.ways["headers"] == sum(
        len(raw(t)) for t in sources.values()
    )


def test_real_checkpoints_joined_with_another_training(
    tmp_path: Path, layer11: Path, layer13: Path
) -> None:
    """Layer 13's weights, renamed to layer 11, and the mean of both, at a real model's width."""
    renamed = {
        name.replace("layer_13", "layer_11"): tensor
        for name, tensor in read_weights(layer13).items()
    }
    other = write_checkpoint(tmp_path / "other", renamed)
    options = npt.MergeOptions(on_conflict="mean")
    npt.merge([layer11, other], tmp_path / "out", verify=True, options=options)
    merged = read_weights(tmp_path / "out")
    where = Situation.random(d=576, f=1536, tokens=3)
    expected = modulated_mlp([read_weights(layer11), renamed], 11, where, 0.5)
    assert relative_error(modulated_mlp([merged], 11, where), expected) <= EXACT


def test_merges_made_by_the_original_are_understood(tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "old",
        {**layer_weights(1), **layer_weights(2)},
        training_state={"global_step": 7, "merge_info": {"layer_sources": {1: "a", 2: "b"}}},
    )
    summary = {
        "merged_layers": [1, 2],
        "layer_sources": {"1": "runs/a", "2": "runs/b"},
        "total_parameters": 1,
        "checkpoint_keys": 18,
    }
    (path / "merge_summary.json").write_text(json.dumps(summary))
    npt.merge([path, one_layer(tmp_path / "c", 3)], tmp_path / "out")
    facts = json_of(tmp_path / "out" / "merge_summary.json")["layers"]
    assert [facts[n]["chain"] for n in "123"] == [["runs/a"], ["runs/b"], []]
    assert [facts[n]["source"] for n in "12"] == [str(path)] * 2
    assert [facts[n]["step"] for n in "123"] == [7, 7, None]
