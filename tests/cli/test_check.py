"""``npt-fast check``: exit codes, lines, JSON and JUnit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml  # type: ignore[import-untyped]

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model
from tests.checkpoints import run
from tests.training.runs import Place
from tests.transfer.known import known_relations


def facts(tmp_path: Path, *given: dict[str, Any]) -> Path:
    path = tmp_path / "facts.yaml"
    path.write_text(yaml.safe_dump({"facts": list(given)}))
    return path


# a modulation in its own place changes nothing; "nowhere" is in no continuation
HOLDS: dict[str, Any] = {
    "name": "holds", "prompt": "dead", "inject": {"from": "abc"}, "must_not_change": ["abc"],
    "tokens": 3,
}  # fmt: skip
FAILS: dict[str, Any] = {
    "name": "fails", "prompt": "dead", "inject": {"from": "abc"}, "expect": "nowhere", "tokens": 3,
}  # fmt: skip


def arguments(place: Place, checkpoint: Path, path: Path, *more: object) -> list[object]:
    return ["check", path, "--checkpoint", checkpoint, "--model_name", place.base, "--cpu", *more]


def test_all_hold(place: Place, checkpoint: Path, capsys: Any, tmp_path: Path) -> None:
    code, out, err = run(capsys, *arguments(place, checkpoint, facts(tmp_path, HOLDS)))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("ok holds (") and lines[1].startswith("  'dead': ")
    assert lines[-1] == "1 of 1 facts hold"


def test_one_fails(place: Place, checkpoint: Path, capsys: Any, tmp_path: Path) -> None:
    path, junit = facts(tmp_path, HOLDS, FAILS), tmp_path / "junit.xml"
    given = arguments(place, checkpoint, path, "--junit", junit, "--layers", "1-2")
    code, out, err = run(capsys, *given)
    assert (code, err) == (3, "")
    assert out.splitlines()[2] == "  \"abc\" at 2 'c' into tokens 3 'd'"
    assert out.splitlines()[3].startswith("FAIL fails (")
    assert out.splitlines()[6].startswith("  expected to contain 'nowhere', got ")
    assert out.splitlines()[-1] == "1 of 2 facts hold"
    (suite,) = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert suite.get("name") == str(path)
    code, out, _ = run(capsys, *given, "--json")
    found = json.loads(out)
    assert code == 3 and found["failed"] == 1
    assert [fact["passed"] for fact in found["facts"]] == [True, False]
    assert found["facts"][1]["problems"][0].startswith("expected to contain 'nowhere'")


def test_what_is_wrong_is_one_line_each(
    place: Place, checkpoint: Path, capsys: Any, tmp_path: Path
) -> None:
    """All mistakes in the file are reported at once, before a model is loaded."""
    path = facts(tmp_path, {**HOLDS, "expects": "x", "tokens": 0})
    code, out, err = run(capsys, "check", path, "--checkpoint", "none", "--model_name", "/none")
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"Error: {path}: fact 'holds': ") for line in lines)
    good = facts(tmp_path, HOLDS)
    outside = tmp_path / "outside.yaml"
    changed = {**HOLDS, "inject": {"from": "abc", "position": 7}}
    outside.write_text(yaml.safe_dump({"facts": [changed]}))
    cases: list[tuple[list[object], int, str]] = [
        (
            arguments(place, checkpoint, tmp_path / "none.yaml"),
            1,
            "none.yaml: cannot be opened: No such file",
        ),
        (arguments(place, tmp_path / "none", good), 1, "Checkpoint not found"),
        (arguments(place, checkpoint, good, "--layers", "5"), 1, "has no layer 5"),
        (arguments(place, checkpoint, outside), 1, "fact 'holds': position 7 is outside the text"),
        (["check", "--checkpoint", checkpoint], 2, "FACTS"),
    ]
    for given, expected_code, expected in cases:
        code, out, err = run(capsys, *given)
        assert (code, out) == (expected_code, ""), err
        assert err.startswith("Error: ") and err.count("\n") == 1 and expected in err


def test_how_texts_are_read(
    place: Place, bos_base: Path, checkpoint: Path, capsys: Any, tmp_path: Path
) -> None:
    bos, path = replace(place, base=bos_base), facts(tmp_path, HOLDS)
    for option, where in (
        ([], "  \"abc\" at 3 'c' into tokens 4 'd'"),
        (["--no-special-tokens"], "  \"abc\" at 2 'c' into tokens 3 'd'"),
        (["--chat"], "  \"abc\" at 12 ':' into tokens 13 ':'"),
    ):
        code, out, err = run(capsys, *arguments(bos, checkpoint, path, *option))
        assert (code, err) == (0, "") and out.splitlines()[2] == where


def test_relations(place: Place, checkpoint: Path, capsys: Any, tmp_path: Path) -> None:
    """A suite's relations are checked by a study, beside facts."""
    model, tokenizer = load_base_model(str(place.base))
    relations = known_relations(model, tokenizer, one="{}", two="of {}")
    relations[0]["at_least"] = 0
    relations[1]["at_least"] = 1
    path, junit = tmp_path / "suite.yaml", tmp_path / "junit.xml"
    suite = {"facts": [HOLDS], "relations": relations, "controls": ["a", "b c"]}
    path.write_text(yaml.safe_dump(suite))
    code, out, err = run(capsys, *arguments(place, checkpoint, path, "--junit", junit, "--json"))
    assert (code, err) == (3, "")
    found = npt.study(
        npt.load(model, checkpoint), tokenizer, npt.read_suite(path),
        modes=["replace"], strengths=[1.0],
    )  # fmt: skip
    fact, one, two = json.loads(out)["facts"]
    assert fact["name"] == "holds" and fact["passed"]
    for outcome, name, at_least in ((one, "one", 0), (two, "two", 1)):
        rows = [row for row in found.rows if (row.relation, row.method) == (name, "replace")]
        same = [row.winner == "moved" for row in rows if row.injected == "same relation"]
        control = [row.winner == "moved" for row in rows if row.injected == "unrelated"]
        assert outcome["name"] == name and len(same) == 10
        assert outcome["after"] == f"source's object on top in {sum(same)} of 10 pairs"
        missed = sum(same) < at_least * 10
        assert len(outcome["problems"]) == missed + any(control)
        assert any("at_least is 1" in problem for problem in outcome["problems"]) == missed
        assert any("none may" in problem for problem in outcome["problems"]) == any(control)
    assert not two["passed"]
    (suite_element,) = ElementTree.parse(junit).getroot()
    assert suite_element.get("tests") == "3"
    code, out, _ = run(capsys, *arguments(place, checkpoint, path))
    assert code == 3 and "FAIL two (" in out and "own object on top in " in out
