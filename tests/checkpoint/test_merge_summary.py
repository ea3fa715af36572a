"""``merge_summary.json``: what is read has its types, and what is written stays as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import npt_fast as npt
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.merge_summary import MergeSummary
from tests.checkpoints import layer_weights, write_checkpoint
from tests.spoilt import check_types

JOINED = Path(__file__).parent.parent / "data" / "formats" / "checkpoint" / "joined"
SUMMARY = {
    "merged_layers": [1, 2],
    "layer_sources": {"1": "a", "2": "b"},
    "total_parameters": 10,
    "checkpoint_keys": 2,
    "layers": {
        "1": {"step": 3, "source": "a", "chain": ["x"]},
        "2": {
            "chain": None, "digest": "00",
            "parts": [{"source": "c", "step": 5, "chain": ["d"], "num_ranks": 4, "divisor": 2}],
        },
    },
    "working_directory": "..",
    "inputs": [{"path": "a", "layers": [1]}, {"path": "b", "layers": None}],
    "options": {"uniform": False, "max_shard_size": 5, "copy_multi_layer_state": None},
    "files": {"npt_weights.pt": "00"},
    "tensors": {"npt_weights.pt": {"x": "F32[1] 00"}},
}  # fmt: skip


def test_what_is_parsed_has_its_types_or_is_refused_by_key() -> None:
    check_types(MergeSummary, SUMMARY)


def test_a_sound_file_is_what_it_says() -> None:
    summary = MergeSummary.parse(SUMMARY, "file")
    assert summary.layers[1].chain == ("x",) and summary.layers[2].source == "b"
    assert summary.layers[2].parts[0].divisor == 2
    assert summary.inputs == (("a", (1,)), ("b", None))


def test_a_file_that_is_read_and_written_again_is_the_same_to_the_byte() -> None:
    path = JOINED / "merge_summary.json"
    read = MergeSummary.parse(strict_json.read_foreign(path), str(path))
    assert strict_json.dump(read.to_dict()) == path.read_bytes()


def test_a_joined_layer_is_recorded_with_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer11: Path, layer13: Path
) -> None:
    """The bytes are those of version 0.1.0; they hold the SHA-256 of all other files."""
    for path in (layer11, layer13):
        shutil.copytree(path, tmp_path / path.parent.name / path.name)
    monkeypatch.chdir(tmp_path)  # paths are recorded as they are given
    first, second = "layer11/checkpoint-800", "layer13/checkpoint-600"
    npt.merge([first, second], "merged", verify=True)
    joined = npt.MergeOptions(on_conflict="concat", uniform=True, format="pt")
    npt.merge(["merged", first], "joined", verify=True, options=joined)
    for expected in JOINED.iterdir():
        assert (tmp_path / "joined" / expected.name).read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"inputs": [{"path": "a", "layers": 5}]}', "layers must"),
        ('{"options": {"copy_multi_layer_state": 5}}', "copy_multi"),
        ('{"tensors": {"x.pt": {"x": "\\ud800"}}}', "tensors must"),
        ('{"layers": {"1": {"parts": [{}]}}}', "source is missing"),
        ('{"files": [], "merged_layers": "12"}', "must be a"),
    ],
)
def test_every_verb_says_it_in_one_line(tmp_path: Path, content: str, told: str) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1))
    (path / "merge_summary.json").write_text(content)
    lines = npt.verify(path).problems + npt.inspect(path).problems
    lines += npt.merge([path], tmp_path / "out").warnings[:1]
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(f"{path / 'merge_summary.json'}: ") and told in line
