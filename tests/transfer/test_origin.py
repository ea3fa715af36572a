"""Origins: what can be saved, and their description in a line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import npt_fast as npt
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.origin import describe
from tests.transfer.models import (
    assert_same,
    converted,
    nested,
    random_modulation,
    tokenizer,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@example({"text": "caf\udce9"})
@example({"text": "\ud800"})
@example({"\ud800": 1})
@example({"text": 'a\n"漢"\\\0\x1b😀'})
@example({"error": math.nan})
@example({"factor": 1e308, "of": {"factor": -5e-324, "of": {}}})
@example({"factor": 10**400})
@example({"text": "😀\0" * 100_000})
@example({"text": "\0" * 1_500_000})
@given(st.dictionaries(st.text(st.characters()), PLAIN))
@settings(deadline=None, derandomize=True)
def test_an_origin_is_refused_or_read_back(origin: dict[str, Any]) -> None:
    m = replace(random_modulation(layers=(1,), projections=("up",)), origin=origin)
    with TemporaryDirectory() as folder:
        path = Path(folder, "m")
        try:
            m.save(path)
        except npt.TransferError as error:
            assert str(error).startswith(f"{path}: cannot be written: ") and len(str(error)) < 500
            assert not list(path.parent.iterdir())
        else:
            assert_same(npt.load_modulation(path), m)


def shared(doublings: int) -> dict[str, Any]:
    """A tree of 2 ** doublings leaves that takes no memory."""
    found: dict[str, Any] = {}
    for _ in range(doublings):
        found = {"sum": [found, found]}
    return found


def cyclic() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["of"] = found
    return found


@pytest.mark.parametrize(
    "origin",
    [
        nested(65), nested(850), nested(100_000), shared(30), cyclic(), {"a": object()}, {1: "a"},
        {"a": b"bytes"}, {"a": {1, 2}}, {"a": math.inf}, {"a": 1 << 63}, {"a": 1j}, [1], None,
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_not_saved(origin: Any, tmp_path: Path) -> None:
    with pytest.raises(npt.TransferError, match="m: cannot be written: its origin must be a mapp"):
        replace(random_modulation(), origin=origin).save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_as_deep_as_an_origin_may_be(tmp_path: Path) -> None:
    m = replace(random_modulation(), origin=nested(64))
    m.save(tmp_path / "m")
    assert_same(npt.load_modulation(tmp_path / "m"), m)


def test_a_line_that_says_where_it_comes_from() -> None:
    model = converted()
    a = npt.extract(model, tokenizer, "Köln")
    b = npt.extract(model, tokenizer, "Rom", position="all", reduce="mean")
    assert a.description == "\"Köln\" at 4 'n'"
    assert b.description == '"Rom" mean of 3 tokens'
    assert (a - 2 * b).description == f"({a.description}) + (-1 * (2 * ({b.description})))"
    assert npt.mean([a, b]).description == f"mean of {a.description}, {b.description}"
    assert describe({}) == "unknown"


@pytest.mark.parametrize(
    "origin",
    [
        {"sum": 5},
        {"sum": [7]},
        {"factor": "x", "of": {}},
        {"factor": 1},
        {"compressed": {}},
        {"summary": ["x"]},
    ],
)
def test_an_origin_of_a_file_may_say_anything(origin: dict[str, Any]) -> None:
    assert replace(random_modulation(), origin=origin).description == "unknown"


def combined(m: Modulation, times: int) -> Modulation:
    """Combined in every way, `times` times, then compressed."""
    for _ in range(times):
        m = npt.mean([m + m, m - 0.5 * m, -m * 10**30]).compress(2)[0]
        m = m.compress(rank=10**30)[0]
    return m


@pytest.mark.parametrize("times", [1, 5, 30])
def test_what_was_combined_can_be_saved_and_combined_again(times: int, tmp_path: Path) -> None:
    """Origins that grow by a level or double in size each time."""
    scale = 0.0 if times > 5 else 1.0
    m = combined(scale * random_modulation(projections=("up",)), times)
    m.save(tmp_path / "m")
    again = npt.load_modulation(tmp_path / "m")
    assert again.origin == m.origin and again.description == m.description
    assert again.description.startswith(("mean of", "((", "-1 *")) and len(m.description) <= 1000
    (again + m).save(tmp_path / "m")


def test_a_long_chain_keeps_a_line_that_says_where_it_comes_from(tmp_path: Path) -> None:
    m = random_modulation()
    for _ in range(300):
        m = 1.0 * m
    assert m.description.startswith("1 * (1 * (") and len(m.description) <= 1000
    m.save(tmp_path / "m")
    assert npt.load_modulation(tmp_path / "m").origin == m.origin
    few = random_modulation()
    for _ in range(40):
        few = 1.0 * few
    assert few.description == "1 * (" * 40 + '"seed 0" at []' + ")" * 40
    wide = npt.mean([m] * 500)
    assert wide.description.startswith("mean of 1 * (") and len(wide.description) <= 1000
    wide.save(tmp_path / "m")


@pytest.mark.parametrize("text", ["a", "\0", "😀", '"'])
def test_what_is_made_of_long_texts_can_be_saved(text: str, tmp_path: Path) -> None:
    m = replace(random_modulation(), origin={"text": text * ((1 << 21) // len(text.encode()))})
    for combination in (1.0 * m, m + m, npt.mean([m] * 5), m.compress()[0]):
        combination.save(tmp_path / "m")
        assert npt.load_modulation(tmp_path / "m").origin == combination.origin
