"""Verifying with records that are damaged, odd, or missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from tests.checkpoint.merging import merged
from tests.checkpoints import (
    flip_byte,
    layer_weights,
    offset_of,
    trained_checkpoint,
    write_checkpoint,
)

STATE_DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "lost": Path.unlink,
}


@pytest.mark.parametrize("damage", STATE_DAMAGE)
@pytest.mark.parametrize("proven", [True, False])
def test_a_state_that_cannot_be_read_is_one_problem_of_the_output(
    tmp_path: Path, proven: bool, damage: str
) -> None:
    output = merged(tmp_path, verify=proven)
    STATE_DAMAGE[damage](output / "training_state.pt")
    report = npt.verify(output)
    assert not any("sources have changed" in note for note in report.notes)
    about = [line for line in report.problems if line != "training_state.pt has changed"]
    assert len(about) == 1 and "training_state.pt" in about[0]


DIGEST_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a digest": lambda raw: raw[:-2] + (b"0" if raw[-2:-1] != b"0" else b"1") + b"\n",
    "a file's name": lambda raw: b"~" + raw[1:],
    "the end": lambda raw: raw[:-20],
    "a line more": lambda raw: raw + b"\n",
    "all of it": lambda raw: b"",
}


@pytest.mark.parametrize("damage", DIGEST_DAMAGE)
def test_damaged_digests_do_not_blame_the_tensors(tmp_path: Path, damage: str) -> None:
    output = merged(tmp_path)
    path = output / "merge_digests.txt"
    path.write_bytes(DIGEST_DAMAGE[damage](path.read_bytes()))
    report = npt.verify(output)
    assert report.problems == ["merge_digests.txt has changed"]
    (note,) = report.notes
    assert "not compared with merge_digests.txt" in note


def test_lost_digests_were_recorded(tmp_path: Path) -> None:
    output = merged(tmp_path)
    (output / "merge_digests.txt").unlink()
    report = npt.verify(output)
    assert report.problems == ["merge_digests.txt is missing"]
    assert not any("without --verify" in note or "made with" in note for note in report.notes)


def test_without_a_summary_structure_is_checked(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1))
    report = npt.verify(path)
    assert report.passed
    assert report.crcs_matched == 9
    assert report.notes == [
        "no merge_summary.json: not written by a merge",
        "nothing to compare with for npt_weights.pt: no source and no digest is known; structure, "
        "CRCs and values were checked",
    ]
    flip_byte(path / "npt_weights.pt", offset_of(path / "npt_weights.pt", layer_weights(1)[
        "layer_1_np.W_b_up_up"]) + 2)  # fmt: skip
    assert not npt.verify(path).passed


def test_what_nothing_is_known_of_is_named(tmp_path: Path) -> None:
    trained = trained_checkpoint(tmp_path / "a", 1)
    names = "npt_weights.pt, training_state.pt, multi_layer_state.pt, config.json"
    assert f"nothing to compare with for {names}: " in npt.verify(trained).notes[-1]
    npt.merge([trained], tmp_path / "out", verify=True)
    assert not npt.verify(tmp_path / "out").notes
    npt.merge([trained], tmp_path / "plain")
    assert not any("nothing to compare" in note for note in npt.verify(tmp_path / "plain").notes)
    trained.rename(tmp_path / "b")
    report = npt.verify(tmp_path / "plain")
    assert report.passed
    assert "nothing to compare with for npt_weights.pt, training_state.pt: " in report.notes[-1]


ODD_SUMMARIES: dict[str, Any] = {
    "empty": {},
    "options-of-the-future": {"inputs": [], "options": {"warp": 9}},
    "layers-a-number": {"inputs": [{"path": "x", "layers": 5}], "options": {}},
    "layers-of-text": {"inputs": [{"path": "x", "layers": ["1"]}], "options": {}},
    "place-a-number": {"inputs": [], "options": {}, "working_directory": 7},
    "inputs-a-number": {"inputs": 3, "options": {}},
    "layers-odd": {"inputs": [{"path": "x", "layers": {"a": 1}}], "options": {}},
    "bad-choice": {"inputs": [{"path": "x", "layers": None}], "options": {"dtype": "int3"}},
    "bad-choice-type": {"inputs": [], "options": {"dtype": [1]}},
    "size-of-text": {"inputs": [], "options": {"max_shard_size": "5"}},
    "tensors-odd": {"tensors": {"npt_weights.pt": [1]}, "files": [2]},
    "digest-odd": {"tensors": {"npt_weights.pt": {"layer_1_np.W_down_up": 3}}},
    "merged-layers-odd": {"merged_layers": [1, "2", None]},
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_SUMMARIES)
def test_an_odd_summary_does_not_break_verify(tmp_path: Path, case: str) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1))
    (path / "merge_summary.json").write_text(json.dumps(ODD_SUMMARIES[case]))
    report = npt.verify(path)
    assert report.tensors == 9
