"""The tensors of one NP layer in a checkpoint, and the architecture that they have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from npt_fast.checkpoint.keys import PROJECTIONS_OF, STEMS, NPTKey, parse_key
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.errors import CheckpointError

Slot = tuple[str, str, int]
"""Projection, stem and component of a tensor, independent of its name in a file."""
ScaleSlot = tuple[str, str]
"""Projection and stem of the scales of int8 tensors, which all components share a tensor of."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The architecture of an NP layer, which names and shapes of its tensors determine.

    Attributes:
        modulation: modulation type: ``"single"``, ``"dual"``, ``"triple"`` or ``"plain"``.
        num_ranks: number of components k per projection.
        rank: bottleneck width r of each component.
        hidden_size: width D of the base model.
        intermediate_size: width F of the base model's MLP.
    """

    modulation: str
    num_ranks: int
    rank: int
    hidden_size: int
    intermediate_size: int

    def __str__(self) -> str:
        return f"{self.modulation}, num_ranks {self.num_ranks}, rank {self.rank}"

    def slots(self) -> Iterator[Slot]:
        """All slots, in the order in which parameters are saved and optimized (design.md#keys)."""
        for projection in PROJECTIONS_OF[self.modulation]:
            for stem in STEMS:
                for component in range(self.num_ranks):
                    yield projection, stem, component

    def shape(self, slot: Slot) -> tuple[int, int]:
        """Shape of the tensor in a slot, ``(in, out)`` (design.md#definition)."""
        d, f, r = self.hidden_size, self.intermediate_size, self.rank
        projection, stem, _ = slot
        if stem == "W_down":
            return d, r
        reads_hidden = stem == "W_a_up"
        if projection == "down":
            reads_hidden = not reads_hidden
        return r, d if reads_hidden else f

    def scale_slots(self) -> Iterator[ScaleSlot]:
        """The slots of all scales, in the order of `slots`."""
        for projection, stem, component in self.slots():
            if not component:
                yield projection, stem

    def scale_shape(self, slot: ScaleSlot) -> tuple[int, int]:
        """Shape of the scales in a slot: one for each output channel (design.md#int8)."""
        projection, stem = slot
        channels = self.num_ranks * self.rank
        if stem == "W_a_up":
            return channels, 1
        return 1, channels if stem == "W_down" else self.shape((projection, stem, 0))[1]

    def scale_key(self, layer: int, slot: ScaleSlot) -> NPTKey:
        """Key of the scales in a slot."""
        projection, stem = slot
        return NPTKey(layer, projection, stem, None, scale=True)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(math.prod(self.shape(slot)) for slot in self.slots())

    def place(self, slot: Slot) -> tuple[str, int, int]:
        """Where a tensor lies in `NPComponent`: its parameter, and axis and start of its r places.

        The parameters are joined as the GEMMs need them (design.md#coefficients).
        """
        projection, stem, component = slot
        index = PROJECTIONS_OF[self.modulation].index(projection)
        start = component * self.rank
        within = start + index * self.num_ranks * self.rank  # of a parameter of all projections
        if stem == "W_down":
            return "w_down", 1, within
        if stem == "W_b_up":
            return f"w_b_{projection or 'gate'}", 0, start
        # down's apart: it reads F columns, gate and up read D
        return ("w_a_mid", 0, start) if projection == "down" else ("w_a_in", 0, within)

    def joined_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of every parameter of `NPComponent`."""
        shapes = {}
        for slot in self.slots():
            name, axis, start = self.place(slot)
            rows, columns = self.shape(slot)
            # slots ascend, so that the last one of a parameter ends it
            shapes[name] = (rows, start + columns) if axis else (start + rows, columns)
        return shapes

    def key(self, layer: int, slot: Slot) -> NPTKey:
        """Key of the tensor in a slot, as the original spells it."""
        projection, stem, component = slot
        return NPTKey(layer, projection, stem, component if self.num_ranks > 1 else None)

    def names(self, layer: int) -> list[str]:
        """Names of all tensors of a layer, in parameter order."""
        return [str(self.key(layer, slot)) for slot in self.slots()]


def flat(report: Any) -> dict[str, Any]:
    """A layer's report as plain data, with modulation, num_ranks and rank for `architecture`."""
    content: dict[str, Any] = {}
    for name, value in asdict(report).items():
        if name == "architecture":
            content |= {key: value[key] for key in ("modulation", "num_ranks", "rank")}
        else:
            content[name] = value
    return content


@dataclass(frozen=True, slots=True)
class NPModule:
    """All tensors of one NP layer, by slot, in parameter order.

    Attributes:
        layer: index of the layer.
        architecture: the layer's architecture.
        tensors: the factors' numbers: floats, or int8.
        scales: scales of int8 numbers; none for floats.
    """

    layer: int
    architecture: Architecture
    tensors: Mapping[Slot, TensorEntry]
    scales: Mapping[ScaleSlot, TensorEntry] = field(default_factory=dict)

    @property
    def factors(self) -> str | None:
        """``"int8"``; None for floats, as `LayerDescription` records it."""
        return "int8" if self.scales else None

    @property
    def entries(self) -> list[TensorEntry]:
        """All tensors: numbers, then scales."""
        return [*self.tensors.values(), *self.scales.values()]

    @property
    def numel(self) -> int:
        return self.architecture.numel

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def dtypes(self) -> list[str]:
        """Names of the element types of the tensors, usually one."""
        return sorted({entry.dtype.name for entry in self.tensors.values()})


def collect_modules(tensors: Mapping[str, TensorEntry], where: str) -> dict[int, NPModule]:
    """Group the tensors of a checkpoint into complete layers, in ascending order.

    Args:
        tensors: tensors by their names in the file.
        where: path of the checkpoint, for messages.

    Raises:
        CheckpointError: a name is not that of an NPT tensor, a tensor occurs in both spellings of
            its name, there is no layer, or a layer is incomplete or has tensors of wrong shapes.
    """
    by_layer: dict[int, dict[NPTKey, TensorEntry]] = {}
    for name, entry in tensors.items():
        key = parse_key(name)
        if key is None:
            raise CheckpointError(f"{where}: {name!r:.80} is not the name of an NPT tensor")
        layer = by_layer.setdefault(key.layer, {})
        if key in layer:
            raise CheckpointError(f"{where}: {name} is there twice, in both spellings of its name")
        layer[key] = entry
    if not by_layer:
        raise CheckpointError(f"{where}: holds no NPT layers")
    return {layer: _assemble(layer, by_layer[layer], where) for layer in sorted(by_layer)}


def _assemble(layer: int, found: dict[NPTKey, TensorEntry], where: str) -> NPModule:
    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{where}: layer {layer} {problem}")

    given_scales = {key: found.pop(key) for key in list(found) if key.scale}
    projections = {key.projection for key in found}
    modulation = next((m for m, names in PROJECTIONS_OF.items() if set(names) == projections), None)
    if modulation is None:
        present = ", ".join(sorted(name or "single" for name in projections))
        raise fail(f"is incomplete: it has tensors for {present} only")
    # a single tensor named W_down.99999 must not make the loops below long
    num_ranks = 1 + max((key.component or 0 for key in found), default=0)
    if num_ranks > len(found):
        raise fail(f"is incomplete: it has component {num_ranks - 1}, but lacks earlier ones")
    tensors: dict[Slot, TensorEntry] = {}
    numbered = any(key.component is not None for key in found)
    for projection in PROJECTIONS_OF[modulation]:
        for stem in STEMS:
            for component in range(num_ranks):
                key = NPTKey(layer, projection, stem, component if numbered else None)
                if key not in found:
                    raise fail(f"is incomplete: {key} is missing")
                tensors[projection, stem, component] = found.pop(key)
    if found:
        raise fail(f"has the unexpected tensor {next(iter(found.values())).name}")

    for entry in tensors.values():
        if given_scales:
            if entry.dtype.name != "I8":
                raise fail(f"has scales, but {entry.name} is {entry.dtype.name}, not I8")
        elif not entry.dtype.is_float or entry.dtype.bits < 8:  # packed types have no whole bytes
            raise fail(f"has a tensor that cannot be trained: {entry.name} is {entry.dtype.name}")
        if len(entry.shape) != 2 or not entry.numel:
            raise fail(f"has a tensor of the wrong shape: {entry.name} is {list(entry.shape)}")
    first = PROJECTIONS_OF[modulation][0]
    d, r = tensors[first, "W_down", 0].shape
    f = tensors[first, "W_b_up", 0].shape[1]
    architecture = Architecture(modulation, num_ranks, r, d, f)
    for slot, entry in tensors.items():
        if entry.shape != architecture.shape(slot):
            raise fail(
                f"has a tensor of the wrong shape: {entry.name} is {list(entry.shape)}, "
                f"{list(architecture.shape(slot))} expected"
            )
    scales = _scales(architecture, layer, given_scales, fail) if given_scales else {}
    return NPModule(layer, architecture, tensors, scales)


def _scales(
    architecture: Architecture,
    layer: int,
    found: dict[NPTKey, TensorEntry],
    fail: Callable[[str], CheckpointError],
) -> dict[ScaleSlot, TensorEntry]:
    scales = {}
    for slot in architecture.scale_slots():
        key, shape = architecture.scale_key(layer, slot), architecture.scale_shape(slot)
        entry = found.pop(key, None)
        if entry is None:
            raise fail(f"is incomplete: {key} is missing")
        if (entry.dtype.name, entry.shape) != ("F32", shape):
            raise fail(
                f"has unusable scales: {entry.name} is {entry.dtype.name}{list(entry.shape)}, "
                f"F32{list(shape)} expected"
            )
        scales[slot] = entry
    if found:
        raise fail(f"has the unexpected tensor {next(iter(found.values())).name}")
    return scales
