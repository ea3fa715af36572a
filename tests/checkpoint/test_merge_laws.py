"""The laws of merging (design.md#merge-laws): order, grouping, and the same bytes again."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from tests.checkpoints import (
    assert_same_tensors,
    contents,
    load_state,
    raw,
    read_weights,
    trained_checkpoint,
)


def test_disjoint_merges_commute(tmp_path: Path) -> None:
    paths = [trained_checkpoint(tmp_path / str(n), n, num_ranks=n) for n in (1, 2, 3)]
    results = []
    for number, order in enumerate(itertools.permutations(paths)):
        out = tmp_path / f"out{number}"
        npt.merge(order, out)
        results.append((out / "npt_weights.pt").read_bytes())
        moments = load_state(out)["optimizer_state_dict"]["state"]
        results[-1] += b"".join(raw(state["exp_avg"]) for state in moments.values())
    assert len(set(results)) == 1


def test_merging_is_associative(tmp_path: Path) -> None:
    a, b, c = (trained_checkpoint(tmp_path / str(n), n, steps=n) for n in (1, 2, 3))
    npt.merge([a, b, c], tmp_path / "at-once")
    npt.merge([a, b], tmp_path / "ab")
    npt.merge([tmp_path / "ab", c], tmp_path / "left")
    npt.merge([b, c], tmp_path / "bc")
    npt.merge([a, tmp_path / "bc"], tmp_path / "right")
    expected = read_weights(tmp_path / "at-once")
    moments = load_state(tmp_path / "at-once")["optimizer_state_dict"]
    for name in ("left", "right"):
        assert_same_tensors(read_weights(tmp_path / name), expected)
        state = load_state(tmp_path / name)
        assert repr(state["optimizer_state_dict"]) == repr(moments)
        assert state["global_step"] == 3


OPTION_SETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shards": {"format": "safetensors", "max_shard_size": 3000},
    "uniform": {"uniform": True},
    "mean": {"on_conflict": "mean", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", OPTION_SETS)
def test_same_inputs_and_options_same_bytes(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    trained_checkpoint(first / "a", 1, num_ranks=2)
    trained_checkpoint(first / "b", 2, rank=7, modulation="dual")
    trained_checkpoint(first / "c", 1, seed=8, steps=6)
    shutil.copytree(first, tmp_path / "elsewhere" / "second")  # new inodes, times and places
    written = []
    for place in (first, tmp_path / "elsewhere" / "second", first):
        monkeypatch.chdir(place)
        shutil.rmtree("out", ignore_errors=True)
        options = npt.MergeOptions(**OPTION_SETS[case])
        npt.merge(["a", "b", "c"], "out", verify=True, options=options)
        written.append(contents(place / "out"))
    assert len(written[0]) >= 6
    assert written[0] == written[1] == written[2]
