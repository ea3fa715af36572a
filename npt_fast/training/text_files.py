"""Read the rows of a file of text, JSON or Parquet that anybody may have written.

A file is read in pieces, so memory grows only with its largest document, which is bounded. The size
of an object, page or paragraph is checked before it is decoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from npt_fast.checkpoint import file_kind
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.errors import DataError
from npt_fast.training.parquet_file import parquet_columns, parquet_values
from npt_fast.training.rows import MissingContent, columns_of, content_of

LONGEST = 1 << 23
"""Largest number of characters in a document; tokenising takes a hundred bytes per character."""

_PIECE = 1 << 20  # characters read at once
_LONGEST_OBJECT = 2 * LONGEST  # characters of JSON; an escaped character takes six
_DEEPEST = 100  # levels of nesting, as in the JSON files of a checkpoint
_MOST_VALUES = 1_000_000  # in an object; an empty list takes 3 bytes in a file, 64 in memory
_SPACE = re.compile(r"[ \t\r\n]*+")
# a string, which the end of the piece may cut short, or a bracket or comma
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(")?|[][{},]', re.DOTALL)

_OTHER_LISTS = (
    "; of lists, a Parquet file may have messages with fields of texts and numbers: write others "
    'as .jsonl, or give datasets.load_dataset("parquet", data_files=...) from Python'
)

_Read = Callable[[int], str]


def read_contents(file: SourceFile, column: str | None = None) -> Iterator[Any]:
    """Yield what the rows of a file hold, in order; its suffix must be one of `READERS`.

    Args:
        file: the file.
        column: column that holds it, as for `npt_fast.training.rows.content_of`; text files have
            none.

    Yields:
        Texts, of JSON files also messages and token ids, unchecked.

    Raises:
        DataError: a row has none.
        ValueError: the content does not fit the suffix, or exceeds a limit.
        OSError: the file cannot be read.
        CheckpointError: the file changed while it was being read.
    """
    yield from READERS[file.path.suffix.lower()](file, column)


def _paragraphs(file: SourceFile, column: str | None) -> Iterator[str]:
    """Yield paragraphs, which blank lines separate."""
    with _opened(file) as read:
        begun = ""
        while piece := read(_PIECE):
            *whole, begun = (begun + piece).split("\n\n")
            if max(map(len, (*whole, begun))) > LONGEST:
                raise ValueError(
                    f"a paragraph of more than {LONGEST:,} characters; put blank lines into it"
                )
            yield from filter(None, whole)
        if begun:
            yield begun


def _json_contents(file: SourceFile, column: str | None) -> Iterator[Any]:
    """Yield the content of each JSON object."""
    with _opened(file) as read:
        for number, row in enumerate(_JsonReader(read).rows()):
            try:
                content = content_of(row, column)
            except MissingContent as error:
                raise DataError(f"{file.path}: row {number} {error}") from None
            if not _is_content(content):
                kinds = {name: type(value).__name__ for name, value in row.items()}
                raise _no_text(file, number, kinds, column)
            if len(content) > LONGEST:
                raise ValueError(f"row {number}: a text of more than {LONGEST:,} characters")
            if isinstance(content, str) and not content.isascii():
                try:
                    content.encode()
                except UnicodeEncodeError:
                    raise ValueError(
                        f"row {number}: its text holds half a character (a lone surrogate)"
                    ) from None
            yield content


def _is_content(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and set(map(type, value)) in ({dict}, {int})
    )


def _parquet_contents(file: SourceFile, column: str | None) -> Iterator[Any]:
    """Yield a column of texts or chats, or chats of the columns ``prompt`` and ``completion``."""
    with file.open() as fd, open(fd, "rb", closefd=False) as stream:
        kinds = parquet_columns(stream)
        names = columns_of(kinds, column)
        others = [kinds[name] for name in names if kinds[name] not in ("str", "list")]
        if others or not names:
            remedy = _OTHER_LISTS if any("<" in kind for kind in others) else ""
            raise _no_text(file, 0, kinds, column, remedy)
        columns = [parquet_values(stream, name, LONGEST) for name in names]
        for number, values in enumerate(zip(*columns, strict=True)):
            row = dict(zip(names, values, strict=True))
            if None in values:
                empty = {name: "NoneType" for name, value in row.items() if value is None}
                raise _no_text(file, number, {**kinds, **empty}, column)
            yield content_of(row, column)


READERS: Mapping[str, Callable[[SourceFile, str | None], Iterator[Any]]] = {
    ".txt": _paragraphs,
    ".md": _paragraphs,
    ".jsonl": _json_contents,
    ".json": _json_contents,
    ".parquet": _parquet_contents,
}
"""Reader of each suffix that a text file may have."""


def _no_text(
    file: SourceFile, number: int, kinds: Mapping[str, str], column: str | None, remedy: str = ""
) -> DataError:
    return DataError(f"{file.path}: row {number} {MissingContent.of(kinds, column)}{remedy}")


@contextmanager
def _opened(file: SourceFile) -> Iterator[_Read]:
    """Open a file; yield a function that reads up to `count` characters."""
    # closefd: `file` closes the descriptor, after looking whether it is still the same file
    with file.open() as fd, open(fd, encoding="utf-8", closefd=False) as text:

        def read(count: int) -> str:
            file.check(fd)
            try:
                return text.read(count)
            except UnicodeDecodeError as error:
                kind = file_kind.recognise(file.read_at(fd, 0, min(file_kind.HEAD, file.size)))
                raise ValueError(f"it is {kind}" if kind else str(error)) from None

        yield read


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


class _JsonReader:
    """Reads JSON in pieces: finds the end of a value, in one pass, before parsing it."""

    def __init__(self, read: _Read) -> None:
        self._read = read
        self._decode = json.JSONDecoder(object_pairs_hook=_unique).raw_decode
        self._text = read(1).removeprefix("\ufeff")  # the codec utf-8-sig accepts half a mark
        self._at = 0
        self._number = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield objects that follow one another or stand in an array, where a string is a text."""
        array = self._next() == "["
        end = "]" if array else ""
        self._at += array
        while (begin := self._next()) != end:
            if array and self._number:
                if begin != ",":
                    raise self._bad("a comma is missing before it, or the array ends without ]")
                self._at += 1
                begin = self._next()
            if begin != "{" and not (array and begin == '"'):
                raise self._bad("not a JSON object")
            value = self._value()
            yield {"text": value} if isinstance(value, str) else value
            self._number += 1
        self._at += array
        if self._next():
            raise self._bad("the array has ended before it")

    def _bad(self, problem: str) -> ValueError:
        return ValueError(f"row {self._number}: {problem}")

    def _next(self) -> str:
        """Skip white space and return the next character without reading it; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found
            self._at = found.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _more(self) -> bool:
        """Read on; return False at the end. The unparsed text at least doubles: linear time."""
        left = self._text[self._at :]
        piece = self._read(max(_PIECE, len(left)))
        self._text, self._at = left + piece, 0
        return bool(piece)

    def _value(self) -> Any:
        length = self._length()
        try:
            value, end = self._decode(self._text, self._at)
        except json.JSONDecodeError as error:
            raise self._bad(f"not valid JSON: {error.msg}") from None
        except ValueError as error:  # a duplicate key, or a number of thousands of digits
            raise self._bad(str(error)) from None
        assert end == self._at + length
        self._at = end
        return value

    def _length(self) -> int:
        """Return the length of the value that starts here, or of the rest if it has no end."""
        depth = values = done = 0
        while True:
            for token in _TOKEN.finditer(self._text, self._at + done):
                first = self._text[token.start()]
                if first == '"' and not token[1]:
                    break  # the string continues in the next piece
                done = token.end() - self._at
                values += 1
                depth += (first in "{[") - (first in "}]")
                if depth > _DEEPEST:
                    raise self._bad(f"nested more than {_DEEPEST} deep")
                if values > _MOST_VALUES:
                    raise self._bad(f"an object of more than {_MOST_VALUES:,} values")
                if not depth:
                    return self._bounded(done)
            else:
                done = len(self._text) - self._at
            self._bounded(len(self._text) - self._at)
            if not self._more():
                return done

    def _bounded(self, length: int) -> int:
        if length > _LONGEST_OBJECT:
            raise self._bad(f"an object of over {_LONGEST_OBJECT:,} characters, or without an end")
        return length
