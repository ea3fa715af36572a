"""Training states as trainers leave them, and as torch loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.checkpoints import layer_weights, write_checkpoint

BOTH = [11, 13]


def loaded_state(path: Path) -> dict[str, Any]:
    """The training state of a source, loaded by torch, with its numpy scalars."""
    scalar = np.float64().__reduce__()[0]  # NumPy 2 has it in another place than 1
    numpy_scalar = [scalar, np.dtype, type(np.dtype("float64"))]  # design.md#training-state
    with torch.serialization.safe_globals(numpy_scalar):
        state = torch.load(path / "training_state.pt", weights_only=True)
    assert isinstance(state, dict)
    return state


def adamw_over(
    weights: Mapping[str, Tensor],
) -> tuple[list[torch.nn.Parameter], torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The trainer's optimizer and scheduler: one group over all weights in key order."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=7.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return parameters, optimizer, scheduler


def with_state(path: Path, layer: int, state: Mapping[str, Any]) -> Path:
    return write_checkpoint(path, layer_weights(layer), training_state=state)


def stepped(layer: int, **options: Any) -> dict[str, Any]:
    """The state dict of an AdamW after one step over a layer's weights."""
    parameters = [torch.nn.Parameter(tensor) for tensor in layer_weights(layer).values()]
    optimizer = torch.optim.AdamW(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def unstepped() -> dict[str, Any]:
    parameters = [torch.nn.Parameter(tensor) for tensor in layer_weights(11).values()]
    return torch.optim.AdamW(parameters).state_dict()
