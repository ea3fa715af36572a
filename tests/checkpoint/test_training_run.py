"""The folder of a training run: its checkpoints by step, and the newest of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.checkpoint.training_run import checkpoints_in
from tests.checkpoints import layer_weights, run, write_checkpoint


def make_run(folder: Path, *names: str) -> Path:
    """Write a run with these checkpoints; the first has layer 0, the second layer 1, and so on."""
    for layer, name in enumerate(names):
        write_checkpoint(folder / name, layer_weights(layer))
    return folder


def test_by_step(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-010", ".checkpoint-99.removed"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").touch()
    (tmp_path / "checkpoint-12").symlink_to("nowhere")
    assert list(checkpoints_in(tmp_path).items()) == [
        (9, tmp_path / "checkpoint-9"),
        (10, tmp_path / "checkpoint-10"),
    ]
    assert checkpoints_in(tmp_path / "nowhere") == {}
    assert checkpoints_in(tmp_path / "checkpoint-11") == {}


NEWEST = {
    "by number": (["checkpoints/checkpoint-900", "checkpoints/checkpoint-1000"], 1),
    "not the best": (
        ["checkpoints/checkpoint-5", "checkpoints/best", "checkpoints/checkpoint-10"], 2,
    ),
    "what is left": (["checkpoints/best", "checkpoints/final"], 1),
    "only the best": (["checkpoints/best"], 0),
    "without a folder for them": (["checkpoint-5", "checkpoint-10"], 1),
}  # fmt: skip


@pytest.mark.parametrize("case", NEWEST)
def test_analyze_finds_the_newest(case: str, tmp_path: Path, capsys: Any) -> None:
    names, expected = NEWEST[case]
    folder = make_run(tmp_path / "run", *names)
    report = npt.inspect(folder)
    assert [info.layer for info in report.layers] == [expected]
    newest = folder / names[expected]
    assert report.path == str(newest)
    assert report.notes == [f"{folder}: using {newest}, the newest checkpoint of this run"]
    code, out, err = run(capsys, "analyze", "--checkpoint", folder)
    assert (code, err) == (0, "")
    assert report.notes[0] in out.splitlines()


def test_the_folder_of_checkpoints_is_enough(tmp_path: Path) -> None:
    make_run(tmp_path, "checkpoints/checkpoint-1", "checkpoints/checkpoint-2")
    found = npt.inspect(tmp_path / "checkpoints").path
    assert found == str(tmp_path / "checkpoints" / "checkpoint-2")


def test_what_holds_no_weights_is_no_checkpoint(tmp_path: Path) -> None:
    """The original writes into the folder directly, so that a killed run can leave it empty."""
    make_run(tmp_path, "checkpoints/checkpoint-1")
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir()
    assert npt.inspect(tmp_path).path == str(tmp_path / "checkpoints" / "checkpoint-1")


def test_a_checkpoint_is_no_run(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(11))
    make_run(path, "checkpoints/checkpoint-1")
    report = npt.inspect(path)
    assert (report.path, report.notes) == (str(path), [])


def test_a_broken_newest_is_not_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path, "checkpoints/checkpoint-1", "checkpoints/checkpoint-2")
    broken = tmp_path / "checkpoints" / "checkpoint-2" / "npt_weights.pt"
    os.truncate(broken, 100)
    with pytest.raises(npt.CheckpointError, match="checkpoint-2"):
        npt.inspect(tmp_path)


def test_other_commands_name_the_newest(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "checkpoints/checkpoint-1", "checkpoints/checkpoint-2")
    line = f"{folder}: is the folder of a run; name a checkpoint of it, such as "
    line += str(folder / "checkpoints" / "checkpoint-2")
    for use in (lambda: npt.merge([folder], tmp_path / "out"), lambda: npt.verify(folder)):
        with pytest.raises(npt.CheckpointError) as caught:
            use()
        assert str(caught.value) == line
    assert npt.can_merge([folder]).remarks == [line]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["empty", "other"])
def test_a_folder_that_is_no_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "checkpoints" / "checkpoint-8").mkdir(parents=True)
    with pytest.raises(npt.CheckpointError, match="NPT weights not found"):
        npt.inspect(tmp_path / name)
