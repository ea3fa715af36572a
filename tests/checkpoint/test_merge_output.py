"""Where a merge may write, and what it may replace."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import npt_fast as npt
from tests.checkpoint.merging import one_layer, refuse
from tests.checkpoints import (
    assert_same_tensors,
    contents,
    layer_weights,
    read_weights,
    trained_checkpoint,
    write_checkpoint,
)


def at_input(root: Path) -> Path:
    return root / "a"


def inside_input(root: Path) -> Path:
    return root / "a" / "merged"


def deep_inside_input(root: Path) -> Path:
    return root / "a" / "x" / "y"


def around_input(root: Path) -> Path:
    return root


def link_to_input(root: Path) -> Path:
    (root / "link").symlink_to(root / "a")
    return root / "link"


def inside_by_link(root: Path) -> Path:
    (root / "link").symlink_to(root / "a")
    return root / "link" / "merged"


def around_by_link(root: Path) -> Path:
    (root.parent / f"{root.name}-link").symlink_to(root)
    return root.parent / f"{root.name}-link"


def by_dots(root: Path) -> Path:
    return root / "b" / ".." / "a"


PLACES = [
    at_input, inside_input, deep_inside_input, around_input, link_to_input, inside_by_link,
    around_by_link, by_dots,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("second", [False, True], ids=["first-input", "second-input"])
def test_the_output_never_touches_an_input(
    tmp_path: Path, place: Callable[[Path], Path], force: bool, second: bool
) -> None:
    root = tmp_path / "root"
    inputs = [one_layer(root / "a", 1), one_layer(tmp_path / "far", 2)]
    (root / "b").mkdir()
    output = place(root)
    before = {path: contents(path) for path in inputs}
    with pytest.raises(npt.MergeError) as caught:
        npt.merge(inputs[::-1] if second else inputs, output, force=force)
    assert "choose another --output" in str(caught.value)
    assert {path: contents(path) for path in inputs} == before


def test_the_output_may_be_beside_an_input(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "run" / "a", 1)
    npt.merge([path], tmp_path / "run" / "a-merged")
    npt.merge([path], tmp_path / "run" / "new" / "deep")
    assert_same_tensors(read_weights(tmp_path / "run" / "new" / "deep"), read_weights(path))


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    old = one_layer(tmp_path / "out", 2)
    stale = old / "npt_weights-00001-of-00002.safetensors"
    stale.write_bytes(b"old")
    before = contents(old)
    refuse(tmp_path, [path], "Output path already exists: .*out. Use --force to overwrite.")
    assert contents(old) == before
    npt.merge([path], old, verify=True, force=True)
    assert_same_tensors(read_weights(old), read_weights(path))
    assert not stale.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


def test_force_goes_through_a_link_to_the_folder(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    one_layer(tmp_path / "real", 2)
    (tmp_path / "out").symlink_to("real")
    npt.merge([path], tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink()
    assert_same_tensors(read_weights(tmp_path / "real"), read_weights(path))


@pytest.mark.parametrize("kind", ["file", "sub-folder", "dangling-link"])
def test_force_replaces_checkpoints_only(tmp_path: Path, kind: str) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("precious")
    elif kind == "dangling-link":
        output.symlink_to("nowhere")
    else:
        (output / "checkpoints").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(npt.MergeError, match="--force replaces checkpoints only"):
        npt.merge([path], output, force=True)
    assert sorted(tmp_path.rglob("*")) == before


FOREIGN = {
    "text": {"thesis.tex": b"years of work"},
    "a-model": {"config.json": b"{}", "model.safetensors": b"x", "tokenizer.json": b"{}"},
    "parts": {"config.json": b"{}", "training_state.pt": b"x"},
    "hidden": {".git": b"x"},
}


@pytest.mark.parametrize("files", FOREIGN)
def test_force_never_replaces_what_is_no_checkpoint(tmp_path: Path, files: str) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = tmp_path / "out"
    output.mkdir()
    for name, data in FOREIGN[files].items():
        (output / name).write_bytes(data)
    before = contents(output)
    with pytest.raises(npt.MergeError, match=r"holds no NPT weights.* replaces checkpoints only"):
        npt.merge([path], output, force=True)
    assert contents(output) == before


@pytest.mark.parametrize(
    "name", ["README.md", "loss.png", "npt_weights.pt.bak", "npt_weights-old.pt", ".notes"]
)
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_force_refuses_foreign_files_by_name(tmp_path: Path, name: str, folder: bool) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = one_layer(tmp_path / "out", 2)
    (output / name).mkdir() if folder else (output / name).write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(npt.MergeError, match=f"holds {re.escape(name)} beside the checkpoint"):
        npt.merge([path], output, force=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert list(read_weights(output)) == list(layer_weights(2))


def test_a_folder_with_the_name_of_a_checkpoints_file_is_foreign(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = one_layer(tmp_path / "out", 2)
    (output / "training_state.pt").mkdir()
    with pytest.raises(npt.MergeError, match=r"holds training_state\.pt beside"):
        npt.merge([path], output, force=True)


def test_a_foreign_file_that_appears_while_merging_is_kept(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = one_layer(tmp_path / "out", 2)

    def progress(activity: str, done: int, total: int) -> None:
        (output / "notes.txt").write_text("mine")

    with pytest.raises(npt.MergeError, match=r"holds notes\.txt beside"):
        npt.merge([path], output, force=True, progress=progress)
    assert (output / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


def test_force_replaces_everything_that_a_merge_writes(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 1)
    options = npt.MergeOptions(format="safetensors", max_shard_size=999)
    npt.merge([path], tmp_path / "out", verify=True, options=options)
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert sum("-of-" in name for name in written) > 1
    npt.merge([path], tmp_path / "out", verify=True, force=True)
    assert not any("-of-" in p.name for p in (tmp_path / "out").iterdir())


def test_an_empty_folder_holds_nothing_to_lose(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = tmp_path / "out"
    output.mkdir()
    refuse(tmp_path, [path], "already exists")
    npt.merge([path], output, force=True)
    assert_same_tensors(read_weights(output), read_weights(path))


def test_a_failed_replacement_leaves_the_old_one(tmp_path: Path) -> None:
    weights = layer_weights(1)
    weights["layer_1_np.W_b_up_up"][0, 0] = torch.nan
    path = write_checkpoint(tmp_path / "a", weights)
    old = one_layer(tmp_path / "out", 2)
    before = contents(old)
    with pytest.raises(npt.VerificationError):
        npt.merge([path], old, verify=True, force=True)
    assert contents(old) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(npt.NPTError) as caught:
        npt.merge([path], tmp_path / "file" / "out")
    assert str(tmp_path / "file") in str(caught.value)
