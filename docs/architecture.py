"""Draws architecture.svg: who imports whom, from the table that tests/test_layering.py enforces.

    python -m docs.architecture     # after a change of that table

The places of the boxes are decided here. The arrows come from the table: one for each import that
is allowed, without those that follow from others. They are vertical, so a box must stand above what
it imports and overlap it horizontally.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

from tests.test_layering import ALLOWED

PICTURE = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT, TOP = 760, 540, 24
ROW, BOX_HEIGHT = 84, 50
FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"


class Box(NamedTuple):
    """Parts of the library in one frame.

    Attributes:
        parts: Names of the parts, as the table has them.
        text: What they do, in a line.
        row: Index of its row, from the top.
        left: Left edge, in pixels.
        right: Right edge, in pixels.
        colour: Colour of the frame's inside.
    """

    parts: tuple[str, ...]
    text: str
    row: int
    left: int
    right: int
    colour: str

    @property
    def top(self) -> int:
        return TOP + self.row * ROW


BOXES = (
    Box(("cli",), "npt-fast: one file per verb", 0, 40, 720, "#e8eaf6"),
    Box(("training",), "data, losses, the loop", 1, 40, 230, "#e3f2fd"),
    Box(("vllm",), "plugin", 1, 250, 370, "#e3f2fd"),
    Box(("transfer",), "extract, inject, bake, trace, compare, check", 1, 390, 720, "#e3f2fd"),
    Box(("hf",), "Hugging Face models: convert, load, save, export", 2, 40, 720, "#e0f2f1"),
    Box(("pictures", "report_files"), "how results are shown", 3, 500, 720, "#f5f5f5"),
    Box(
        ("modules", "called_mlp", "initialization", "kept_cast", "mlp_layout", "moe_mlp"),
        "the NP component",
        3,
        40,
        480,
        "#e0f2f1",
    ),
    Box(("functional",), "the modulated MLP as a function", 4, 40, 290, "#fff3e0"),
    Box(("checkpoint", "hub"), "read, merge, verify; no torch", 4, 310, 720, "#fce4ec"),
    Box(("kernels",), "Triton", 5, 40, 130, "#fff3e0"),
    Box(
        (
            *("arguments", "config", "errors", "layer_names", "paths", "schema", "tables"),
            "text_sources",
        ),
        "the standard library only",
        5,
        150,
        720,
        "#f5f5f5",
    ),
)


def arrows() -> list[tuple[Box, Box]]:
    """Pairs of importing and imported boxes, without those that a longer way connects too."""
    allowed = {**ALLOWED, "cli": set(ALLOWED)}
    below = {
        box: {
            other
            for other in BOXES
            if other != box and any(allowed[part] & {*other.parts} for part in box.parts)
        }
        for box in BOXES
    }

    def reached(box: Box) -> set[Box]:
        return below[box].union(*map(reached, below[box]))

    return [
        (box, other)
        for box in BOXES
        for other in BOXES
        if other in below[box] and not any(other in reached(way) for way in below[box])
    ]


def text(x: float, y: int, size: int, content: str, style: str = "") -> str:
    place = f'x="{x:g}" y="{y}" font-size="{size}" text-anchor="middle"'
    return f"<text {place}{style}>{escape(content)}</text>"


def drawn(box: Box) -> str:
    middle, width = (box.left + box.right) / 2, box.right - box.left
    frame = f'x="{box.left}" y="{box.top}" width="{width}" height="{BOX_HEIGHT}" rx="6"'
    return "\n".join(
        (
            f'<rect {frame} fill="{box.colour}" stroke="#455a64"/>',
            text(middle, box.top + 21, 15, ", ".join(box.parts), ' font-weight="600"'),
            text(middle, box.top + 39, 12, box.text, ' fill="#455a64"'),
        )
    )


def arrow(above: Box, below: Box) -> str:
    left, right = max(above.left, below.left), min(above.right, below.right)
    if left >= right or above.row >= below.row:
        raise ValueError(f"{below.parts} must stand below {above.parts}: move them in BOXES")
    x = (left + right) / 2
    ends = f'x1="{x:g}" y1="{above.top + BOX_HEIGHT}" x2="{x:g}" y2="{below.top}"'
    return f'<line {ends} stroke="#455a64" stroke-width="1.5" marker-end="url(#head)"/>'


def svg() -> str:
    missing = ALLOWED.keys() - {part for box in BOXES for part in box.parts}
    if missing:
        raise ValueError(f"{sorted(missing)} have no box: add them to BOXES")
    legend = "An arrow means “imports”. Arrows that follow from others are left out."
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
            f' width="{WIDTH}" height="{HEIGHT}" font-family="{FONT}" fill="#212121">',
            "<title>Who imports whom in npt_fast</title>",
            '<defs><marker id="head" markerUnits="userSpaceOnUse" markerWidth="10"'
            ' markerHeight="10" refX="10" refY="5" orient="auto"><path d="M0 0 L10 5 L0 10 z"'
            ' fill="#455a64"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
            *(arrow(*pair) for pair in arrows()),
            *map(drawn, BOXES),
            text(WIDTH / 2, HEIGHT - 18, 12, legend, ' fill="#455a64"'),
            "</svg>\n",
        )
    )


if __name__ == "__main__":
    PICTURE.write_text(svg())
