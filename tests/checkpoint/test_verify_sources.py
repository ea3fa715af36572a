"""Verifying against sources that changed, moved, or are lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from tests.checkpoint.merging import FORMS, merged
from tests.checkpoints import flip_byte, offset_of, read_weights, trained_checkpoint


def train_on(checkpoint: Path, layer: int, **architecture: Any) -> None:
    """Replace a checkpoint by one with other weights and another training state."""
    shutil.rmtree(checkpoint)
    trained_checkpoint(checkpoint, layer, steps=9, seed=99, **architecture)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", [{}, {"rank": 5}, {"num_ranks": 3}], ids=str)
def test_a_source_that_was_trained_on_is_a_note(
    tmp_path: Path, form: str, architecture: dict[str, Any]
) -> None:
    path = merged(tmp_path, **FORMS[form])
    train_on(tmp_path / "in1", 1, **architecture)
    report = npt.verify(path)
    assert report.passed, report.problems
    assert report.digests_matched == 27 * 4
    assert any(str(tmp_path / "in1") in note and "changed" in note for note in report.notes) or (
        any("the sources have changed since the merge: " in note for note in report.notes)
    )
    file = next(path.glob("npt_weights*.[ps]*t*"))
    flip_byte(file, file.stat().st_size // 2)
    assert not npt.verify(path).passed


def test_one_changed_tensor_of_a_source_is_counted(tmp_path: Path) -> None:
    path = merged(tmp_path)
    weights = read_weights(tmp_path / "in1")
    weights["layer_1_np.W_down_up"] += 1
    torch.save(weights, tmp_path / "in1" / "npt_weights.pt")
    report = npt.verify(path)
    assert report.passed and report.compared == 27 * 4 - 1
    (note,) = report.notes
    source = tmp_path / "in1" / "npt_weights.pt"
    assert note.startswith(f"{source} has changed since the merge, or is another file (1 tensor")


@pytest.mark.parametrize("damage", ["layer gone", "unreadable", "another base"])
def test_a_source_that_cannot_be_planned_with_is_a_note(tmp_path: Path, damage: str) -> None:
    path = merged(tmp_path)
    if damage == "layer gone":
        train_on(tmp_path / "in1", 7)
    elif damage == "unreadable":
        (tmp_path / "in1" / "npt_weights.pt").write_bytes(b"version https://git-lfs.github.com/")
    else:
        train_on(tmp_path / "in1", 1, d=32)
    report = npt.verify(path)
    assert report.passed and report.digests_matched == 27 * 4
    assert report.notes[0].startswith("not compared with its sources: ")


def test_crcs_prove_a_pt_whose_source_was_trained_on(tmp_path: Path) -> None:
    path = merged(tmp_path, verify=False)
    train_on(tmp_path / "in1", 1)
    assert npt.verify(path).passed
    name = "layer_1_np.W_a_up_up"
    flip_byte(path / "npt_weights.pt", offset_of(path / "npt_weights.pt", read_weights(path)[name]))
    report = npt.verify(path)
    assert any(f"npt_weights.pt: {name}: damaged" in line for line in report.problems)


def test_without_any_record_nobody_knows_which_side_changed(tmp_path: Path) -> None:
    path = merged(tmp_path, verify=False, format="safetensors", weights_only=True)
    train_on(tmp_path / "in1", 1)
    report = npt.verify(path)
    assert len(report.problems) == 9
    assert all(
        line.endswith("nothing recorded tells which of the two has changed")
        for line in report.problems
    )


def damage_one(checkpoint: Path) -> str:
    """Flip a byte of a tensor and keep its CRC-32; returns the tensor's name."""
    file = checkpoint / "npt_weights.pt"
    name, tensor = list(read_weights(checkpoint).items())[4]
    flip_byte(file, offset_of(file, tensor) + 2)
    return name


def test_a_source_damaged_since_is_not_the_outputs_fault(tmp_path: Path) -> None:
    path = merged(tmp_path, verify=False, format="safetensors")
    name = damage_one(tmp_path / "in1")
    report = npt.verify(path)
    assert report.passed and report.compared == 27 * 4 - 1
    source = tmp_path / "in1" / "npt_weights.pt"
    assert f"{source}: {name}: damaged, its CRC-32 differs" in report.notes
    assert any(f"{name}: neither its source nor a record proves it" in n for n in report.notes)


def test_what_was_copied_from_a_damaged_source_is_damaged(tmp_path: Path) -> None:
    trained_checkpoint(tmp_path / "in1", 1)
    name = damage_one(tmp_path / "in1")
    options = npt.MergeOptions(format="safetensors")
    npt.merge([tmp_path / "in1"], tmp_path / "out", options=options)
    (problem,) = npt.verify(tmp_path / "out").problems
    assert f"{name}: damaged, its CRC-32 differs" in problem


def test_a_lost_source_state_names_its_file(tmp_path: Path) -> None:
    path = merged(tmp_path)
    (tmp_path / "in1" / "training_state.pt").unlink()
    report = npt.verify(path)
    assert report.passed and report.compared == 27 + 18 * 3
    (note,) = report.notes
    assert note.startswith(
        "training_state.pt: the sources have changed since the merge: 27 tensors"
    )


def test_sources_are_found_whatever_names_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output may be named by its weights file or through links, also with ``..`` after one."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    for layer in (1, 2):
        trained_checkpoint(tmp_path / "far" / str(layer), layer)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path)
    npt.merge(["far/1", "link/../2"], "link/out", verify=True)
    monkeypatch.chdir("/")
    for name in ("link/out", "far/away/out", "far/away/out/npt_weights.pt"):
        report = npt.verify(tmp_path / name)
        assert report.passed and report.compared == 18 * 4, report.notes


@pytest.mark.parametrize("whole_tree_moved", [False, True])
def test_relative_sources_are_those_of_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_tree_moved: bool
) -> None:
    for place, seed in (("one", 1), ("two", 2)):
        for layer in (1, 2):
            trained_checkpoint(tmp_path / place / str(layer), layer, seed=seed)
    monkeypatch.chdir(tmp_path / "one")
    npt.merge(["1", "2"], "sub/out", verify=True)
    monkeypatch.chdir(tmp_path / "two")  # the same names, another experiment
    tree = tmp_path / "one"
    if whole_tree_moved:
        tree = tree.rename(tmp_path / "moved")
    report = npt.verify(tree / "sub" / "out")
    assert report.passed and report.notes == [] and report.compared == 18 * 4


def test_without_digests_the_sources_are_the_proof(tmp_path: Path) -> None:
    path = merged(tmp_path, verify=False, format="safetensors")
    report = npt.verify(path)
    assert report.passed and report.compared == 27 * 4
    assert any("not made with --verify" in note for note in report.notes)
    file = path / "npt_weights.safetensors"
    flip_byte(file, file.stat().st_size - 3)
    assert not npt.verify(path).passed


@pytest.mark.parametrize("name", ["config.json", "npt_config.json", "multi_layer_state.pt"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_without_digests_the_sources_prove_small_files(
    tmp_path: Path, name: str, damage: str
) -> None:
    """All small files can be made again from the sources."""
    path = merged(tmp_path, verify=False)
    if damage == "missing":
        (path / name).unlink()
    else:
        data = (path / name).read_bytes()
        old = {"config.json": b"test/model", "npt_config.json": b"removed"}.get(name, b"teacher")
        (path / name).write_bytes(data.replace(old, old[:-1] + b"x", 1))
    assert not npt.verify(path).passed
