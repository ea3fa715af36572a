"""``npt-fast study``: tables, JSON, the folder, and what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model
from npt_fast.transfer.study_report import study_json
from tests.checkpoints import run
from tests.training import tiny
from tests.training.runs import Place
from tests.transfer.known import known_relations


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    base, tokenizer = tiny.model(initializer_range=0.2), tiny.tokenizer()
    relations = known_relations(base, tokenizer, one="{}", two="of {}")
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"relations": relations, "controls": ["a", "b c"]}))
    return path


def arguments(place: Place, checkpoint: Path, suite: Path, *more: object) -> list[object]:
    """A command line; what is in `more` is not given twice."""
    given: dict[str, object] = {
        "--checkpoint": checkpoint, "--model_name": place.base, "--suite": suite,
        "--output": suite.parent / "out",
    }  # fmt: skip
    rest = [part for name, value in given.items() if name not in more for part in (name, value)]
    return ["study", "--cpu", *rest, *more]


def test_tables_and_a_folder(place: Place, checkpoint: Path, suite: Path, capsys: Any) -> None:
    code, out, err = run(capsys, *arguments(place, checkpoint, suite))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1] == f"Written to {suite.parent / 'out'}"
    assert all(len(line) <= 100 for line in lines[:-1])
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert ["", "one", "4 of 4", "10", "{}", ""] in cells
    (base,) = (row for row in cells if row[1:3] == ["base model", "nothing"])
    assert base[4] == "100 [100, 100]"
    assert len(list((suite.parent / "out").iterdir())) == 5


def test_json_is_the_librarys(place: Place, checkpoint: Path, suite: Path, capsys: Any) -> None:
    more = ["--relations", "two", "--modes", "exact-blend", "--strengths", 0.5, "--pairs", 2]
    given = arguments(place, checkpoint, suite, *more, "--seed", 5, "--json")
    code, out, err = run(capsys, *given)
    assert (code, err) == (0, "")
    model, tokenizer = load_base_model(str(place.base))
    expected = npt.study(
        npt.load(model, checkpoint), tokenizer, npt.read_suite(suite), relations=["two"],
        modes=["exact-blend"], strengths=[0.5], pairs=2, seed=5,
    )  # fmt: skip
    document = json.loads(out)
    assert document == json.loads(json.dumps(study_json(expected, expected.summaries())))
    assert document == json.loads((suite.parent / "out" / "study.json").read_text())
    assert {row["relation"] for row in document["rows"]} == {"two"}


def test_what_is_wrong_is_one_line(
    place: Place, checkpoint: Path, suite: Path, capsys: Any, tmp_path: Path
) -> None:
    """Before a model is loaded, where that can be; and nothing is left."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("relations: [captial]")
    facts = tmp_path / "facts.yaml"
    facts.write_text("facts: [{prompt: a, inject: {from: b}, expect: c}]")
    nowhere = place.base / "none"
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    early: list[tuple[list[object], int, str]] = [
        (["--suite", bad], 1, f"{bad}: relation 'captial': unknown relation"),
        (["--suite", tmp_path / "none"], 1, "none: cannot be opened"),
        (["--suite", facts], 1, f"{facts}: has no relations, which a study needs"),
        (["--relations", "three"], 1, "unknown relation 'three'; there are one, two"),
        (["--output", tmp_path / "there"], 1, "there: exists already"),
        (["--output", bad / "a"], 1, "Not a directory"),
        (["--modes", "ad"], 2, "modes"),
        (["--pairs", 0], 2, "pairs"),
        ([], 1, str(nowhere)),
    ]
    for more, expected_code, expected in early:
        given = arguments(place, checkpoint, suite, *more, "--model_name", nowhere)
        code, out, err = run(capsys, *given)
        assert (code, out) == (expected_code, ""), err
        assert err.startswith("Error: ") and err.count("\n") == 1 and expected in err, err
    code, _, err = run(capsys, *arguments(place, tmp_path / "none", suite))
    assert code == 1 and "Checkpoint not found" in err
    assert sorted(tmp_path.iterdir()) == before
    code, _, err = run(capsys, "study", "--checkpoint", checkpoint)
    assert code == 2 and "--output" in err
