"""The change of a projection whose weight is sharded over devices (DTensor): tensor parallelism.

Factors are replicated. DTensor computes the definition with them: where a projection's output is
sharded, each device uses its columns of W_b_up; where the input is, each uses its columns of
W_a_up, and the probes are summed over devices before the coefficients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    # by its name, since importing torch.distributed.tensor takes 4 s
    return type(tensor).__name__ == "DTensor"


def whole(tensor: Any) -> Tensor:
    """A tensor, gathered from all devices if it is a shard."""
    gathered: Tensor = tensor.full_tensor() if is_shard(tensor) else tensor
    return gathered


def sharded_change(
    projection: Any, a: Tensor, u: Tensor, w_a: Tensor, w_b: Tensor, *, num_ranks: int
) -> Tensor:
    """`npt_fast.functional.change_from_bottleneck` for a projection whose weight `is_shard`.

    Args:
        projection: linear module whose weight ``(out, in)`` is a DTensor.
        a: this device's input of the projection: ``(..., in)``, or its columns of it.
        u: bottleneck, ``(..., R)``, the same on every device.
        w_a: W_a_up, ``(R, in)``.
        w_b: W_b_up, ``(R, out)``.
        num_ranks: number of components k.

    Returns:
        The change as a DTensor, ``(..., out)``.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = projection.weight.device_mesh
    placed = projection.weight.placements
    whole = [Replicate()] * len(placed)

    def replicated(tensor: Tensor) -> Any:
        return DTensor.from_local(tensor, mesh, whole)

    def where_sharded(dim: int, tensor_dim: int) -> list[Any]:
        return [Shard(tensor_dim) if p == Shard(dim) else Replicate() for p in placed]

    read: Any = a
    if not isinstance(a, DTensor):
        read = DTensor.from_local(a, mesh, where_sharded(1, a.ndim - 1))
    u, w_b = replicated(u), replicated(w_b).redistribute(placements=where_sharded(0, 1))
    w_a = replicated(w_a).redistribute(placements=where_sharded(1, 1))
    wide = torch.promote_types(u.dtype, torch.float32)
    p = (read @ w_a.t()).redistribute(placements=whole)
    s = (u.to(wide) * p.to(wide)).unflatten(-1, (num_ranks, -1)).sum(-1, keepdim=True)
    z = (u.unflatten(-1, (num_ranks, -1)) * s).to(u.dtype).flatten(-2)
    change: Tensor = z @ w_b
    return change


def like(change: Any, y: Tensor) -> Tensor:
    """A change as a projection's output is: a DTensor, all of it, or this device's columns.

    Args:
        change: DTensor ``(..., out)``.
        y: output of the projection.
    """
    if type(y) is type(change):
        found: Tensor = change
    elif y.shape == change.shape:
        found = change.full_tensor()
    else:
        found = change.to_local()
    return found
