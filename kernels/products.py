"""Matrix products with float32 sums, also of 16-bit matrices, and sums of products in place."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from npt_fast.kernels._ops import define

SUMS_IN_FLOAT32 = frozenset(
    device
    for device in ("cpu", "cuda", "meta")
    if torch._C._dispatch_has_kernel_for_dispatch_key(
        "aten::addmm.dtype", torch._C._dispatch_key_for_device(device)
    )
)
"""Devices whose GEMMs of 16-bit matrices return their float32 sums: not CPUs, as of torch 2.13."""


@define("add_product(Tensor(a!) y, Tensor a, Tensor b) -> ()", lambda y, a, b: None)
def add_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """``y += a @ b``, also for a float32 y of 16-bit factors on `SUMS_IN_FLOAT32`.

    As an operation that mutates its argument it stays in place under Inductor, which gives a new
    buffer to every `addmm`. For another output than y torch copies y first (pytorch #153590).
    """
    if y.dtype == a.dtype:
        torch.addmm(y, a, b, out=y)
    else:
        torch.addmm(y, a, b, out_dtype=y.dtype, out=y)


def _wide_shape(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]), dtype=wide)


@define("batched_product(Tensor a, Tensor b) -> Tensor", _wide_shape)
def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of ``(k, m, n)`` and ``(k, n, o)``, in float32 at least."""
    if a.dtype.itemsize == 2 and a.device.type in SUMS_IN_FLOAT32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in `dtype`: for float32 the sums themselves, also of 16-bit matrices."""
    if dtype != torch.float32 or a.dtype.itemsize >= dtype.itemsize:
        return (a @ b).to(dtype)
    if a.device.type in SUMS_IN_FLOAT32:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def tell_flop_counters() -> None:
    """Register our operations with torch's FLOP counters, if they are imported: they take 0.6 s."""
    counters = sys.modules.get("torch.utils.flop_counter")
    if counters and torch.ops.npt_fast.add_product not in counters.flop_registry:
        register = counters.register_flop_formula
        register(torch.ops.npt_fast.add_product)(lambda y, *factors, **_: _flops(*factors))
        register(torch.ops.npt_fast.batched_product)(lambda a, b, **_: a[0] * _flops(a[1:], b[1:]))


def _flops(a: Any, b: Any) -> int:
    return 2 * int(a[0]) * int(a[1]) * int(b[1])


tell_flop_counters()
