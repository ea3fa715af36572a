"""Tables in Markdown, aligned for a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence


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
