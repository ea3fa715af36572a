"""Weights and AdamW's moments: out of model and optimizer into a checkpoint, and back.

A component's parameters join several tensors of the original. A checkpoint has one AdamW state per
tensor, in the original's order (design.md#training-state), so that merges and the original can read
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from npt_fast import schema
from npt_fast.checkpoint.checkpoint import Checkpoint
from npt_fast.checkpoint.numbers import read_number
from npt_fast.checkpoint.source_file import NearbyReader
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.checkpoint.training_state import (
    TRAINING_STATE,
    TrainingState,
    read_training_state,
)
from npt_fast.errors import TrainingError
from npt_fast.functional import whole
from npt_fast.hf.weights_file import read_tensor
from npt_fast.modules import NPComponent

_MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_weights(components: Mapping[int, NPComponent]) -> dict[str, Tensor]:
    """Return all weights by full name, on the CPU. Under FSDP every process must call it."""
    return {
        f"layer_{layer}_np.{name}": view.clone()
        for layer, component in components.items()
        for name, view in component.split(
            {name: _on_cpu(parameter) for name, parameter in component.named_parameters()}
        ).items()
    }


def gather_optimizer(
    optimizer: torch.optim.Optimizer, components: Mapping[int, NPComponent]
) -> dict[str, Any]:
    """Return AdamW's state in the original's form, on the CPU.

    Under FSDP every process must call it.
    """
    state: dict[int, dict[str, Tensor]] = {}
    index = 0
    for component in components.values():
        own = dict(component.named_parameters())
        names = list(
            component.split({name: torch.empty(p.shape, device="meta") for name, p in own.items()})
        )
        held = {name: optimizer.state[p] for name, p in own.items() if p in optimizer.state}
        if held:
            split = {
                moment: component.split(
                    {name: _on_cpu(values[moment]) for name, values in held.items()}
                )
                for moment in _MOMENTS
            }
            step = _on_cpu(next(iter(held.values()))["step"]).to(torch.float32)
            for offset, name in enumerate(names):
                moments = {moment: split[moment][name].clone() for moment in _MOMENTS}
                state[index + offset] = {"step": step.clone(), **moments}
        index += len(names)
    first, keys = optimizer.param_groups[0], (*optimizer.defaults, "initial_lr")
    group = {key: first[key] for key in keys if key in first}  # the same for all groups
    # how a step is computed belongs to this machine, not to the state
    group |= {"fused": None, "foreach": None, "params": list(range(index))}
    return {"state": state, "param_groups": [group]}


def gather_schedule(schedule: Any) -> dict[str, Any]:
    """Return the state of a schedule for the one group that `gather_optimizer` makes of all."""
    state: dict[str, Any] = schedule.state_dict()
    return {key: value[:1] if isinstance(value, list) else value for key, value in state.items()}


def _on_cpu(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu()


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    components: Mapping[int, NPComponent],
    saved: TrainingState,
    checkpoint: Checkpoint,
) -> list[int]:
    """Restore AdamW's moments by name; layers without moments in the checkpoint start fresh.

    Tensors that are joined in one parameter may differ in step, for example after a merge that
    joined two modules of one layer. Then all moments are scaled to the highest step such that
    ``moment / (1 - beta^step)``, which AdamW uses, stays the same.

    Returns:
        Layers that start fresh.

    Raises:
        TrainingError: AdamW cannot have left these steps or moments.
    """
    reader = NearbyReader()
    betas = optimizer.param_groups[0]["betas"]
    fresh = []
    for layer, component in components.items():
        slots = saved.optimizer.get(layer)
        if not slots:
            fresh.append(layer)
            continue
        architecture = checkpoint.modules[layer].architecture
        prefix = f"layer_{layer}_np."
        states = {
            str(architecture.key(layer, slot)).removeprefix(prefix): values
            for slot, values in slots.items()
        }
        steps = {
            name: _steps(values["step"], f"{saved.path}: the AdamW state of {prefix}{name}")
            for name, values in states.items()
        }
        top = max(steps.values())
        if top and not all(steps.values()):
            raise TrainingError(
                f"{saved.path}: the AdamW state of layer {layer} has tensors at step 0 and others "
                f"at step {top}; leave out {TRAINING_STATE} to start the optimizer fresh"
            )
        own = dict(component.named_parameters())
        joined = {
            moment: {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in own.items()}
            for moment in _MOMENTS
        }
        for moment, beta in zip(_MOMENTS, betas, strict=True):
            views = component.split(joined[moment])
            for name, values in states.items():
                entry = values[moment]
                assert isinstance(entry, TensorEntry)
                value = read_tensor(entry, reader)
                if not entry.dtype.is_float or not bool(value.float().isfinite().all()):
                    raise TrainingError(
                        f"{saved.path}: {moment} of {prefix}{name} must be finite numbers"
                    )
                views[name].copy_(value)
                if steps[name] != top:
                    views[name].mul_((1 - beta**top) / (1 - beta ** steps[name]))
        for name, parameter in own.items():
            moments = {moment: _like(joined[moment][name], parameter) for moment in _MOMENTS}
            step = torch.tensor(float(top), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = {"step": step, **moments}
    return fresh


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _steps(value: TensorEntry | float | None, where: str) -> int:
    if isinstance(value, TensorEntry):
        value = read_number(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not schema.is_count(value):
        raise TrainingError(f"{where}: step must be a whole number, not {schema.shown(value)}")
    return value


def read_state(checkpoint: Checkpoint) -> TrainingState | None:
    """Read the training state of a checkpoint, None if it has none."""
    if checkpoint.directory is None:
        return None
    return read_training_state(checkpoint.directory / TRAINING_STATE, checkpoint.modules)
