"""Draws np_layer.svg: what an NP layer computes, and what becomes of trained layers.

python -m docs.np_layer
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

PICTURE = Path(__file__).with_suffix(".svg")
BASE, TRAINED, USED = "#eceff1", "#bbdefb", "#c8e6c9"  # frozen weights, NP weights, what users do
# name -> centre and width in tenths of an inch, colour, text
BOXES: dict[str, tuple[float, float, float, str, str]] = {
    "attention": (11, 12, 18, BASE, "attention output $a$"),
    "down": (37, 12, 18, TRAINED, r"$z = a\,W_{\mathrm{down}}$"),
    "vectors": (37, 34, 18, TRAINED, r"$v_a$ and $v_b$ from $z$"),
    "mlp": (11, 34, 20, BASE, r"$W x + \sum v_b\,(v_a \cdot x)$"),
    "apart": (61, 12, 16, TRAINED, "train layer 11\ntrain layer 13\ntrain layer 23"),
    "merge": (83, 12, 16, USED, "merge\nand verify"),
    "train": (105, 12, 16, USED, "train together,\nevaluate"),
    "extract": (61, 34, 19, USED, "extract from\n“The capital of\nFrance is”"),
    "inject": (84, 34, 19, USED, "inject into\n“The capital of\nGermany is”"),
    "serve": (105, 34, 16, USED, "export and serve"),
}
ARROWS = (
    ("attention", "down"), ("down", "vectors"), ("vectors", "mlp"), ("apart", "merge"),
    ("merge", "train"), ("merge", "extract"), ("extract", "inject"), ("train", "serve"),
)  # fmt: skip
HEIGHT = 9


def draw() -> Any:
    """The figure: boxes, and arrows from the edge of one box to the edge of another."""
    figure, axes = plt.subplots(figsize=(11.4, 4.3))
    for x, y, width, colour, text in BOXES.values():
        corner = (x - width / 2, y - HEIGHT / 2)
        axes.add_patch(
            FancyBboxPatch(corner, width, HEIGHT, boxstyle="round,pad=0,rounding_size=1", fc=colour)
        )
        axes.text(x, y, text, ha="center", va="center", fontsize=9)
    for start, end in ARROWS:
        (x0, y0, width0, *_), (x1, y1, width1, *_) = BOXES[start], BOXES[end]
        sideways = y0 == y1
        side = 1 if x1 > x0 else -1
        tail = (x0 + side * width0 / 2, y0) if sideways else (x0, y0 + HEIGHT / 2)
        head = (x1 - side * width1 / 2, y1) if sideways else (x1, y1 - HEIGHT / 2)
        axes.annotate("", head, tail, arrowprops={"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0})
    axes.text(24, 2, "One NP layer, for every token", ha="center", fontsize=11, weight="bold")
    axes.text(83, 2, "What becomes of trained layers", ha="center", fontsize=11, weight="bold")
    axes.text(24, 42, "in gate, up and down, with k such changes each", ha="center", fontsize=9)
    axes.axvline(49, color="#b0bec5", linewidth=0.8)
    axes.set(xlim=(0, 114), ylim=(43, 0), aspect="equal")
    axes.axis("off")
    return figure


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "npt_fast"  # the same bytes every time
    draw().savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})
    print(PICTURE)
