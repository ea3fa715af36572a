"""Measurements as data: rows, the jobs that yield them, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from npt_fast.tables import markdown_table

Row = dict[str, Any]
"""What was measured, a status, details and numbers. Lists go to the JSON file only."""

BAD = ("failed", "wrong", "differs")
NOT_RUN = "not run: budget"
"""Status of work that the budget left no time for."""
SKIPPED = "skipped"
"""Status of work that lacks memory, a tool or a GPU."""
STOPPED = "not run: stopped"
"""Status of work that was not reached before the run was stopped."""


class Job(NamedTuple):
    """A unit of work in a part: what it measures, and a function that yields its rows.

    The function takes a deadline of `time.monotonic`, after which it starts nothing new.
    """

    what: str
    run: Callable[[float], Iterable[Row]]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with one column for each key that any row has a value for."""
    heads = dict.fromkeys(key for r in rows for key, value in r.items() if cell(value) != "-")
    return markdown_table(list(heads), [[cell(r.get(head)) for head in heads] for r in rows])


def cell(value: Any) -> str:
    """A value as a table shows it; ``"-"`` for a missing value and for a list."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if value is None or value == "" or isinstance(value, list):
        return "-"
    text = " ".join(str(value).replace("|", "/").split())
    return text if len(text) <= 200 else f"{text[:200]}..."
