"""Layers as users write them: ``11,13``, ``11-15``, or a name that depends on the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from itertools import groupby

from npt_fast.errors import OptionError

NAMES: dict[str, Callable[[int], range]] = {
    "all": range,
    "upper_half": lambda count: range(count // 2, count),
    "lower_half": lambda count: range(count // 2),
}
"""The original's names, and the layers that each means in a model of so many layers."""


LayerList = str | int | Collection[int]
"""Layers in Python: 11, ``"11,13"``, ``"11-15"``, ``"upper_half"``, ``(11, 13)``, ``range(4)``."""


def is_name(layers: LayerList) -> bool:
    """Whether layers are given by one of `NAMES`."""
    return isinstance(layers, str) and layers in NAMES


def check_layers(layers: LayerList) -> None:
    """Raise OptionError unless `resolve_layers` finds layers in some model."""
    if not is_name(layers) and not parse_layers(layers):
        raise OptionError(f"layers must name a layer, got {layers!r}")


def chosen_layers(layers: LayerList | None, there: Collection[int], count: int) -> list[int]:
    """Layers to work on: all of those that are there, or those that are named.

    Args:
        layers: as for `resolve_layers`. All that are there if None; of a part of the model, such as
            ``upper_half``, those that are there.
        there: layers that there are; others may be named, and the caller refuses them.
        count: number of the model's layers.

    Raises:
        OptionError: as `resolve_layers`, or none of a part of the model is there.
    """
    if layers is None:
        return list(there)
    found = resolve_layers(layers, count)
    if not is_name(layers):
        return list(found)
    if named := [layer for layer in found if layer in there]:
        return named
    raise OptionError(f"there are layers {list(there)}, none of {layers}")


def resolve_layers(layers: LayerList, count: int) -> tuple[int, ...]:
    """The layers of a model, from 0, in the order given; negative indices count from the end.

    Args:
        layers: one of `NAMES`, or as for `parse_layers`.
        count: number of the model's layers.

    Raises:
        OptionError: as `parse_layers`, or the model lacks one of the layers.
    """
    if isinstance(layers, str) and is_name(layers):
        return tuple(NAMES[layers](count))
    given = parse_layers(layers)
    for layer in given:
        if not -count <= layer < count:
            raise OptionError(f"there is no layer {layer}, the model has {count} layers")
    return parse_layers([layer % count for layer in given])


def parse_layers(layers: LayerList) -> tuple[int, ...]:
    """Parse an index, ``"11,13"``, ``"11-15"`` or indices into layer indices, in the order given.

    Raises:
        OptionError: `layers` is none of these, or names a layer twice.
    """
    if isinstance(layers, str):
        found = layer_indices(layers)
    else:
        given = layers if isinstance(layers, Collection) else [layers]
        if any(type(layer) is not int for layer in given):
            raise OptionError(
                f"layers must be a list of layer indices, such as 11, '11,13' or [11, 13], got "
                f"{layers!r:.80}"
            )
        found = list(given)
    if len(set(found)) < len(found):
        raise OptionError(f"layers names a layer twice: {layers!r:.80}")
    return tuple(found)


_MAX_LAYERS = 10_000  # bounds the memory that a short text such as "0-99999,0-99999" can take


def layer_indices(text: str) -> list[int]:
    """Parse ``"11,13"`` or ``"5,11-13"`` into layer indices, in the order given.

    Raises:
        OptionError: `text` is not a list of layers, has a range that runs backwards, or names more
            layers than any model has.
    """
    found: list[int] = []
    for part in text.split(","):
        # five digits: int() of a long text of digits takes quadratic time
        match = re.fullmatch(r"\s*(-?[0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        if match is None:
            names = ", ".join(NAMES)
            raise OptionError(
                f"{text!r:.80} is not a list of layers such as 11,13 or 11-15 ({names})"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise OptionError(f"{first}-{last} runs backwards; a range is written as 11-15")
        found.extend(range(first, last + 1))
        if len(found) > _MAX_LAYERS:
            raise OptionError(f"{text!r:.80} names more than {_MAX_LAYERS:,} layers")
    return found


def ranges(layers: Sequence[int]) -> str:
    """Ascending numbers as ``0-2,4``, which is how options take layers."""
    runs = [
        [layer for _, layer in group]
        for _, group in groupby(enumerate(layers), key=lambda item: item[1] - item[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
