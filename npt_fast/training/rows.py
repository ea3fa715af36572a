"""Rows of data sets: where their content is, and how it becomes a document.

The content of a row is a text, a chat (a list of messages), or a list of token ids. A document is a
text, which is still to be tokenised, or a list of token ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np

from npt_fast.checkpoint.source_file import read_file
from npt_fast.errors import CheckpointError, DataError
from npt_fast.hf.tokenizer import chat_ids
from npt_fast.paths import user_path

_LARGEST_TEMPLATE = 1 << 20  # bytes; the longest that models come with has 20 KB

_CONTENT = (("text",), ("messages",), ("prompt", "completion"), ("input_ids",))
_COLUMNS = "text, messages, prompt and completion, or input_ids"

Document = str | list[int]


class MissingContent(ValueError):
    """A row has none of the columns that are looked for, or its content is of another kind."""

    @classmethod
    def of(cls, kinds: Mapping[str, str], column: str | None) -> MissingContent:
        """The error of a row with columns of these types, where `column` is wanted, if given."""
        wanted = f"named {column}" if column else _COLUMNS
        has = ", ".join(f"{name!s:.40} ({kind})" for name, kind in islice(kinds.items(), 20))
        return cls(f"needs a text in a column {wanted}, has {has or 'nothing'}")


def content_of(row: Any, column: str | None = None) -> Any:
    """The content of a row.

    Args:
        row: a mapping by column, or the content itself.
        column: name of the column; by default the first of ``text``, ``messages``, ``prompt`` with
            ``completion``, and ``input_ids`` that the row has.

    Returns:
        A text, messages, or token ids; messages of a prompt and its completion.

    Raises:
        MissingContent: the row has no such column; the message names those there.
    """
    if not isinstance(row, Mapping):
        return row
    names = columns_of(row, column)
    if not names:
        kinds = {name: type(value).__name__ for name, value in row.items()}
        raise MissingContent.of(kinds, column)
    if len(names) > 1:
        return [*_turns("user", row["prompt"]), *_turns("assistant", row["completion"])]
    return row[names[0]]


def columns_of(there: Collection[str], column: str | None = None) -> tuple[str, ...]:
    """The columns that hold the content of rows, as for `content_of`; none if they are missing."""
    wanted = _CONTENT if column is None else ((column,),)
    return next((names for names in wanted if all(name in there for name in names)), ())


def _turns(role: str, given: Any) -> list[Any]:
    return [{"role": role, "content": given}] if isinstance(given, str) else list(given or ())


def document_of(content: Any, tokenizer: Any, vocabulary: int | None = None) -> Document:
    """Make a document of a row's content.

    Args:
        content: as `content_of` returns it; None is an empty text.
        tokenizer: its chat template makes tokens of messages.
        vocabulary: number of ids that the model knows; None for ids that are known to be good.

    Raises:
        MissingContent: it is of another kind, or the model does not know an id.
        ModelError: the tokenizer has no chat template, or it cannot be applied.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list | tuple) and content and isinstance(content[0], Mapping):
        for message in content:
            _check_message(message)
        return chat_ids(tokenizer, content, remedy="give one with chat_template")
    if not hasattr(content, "__len__") or isinstance(content, Mapping | bytes):
        raise MissingContent(
            f"is of type {type(content).__name__}, not a text, a chat or token ids"
        )
    if not len(content):
        return []
    try:
        ids = np.asarray(content)
    except ValueError:  # lists of several lengths
        ids = np.empty((0, 0))
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise MissingContent(
            f"is of type {type(content).__name__} of {type(content[0]).__name__}, not a text, a "
            "chat or token ids"
        )
    if vocabulary is not None and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise MissingContent(
            f"has token ids from {ids.min()} to {ids.max()}, the model has 0 to {vocabulary - 1}"
        )
    found: list[int] = ids.tolist()
    return found


def _check_message(message: Any) -> None:
    """Raise MissingContent for what is no message: a template would write its frame alone."""
    if not isinstance(message, Mapping):
        raise MissingContent(f"has a message of type {type(message).__name__}")
    told = message.get("content") is not None or message.get("tool_calls")
    if not isinstance(message.get("role"), str) or not told:
        few = islice(message.items(), 20)
        has = ", ".join(f"{name!s:.40} ({type(value).__name__})" for name, value in few)
        raise MissingContent(f"has a message without role and content: it has {has or 'nothing'}")


class Rows:
    """Reads the rows of any iterable as `datasets` does, from any position.

    Args:
        rows: gives the same rows whenever it is iterated; those before a position are passed over.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows = rows
        self._next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"row": self._next}

    def load_state_dict(self, position: Mapping[str, Any]) -> None:
        self._next = position["row"]

    def __iter__(self) -> Iterator[Any]:
        for row in islice(self._rows, self._next, None):
            self._next += 1
            yield row


def open_rows(rows: Iterable[Any]) -> Any:
    """A reader of a data set, with a position that it can go on from.

    Args:
        rows: a data set of `datasets`, or any other iterable. A ``datasets.Dataset`` seeks; its
            streams are read from the beginning, since they lose rows of a buffer of theirs.

    Returns:
        An iterable with ``state_dict`` and ``load_state_dict``; it leaves `rows` as it is.
    """
    if isinstance(rows, datasets.Dataset) and len(rows):
        return rows.with_format(None).to_iterable_dataset()
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.with_format(None)  # a copy, which gives Python's own objects
    return Rows(rows)


def with_chat_template(tokenizer: Any, given: str | Path | None) -> Any:
    """The tokenizer with the chat template of a file; the same one if none is given.

    Raises:
        DataError: the file cannot be read, is no text, or has more than 1 MiB.
    """
    if given is None:
        return tokenizer
    path = user_path(given)
    try:
        template = read_file(path, _LARGEST_TEMPLATE, follow_links=True).decode()
    except (CheckpointError, UnicodeDecodeError) as error:
        told = str(error) if isinstance(error, CheckpointError) else f"{path}: {error}"
        raise DataError(f"{told}; give a file with a chat template") from None
    found = copy(tokenizer)
    found.chat_template = template
    return found
