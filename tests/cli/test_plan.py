"""``npt-fast plan``: tables, JSON, the folder, and what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model
from tests.checkpoints import run
from tests.training.runs import LENGTH, Place


def arguments(place: Place, checkpoint: Path, *more: object) -> list[object]:
    return [
        "plan", "--checkpoint", checkpoint, "--model_name", place.base, "--data", place.text,
        "--max_length", LENGTH, "--num_eval_samples", 4, "--cpu", *more,
    ]  # fmt: skip


def without_times(document: Any) -> Any:
    if isinstance(document, dict):
        return {k: without_times(v) for k, v in document.items() if k != "seconds"}
    return [without_times(v) for v in document] if isinstance(document, list) else document


def test_json_is_the_librarys_and_a_folder_has_it(
    place: Place,
    checkpoint: Path,
    capsys: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("npt_fast.training.other_texts._MOST_TOKENS", 256)  # to be quick
    output = tmp_path / "out"
    more = ["--counts", "2,5", "--seed", 3, "--output", output]
    code, out, err = run(capsys, *arguments(place, checkpoint, *more, "--json"))
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document == json.loads((output / "plan.json").read_text())
    assert sorted(path.name for path in output.iterdir()) == ["plan.csv", "plan.json", "plan.png"]
    model, tokenizer = load_base_model(str(place.base))
    expected = npt.plan(
        npt.load(model, checkpoint), tokenizer, place.text, counts=[2], seed=3, windows=4,
        max_length=LENGTH,
    )  # fmt: skip
    assert document["order"] == list(expected.order) and sorted(document["order"]) == [1, 2]
    assert [one["kl"] for one in document["alone"]] == [one.kl for one in expected.alone]
    (both,) = document["prefixes"]
    assert both["count"] == 2 and without_times(both["planned"]) == without_times(both["control"])
    assert both["planned"]["kl"] == expected.prefixes[0].planned.kl


def test_lines_for_people(place: Place, checkpoint: Path, capsys: Any, tmp_path: Path) -> None:
    code, out, err = run(
        capsys, *arguments(place, checkpoint, "--layers", "2", "--output", tmp_path / "out")
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "Order: 2" in lines and lines[-1] == f"Written to {tmp_path / 'out'}"
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert rows == ["layer", "-----", "2", "layers", "------", "1"]


def test_what_is_wrong_is_one_line(
    place: Place, checkpoint: Path, capsys: Any, tmp_path: Path
) -> None:
    """Nothing is left of it."""
    (tmp_path / "there").mkdir()
    output = tmp_path / "out"
    cases: list[tuple[list[object], int, str]] = [
        (["--layers", "1,9", "--output", output], 1, "has no layer 9, only [1, 2]"),
        (["--layers", "-9", "--output", output], 1, "there is no layer -9, the model has 4"),
        (["--layers", "one"], 2, "'one' is not a list of layers"),
        (["--counts", "0"], 2, "counts"),
        (["--counts", "1,x"], 2, "'1,x' is not a list of numbers such as 1,3,10"),
        (["--num_eval_samples", "0"], 2, "num_eval_samples"),
        (["--output", tmp_path / "there"], 1, "there: exists already; choose another folder"),
    ]
    for more, expected_code, expected in cases:
        code, out, err = run(capsys, *arguments(place, checkpoint, *more))
        assert (code, out) == (expected_code, ""), err
        assert err.startswith("Error: ") and err.count("\n") == 1 and expected in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
