"""Positions that users write, counted on a text's tokens."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import npt_fast as npt
from npt_fast.config import Position
from npt_fast.transfer.positions import find, parse, reached, resolve
from tests.transfer.models import bos_tokenizer

TOKENS = ["The", " capital", " of", " Ger", "many", " is", " of", " note"]


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0, [0]),
        (7, [7]),
        (-1, [7]),
        (-8, [0]),
        ("3", [3]),
        ("-2", [6]),
        ("last", [7]),
        ("first", [0]),
        ("all", list(range(8))),
        ("last_1", [7]),
        ("last_3", [5, 6, 7]),
        ("last_99", list(range(8))),
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, 3), [0, 3, 6]),
        (slice(-2, None), [6, 7]),
        (slice(6, 99), [6, 7]),
        ("2:5", [2, 3, 4]),
        (":2", [0, 1]),
        ("-2:", [6, 7]),
        (":", list(range(8))),
        ([1, 4], [1, 4]),
        ((4, -1, 1), [1, 4, 7]),
        (range(2, 4), [2, 3]),
        ([5, -3, 5], [5]),
        ("1,4", [1, 4]),
        ("-1,0", [0, 7]),
        ("at:capital", [1]),
        ("at:Germany", [3, 4]),
        (npt.at("Germany"), [3, 4]),
        ("at:erman", [3, 4]),
        ("at:of Germany is", [2, 3, 4, 5]),
        (npt.at(" of"), [2]),
        ("after:of", [3]),
        (npt.after("Germany"), [5]),
        ("after:Ger", [4]),
        ("at:The capital of Germany is of note", list(range(8))),
    ],
    ids=str,
)
def test_positions(position: Position, expected: list[int]) -> None:
    assert resolve(position, TOKENS) == expected


OUTSIDE = "outside the text, which has 8 tokens: 0 'The', 1 ' capital'"


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (8, f"position 8 is {OUTSIDE}"),
        (-9, f"position -9 is {OUTSIDE}"),
        ("42", f"position 42 is {OUTSIDE}"),
        ([0, 8], f"position 8 is {OUTSIDE}"),
        (slice(5, 2), "no token of 8 is at slice(5, 2, None)"),
        ("9:", "no token of 8 is at 9:"),
        ([], "no token of 8 is at []"),
        (True, "positions are whole numbers, not True"),
        ([1.5], "positions are whole numbers, not 1.5"),
        ("at:France", "'France' does not occur in 'The capital of Germany is of note'"),
        ("after:note", "nothing follows 'note' in"),
        (npt.at(""), "'' does not occur"),
        (
            "at:",
            "'at:' is not a position: a number, 2:5, 1,4, last, last_3, first, all",
        ),
        ("second", "'second' is not a position"),
        ("", "'' is not a position"),
        ("1:2:3", "'1:2:3' is not a position"),
        ("1.0", "'1.0' is not a position"),
        ("-:", "'-:' is not a position"),
        ("1:-", "'1:-' is not a position"),
        ("9" * 5000, "9 is not a position"),
        (f"0,{'9' * 5000}", "9 is not a position"),
    ],
    ids=str,
)
def test_what_is_no_position(position: Any, message: str) -> None:
    with pytest.raises(npt.TransferError, match=re.escape(message)):
        resolve(position, TOKENS)


def test_a_long_text_is_not_listed_whole() -> None:
    with pytest.raises(npt.TransferError, match=r"19 'x', \.\.\.$"):
        resolve(100, ["x"] * 50)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(-n, n - 1))))
def test_a_number_is_python_indexing(case: tuple[int, int]) -> None:
    count, index = case
    tokens = [str(i) for i in range(count)]
    assert [tokens[i] for i in resolve(index, tokens)] == [tokens[index]]
    assert resolve(str(index), tokens) == resolve(index, tokens)


@given(st.lists(st.text("ab ", min_size=1, max_size=3), min_size=1, max_size=6), st.data())
def test_a_match_covers_the_text_and_no_token_more(tokens: list[str], data: st.DataObject) -> None:
    whole = "".join(tokens)
    start = data.draw(st.integers(0, len(whole) - 1))
    text = whole[start : data.draw(st.integers(start + 1, len(whole)))]
    found = resolve(npt.at(text), tokens)
    assert found == list(range(found[0], found[-1] + 1))
    assert text in "".join(tokens[i] for i in found)
    for fewer in (found[1:], found[:-1]):
        begin = len("".join(tokens[: fewer[0]])) if fewer else 0
        end = begin + len("".join(tokens[i] for i in fewer))
        first = whole.find(text)
        assert not begin <= first <= first + len(text) <= end


def test_a_match_is_written_as_it_is_read() -> None:
    for written in ("at:Germany", "after:is: not"):
        assert str(parse(written)) == written


CHAT = ["<|begin of text|>", "the", " text", "<|end|>", " of", "<|end|>", " end"]
SPECIAL = {0, 3, 5}


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0, [0]),
        (1, [1]),
        ("at:text", [2]),  # not BOS, whose text has the word too
        ("at:of", [4]),
        ("at:end", [6]),
        ("at:<|end|>", [3]),
        ("after:text", [3]),
        ("at: text<|end|>", [2, 3]),
        ("after:<|begin of text|>", [1]),
    ],
)
def test_a_special_token_is_no_part_of_a_word(position: Position, expected: list[int]) -> None:
    assert resolve(position, CHAT, SPECIAL) == expected


def test_a_word_that_only_a_special_token_has() -> None:
    with pytest.raises(npt.TransferError, match=r"'begin' does not occur in '<.begin of text"):
        resolve("at:begin", CHAT, SPECIAL)


@pytest.mark.parametrize(
    ("when", "line"),
    [
        ("prefill", "1 'the', 4 ' of'"),
        ("both", "1 'the', 4 ' of', the generated ones"),
        ("decode", "the generated ones"),
    ],
)
def test_where_an_injection_was(when: Any, line: str) -> None:
    assert reached([1, 4], CHAT, when) == line


def test_positions_of_ids() -> None:
    ids = bos_tokenizer("to be")["input_ids"]
    assert find("at:b", ids, bos_tokenizer) == [4]  # not in <bos>
    assert find(1, ids) == find(1, ids, bos_tokenizer) == [1]
    with pytest.raises(npt.TransferError, match="the position at:b needs a tokenizer"):
        find("at:b", ids)
    with pytest.raises(npt.TransferError, match="6 tokens: 0 '<bos>', 1 't', 2 'o', 3 ' ', 4 'b'"):
        find(6, ids, bos_tokenizer)
    with pytest.raises(
        npt.TransferError, match=r"position 6 is outside the text, which has 6 tokens$"
    ):
        find(6, ids)
