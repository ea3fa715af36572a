"""How results are shown: tables in Markdown for a terminal, in HTML for notebooks and browsers."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from html import escape

from npt_fast.errors import printable


class Report:
    """A result that Python shows in one line, and a notebook as a small table."""

    __slots__ = ()

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, object]:
        """What is worth a look, by its name."""

    def __repr__(self) -> str:
        facts = "; ".join(f"{name}: {value}" for name, value in self.facts.items())
        return printable(f"<{type(self).__name__} {facts}>")

    def _repr_html_(self) -> str:
        rows = [
            [f"<th>{escaped(name)}</th>", f"<td>{escaped(str(value))}</td>"]
            for name, value in self.facts.items()
        ]
        return html_table([type(self).__name__, ""], rows)


def markdown_table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; columns of numbers are right-aligned.

    Args:
        heads: heads of the columns.
        body: cells of each row.
    """
    columns = list(zip(heads, *body, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(re.match(r"[-\d]", cell) for cell in column[1:]) for column in columns]
    lines = []
    for cells in (heads, tuple("-" * width for width in widths), *body):
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML.

    Args:
        heads: heads of the columns, which are escaped here.
        rows: cells of each row, as HTML.
    """
    lines = ["".join(f"<th>{escaped(head)}</th>" for head in heads), *map("".join, rows)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def escaped(text: str) -> str:
    """Escape a text; characters that HTML does not allow become the replacement character."""
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return escape(shown)
