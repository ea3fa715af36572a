"""Merging by the rules of the users' guide: layers, configuration, summary, text and modes."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import torch

import npt_fast as npt
from tests.checkpoint.merging import json_of, one_layer
from tests.checkpoints import (
    assert_same_tensors,
    layer_weights,
    load_state,
    multi_layer_state,
    read_weights,
    trained_checkpoint,
    write_checkpoint,
)


def test_layers_from_every_input_in_ascending_order(tmp_path: Path) -> None:
    layers = [13, 2, 11, 0, 14]
    paths = [one_layer(tmp_path / str(n), n, num_ranks=1 + n % 3) for n in layers]
    report = npt.merge(paths, tmp_path / "out", verify=True)
    expected = [item for n in sorted(layers) for item in read_weights(tmp_path / str(n)).items()]
    merged = read_weights(tmp_path / "out")
    assert list(merged) == [name for name, _ in expected]
    assert_same_tensors(merged, dict(expected))
    assert [info.layer for info in report.layers] == sorted(layers)
    assert [info.source for info in report.layers] == [
        str(tmp_path / str(n)) for n in sorted(layers)
    ]
    assert report.total_parameters == sum(tensor.numel() for tensor in merged.values())
    assert report.checkpoint_keys == len(merged)


def test_config_of_the_first_plus_merge_info(tmp_path: Path) -> None:
    configs: list[Any] = [None, {"model_name": "m", "max_steps": 1, "nested": {"é": [1.5, None]}}]
    configs.append({"model_name": "m", "max_steps": 2})
    paths = [
        write_checkpoint(tmp_path / f"{n}", layer_weights(n), config=config)
        for n, config in enumerate(configs)
    ]
    npt.merge(paths, tmp_path / "out")
    merge_info = {
        "merged_from": [str(path) for path in paths],
        "merged_layers": [0, 1, 2],
        "layer_sources": {str(n): str(path) for n, path in enumerate(paths)},
    }
    assert json_of(tmp_path / "out" / "config.json") == {**configs[1], "merge_info": merge_info}


def test_no_config_no_file(tmp_path: Path) -> None:
    npt.merge([one_layer(tmp_path / "a", 1)], tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_summary_has_the_keys_of_the_original(tmp_path: Path) -> None:
    paths = [one_layer(tmp_path / "a", 13), one_layer(tmp_path / "b", 2)]
    npt.merge(paths, tmp_path / "out")
    summary = json_of(tmp_path / "out" / "merge_summary.json")
    assert summary["merged_layers"] == [2, 13]
    assert summary["layer_sources"] == {"2": str(paths[1]), "13": str(paths[0])}
    assert summary["total_parameters"] == sum(
        tensor.numel() for path in paths for tensor in read_weights(path).values()
    )
    assert summary["checkpoint_keys"] == 18


def test_one_input_keeps_every_byte(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 11, num_ranks=2)
    npt.merge([path], tmp_path / "out", verify=True)
    assert_same_tensors(read_weights(tmp_path / "out"), read_weights(path))
    assert list(read_weights(tmp_path / "out")) == list(read_weights(path))
    merged, source = load_state(tmp_path / "out"), load_state(path)
    del merged["merge_info"]
    assert merged.keys() == source.keys()
    assert all(repr(merged[name]) == repr(source[name]) for name in source)


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 1)
    before = os.umask(0o027)
    try:
        npt.merge([path], tmp_path / "out", verify=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert modes == {0o640}


def test_paths_that_are_not_unicode(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff"))
    path = one_layer(odd, 1)
    npt.merge([path], tmp_path / "out", verify=True)
    assert npt.verify(tmp_path / "out").passed


def test_text_that_is_not_unicode(tmp_path: Path) -> None:
    """JSON can hold half a surrogate pair; a text that can be read must be writable."""
    path = one_layer(tmp_path / "a", 1)
    (path / "config.json").write_text('{"model_name": "m", "note": "\\ud800"}')
    npt.merge([path], tmp_path / "out", verify=True)
    assert json_of(tmp_path / "out" / "config.json")["note"] == "\ud800"


def test_progress_is_by_bytes(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    path = trained_checkpoint(tmp_path / "a", 1)
    npt.merge([path], tmp_path / "out", verify=True, progress=lambda *call: calls.append(call))
    for activity in ("merging", "verifying"):
        done = [call[1] for call in calls if call[0] == activity]
        (total,) = {call[2] for call in calls if call[0] == activity}
        assert done == sorted(done) and done[0] == 0
        assert done[-1] == total > 0


def test_curriculum_survives_a_merge_of_merges(tmp_path: Path) -> None:
    paths = [
        write_checkpoint(
            tmp_path / str(n),
            layer_weights(n),
            multi_layer_state=multi_layer_state([n], layer_weights={n: n / 4}),
        )
        for n in (1, 2, 3)
    ]
    npt.merge(paths[:2], tmp_path / "v1")
    npt.merge([tmp_path / "v1", paths[2]], tmp_path / "v2")
    state = torch.load(tmp_path / "v2" / "multi_layer_state.pt", weights_only=True)
    assert state["layer_weights"] == {1: 0.25, 2: 0.5, 3: 0.75}
