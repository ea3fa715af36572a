"""Runs: the newest checkpoint for those who look, and a way on for those who need one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from tests.checkpoints import layer_weights, run, trained_checkpoint, write_checkpoint


@pytest.fixture(params=["", "checkpoints"], ids=["as-in-the-guide", "as-trained"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run with checkpoints of 99, 100 and 1000 steps; no order of names finds the newest."""
    folder = tmp_path / "run"
    for step in (1000, 99, 100):
        trained_checkpoint(folder / request.param / f"checkpoint-{step}", 3)
    for name in ("checkpoint-2000.old", "checkpoint-", "checkpoint-01001", "best"):
        write_checkpoint(folder / request.param / name, layer_weights(4))
    (folder / request.param / "checkpoint-9999").write_text("a file")
    (folder / "config.json").write_text("{}")
    return folder


def newest(folder: Path) -> Path:
    (found,) = folder.rglob("checkpoint-1000")
    return found


def test_looking_at_a_run_is_looking_at_its_newest_checkpoint(folder: Path) -> None:
    report = npt.inspect(folder)
    assert report.path == str(newest(folder))
    assert report.notes == [f"{folder}: using {newest(folder)}, the newest of 3 checkpoints"]
    assert [info.layer for info in report.layers] == [3]


def test_the_folder_of_checkpoints_itself(folder: Path) -> None:
    assert npt.inspect(newest(folder).parent).path == str(newest(folder))


def test_analyze_says_which(capsys: Any, folder: Path) -> None:
    code, out, err = run(capsys, "analyze", "--checkpoint", folder)
    assert (code, err) == (0, "")
    assert f"{folder}: using {newest(folder)}, the newest of 3 checkpoints\n" in out
    code, out, _ = run(capsys, "analyze", "--checkpoint", folder, "--json")
    assert code == 0
    assert json.loads(out)["checkpoints"][0]["path"] == str(newest(folder))


def test_a_single_checkpoint(tmp_path: Path) -> None:
    only = write_checkpoint(tmp_path / "run" / "checkpoint-0", layer_weights(3))
    notes = npt.inspect(tmp_path / "run").notes
    assert notes == [f"{tmp_path / 'run'}: using {only}, its only checkpoint"]


USES: dict[str, Callable[[Path], object]] = {
    "merge": lambda folder: npt.merge([folder], folder.parent / "out"),
    "merge-selection": lambda folder: npt.merge([f"{folder}:3"], folder.parent / "out"),
    "verify": npt.verify,
    "load": lambda folder: npt.load(None, folder),  # it fails before it looks at the model
}


@pytest.mark.parametrize("use", USES)
def test_others_name_the_newest(folder: Path, use: str) -> None:
    with pytest.raises(npt.CheckpointError) as caught:
        USES[use](folder)
    assert str(caught.value) == (
        f"{folder}: is a run; name one of its checkpoints, such as {newest(folder)}"
    )


def test_a_newest_checkpoint_without_weights_is_not_passed_over(folder: Path) -> None:
    (newest(folder) / "npt_weights.pt").unlink()
    with pytest.raises(npt.CheckpointError, match=r"weights not found at .*checkpoint-1000"):
        npt.inspect(folder)


def test_a_checkpoint_that_holds_checkpoints_is_itself(tmp_path: Path) -> None:
    outer = write_checkpoint(tmp_path / "run", layer_weights(5))
    write_checkpoint(outer / "checkpoints" / "checkpoint-7", layer_weights(6))
    report = npt.inspect(outer)
    assert [info.layer for info in report.layers] == [5]
    assert report.notes == []
