"""The layers of a merged checkpoint: which inputs each comes from, and each of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from npt_fast.checkpoint.checkpoint import Checkpoint
from npt_fast.checkpoint.dtypes import DType
from npt_fast.checkpoint.keys import PROJECTIONS_OF
from npt_fast.checkpoint.np_module import Architecture, NPModule, Slot
from npt_fast.checkpoint.recipe import Recipe, check_castable
from npt_fast.checkpoint.training_state import SlotState, TrainingState
from npt_fast.config import MergeOptions
from npt_fast.errors import MergeError


@dataclass(frozen=True, slots=True)
class MergeInput:
    """An input of a merge: an opened checkpoint, and the parts of it that are used.

    Attributes:
        checkpoint: the checkpoint with all its layers.
        layers: layers to take, ascending.
        selected: whether the user chose the layers (``A:11,13``).
        state: training state; None if there is none or it is not used.
        multi_layer_state: content of ``multi_layer_state.pt``; None if there is none or it is not
            used.
    """

    checkpoint: Checkpoint
    layers: tuple[int, ...]
    selected: bool
    state: TrainingState | None
    multi_layer_state: Mapping[str, Any] | None

    def step(self, layer: int) -> int | None:
        """Optimizer steps that a layer was trained for; None if unknown."""
        recorded = self.checkpoint.record(layer).step
        if recorded is None and self.state is not None:
            return self.state.global_step
        return recorded


@dataclass(frozen=True, slots=True)
class Part:
    """A layer of one input that becomes a part of a merged layer."""

    origin: MergeInput
    module: NPModule


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """One layer of the merged checkpoint.

    Attributes:
        layer: index of the layer.
        architecture: architecture after the merge.
        parts: layers of inputs that it is made of; several only for ``concat`` and ``mean``.
        divisor: number that ``W_b_up`` is divided by: the number of parts for ``mean``, else 1.
    """

    layer: int
    architecture: Architecture
    parts: tuple[Part, ...]
    divisor: int = 1

    @property
    def source(self) -> str:
        return " + ".join(part.origin.checkpoint.given for part in self.parts)

    @property
    def step(self) -> int | None:
        steps = [step for p in self.parts if (step := p.origin.step(self.layer)) is not None]
        return max(steps, default=None)

    @property
    def factors(self) -> str | None:
        """``"int8"`` or None, as in `NPModule`; parts with int8 factors are never joined."""
        return self.parts[0].module.factors

    @property
    def residual(self) -> str | None:
        return next(iter(_residuals(self.layer, self.parts)), None)

    def slots(self) -> Iterator[tuple[Slot, Part | None, Slot | None]]:
        """Every slot, with the part and slot that it comes from; both None for a new tensor."""
        offsets = []
        count = 0
        for part in self.parts:
            offsets.append(count)
            count += part.module.architecture.num_ranks
        for slot in self.architecture.slots():
            projection, stem, component = slot
            index = next(
                (i for i, part in enumerate(self.parts)
                 if 0 <= component - offsets[i] < part.module.architecture.num_ranks),
                None,
            )  # fmt: skip
            if index is None:
                yield slot, None, None
                continue
            part = self.parts[index]
            if part.module.architecture.modulation == "single" and projection == "gate":
                projection = ""  # single modulation modulates gate, but its names do not say so
            origin = (projection, stem, component - offsets[index])
            yield (slot, part, origin) if origin in part.module.tensors else (slot, None, None)

    def recipes(self, dtype: DType | None) -> Iterator[Recipe]:
        """The recipes of the weights, in parameter order.

        Args:
            dtype: element type of all weights; None keeps that of each source.

        Raises:
            MergeError: a tensor cannot be converted.
        """
        if self.factors is not None:
            yield from self._unchanged(dtype)
            return
        default = next(iter(self.parts[0].module.tensors.values())).dtype
        for slot, part, origin in self.slots():
            name = str(self.architecture.key(self.layer, slot))
            shape = self.architecture.shape(slot)
            stem = slot[1]
            if part is None or origin is None:
                # W_b_up = 0 keeps the layer's function; the others are random, so that it can train
                recipe = Recipe(name, dtype or default, shape, None, random=stem != "W_b_up")
                check_castable(self.source, recipe)
                yield recipe
                continue
            source = part.module.tensors[origin]
            recipe = Recipe(
                name,
                dtype or source.dtype,
                shape,
                source,
                divisor=self.divisor if stem == "W_b_up" else 1,
                # new columns of W_down have no effect yet; at random they can be trained
                random=stem == "W_down" and shape != source.shape,
            )
            check_castable(self.source, recipe)
            yield recipe

    def _unchanged(self, dtype: DType | None) -> Iterator[Recipe]:
        """The recipes of a layer with int8 factors: copies, since scales belong to the numbers."""
        module = self.parts[0].module
        if dtype is not None:
            raise MergeError(
                f"{self.source}: layer {self.layer}: int8 factors cannot be converted; "
                "leave out --dtype"
            )
        if module.architecture != self.architecture:
            raise MergeError(
                f"{self.source}: layer {self.layer}: int8 factors cannot be padded; "
                "leave out --uniform"
            )
        for slot, entry in module.tensors.items():
            key = self.architecture.key(self.layer, slot)
            yield replace(Recipe.unchanged(entry), name=str(key))
        for scale, entry in module.scales.items():
            key = self.architecture.scale_key(self.layer, scale)
            yield replace(Recipe.unchanged(entry), name=str(key))

    def moments(self) -> Iterator[tuple[SlotState | None, tuple[int, int]]]:
        """Optimizer state, None if it starts fresh, and shape of every parameter, in order."""
        for slot, part, origin in self.slots():
            state = None
            if part is not None and origin is not None and part.origin.state is not None:
                state = part.origin.state.optimizer.get(self.layer, {}).get(origin)
            yield state, self.architecture.shape(slot)

    def optimizer(self) -> str:
        """What becomes of the optimizer state: ``"kept"``, ``"fresh"`` or ``"partly fresh"``."""
        kept = [state is not None for state, _ in self.moments()]
        return "kept" if all(kept) else "partly fresh" if any(kept) else "fresh"


def resolve_conflicts(
    inputs: Sequence[MergeInput], options: MergeOptions, warnings: list[str]
) -> list[MergedLayer]:
    """Merged layers, one for each index, as the option ``on_conflict`` says.

    A layer is taken as a whole; tensors of different layers are never mixed.

    Args:
        inputs: inputs of the merge.
        options: options of the merge.
        warnings: list to which a line is added for every conflict.

    Raises:
        MergeError: two inputs hold a layer, and the option forbids this or they cannot be joined.
    """
    policy = options.on_conflict
    chosen: dict[int, list[Part]] = {}
    for item in inputs:
        given = item.checkpoint.given
        for layer in item.layers:
            part = Part(item, item.checkpoint.modules[layer])
            parts = chosen.setdefault(layer, [])
            if not parts:
                parts.append(part)
                continue
            holder = parts[0].origin.checkpoint.given
            exists = f"Layer {layer} already exists in merged checkpoint (from {holder})."
            if policy == "error":
                raise MergeError(f"{exists} {given} has it too; select layers with PATH:LAYERS")
            if policy == "identical":
                if not _same_module(parts[0].module, part.module):
                    raise MergeError(f"{exists} The one in {given} is not identical")
            elif policy == "first":
                warnings.append(f"{exists} Skipping from {given}")
            elif policy == "last":
                warnings.append(f"{exists} Replaced by the one from {given}")
                parts[:] = [part]
            else:
                warnings.append(f"{exists} Joined with the one from {given} ({policy})")
                parts.append(part)
    return [_join(layer, chosen[layer], options) for layer in sorted(chosen)]


def _same_module(a: NPModule, b: NPModule) -> bool:
    if (a.architecture, a.factors) != (b.architecture, b.factors):
        return False
    for first, second in zip(a.entries, b.entries, strict=True):
        if first.dtype != second.dtype:
            return False
        digests = []
        for entry in (first, second):
            digest = hashlib.sha256()
            for window in Recipe.unchanged(entry).windows():
                digest.update(window)
            digests.append(digest.digest())
        if digests[0] != digests[1]:
            return False
    return True


def _join(layer: int, parts: Sequence[Part], options: MergeOptions) -> MergedLayer:
    """Join parts into one layer, with the components of all along the num_ranks axis."""
    if len(parts) > 1:
        if any(part.module.factors for part in parts):
            raise MergeError(
                f"layer {layer}: {options.on_conflict} of int8 factors is not supported; "
                "join float checkpoints and quantize the result"
            )
        dtypes = {dtype for part in parts for dtype in part.module.dtypes}
        if len(dtypes) > 1 and options.dtype is None:
            raise MergeError(
                f"layer {layer}: {options.on_conflict} of unlike types "
                f"{', '.join(sorted(dtypes))}; choose one with --dtype"
            )
        if len(_residuals(layer, parts)) > 1:
            raise MergeError(f"layer {layer}: parts with and without the residual cannot be joined")
    architectures = [part.module.architecture for part in parts]
    joined = replace(_common(architectures), num_ranks=sum(a.num_ranks for a in architectures))
    divisor = len(parts) if options.on_conflict == "mean" else 1
    return MergedLayer(layer, joined, tuple(parts), divisor)


def _residuals(layer: int, parts: Sequence[Part]) -> set[str]:
    """The residuals that the parts record; a part without a record fits any other."""
    records = (part.origin.checkpoint.record(layer).residual for part in parts)
    return {residual for residual in records if residual is not None}


def _common(architectures: Sequence[Architecture]) -> Architecture:
    """The smallest architecture that all can be padded to exactly (design.md#padding).

    Raises:
        MergeError: some are for MLPs with a gate, and some for MLPs without one.
    """
    kinds = list(PROJECTIONS_OF)  # all but plain have the projections of those before them
    modulations = {a.modulation for a in architectures}
    if "plain" in modulations and len(modulations) > 1:
        raise MergeError(
            f"layers of modulation types {', '.join(sorted(modulations))} cannot be padded to one: "
            "plain is for MLPs without a gate"
        )
    return replace(
        architectures[0],
        modulation=max(modulations, key=kinds.index),
        num_ranks=max(a.num_ranks for a in architectures),
        rank=max(a.rank for a in architectures),
    )


def make_uniform(layers: Sequence[MergedLayer]) -> list[MergedLayer]:
    """The layers, all padded to one architecture (design.md#padding)."""
    common = _common([merged.architecture for merged in layers])
    return [replace(merged, architecture=common) for merged in layers]
