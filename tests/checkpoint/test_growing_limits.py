"""Limits on what a file may ask for grow with the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from npt_fast.checkpoint import safetensors_file, strict_json, torch_pickle, torch_pickle_writer
from npt_fast.checkpoint.inspect import inspect
from npt_fast.checkpoint.merge import merge
from npt_fast.checkpoint.verify import verify
from npt_fast.config import MergeOptions
from npt_fast.errors import CheckpointError
from tests.checkpoints import adamw_state, layer_weights, write_checkpoint, write_shards


def test_limits_have_no_constant_that_many_parameters_would_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundredth of the tensors of 80 layers with num_ranks 128, without any constant reserve."""
    monkeypatch.setattr(torch_pickle, "_SMALL_MEMORY", 0)
    monkeypatch.setattr(strict_json, "_MANY_CONTAINERS", 100)
    inputs = []
    for layer in (1, 2):
        weights = layer_weights(layer, d=8, f=8, rank=1, num_ranks=48)
        state = adamw_state(weights, steps=1)
        inputs.append(write_checkpoint(tmp_path / str(layer), weights, training_state=state))
    for form in ("pt", "safetensors"):
        out = tmp_path / form
        options = MergeOptions(format=form)  # type: ignore[arg-type]
        merge(inputs, out, verify=True, options=options)
        report = verify(out)
        assert report.passed and report.tensors == report.digests_matched == 864 * 4
        merge([out], tmp_path / f"{form}-again", verify=True, options=options)
        assert inspect(out).problems == []
        summary = (out / "merge_summary.json").stat().st_size
        assert summary < 5000  # digests have a file of their own


def test_hostile_pickles_do_not_get_more_with_a_larger_file(tmp_path: Path) -> None:
    """Nested lists need 81 bytes of memory per byte; the limit is 24 beyond the first 64 MiB."""
    size = 1_500_000
    with pytest.raises(CheckpointError, match=r"more than 103,108,\d+ bytes of memory"):
        torch_pickle.decode(b"\x80\x02" + b"]" * size + b".", "here")
    assert len(torch_pickle.decode(b"\x80\x02](" + b"]" * 500_000 + b"e.", "here")) == 500_000


def test_a_safetensors_header_up_to_the_limit_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    save_file(layer_weights(1), path / "npt_weights.safetensors", metadata={"x": "y" * 20_000_000})
    merge([path], tmp_path / "out", verify=True)
    assert verify(tmp_path / "out").passed


def test_an_index_of_many_tensors(tmp_path: Path) -> None:
    """An index of 20 MB is read; that of 80 layers with num_ranks 128 has 9 MB."""
    path = write_shards(tmp_path / "a", [layer_weights(1), layer_weights(2)])
    index = path / "npt_weights.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"metadata": {"x": "y" * 20_000_000}, **content}))
    merge([path], tmp_path / "out", verify=True)
    assert verify(tmp_path / "out").passed


@pytest.mark.parametrize(("form", "told"), [
    ("pt", r"npt_weights\.pt: a pickle of [\d,]+ bytes cannot be read again; 1,000"),
    ("safetensors", r"a safetensors header of [\d,]+ bytes for 36 tensors; .* allows 2,000"),
])  # fmt: skip
def test_a_limit_that_remains_is_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any, told: str
) -> None:
    weights = {**layer_weights(1, num_ranks=2), **layer_weights(2, num_ranks=2)}
    path = write_checkpoint(tmp_path / "a", weights)
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(torch_pickle_writer, "MAX_PICKLE_BYTES", 1000)
    monkeypatch.setattr(safetensors_file, "MAX_BYTES", 2000)
    with pytest.raises(CheckpointError, match=told):
        merge([path], tmp_path / "work" / "out", options=MergeOptions(format=form))
    assert os.listdir(tmp_path / "work") == []
