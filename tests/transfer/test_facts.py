"""Files of facts: what they may contain; each mistake is one line."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from npt_fast.config import Injection
from npt_fast.transfer.facts import Fact
from npt_fast.transfer.strict_yaml import MistakesError
from npt_fast.transfer.suite import read_suite


def test_a_file_of_facts(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(
        """
facts:
  - prompt: The capital of Germany is
    inject: {from: The capital of France is}
    expect: Paris
  - name: all
    prompt: p
    inject: {from: s, sequence: true, position: -2, mode: add, strength: 2, when: both}
    expect: {begins: a, contains: b}
    must_not_change: [c, d]
    tokens: 3
  - prompt: q
    inject: {from: s, position: [1, -1]}
    expect: e
"""
    )
    assert read_suite(path).facts == [
        Fact(
            name="The capital of Germany is",
            prompt="The capital of Germany is",
            source="The capital of France is",
            contains="Paris",
        ),
        Fact(
            name="all", prompt="p", source="s", sequence=True,
            injection=Injection(position=-2, mode="add", strength=2, when="both"),
            begins="a", contains="b", must_not_change=["c", "d"], tokens=3,
        ),
        Fact(name="q", prompt="q", source="s", injection=Injection(position=[1, -1]), contains="e"),
    ]  # fmt: skip


RIGHT: dict[str, Any] = {"name": "n", "prompt": "p", "inject": {"from": "s"}, "expect": "e"}


def wrong(**changes: Any) -> str:
    fact = {key: value for key, value in {**RIGHT, **changes}.items() if value is not None}
    return str(yaml.safe_dump({"facts": [fact]}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wrong(expects="e"), ": fact 'n': unknown key 'expects'; did you mean 'expect'?"),
        (wrong(zzz=1), ": fact 'n': unknown key 'zzz'; there are name, prompt"),
        (wrong(inject={"from": "s", "mod": "add"}), ": fact 'n': inject: unknown key 'mod'"),
        (wrong(expect={"ends": "x"}), ": fact 'n': expect: unknown key 'ends'"),
        (wrong(inject={}), ": fact 'n': inject: from is missing"),
        (wrong(inject="s"), ": fact 'n': inject must be a mapping with from, not 's'"),
        (wrong(prompt=None), ": fact 'n': prompt is missing"),
        (wrong(prompt=""), ": fact 'n': prompt must be a text, not ''"),
        (wrong(expect=True), ": fact 'n': expect must be a text or a mapping, not True"),
        (wrong(expect=None), ": fact 'n': expects nothing; give expect or must_not_change"),
        (wrong(expect={}), ": fact 'n': expects nothing"),
        (wrong(must_not_change="x"), ": fact 'n': must_not_change must be a list of prompts"),
        (wrong(tokens=0), ": fact 'n': tokens must be a whole number from 1 to 10,000, not 0"),
        (wrong(tokens=True), ": fact 'n': tokens must be"),
        (wrong(inject={"from": "s", "mode": "ad"}), "mode must be one of replace, blend, add"),
        (wrong(inject={"from": "s", "when": "now"}), "when must be one of prefill"),
        (wrong(inject={"from": "s", "strength": "2"}), "strength must be a number, not '2'"),
        (wrong(inject={"from": "s", "strength": float("nan")}), "strength must be a number"),
        (wrong(inject={"from": "s", "position": "there"}), "position must be a number, a list"),
        (wrong(inject={"from": "s", "position": 1.5}), "position must be a number, a list"),
        (wrong(inject={"from": "s", "position": []}), "position must be a number, a list"),
        (wrong(inject={"from": "s", "position": [True]}), "position must be a number, a list"),
        (wrong(inject={"from": "s", "sequence": 1}), "sequence must be true or false, not 1"),
        ("facts: [3]", ": fact 1: must be a mapping with prompt, inject"),
        ("facts: []", ": has no facts"),
        ("facts: {}", ": facts must be a list"),
        ("", ": must be a mapping with facts"),
        ("- a", ": must be a mapping with facts"),
        ("fact: []", ": unknown key 'fact'; did you mean 'facts'?"),
        ("facts: [", ": is not valid YAML: "),
        ("facts: []\nfacts: []", ": is not valid YAML: 'facts' is there twice"),
        ("? [a]\n: 1", ": is not valid YAML: "),
        ("facts: !!python/object/apply:os.system [true]", ": is not valid YAML: "),
        ("facts: &a [*a]", ": is not valid YAML: *a: write the value out again"),
        ("facts: [{<<: {prompt: a}}]", ": is not valid YAML: '<<': a key must be a text"),
        ("facts: [<<]", ": is not valid YAML: "),
        ("yes: 1", ": is not valid YAML: 'yes': a key must be a text; put it in quotes"),
        ("5: 1", ": is not valid YAML: '5': a key must be a text"),
        ("{[a]: 1}", ": is not valid YAML: a list or mapping: a key must be a text"),
        (
            "facts: !!timestamp x",
            ": is not valid YAML: tag:yaml.org,2002:timestamp: leave tags out",
        ),
        ("facts: !!bool x", "leave tags out"),
        ("facts: ! x", "leave tags out"),
        ("facts: " + "9" * 41, ": is not valid YAML: a number of 41 characters"),
        ("facts: " + "9" * 900_000, ": is not valid YAML: a number of 900,000 characters"),
        ("facts: 0x" + "f" * 900_000, ": is not valid YAML: a number of 900,002 characters"),
        ("facts: 1" + ":00" * 300_000, ": is not valid YAML: a number of 900,001 characters"),
        ("facts: 1." + "0" * 900_000, ": is not valid YAML: a number of 900,002 characters"),
        ("facts: [" + "a," * 400_000 + "]", ": is not valid YAML: more than 30,000 values"),
        ("facts: [" + "{q: 1}," * 9_000 + "]", ": fact 1: unknown key 'q'"),
        ("- a\n" * 200_000, ": is not valid YAML: more than 30,000 values"),
        (
            "".join(" " * n + "a:\n" for n in range(1000)),
            ": is not valid YAML: nested more than 10 deep",
        ),
        ("- " * 400_000, ": is not valid YAML: nested more than 10 deep"),
        ("{a: " * 200_000, ": is not valid YAML: nested more than 10 deep"),
        (" " * 1_000_001, ": 1,000,001 bytes; more than 1,000,000 are refused"),
        (wrong(tokens=10_001), "tokens must be a whole number from 1 to 10,000"),
        (wrong(tokens=True), "tokens must be a whole number from 1 to 10,000"),
        (wrong(inject={"from": "s", "strength": 1e999}), "strength must be a number"),
        (wrong(inject={"from": "s", "strength": 10**30}), "strength must be a number"),
        (wrong(inject={"from": "s", "mode": ["replace"]}), "mode must be one of"),
        ('facts: [{prompt: "\\ud800"}]', "prompt must be a text"),
        ('facts: [{"\\ud800": a}]', "unknown key"),
        ("facts: 2026-13-45", ": "),
        ("[" * 5000, ": is not valid YAML: "),
        ("a: \x00", ": is not valid YAML: "),
    ],
    ids=lambda value: value[:40],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(text)
    with pytest.raises(MistakesError) as caught:
        read_suite(path)
    assert caught.value.problems[0].startswith(str(path)) and "\n" not in str(caught.value)
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems


def test_all_mistakes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    second = {**RIGHT, "prompt": 3, "inject": {"from": "", "mode": "x"}}
    third = {**RIGHT, "name": "other", "tokens": "many"}
    path.write_text(json.dumps({"facts": [RIGHT, second, third]}))
    with pytest.raises(MistakesError, match=r"\(and 4 more\)") as caught:
        read_suite(path)
    assert (
        len(caught.value.problems) == 5
    )  # three and a repeated name of the second, one of the third
    assert sum("fact 'n'" in problem for problem in caught.value.problems) == 4
    path.write_bytes(b"facts: \xff")
    with pytest.raises(MistakesError, match="is not valid YAML"):
        read_suite(path)
    with pytest.raises(MistakesError, match="No such file"):
        read_suite(tmp_path / "none.yaml")
    path.write_text("facts: [" + "{q: 1}," * 9_000 + "]")
    with pytest.raises(MistakesError) as caught:
        read_suite(path)
    assert 100 < len(caught.value.problems) < 110  # then the reader stops


def test_facts_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(MistakesError, match=r"not a regular file|is a directory"):
            read_suite(path)


def bombs() -> Iterator[str]:
    """A few bytes that an ordinary loader expands to gigabytes."""
    letters = "abcdefghijkl"
    for alias, value in (("[{}]", "[x]"), ("{{<<: [{}]}}", "{x: 1}")):
        lines = [f"a: &a {value}"]
        for before, letter in pairwise(letters):
            many = ", ".join([f"*{before}"] * 9)
            lines.append(f"{letter}: &{letter} " + alias.format(many))
        yield "\n".join(lines)


@pytest.mark.parametrize("text", [*bombs()], ids=["aliases", "merges"])
def test_a_bomb_takes_no_memory(tmp_path: Path, text: str) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(MistakesError, match=r"\*a: write the value out again"):
            read_suite(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@given(st.text(st.sampled_from("ab:-[]{}&*!?|>%@'\"#, \n<~.0x")))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_any_text_is_facts_or_one_line(text: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "facts.yaml")
        path.write_text(text)
        with pytest.raises(MistakesError, match=r"^[^\n]*$") as caught:
            read_suite(path)
        assert str(caught.value).startswith(f"{path}: ")
