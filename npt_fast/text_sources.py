"""What ``--data`` names: one text, or several that take turns; and data sets that are objects."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from npt_fast.errors import DataError, OptionError
from npt_fast.paths import expand

TextData = str | os.PathLike[str] | Iterable[Any]
"""Text to train or measure on: what `TrainOptions.data` names, or a data set of rows, such as a
``datasets.Dataset``, or an iterable of texts or of lists of token ids."""

STREAMED = "medium"
"""What training reads if no data is named, provided that it can be reached."""
SAMPLED = "self"
"""What training samples from the base model otherwise."""
DEFAULT_TOKENS = 100_000
"""Tokens of a sampled text whose length is not given."""

_MOST_TOKENS = 100_000_000  # 400 MB of ids; a GPU that samples 10,000 tokens a second takes 3 hours
_SAMPLED = re.compile(rf"{SAMPLED}(:(?P<tokens>[0-9]{{1,9}}))?")


class Source(NamedTuple):
    """A text to train on.

    Attributes:
        name: what `npt_fast.training.documents.open_documents` opens; of a sampled text its name
            with its length, as ``self:100000``.
        tokens: number of tokens to sample from the base model; None if the text is read.
        rows: the data set itself if it is an object, which its type names.
    """

    name: str
    tokens: int | None = None
    rows: Iterable[Any] | None = None


def parse_data(text: str | os.PathLike[str]) -> tuple[Source, ...]:
    """The texts of ``"self:200000,python-docs"``, in the order given.

    Raises:
        OptionError: a text is named twice, be it sampled with two lengths, or a sampled one has no
            such length.
        PathError: a text is neither sampled nor a path.
    """
    text = os.fspath(text)
    sources = tuple(_source(part.strip()) for part in text.split(","))
    # of two sampled texts the longer one has the rows of the other, those held out too
    names = [source.name if source.tokens is None else SAMPLED for source in sources]
    if len(set(names)) < len(names):
        raise OptionError(f"{text!r:.80} names a text twice")
    return sources


def sources_of(data: TextData) -> tuple[Source, ...]:
    """The texts that are named, as `parse_data` reads them, or the one data set that is given.

    Raises:
        DataError: the object is no data set, has several parts, or can be read only once.
        OptionError: as `parse_data`.
    """
    if isinstance(data, str | os.PathLike):
        return parse_data(data)
    name = type(data).__name__
    if isinstance(data, Mapping) or hasattr(data, "columns"):  # of pandas and others
        parts = ", ".join(f"{part!s:.40}" for part in list(getattr(data, "columns", data))[:20])
        raise DataError(f"{name}: is several data sets; give one of them: {parts}")
    if isinstance(data, bytes | bytearray) or not hasattr(data, "__iter__"):
        raise DataError(
            f"{name}: is no text; give a data set, an iterable of texts or of lists of token ids, "
            "or the name of a text"
        )
    if iter(data) is data:
        raise DataError(
            f"{name}: can be read once, but a text is read from its beginning several times; give "
            "a list, or an object whose __iter__ starts anew"
        )
    return (Source(name, rows=data),)


def data_name(data: TextData) -> str:
    """What reports call a text: sampled texts with their lengths; raises like `sources_of`."""
    return ",".join(source.name for source in sources_of(data))


def _source(text: str) -> Source:
    if text.partition(":")[0] != SAMPLED:
        expand(text)
        return Source(text)
    match = _SAMPLED.fullmatch(text)
    tokens = int(match["tokens"] or DEFAULT_TOKENS) if match else 0
    if not 0 < tokens <= _MOST_TOKENS:
        raise OptionError(
            f"{text!r:.80} is not {SAMPLED} or {SAMPLED}:TOKENS with a number from 1 to "
            f"{_MOST_TOKENS:,}; a file of this name is ./{text:.80}"
        )
    return Source(f"{SAMPLED}:{tokens}", tokens)
