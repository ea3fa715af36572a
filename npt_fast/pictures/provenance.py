"""Where the layers of a merged checkpoint come from, as a tree."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from npt_fast.checkpoint.checkpoint import Checkpoint
from npt_fast.errors import NPTError, printable
from npt_fast.hub import is_hub_name
from npt_fast.layer_names import ranges
from npt_fast.pictures.figure import figure_class

_DEEPEST, _MOST = 12, 120
_LONGEST_NAME = 36


@dataclass(slots=True)
class Origin:
    """A checkpoint in the tree.

    Attributes:
        path: path as the merge recorded it.
        layers: layers that the merged checkpoint has from it.
        steps: optimizer steps that these layers were trained for.
        origins: checkpoints that it got the layers from in earlier merges, by path.
    """

    path: str
    layers: set[int] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)
    origins: dict[str, Origin] = field(default_factory=dict)

    @property
    def leaves(self) -> int:
        """The number of rows that the tree takes."""
        return sum(origin.leaves for origin in self.origins.values()) or 1

    @property
    def depth(self) -> int:
        """The number of columns that the tree takes."""
        return 1 + max((origin.depth for origin in self.origins.values()), default=0)


def provenance(checkpoint: Checkpoint) -> Origin | None:
    """The tree of a merged checkpoint; None if it records no sources.

    Raises:
        NPTError: it records more sources than a picture can show.
    """
    root = Origin(checkpoint.place)
    merged = checkpoint.summary.layers if checkpoint.summary else {}
    for layer, found in merged.items():
        ways = [(part.source, part.chain, part.step) for part in found.parts]
        if not ways and found.source is not None:
            ways = [(found.source, found.chain, found.step)]
        for source, chain, step in ways:
            if len(chain) >= _DEEPEST:
                raise NPTError(
                    f"{checkpoint.given}: layer {layer} went through {len(chain) + 1:,} merges, "
                    f"too many for a picture; analyze without --plot lists them"
                )
            place = root
            place.layers.add(layer)
            for path in (source, *chain):
                place = place.origins.setdefault(path, Origin(path))
                place.layers.add(layer)
            if step is not None:
                place.steps.add(step)
    if root.leaves > _MOST:
        raise NPTError(
            f"{checkpoint.given}: has layers of {root.leaves:,} checkpoints, too many for a "
            "picture; analyze without --plot lists them"
        )
    return root if root.origins else None


def draw_provenance(checkpoint: Checkpoint) -> Any:
    """Draw where the layers of a merged checkpoint come from: the result left, first runs right.

    Args:
        checkpoint: A merged checkpoint.

    Returns:
        A figure of matplotlib.

    Raises:
        NPTError: matplotlib is missing, the checkpoint records no sources, or too many.
    """
    root = provenance(checkpoint)
    if root is None:
        raise NPTError(f"{checkpoint.given}: records no sources; it was not merged by npt_fast")
    figure = figure_class()(figsize=tree_size(root), layout="constrained")
    draw_tree(figure.subplots(), root)
    return figure


def tree_size(root: Origin) -> tuple[float, float]:
    """Width and height of a tree's picture, in inches."""
    return 1 + 3.2 * root.depth, 0.6 + 0.6 * root.leaves


def draw_tree(axes: Any, root: Origin) -> None:
    """Draw a tree into axes: boxes with names, layers and steps, and lines between them."""
    axes.set(xlim=(-0.5, root.depth - 0.5), ylim=(root.leaves - 0.5, -0.5))
    axes.set_axis_off()
    axes.set_title("where the layers come from")
    _draw_origin(axes, root, 0, 0)


def _draw_origin(axes: Any, origin: Origin, column: int, row: int) -> float:
    """Draw a checkpoint and those it comes from, from a row on; returns its own place."""
    places = []
    for one in origin.origins.values():
        places.append(_draw_origin(axes, one, column + 1, row))
        row += one.leaves
    place = sum(places) / len(places) if places else float(row)
    for other in places:
        axes.plot([column, column + 1], [place, other], color="0.6", zorder=1)
    axes.text(
        column, place, _label(origin), ha="center", va="center", fontsize="small", zorder=2,
        parse_math=False,
        bbox={"boxstyle": "round", "fc": "white" if places else "#e8eaf6", "ec": "0.5"},
    )  # fmt: skip
    return place


def _label(origin: Origin) -> str:
    path = origin.path.partition("@")[0] if is_hub_name(origin.path) else origin.path
    # the folder above says more than checkpoint-800, and "checkpoints" says nothing
    parts = [part for part in PurePath(path).parts[-3:] if part != "checkpoints"][-2:]
    name = printable("/".join(parts))
    name = name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"
    layers = sorted(origin.layers)
    text = f"{name}\nlayer{'s' * (len(layers) > 1)} {ranges(layers)}"
    if origin.steps:
        text += f", step {', '.join(map(str, sorted(origin.steps)))}"
    return text
