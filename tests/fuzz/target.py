"""A reader to fuzz: how a file reaches it, and which second reader it is compared with.

An input is one or several valid files, changed by a few edits. The reader must refuse it in one
line, or agree with the second reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st

from npt_fast.errors import NPTError
from tests.fuzz import mutations
from tests.fuzz.mutations import Edit
from tests.fuzz.watch import watched

MOST_EDITS = 6
LONGEST_LINE = 500
"""Characters of a message."""

Recipe = tuple[int, list[tuple[int, int]]]
"""Which valid file, and which edits with the seed of each."""


@dataclass(frozen=True)
class Target:
    """A reader to fuzz.

    Attributes:
        name: name in reports.
        file: name of the file that is changed.
        edits: edits that suit the file's format.
        prepare: function that writes the other files into a folder, and returns valid contents of
            the file.
        read: function that reads the file at a path; if it returns, the file was accepted.
        compare: function that compares the result of `read` with that of a second reader.
    """

    name: str
    file: str
    edits: Sequence[Edit]
    prepare: Callable[[Path], Sequence[bytes]]
    read: Callable[[Path], Any]
    compare: Callable[[Path, Any], None]


@dataclass
class Place:
    """A target's folder, with all that its inputs need.

    Attributes:
        target: the target.
        folder: folder for its files; it is empty at first.
        valid: contents of the file that are accepted.
        accepted: number of inputs that the reader accepted so far.
        refused: number of inputs that the reader refused so far.
    """

    target: Target
    folder: Path
    valid: Sequence[bytes] = field(init=False)
    accepted: int = field(default=0, init=False)
    refused: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.valid = self.target.prepare(self.folder)

    @property
    def path(self) -> Path:
        return self.folder / self.target.file

    def recipes(self) -> st.SearchStrategy[Recipe]:
        """Every input, the simplest first."""
        edit = st.tuples(st.integers(0, len(self.target.edits) - 1), st.integers(0, (1 << 32) - 1))
        return st.tuples(
            st.integers(0, len(self.valid) - 1), st.lists(edit, min_size=1, max_size=MOST_EDITS)
        )

    def build(self, recipe: Recipe) -> bytes:
        number, steps = recipe
        data = self.valid[number]
        for edit, seed in steps:
            data = self.target.edits[edit](data, Random(seed), self.valid)[: mutations.MAX_BYTES]
        return data

    def run(self, data: bytes) -> bool:
        """Whether the reader accepts the file; raises what is wrong with reading it."""
        self.path.unlink(missing_ok=True)  # whoever has mapped the last one keeps it
        self.path.write_bytes(data)
        try:
            with watched():
                found = self.target.read(self.path)
        except NPTError as error:
            for line in (str(error), *getattr(error, "problems", ())):
                check_line(line)
            self.refused += 1
            return False
        self.target.compare(self.path, found)
        self.accepted += 1
        return True


def check_line(line: str) -> None:
    assert line and line.isprintable(), f"not one printable line: {line!r:.300}"
    assert len(line) < LONGEST_LINE, f"{len(line)} characters: {line:.300}"


def same_values(ours: Any, others: Any) -> None:
    """Whether values are equal, including types, order and NaN."""
    assert repr(ours) == repr(others), f"{ours!r:.300} is not {others!r:.300}"


def fixed(*contents: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [content.encode() for content in contents]
