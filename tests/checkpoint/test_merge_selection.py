"""Merging selected layers of an input."""

from __future__ import annotations

from pathlib import Path

import pytest

import npt_fast as npt
from tests.checkpoint.merging import one_layer, only
from tests.checkpoints import (
    assert_same_tensors,
    layer_weights,
    load_state,
    raw,
    read_weights,
    trained_checkpoint,
    write_checkpoint,
)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("11", [11]),
        ("13,11", [11, 13]),
        ("11,11", [11]),
        ("12", [12]),
        ("11-13", [11, 12, 13]),
        ("13,11-12", [11, 12, 13]),
        ("12-13, 12", [12, 13]),
        ("13-13", [13]),
    ],
)
def test_selected_layers(tmp_path: Path, spec: str, wanted: list[int]) -> None:
    weights = {**layer_weights(11), **layer_weights(12), **layer_weights(13)}
    path = write_checkpoint(tmp_path / "a", weights)
    report = npt.merge([f"{path}:{spec}"], tmp_path / "out", verify=True)
    assert [info.layer for info in report.layers] == wanted
    assert [info.source for info in report.layers] == [str(path)] * len(wanted)
    assert_same_tensors(
        read_weights(tmp_path / "out"), {k: v for n in wanted for k, v in only(weights, n).items()}
    )


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("13-11", "13-11 runs backwards"),
        ("11,13-11", "13-11 runs backwards"),
        ("0-99999", "more than 10,000 layers"),
        (",".join(["0-9999"] * 1000), "more than 10,000 layers"),
        ("11-", "'11-' is not a list of layers"),
        ("11,,13", "'11,,13' is not a list of layers"),
        ("111111", "'111111' is not a list of layers"),
        ("10-13", "has no layer 10, only \\[11\\]"),
        ("11,-1", "has no layer -1, only \\[11\\]"),
    ],
)
def test_a_selection_that_selects_nothing(tmp_path: Path, spec: str, problem: str) -> None:
    path = one_layer(tmp_path / "a", 11)
    with pytest.raises(npt.NPTError, match=problem):
        npt.merge([f"{path}:{spec}"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_selection_avoids_a_conflict(tmp_path: Path) -> None:
    both = write_checkpoint(tmp_path / "a", {**layer_weights(11), **layer_weights(13)})
    other = one_layer(tmp_path / "b", 11, seed=9)
    options = npt.MergeOptions(on_conflict="error")
    npt.merge([f"{both}:13", other], tmp_path / "out", options=options)
    expected = {**read_weights(other), **only(read_weights(both), 13)}
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_a_selected_layer_keeps_its_moments(tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    paths = [trained_checkpoint(tmp_path / str(n), n, steps=n) for n in (2, 3, 4)]
    npt.merge(paths, merged)
    npt.merge([f"{merged}:3"], tmp_path / "out")
    found = load_state(tmp_path / "out")["optimizer_state_dict"]["state"]
    source = load_state(paths[1])["optimizer_state_dict"]["state"]
    assert [raw(s["exp_avg"]) for s in found.values()] == [
        raw(s["exp_avg"]) for s in source.values()
    ]


def test_a_selected_layer_that_is_not_there(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 11)
    with pytest.raises(npt.MergeError, match=r"has no layer 12, only \[11\]"):
        npt.merge([f"{path}:11,12"], tmp_path / "out")


def test_a_selection_that_is_too_long_for_a_name(tmp_path: Path) -> None:
    layers = range(100)
    weights = {k: v for n in layers for k, v in layer_weights(n, modulation="single").items()}
    path = write_checkpoint(tmp_path / "a", weights)
    spec = ",".join(map(str, layers))
    assert len(spec) > 255
    report = npt.merge([f"{path}:{spec}"], tmp_path / "out")
    assert [info.layer for info in report.layers] == list(layers)


def test_a_path_that_looks_like_a_selection(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "run:11", {**layer_weights(11), **layer_weights(13)})
    assert [info.layer for info in npt.merge([path], tmp_path / "out").layers] == [11, 13]
