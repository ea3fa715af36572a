"""The grammar of a line: words, arguments, options."""

from __future__ import annotations

import pytest

from npt_fast.cli.shell.commands import COMMANDS
from npt_fast.cli.shell.line import parse, words
from npt_fast.errors import TransferError


def test_words() -> None:
    found = words(r'inject  a "The capital" plain "say \"hi\"" ""')
    assert [word.text for word in found] == [
        "inject", "a", "The capital", "plain", 'say "hi"', "",
    ]  # fmt: skip
    assert [word.quoted for word in found] == [False, False, True, False, True, True]


INJECT = COMMANDS["inject"]


@pytest.mark.parametrize(
    ("rest", "text", "options"),
    [
        ('a "The capital of" -tokens 5', "The capital of", {"tokens": "5"}),
        ("a The  capital of -tokens 5", "The  capital of", {"tokens": "5"}),
        ("a -pos -2 The capital", "The capital", {"pos": "-2"}),
        ('-temp 0.5 a "x"', "x", {"temp": "0.5"}),
        ("a minus -1 degrees", "minus -1 degrees", {}),
        ('a "-tokens 5"', "-tokens 5", {}),
        ('a ""', "", {}),
        ('a "x" -pos "at:New York"', "x", {"pos": "at:New York"}),
    ],
)
def test_text_with_and_without_quotes(rest: str, text: str, options: dict[str, str]) -> None:
    found = INJECT.parse(rest)
    assert (found["NAME"], found["TEXT"], found.options) == ("a", text, options)


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("", "NAME is missing: inject NAME TEXT"),
        ("a", "TEXT is missing"),
        ('a "The capital', r"a quote \(\"\) is not closed"),
        ('a The "capital" of', "not clear where the text ends; put it in quotes"),
        ("a The -tokens 5 capital", "not clear where the text ends"),
        ('a "x" "y"', "not clear where the text ends"),
        ('a "x" -tokens', "-tokens needs a value"),
        ('a "x" -tokens -temp 1', "-tokens needs a value"),
        ('a "x" -token 5', "unknown option -token; did you mean '-tokens'"),
        ('a "x" --tokens 5', None),
        ('a "x" -pos 1 -pos 2', "-pos is given twice"),
        ("a the -ing form", "text with a word like that goes in quotes"),
    ],
)
def test_lines_that_do_not_fit(rest: str, problem: str | None) -> None:
    if problem is None:
        assert INJECT.parse(rest).options == {"tokens": "5"}
        return
    with pytest.raises(TransferError, match=problem):
        INJECT.parse(rest)


def test_repeated_arguments() -> None:
    found = parse("a b c d", "", ["A...", "NEW"], [], [])
    assert (found.values["A"], found["NEW"]) == (["a", "b", "c"], "d")
    assert parse("", "", ["[TOKEN...]"], [], []).values == {"TOKEN": []}
    with pytest.raises(TransferError, match="'b' is one argument too many"):
        parse("a b", "", ["NAME"], [], [])
