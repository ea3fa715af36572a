"""Gradient clipping, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from npt_fast.functional import whole


def clip_each(layers: Iterable[nn.Module], max_norm: float) -> Tensor:
    """Clip the gradients of each layer to a norm, so that layers train as they would alone.

    Args:
        layers: modules whose parameters have gradients, at least one; DTensors are shards.
        max_norm: largest norm of a layer's gradients.

    Returns:
        The norm of all gradients before clipping, a scalar.
    """
    norms = [whole(nn.utils.clip_grad_norm_(layer.parameters(), max_norm)) for layer in layers]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
