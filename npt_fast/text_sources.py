"""What ``--data`` names: one text, or several that take turns."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from npt_fast.paths import expand

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
    """

    name: str
    tokens: int | None = None


def parse_data(text: str | os.PathLike[str]) -> tuple[Source, ...]:
    """The texts of ``"self:200000,python-docs"``, in the order given.

    Raises:
        ValueError: a text is named twice, be it sampled with two lengths, or a sampled one has no
            such length.
        PathError: a text is neither sampled nor a path.
    """
    text = os.fspath(text)
    sources = tuple(_source(part.strip()) for part in text.split(","))
    # of two sampled texts the longer one has the rows of the other, those held out too
    names = [source.name if source.tokens is None else SAMPLED for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"{text!r:.80} names a text twice")
    return sources


def data_name(text: str | os.PathLike[str]) -> str:
    """What reports call ``--data``: sampled texts with their lengths; raises like `parse_data`."""
    return ",".join(source.name for source in parse_data(text))


def _source(text: str) -> Source:
    if text.partition(":")[0] != SAMPLED:
        expand(text)
        return Source(text)
    match = _SAMPLED.fullmatch(text)
    tokens = int(match["tokens"] or DEFAULT_TOKENS) if match else 0
    if not 0 < tokens <= _MOST_TOKENS:
        raise ValueError(
            f"{text!r:.80} is not {SAMPLED} or {SAMPLED}:TOKENS with a number from 1 to "
            f"{_MOST_TOKENS:,}; a file of this name is ./{text:.80}"
        )
    return Source(f"{SAMPLED}:{tokens}", tokens)
