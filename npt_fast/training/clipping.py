"""Gradient clipping, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def clip_each(layers: Iterable[nn.Module], max_norm: float) -> Tensor:
    """Clip the gradients of each layer to a norm, so that layers train as they would alone.

    Args:
        layers: modules whose parameters have gradients, at least one; DTensors are shards.
        max_norm: largest norm of a layer's gradients.

    Returns:
        The norm of all gradients before clipping, a scalar.
    """
    norms = []
    for layer in layers:
        norm: Any = nn.utils.clip_grad_norm_(layer.parameters(), max_norm)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
