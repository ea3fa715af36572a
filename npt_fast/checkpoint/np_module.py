"""The tensors of one NP layer in a checkpoint, and the architecture that they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from npt_fast.checkpoint.keys import PROJECTIONS_OF, STEMS, NPTKey, parse_key
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.errors import CheckpointError

Slot = tuple[str, str, int]
"""Projection, stem and component of a tensor, independent of its name in a file."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The architecture of an NP layer, which names and shapes of its tensors determine.

    Attributes:
        modulation: modulation type: ``"single"``, ``"dual"`` or ``"triple"``.
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
    """All tensors of one NP layer, by slot, in parameter order."""

    layer: int
    architecture: Architecture
    tensors: Mapping[Slot, TensorEntry]

    @property
    def numel(self) -> int:
        return sum(entry.numel for entry in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

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

    projections = {key.projection for key in found}
    modulation = next((m for m, names in PROJECTIONS_OF.items() if set(names) == projections), None)
    if modulation is None:
        present = ", ".join(sorted(name or "single" for name in projections))
        raise fail(f"is incomplete: it has tensors for {present} only")
    # a single tensor named W_down.99999 must not make the loops below long
    num_ranks = 1 + max(key.component or 0 for key in found)
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
        if not entry.dtype.is_float or entry.dtype.bits < 8:  # packed types have no whole bytes
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
    return NPModule(layer, architecture, tensors)
