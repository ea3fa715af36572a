"""A merge is planned, measured and shown from headers alone."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import npt_fast as npt
from npt_fast.checkpoint.plan import plan_merge
from tests.checkpoints import layer_weights, trained_checkpoint, write_checkpoint

BIG = {"d": 96, "f": 160, "rank": 16}


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("policy", ["first", "last", "concat", "mean"])
def test_a_dry_run_reads_no_data_and_writes_nothing(tmp_path: Path, policy: Any) -> None:
    paths = [trained_checkpoint(tmp_path / str(n), 11, steps=n, rank=n) for n in (2, 3)]
    before = sorted(tmp_path.rglob("*"))
    options = npt.MergeOptions(on_conflict=policy)
    report = npt.merge(paths, tmp_path / "deep" / "out", dry_run=True, options=options)
    assert report.dry_run
    assert report.layers[0].layer == 11
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"format": "safetensors"},
        {"uniform": True},
        {"dtype": "float16"},
        {"weights_only": True},
    ],
    ids=str,
)
def test_a_dry_run_foretells_every_file(tmp_path: Path, options: dict[str, Any]) -> None:
    paths = [trained_checkpoint(tmp_path / str(n), n, rank=n + 2, d=96) for n in (1, 2)]
    chosen = npt.MergeOptions(**options)
    planned = npt.merge(paths, tmp_path / "out", dry_run=True, options=chosen)
    done = npt.merge(paths, tmp_path / "out", options=chosen)
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    summary = written.pop("merge_summary.json")
    assert planned.files == done.files == written
    assert planned.layers == done.layers
    assert planned.ways.get("computed", 0) == done.ways.get("computed", 0)
    assert done.ways["headers"] == planned.ways["headers"] + summary

    def data(ways: dict[str, int]) -> int:
        return sum(count for way, count in ways.items() if way != "headers")

    assert data(done.ways) == data(planned.ways)
    assert planned.needed_bytes >= sum(written.values()) - planned.ways.get("reflink", 0)
    assert planned.free_bytes > 0


def test_a_dry_run_refuses_what_the_merge_would(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1))
    with pytest.raises(npt.MergeError, match="--force"):
        npt.merge([path], write_checkpoint(tmp_path / "b", layer_weights(2)), dry_run=True)
    with pytest.raises(npt.MergeError, match="choose another --output"):
        npt.merge([path], path / "out", dry_run=True)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_copies_can_be_cloned_where_the_file_system_can(tmp_path: Path, form: Any) -> None:
    """From one file to one file, all whole pages have the right phase, in both formats."""
    weights = layer_weights(1, d=960, f=640, rank=64)
    if form == "pt":
        path = write_checkpoint(tmp_path / "a", weights)
    else:
        path = tmp_path / "a.safetensors"
        save_file(weights, path)
    plan = plan_merge([str(path)], npt.MergeOptions(format=form))
    kinds = plan.bytes_by_kind()
    total = sum(tensor.numel() * 4 for tensor in weights.values())
    assert kinds["cloneable"] + kinds["copied"] == total
    assert kinds["computed"] == 0
    # each of the 9 tensors may have a partial page at either end
    assert kinds["cloneable"] >= total - 2 * 4096 * 9


def test_computed_bytes_are_told_apart(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path / str(n), layer_weights(1, seed=n, **BIG)) for n in (1, 2)]
    plan = plan_merge([str(path) for path in paths], npt.MergeOptions(on_conflict="mean"))
    b_up = sum(t.numel() * 4 for n, t in layer_weights(1, **BIG).items() if "W_b_up" in n)
    assert plan.bytes_by_kind()["computed"] == 2 * b_up


@pytest.mark.usefixtures("headers_only")
def test_a_terabyte_is_planned_at_once(tmp_path: Path) -> None:
    """The source is sparse: its sizes are real, its data are a hole."""
    d, f, rank = 1 << 17, 1 << 18, 1 << 16
    header: dict[str, Any] = {}
    end = 0
    for name in layer_weights(0, d=1, f=1, rank=1, num_ranks=4):
        stem = name.split(".")[1]
        wide = f if stem.endswith("_down") == stem.startswith("W_a_up") else d
        shape = [d, rank] if stem.startswith("W_down") else [rank, wide]
        begin, end = end, end + shape[0] * shape[1] * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert end > 10**12
    started = time.process_time()
    report = npt.merge([path], tmp_path / "out", dry_run=True)
    assert time.process_time() - started < 20  # to read it takes minutes
    assert report.needed_bytes > 10**12 or report.ways["reflink"] > 0.9 * 10**12
    if report.needed_bytes > report.free_bytes:
        with pytest.raises(npt.StorageError, match="bytes needed") as caught:
            npt.merge([path], tmp_path / "out")
        assert caught.value.exit_code == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["huge.safetensors"]


BAD_OPTIONS: dict[str, Any] = {
    "on_conflict": "newest",
    "dtype": "int8",
    "format": "gguf",
    "max_shard_size": 0,
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_are_checked_where_they_are_made(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        npt.MergeOptions(**{name: BAD_OPTIONS[name]})
