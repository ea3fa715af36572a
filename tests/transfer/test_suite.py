"""Suite files: what they may contain, the default one, and what is wrong in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from npt_fast.transfer.strict_yaml import MistakesError
from npt_fast.transfer.suite import Relation, default_suite, read_suite

RIGHT: dict[str, Any] = {"name": "n", "prompt": "{} is", "pairs": {"a": "b", "c": "d"}}


def wrong(**changes: Any) -> str:
    relation = {key: value for key, value in {**RIGHT, **changes}.items() if value is not None}
    return str(yaml.safe_dump({"relations": [relation]}))


def test_a_suite(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        """
relations:
  - capital
  - name: river
    prompt: The river of {} is {no format} the
    paraphrases: ["{}'s river is the"]
    pairs: {France: Loire, Brazil: Amazon}
    separator: ""
    at_least: 1
controls: [x, y]
facts: [{prompt: p, inject: {from: s}, expect: e}]
"""
    )
    found = read_suite(path)
    capital, river = found.relations
    assert capital == default_suite().relations[0] and capital.pairs["France"] == "Paris"
    assert river == Relation(
        name="river", prompt="The river of {} is {no format} the",
        paraphrases=["{}'s river is the"], pairs={"France": "Loire", "Brazil": "Amazon"},
        separator="", at_least=1,
    )  # fmt: skip
    assert river.about("Peru") == "The river of Peru is {no format} the"
    assert found.controls == ["x", "y"] and [fact.name for fact in found.facts] == ["p"]


def test_the_default_suite(tmp_path: Path) -> None:
    found = default_suite()
    assert [relation.name for relation in found.relations] == [
        "capital", "language", "currency", "chemical symbol", "continent", "young animal",
        "opposite",
    ]  # fmt: skip
    assert len(found.controls) >= 3
    for relation in found.relations:
        assert len(relation.pairs) >= 15 and len(relation.paraphrases) == 2
    capital, language, currency, _, continent, *_ = found.relations
    for relation in (language, currency, continent):
        assert len(capital.pairs.keys() & relation.pairs.keys()) >= 20
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"relations": [RIGHT]}))
    assert read_suite(path).controls == found.controls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("relations: [captial]", "relation 'captial': unknown relation 'captial'; did you mean 'c"),
        ("relations: [zzz]", "relation 'zzz': unknown relation 'zzz'; there are capital, language"),
        ("relations: [3]", "relation 1: must be a mapping with name, prompt, pairs"),
        ("relations: {}", ": relations must be a list"),
        ("relations: []", ": has no facts and no relations"),
        ("controls: [a]", ": has no facts and no relations"),
        ("relation: []", "unknown key 'relation'; did you mean 'relations'?"),
        ("relations: [capital, capital]", "relation 'capital': another relation has that name"),
        ("relations: [capital]\ncontrols: []", ": controls must be a list of texts, not empty"),
        ("relations: [capital]\ncontrols: [3]", ": controls must be a list of texts, not empty"),
        (wrong(name=None), "relation 1: name is missing"),
        (wrong(prompt=None), "relation 'n': prompt is missing"),
        (wrong(pairs=None), "relation 'n': pairs is missing"),
        (wrong(prompt="x"), "relation 'n': prompt must be a text with {} for the subject, not 'x'"),
        (wrong(paraphrases=["x"]), "relation 'n': paraphrases must be a list of texts with {}"),
        (wrong(pairs={"a": "b"}), "relation 'n': pairs must be a mapping of two or more"),
        (wrong(pairs={"a": "b", "c": 3}), "relation 'n': pairs must be a mapping of two or more"),
        (wrong(pairs={"a": "b", "c": ""}), "relation 'n': pairs must be a mapping of two or more"),
        (wrong(separator=3), "relation 'n': separator must be a text, not 3"),
        (wrong(at_least=1.5), "relation 'n': at_least must be a number from 0 to 1, not 1.5"),
        (wrong(at_least=True), "relation 'n': at_least must be a number from 0 to 1"),
        (wrong(pair={}), "relation 'n': unknown key 'pair'; did you mean 'pairs'?"),
        ("relations: &a [*a]", ": is not valid YAML: *a: write the value out again"),
    ],
    ids=lambda value: value[:40],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(MistakesError) as caught:
        read_suite(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems
