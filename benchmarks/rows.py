"""What a measurement is, as data: rows, the jobs that give them, and how tables show them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from npt_fast.tables import markdown_table

Row = dict[str, Any]
"""What was looked at, a status, details; numbers. Lists go to the JSON file only."""

BAD = ("failed", "wrong", "differs")
NOT_RUN = "not run: budget"
"""Status of what the budget had no time for."""
SKIPPED = "skipped"
"""Status of what lacks something: memory, a tool, a GPU."""
STOPPED = "not run: stopped"
"""Status of what was not reached before somebody stopped it all."""


class Job(NamedTuple):
    """A part of a part: what it is about, and a function that gives its rows.

    The function takes the deadline, of `time.monotonic`, after which it begins nothing more.
    """

    what: str
    run: Callable[[float], Iterable[Row]]


def table(rows: Sequence[Row]) -> str:
    """Columns are what any of the rows has something for."""
    heads = dict.fromkeys(key for r in rows for key, value in r.items() if cell(value) != "-")
    return markdown_table(list(heads), [[cell(r.get(head)) for head in heads] for r in rows])


def cell(value: Any) -> str:
    """A value as a table shows it; ``"-"`` for what is not there, and for lists."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if value is None or value == "" or isinstance(value, list):
        return "-"
    text = " ".join(str(value).replace("|", "/").split())
    return text if len(text) <= 200 else f"{text[:200]}..."
