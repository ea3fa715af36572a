"""Optimizer, scheduler and step: read, taken apart by layer, joined for another set of layers.

The original saves one AdamW group over all NP parameters, layers ascending, then in parameter order
(SPEC 2.3). AdamW keeps every parameter's own step and moments, so states of runs that trained
different layers join exactly by re-indexing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npt_fast.checkpoint.np_module import NPModule, Slot
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.checkpoint.torch_pickle import TensorRef
from npt_fast.checkpoint.torch_zip import TorchZip, read_torch_zip
from npt_fast.errors import CheckpointError

TRAINING_STATE = "training_state.pt"
MULTI_LAYER_STATE = "multi_layer_state.pt"
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}

SlotState = Mapping[str, TensorEntry | float | int]
"""AdamW's state of one parameter: ``step``, ``exp_avg``, ``exp_avg_sq``."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """One ``training_state.pt``.

    Attributes:
        path: the file.
        global_step: optimizer steps of the run.
        content: everything but the optimizer's state; tensors only as references into `archive`.
        group: hyperparameters of the one parameter group; ``params`` left out.
        optimizer: layer -> slot -> state; a parameter that was never stepped has none.
        archive: the file's records.
    """

    path: Path
    global_step: int
    content: Mapping[str, Any]
    group: Mapping[str, Any] | None
    optimizer: Mapping[int, Mapping[Slot, SlotState]]
    archive: TorchZip

    def tensors(self) -> list[TensorEntry]:
        """All tensors of the optimizer, then all others, named as a merge names them."""
        found = [
            value
            for slots in self.optimizer.values()
            for state in slots.values()
            for value in state.values()
            if isinstance(value, TensorEntry)
        ]
        others = enumerate(_references(self.content))
        return [*found, *(self.archive.entry(f"other.{n}", ref) for n, ref in others)]


def read_training_state(path: Path, modules: Mapping[int, NPModule]) -> TrainingState | None:
    """Read ``training_state.pt``; its tensors' data is not touched. None when there is no file.

    Args:
        path: the file.
        modules: all layers of the same checkpoint.

    Raises:
        CheckpointError: unsafe, broken, or not one AdamW group over exactly these layers.
    """
    if not os.path.lexists(path):
        return None
    return _parse(read_torch_zip(SourceFile.of(path)), modules)


def read_multi_layer_state(path: Path) -> dict[str, Any] | None:
    """The curriculum and layer weights in ``multi_layer_state.pt`` (SPEC 2.4), None if absent.

    Raises:
        CheckpointError: unsafe, broken, or of another kind.
    """
    if not os.path.lexists(path):
        return None
    state = read_torch_zip(SourceFile.of(path)).content
    if not isinstance(state, dict) or not isinstance(state.get("layers_to_train"), list):
        raise CheckpointError(f"{path}: has no layers_to_train; not a multi-layer state")
    if not isinstance(state.get("layer_weights", {}), dict):
        raise CheckpointError(f"{path}: its layer_weights are not a mapping")
    if next(_references(state), None) is not None:
        raise CheckpointError(f"{path}: holds a tensor; not a multi-layer state")
    return state


def _references(content: Any) -> Iterator[TensorRef]:
    """Tensor references in nested data, in the order in which they were written."""
    pending = [content]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if isinstance(item, TensorRef):
            yield item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(reversed(list(item.values() if isinstance(item, dict) else item)))


def _parse(archive: TorchZip, modules: Mapping[int, NPModule]) -> TrainingState:
    path = archive.file.path
    content = archive.content

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: {problem}")

    if not isinstance(content, dict):
        raise fail("holds no dict; not a training state")
    step = content.get("global_step")
    if type(step) is not int or step < 0:
        raise fail("has no global_step; not a training state of a known kind")
    content = dict(content)
    optimizer = content.pop("optimizer_state_dict", None)
    if optimizer is None:
        return TrainingState(path, step, content, None, {}, archive)
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(groups, list) or not isinstance(state, dict):
        raise fail("its optimizer_state_dict is of an unknown kind")
    if len(groups) != 1 or not isinstance(groups[0], dict):
        raise fail(f"its optimizer has {len(groups)} parameter groups, 1 expected")
    group = dict(groups[0])
    params = group.pop("params", None)
    if not {"betas", "eps"} <= group.keys():
        raise fail("its optimizer is of an unknown kind, AdamW expected")
    slots = [
        (layer, slot) for layer in sorted(modules) for slot in modules[layer].architecture.slots()
    ]
    if not isinstance(params, list) or len(params) != len(slots):
        count = len(params) if isinstance(params, list) else 0
        raise fail(f"its optimizer has {count} parameters, the weights have {len(slots)}")
    if any(type(index) is not int for index in params) or not set(state) <= set(params):
        raise fail("its optimizer state does not match its parameter list")
    by_layer: dict[int, dict[Slot, SlotState]] = {}
    for index, (layer, slot) in zip(params, slots, strict=True):
        if index in state:
            shape = modules[layer].architecture.shape(slot)
            by_layer.setdefault(layer, {})[slot] = _slot_state(
                archive, index, state[index], shape, fail
            )
    return TrainingState(path, step, content, group, by_layer, archive)


def _slot_state(
    archive: TorchZip,
    index: int,
    raw: Any,
    shape: tuple[int, ...],
    fail: Callable[[str], CheckpointError],
) -> SlotState:
    if (
        not isinstance(raw, dict)
        or not {"step", "exp_avg", "exp_avg_sq"} <= raw.keys()
        or (raw.keys() - _MOMENTS - {"step"})
    ):
        raise fail(f"parameter {index} has optimizer state of an unknown kind, AdamW expected")
    state: dict[str, TensorEntry | float | int] = {}
    for name, value in raw.items():
        if isinstance(value, TensorRef):
            entry = archive.entry(f"optimizer.{index}.{name}", value)
            if entry.shape != (shape if name in _MOMENTS else ()) and (
                name in _MOMENTS or entry.numel != 1
            ):
                raise fail(f"parameter {index}: {name} is {list(entry.shape)}, not {list(shape)}")
            state[name] = entry
        elif name == "step" and type(value) in (int, float):
            state[name] = value
        else:
            raise fail(f"parameter {index}: {name} is not a tensor")
    return state


def join_multi_layer_states(
    template: Mapping[str, Any],
    sources: Mapping[int, Mapping[str, Any] | None],
) -> dict[str, Any]:
    """A multi-layer state for the merged layers.

    Args:
        template: gives the curriculum and all other fields.
        sources: merged layer -> the state of the checkpoint that the layer came from; its weight of
            that layer is kept, 1.0 where it says nothing.
    """
    weights: dict[int, Any] = {}
    for layer in sorted(sources):
        own = sources[layer] or template
        weights[layer] = own.get("layer_weights", {}).get(layer, 1.0)
    joined = dict(template)
    joined["layers_to_train"] = sorted(sources)
    joined["layer_weights"] = weights
    return joined


def base_state(states: Sequence[TrainingState]) -> TrainingState | None:
    """The state whose scalars a merge keeps: the highest global_step, the first on a tie."""
    return max(states, key=lambda state: state.global_step, default=None)
