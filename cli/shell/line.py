"""The grammar of a line: words, and a command's arguments and options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from npt_fast.errors import TransferError, suggestion
from npt_fast.schema import shown

_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|[^\s"]+')
_OPTION = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True)
class Word:
    """A word and its place in the line; a quoted word may hold spaces."""

    text: str
    quoted: bool
    start: int
    end: int

    @property
    def is_option(self) -> bool:
        return not self.quoted and bool(_OPTION.match(self.text))


@dataclass
class Arguments:
    """The arguments and options of a line.

    Attributes:
        values: Values of the arguments by kind; a repeated argument has several.
        options: Values of the options by name, without the dash; a flag's value is empty.
    """

    values: dict[str, list[str]] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, kind: str) -> str:
        return self.values[kind][0]

    def get(self, kind: str) -> str | None:
        """The value of an argument that may be missing."""
        return next(iter(self.values.get(kind, [])), None)


def words(line: str) -> list[Word]:
    r"""Split a line into words; within quotes, ``\"`` is a quote.

    Raises:
        TransferError: a quote is not closed.
    """
    found, place = [], 0
    while place < len(line):
        if line[place].isspace():
            place += 1
            continue
        match = _WORD.match(line, place)
        if match is None:
            raise TransferError('a quote (") is not closed')
        quoted = match[1] is not None
        text = match[1].replace('\\"', '"') if quoted else match[0]
        found.append(Word(text, quoted, match.start(), match.end()))
        place = match.end()
    return found


def parse(
    line: str, usage: str, kinds: Sequence[str], options: Sequence[str], flags: Sequence[str]
) -> Arguments:
    """Parse a line: arguments in order, options anywhere.

    Args:
        line: The line without the command.
        usage: How the command is written, for messages.
        kinds: Kinds of arguments: ``NAME``, ``[NAME]`` (optional), ``NAME...`` (one or more),
            ``[NAME...]``, ``TEXT`` (the last: one quoted word, or all remaining words),
            ``REST`` (the line unchanged).
        options: Options that take a value, as ``-pos``.
        flags: Options that take none.

    Raises:
        TransferError: the line does not fit the command.
    """
    if list(kinds) == ["REST"]:
        return Arguments({"REST": [line.strip()]})
    found = Arguments()
    plain: list[tuple[int, Word]] = []
    given = iter(enumerate(words(line)))
    for index, word in given:
        option = word.text.replace("--", "-", 1)
        if not word.is_option:
            plain.append((index, word))
        elif option not in (*options, *flags):
            raise _unknown(option, [*options, *flags], "TEXT" in kinds)
        elif option[1:] in found.options:
            raise TransferError(f"{option} is given twice")
        elif option in flags:
            found.options[option[1:]] = ""
        else:
            value = next(given, None)
            if value is None or value[1].is_option:
                raise TransferError(f"{option} needs a value: {usage}")
            found.options[option[1:]] = value[1].text
    for place, kind in enumerate(kinds):
        name = kind.strip("[].")
        if kind == "TEXT":
            found.values[name], plain = [_text(line, plain, usage)], []
            continue
        later = len([k for k in kinds[place + 1 :] if not k.startswith("[")])
        count = max(len(plain) - later, 0) if "..." in kind else min(1, len(plain))
        if not count and not kind.startswith("["):
            raise TransferError(f"{name} is missing: {usage}")
        found.values[name] = [word.text for _, word in plain[:count]]
        plain = plain[count:]
    if plain:
        raise TransferError(f"{shown(plain[0][1].text)} is one argument too many: {usage}")
    return found


def _text(line: str, plain: Sequence[tuple[int, Word]], usage: str) -> str:
    if not plain:
        raise TransferError(f"TEXT is missing: {usage}")
    if len(plain) == 1:
        return plain[0][1].text
    first, last = plain[0], plain[-1]
    if any(word.quoted for _, word in plain) or last[0] - first[0] != len(plain) - 1:
        raise TransferError(f"it is not clear where the text ends; put it in quotes: {usage}")
    return line[first[1].start : last[1].end]


def _unknown(option: str, known: Sequence[str], text: bool) -> TransferError:
    hint = suggestion(option, known)
    if not hint:
        hint = f"; known are {', '.join(known)}" if known else "; this command has none"
    quote = " (text with a word like that goes in quotes)" if text else ""
    return TransferError(f"unknown option {option:.40}{hint}{quote}")
