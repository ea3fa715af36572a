"""Layers as users write them: ``11,13``, ``11-15``, or a name that depends on the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby

NAMES: dict[str, Callable[[int], range]] = {
    "all": range,
    "upper_half": lambda count: range(count // 2, count),
    "lower_half": lambda count: range(count // 2),
}
"""The original's names, and the layers that each means in a model of so many layers."""


def is_name(layers: str | Sequence[int]) -> bool:
    """Whether layers are given by one of `NAMES`."""
    return isinstance(layers, str) and layers in NAMES


def check_layers(layers: str | Sequence[int]) -> None:
    """Raise ValueError unless `resolve_layers` can read these layers for some model."""
    if not is_name(layers):
        parse_layers(layers)


def resolve_layers(layers: str | Sequence[int], count: int) -> tuple[int, ...]:
    """The layers of a model, from 0, in the order given; negative indices count from the end.

    Args:
        layers: one of `NAMES`, a list as for `parse_layers`, or a sequence.
        count: number of the model's layers.

    Raises:
        ValueError: `layers` is no list of layers, names one twice, or one that the model lacks.
    """
    if isinstance(layers, str) and is_name(layers):
        return tuple(NAMES[layers](count))
    given = parse_layers(layers)
    for layer in given:
        if not -count <= layer < count:
            raise ValueError(f"there is no layer {layer}, the model has {count} layers")
    return parse_layers([layer % count for layer in given])


def parse_layers(layers: str | Sequence[int]) -> tuple[int, ...]:
    """Parse ``"11,13"``, ``"11-15"`` or a sequence into layer indices, in the order given.

    Raises:
        ValueError: `layers` is not a list of layers, or names one twice.
    """
    found = layer_indices(layers) if isinstance(layers, str) else list(layers)
    if not found or any(type(layer) is not int for layer in found):
        raise ValueError(f"layers must be a list of layer indices, got {layers!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"layers names a layer twice: {layers!r}")
    return tuple(found)


_MAX_LAYERS = 10_000  # bounds the memory that a short text such as "0-99999,0-99999" can take


def layer_indices(text: str) -> list[int]:
    """Parse ``"11,13"`` or ``"5,11-13"`` into layer indices, in the order given.

    Raises:
        ValueError: `text` is not a list of layers, has a range that runs backwards, or names more
            layers than any model has.
    """
    found: list[int] = []
    for part in text.split(","):
        # five digits: int() of a long text of digits takes quadratic time
        match = re.fullmatch(r"\s*(-?[0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        if match is None:
            names = ", ".join(NAMES)
            raise ValueError(
                f"{text!r:.80} is not a list of layers such as 11,13 or 11-15 ({names})"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{first}-{last} runs backwards; a range is written as 11-15")
        found.extend(range(first, last + 1))
        if len(found) > _MAX_LAYERS:
            raise ValueError(f"{text!r:.80} names more than {_MAX_LAYERS:,} layers")
    return found


def ranges(layers: Sequence[int]) -> str:
    """Ascending numbers as ``0-2,4``, which is how options take layers."""
    runs = [
        [layer for _, layer in group]
        for _, group in groupby(enumerate(layers), key=lambda item: item[1] - item[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
