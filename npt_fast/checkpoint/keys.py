"""The names of NPT tensors, such as ``layer_11_np.W_down_gate.0`` (design.md#keys).

``W_down_up`` is ``W_down`` of the projection *up*, and ``W_a_up_down`` is ``W_a_up`` of the
projection *down*: the stem is matched as a whole, and the rest names the projection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STEMS = ("W_down", "W_a_up", "W_b_up")
PROJECTIONS = ("gate", "up", "down")
PROJECTIONS_OF = {
    "single": ("",),
    "dual": ("gate", "up"),
    "triple": ("gate", "up", "down"),
    "plain": ("up", "down"),
}
"""Projections of each modulation type, as in tensor names: names of single do not mention gate.

``plain`` is for MLPs without a gate, the others for those with one.
"""


def modulated(modulation: str) -> tuple[str, ...]:
    """The projections that a modulation type changes, in order."""
    return tuple(name or "gate" for name in PROJECTIONS_OF[modulation])


# no leading zeros: layer_07 beside layer_7 would be two names for one tensor
_KEY = re.compile(
    r"(?:layer_(?P<layer>0|[1-9][0-9]{0,4})_np\."
    r"|model\.layers\.(?P<other>0|[1-9][0-9]{0,4})\.np_component\.)"
    r"(?P<stem>W_down|W_a_up|W_b_up)(?:_(?P<projection>gate|up|down))?"
    r"(?:\.(?P<component>0|[1-9][0-9]{0,4})|(?P<scale>\.scale))?"
)


@dataclass(frozen=True, slots=True)
class NPTKey:
    """The parts of a tensor name.

    Attributes:
        layer: index of the decoder layer.
        projection: ``"gate"``, ``"up"``, ``"down"``, or ``""`` for single modulation.
        stem: ``"W_down"``, ``"W_a_up"`` or ``"W_b_up"``.
        component: index along the num_ranks axis; None if the name has none (num_ranks 1).
        scale: whether these are the scales of int8 tensors, of all components together.
    """

    layer: int
    projection: str
    stem: str
    component: int | None
    scale: bool = False

    def __str__(self) -> str:
        projection = f"_{self.projection}" if self.projection else ""
        component = "" if self.component is None else f".{self.component}"
        return f"layer_{self.layer}_np.{self.stem}{projection}{component}{'.scale' * self.scale}"


def parse_key(name: str) -> NPTKey | None:
    """The parts of a name, in either spelling that the original reads; None for other names."""
    match = _KEY.fullmatch(name)
    if match is None:
        return None
    component = match["component"]
    return NPTKey(
        int(match["layer"] or match["other"]),
        match["projection"] or "",
        match["stem"],
        None if component is None else int(component),
        match["scale"] is not None,
    )
