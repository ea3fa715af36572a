"""Optimizer state, scheduler state and step: how they are read, split by layer and joined.

The original saves one AdamW group over all NP parameters, layers ascending, and in parameter order
within a layer (design.md#training-state). AdamW keeps a step and moments for each parameter, so the
states of runs that trained different layers can be joined exactly: only the indices change.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npt_fast.checkpoint.np_module import NPModule, Slot
from npt_fast.checkpoint.numbers import read_number
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.tensor_entry import Record, TensorEntry
from npt_fast.checkpoint.torch_symbols import TensorRef
from npt_fast.checkpoint.torch_zip import TorchZip, read_torch_zip
from npt_fast.errors import CheckpointError, printable
from npt_fast.schema import is_count, shown

TRAINING_STATE = "training_state.pt"
MULTI_LAYER_STATE = "multi_layer_state.pt"
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
_OPTIMIZER = "optimizer_state_dict"
_MAX_KEY = 80  # characters of a key that go into a tensor's name
_MOMENT = re.compile(rf"optimizer\.[0-9]+\.({'|'.join(sorted(_MOMENTS))})")
_DIGITS = re.compile(r"0|[1-9][0-9]{0,17}")  # 18 digits fit 63 bits

SlotState = Mapping[str, TensorEntry | float | int]
"""AdamW's state of one parameter: ``step``, ``exp_avg``, ``exp_avg_sq``, with amsgrad also
``max_exp_avg_sq``."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The content of a ``training_state.pt``.

    Every tensor in it is a `TensorEntry`, which knows its file. The optimizer's tensors are named
    like ``optimizer.3.exp_avg``, all others by their keys, like
    ``optimizer_state_dict.param_groups.0.lr``. A merge writes the same names.

    Attributes:
        path: path of the file.
        global_step: optimizer steps of the run.
        content: content of the file without the optimizer's state.
        group: hyperparameters of the only parameter group, without ``params``; None without an
            optimizer.
        optimizer: state of each parameter, by layer and slot; a parameter that was never updated
            has none.
        header: bytes of the file that describe its content.
    """

    path: Path
    global_step: int
    content: Mapping[str, Any]
    group: Mapping[str, Any] | None
    optimizer: Mapping[int, Mapping[Slot, SlotState]]
    header: Record

    def tensors(self) -> Iterator[TensorEntry]:
        """All tensors of the file, in the order in which a merge writes them."""
        yield from _entries(self.content)
        for slots in self.optimizer.values():
            for state in slots.values():
                for value in state.values():
                    if isinstance(value, TensorEntry):
                        yield value
        yield from _entries(self.group)


def read_training_state(path: Path, modules: Mapping[int, NPModule]) -> TrainingState | None:
    """Read ``training_state.pt`` without the data of its tensors; None if there is no file.

    Args:
        path: path of the file.
        modules: all layers of the same checkpoint.

    Raises:
        CheckpointError: the file is unsafe or broken, or its optimizer is not one AdamW group over
            exactly these layers.
    """
    if not os.path.lexists(path):
        return None
    return _parse(read_torch_zip(SourceFile.of(path)), modules)


def read_multi_layer_state(path: Path) -> dict[str, Any] | None:
    """Read ``multi_layer_state.pt`` (design.md#checkpoint-files); None if there is no file.

    Returns:
        The content of the file. Layer indices are integers, even if the file has them as text: keys
        become text in JSON, and some files were converted from it.

    Raises:
        CheckpointError: the file is unsafe or broken, or holds something else.
    """
    if not os.path.lexists(path):
        return None
    archive = read_torch_zip(SourceFile.of(path))
    state = archive.content
    if not isinstance(state, dict) or "layers_to_train" not in state:
        raise CheckpointError(f"{path}: has no layers_to_train; not a multi-layer state")
    state = _bound(state, archive, "")
    entry = next(_entries(state), None)
    if entry is not None:
        raise CheckpointError(f"{path}: {entry.name}: is a tensor, plain data expected")
    if not isinstance(state["layers_to_train"], (list, tuple)):
        raise CheckpointError(f"{path}: its layers_to_train are not a list")
    weights = state.get("layer_weights", {})
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path}: its layer_weights are not a mapping")
    by_layer: dict[int, Any] = {}
    for key, weight in weights.items():
        layer = _layer(key, f"{path}: layer_weights")
        if layer in by_layer and by_layer[layer] != weight:
            raise CheckpointError(f"{path}: layer_weights has two weights of layer {layer}")
        by_layer[layer] = weight
    layers = [_layer(layer, f"{path}: layers_to_train") for layer in state["layers_to_train"]]
    return {**state, "layers_to_train": layers, "layer_weights": by_layer}


def _layer(value: Any, where: str) -> int:
    number = _whole_number(_key(value))
    if number is None:
        raise CheckpointError(f"{where}: {shown(value)} is not the index of a layer")
    return number


def _key(value: Any) -> Any:
    """The key; an integer if it is text of digits, as JSON makes of integer keys."""
    return int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value


def _whole_number(value: Any) -> int | None:
    """`value` as an integer, if it is a whole number from 0 to 2^63 - 1; None otherwise.

    800.0 and a tensor of one element count as whole numbers.
    """
    if isinstance(value, TensorEntry) and value.numel == 1:
        value = read_number(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if is_count(value) else None


def _bound(value: Any, archive: TorchZip, name: str, seen: dict[int, Any] | None = None) -> Any:
    """A copy of `value` with a `TensorEntry` for every tensor.

    A container that occurs several times in `value` is copied once, so that the copy is no larger.
    """
    if isinstance(value, TensorRef):
        return archive.entry(name, value)
    if not isinstance(value, (dict, list, tuple)) or isinstance(value, Counter):
        return value
    seen = {} if seen is None else seen
    if id(value) not in seen:
        bound: Any
        if isinstance(value, dict):
            bound = {}
            for key, item in value.items():
                short = printable(str(key))[:_MAX_KEY]
                bound[key] = _bound(item, archive, f"{name}.{short}" if name else short, seen)
        else:
            items = (_bound(v, archive, f"{name}.{i}", seen) for i, v in enumerate(value))
            bound = type(value)(items)
        seen[id(value)] = bound
    return seen[id(value)]


def is_moment(name: str) -> bool:
    """Whether a tensor of this name is a moment of the optimizer; moments must be finite."""
    return _MOMENT.fullmatch(name) is not None


def _entries(content: Any) -> Iterator[TensorEntry]:
    """The tensors in nested data, in the order in which they are written."""
    pending = [content]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if isinstance(item, TensorEntry):
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
    keys = ", ".join(str(key) for key in content) or "none"
    optimizer = content.pop(_OPTIMIZER, None)
    content = _bound(content, archive, "")
    if "global_step" not in content:
        raise fail(
            f"has no global_step; not a training state of a known kind (its keys: {keys:.200})"
        )
    step = _whole_number(content["global_step"])
    if step is None:
        found = content["global_step"]
        if isinstance(found, TensorEntry):
            problem = f"a tensor ({found.dtype.name}{list(found.shape)})"
        else:
            problem = shown(found)
        raise fail(f"its global_step is {problem}, not a number of steps")
    content["global_step"] = step
    if optimizer is None:
        return TrainingState(path, step, content, None, {}, archive.header)
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(groups, list) or not isinstance(state, dict):
        raise fail(f"its {_OPTIMIZER} is of an unknown kind, with param_groups and state expected")
    if len(groups) != 1 or not isinstance(groups[0], dict):
        raise fail(f"its optimizer has {len(groups)} parameter groups, 1 expected")
    group = dict(groups[0])
    params = group.pop("params", None)
    if not {"betas", "eps"} <= group.keys():  # SGD, for example, has neither
        raise fail("its optimizer is of an unknown kind, AdamW expected")
    slots = [
        (layer, slot) for layer in sorted(modules) for slot in modules[layer].architecture.slots()
    ]
    if not isinstance(params, list) or len(params) != len(slots):
        count = len(params) if isinstance(params, list) else 0
        raise fail(f"its optimizer has {count} parameters, the weights have {len(slots)}")
    # only counts go into a set: large integers can be chosen so that all have the same hash
    known = set(params) if all(map(is_count, params)) else set()
    if not state.keys() <= known:
        state = {_key(key): value for key, value in state.items()}
    if len(known) < len(params) or not state.keys() <= known:
        raise fail("its optimizer state does not match its parameter list")
    by_layer: dict[int, dict[Slot, SlotState]] = {}
    for index, (layer, slot) in zip(params, slots, strict=True):
        if index in state:
            shape = modules[layer].architecture.shape(slot)
            # popped, so that memory of the decoded state is freed while the new one grows
            own = _slot_state(archive, index, state.pop(index), shape, fail)
            by_layer.setdefault(layer, {})[slot] = own
    group = _bound(group, archive, f"{_OPTIMIZER}.param_groups.0")
    return TrainingState(path, step, content, group, by_layer, archive.header)


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
    """The multi-layer state of the merged layers.

    Args:
        template: state from which the curriculum and all other fields are taken.
        sources: state of the checkpoint that each merged layer came from, by layer. It gives the
            layer's weight in the loss; 1.0 if it does not record one.
    """
    weights: dict[int, Any] = {}
    for layer in sorted(sources):
        own = sources[layer] or template
        weights[layer] = own.get("layer_weights", {}).get(layer, 1.0)
    joined = dict(template)
    joined["layers_to_train"] = sorted(sources)
    joined["layer_weights"] = weights
    return joined


def furthest_trained(states: Sequence[TrainingState]) -> TrainingState | None:
    """The state with the highest ``global_step``, the first of several; None without states.

    A merge keeps its scalars.
    """
    return max(states, key=lambda state: state.global_step, default=None)
