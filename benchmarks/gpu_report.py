"""The report of a GPU day: rows of one or more calls, as JSON and as tables."""

from __future__ import annotations

import inspect
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npt_fast.benchmarks.harness import result_path, save
from npt_fast.benchmarks.rows import BAD, NOT_RUN, SKIPPED, STOPPED, Row, table
from npt_fast.errors import BenchmarkError
from npt_fast.tables import markdown_table

_KEY = ("op", "what", "provider", "launch")
"""Keys that identify a row; a later row with the same values replaces it."""
ALL_OF_IT = "all of it"
"""Name of the row that replaces all rows of a part that did not start."""
_UNDONE = (NOT_RUN, STOPPED, SKIPPED)


class Report:
    """Rows by part, from calls on one kind of device.

    Args:
        docs: part -> description, in the order of the report.

    Attributes:
        runs: facts about each call, the current one first; a row has the index of its call.
    """

    def __init__(self, docs: Mapping[str, str]) -> None:
        self._docs = docs
        self.runs: list[dict[str, str]] = []
        self._rows: dict[str, dict[tuple[str, ...], Row]] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._done: dict[str, set[str]] = {}

    def add(self, part: str, job: str, row: Row) -> None:
        """Add a row of the current call."""
        self._put(part, {**row, "job": job, "run": 0})

    def _put(self, part: str, row: Row) -> None:
        rows = self._rows.setdefault(part, {})
        key = _key(row)
        if row["job"] != ALL_OF_IT:  # the part has started
            rows.pop(_key({"what": ALL_OF_IT}), None)
        if row["status"] in _UNDONE and key in rows and rows[key]["status"] not in _UNDONE:
            return
        rows[key] = row

    def took(self, part: str, seconds: float) -> None:
        """Add to the seconds of a part."""
        self._seconds[part] += seconds

    def finish(self, part: str, job: str) -> None:
        """Record that a job is complete, and drop rows that said it was not."""
        self._done.setdefault(part, set()).add(job)
        rows = self._rows.get(part, {})
        for key, row in list(rows.items()):
            if row["job"] == ALL_OF_IT or (row["job"] == job and row["status"] in _UNDONE):
                del rows[key]

    def has(self, part: str, job: str) -> bool:
        """Whether a job is complete."""
        return job in self._done.get(part, ())

    def rows(self, part: str) -> list[Row]:
        """All rows of a part."""
        return list(self._rows.get(part, {}).values())

    @property
    def bad(self) -> bool:
        """Whether any row failed."""
        return any(row["status"] in BAD for part in self._rows for row in self.rows(part))

    def document(self) -> dict[str, Any]:
        """The content of the JSON file."""
        parts = {
            name: {
                "seconds": self._seconds[name],
                "done": sorted(self._done.get(name, ())),
                "rows": self.rows(name),
            }
            for name in self._docs
            if name in self._rows
        }
        return {"device": self.runs[0]["device"], "runs": self.runs, "parts": parts}

    def merge(self, file: Path) -> None:
        """Add the rows of an earlier report.

        Raises:
            BenchmarkError: the file is no report, or one of another device.
        """
        before = len(self.runs)
        try:
            document = json.loads(file.read_bytes())
            device, runs, parts = (document[name] for name in ("device", "runs", "parts"))
            if self.runs and device != self.runs[0]["device"]:
                ours = self.runs[0]["device"]
                raise BenchmarkError(f"{file} is of another device, {device}; this is {ours}")
            if not runs:
                raise ValueError("no call")
            for name, part in parts.items():
                for row in part["rows"]:
                    self._put(name, row | {"run": row["run"] + before})
                for job in part["done"]:
                    self.finish(name, job)
                self.took(name, float(part["seconds"]))
            self.runs += runs
        except OSError as error:
            raise BenchmarkError(f"{file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BenchmarkError(f"{file} is no report of benchmarks.gpu_day") from None

    def markdown(self) -> str:
        """A table of all parts, and the tables of each part."""
        summary = [
            (name, f"{self._seconds[name]:.0f}", _counts(self.rows(name)))
            for name in self._docs
            if name in self._rows
        ]
        parts = [markdown_table(("part", "seconds", "result"), summary)] if summary else []
        if len(self.runs) > 1:
            parts.append("Rows say which call they are of:")
            parts.append(table([{"run": i, **facts} for i, facts in enumerate(self.runs)]))
        for name, *_ in summary:
            parts.append(f"## {name}\n\n{inspect.cleandoc(self._docs[name])}")
            by_op: dict[str, list[Row]] = {}  # one job may have rows of several ops, such as paths
            for row in self.rows(name):
                by_op.setdefault(row.get("op", ""), []).append(self._shown(row))
            for op, rows in by_op.items():
                parts += [f"### {op}"] if op else []
                parts.append(table(rows))
        return "\n\n".join(parts)

    def _shown(self, row: Row) -> Row:
        hidden = {"op", "job"} if len(self.runs) > 1 else {"op", "job", "run"}
        return {key: value for key, value in row.items() if key not in hidden}

    def file(self, directory: Path) -> Path:
        """Path of the JSON file that `write` writes."""
        return result_path("gpu-day", self.runs[0]["device"], directory).with_suffix(".json")

    def write(self, directory: Path) -> Path:
        """Replace both files atomically; return the path of the tables."""
        return save(
            "gpu-day", "GPU day", self.runs[0], self.markdown(), self.document(),
            machine="device", directory=directory,
        )  # fmt: skip


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in _KEY)


def _counts(rows: Sequence[Row]) -> str:
    counts = Counter(row["status"] for row in rows)
    return ", ".join(f"{count} {status}" for status, count in counts.items())
