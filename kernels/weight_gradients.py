"""Gradients of float32 parameters whose products are computed from 16-bit copies.

Both operands of a weight's gradient are 16 bit, and the GEMM sums in float32. That sum is the
gradient: it is not rounded to 16 bit on the way. A gradient that is there already, of an earlier
micro-step, is added to by the GEMM itself: 8 bytes a parameter instead of 16 for a gradient of its
own, which autograd adds (design.md#weight-gradients).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from npt_fast.kernels.products import SUMS_IN_FLOAT32, product, tell_flop_counters


class WeightGradient(NamedTuple):
    """How the gradient of one weight is computed.

    Attributes:
        dtype: dtype of the weight.
        leaf: the weight, if its gradient may be added to what it has already; None otherwise.
    """

    dtype: torch.dtype
    leaf: Tensor | None

    @classmethod
    def to(cls, weight: Tensor | None, *, copied: bool) -> WeightGradient | None:
        """The gradient of a weight, which is computed with as it is or `copied`."""
        if weight is None:
            return None
        adds = copied and weight.is_leaf and not torch.compiler.is_compiling()
        if adds:
            tell_flop_counters()
        return cls(weight.dtype, weight if adds else None)

    def alone(self) -> WeightGradient:
        """The same, added to nothing."""
        return self._replace(leaf=None)

    def of(self, a: Tensor, b: Tensor) -> Tensor | None:
        """``a' b``, for a ``(T, in)`` and b ``(T, out)``; None once the leaf's gradient has it."""
        total = None if self.leaf is None else _sum_of(self.leaf)
        if total is None:
            return product(a.t(), b, self.dtype)
        # through the dispatcher: FLOP counters fail at `addmm` with another output dtype
        torch.ops.npt_fast.add_product(total, a.t(), b)
        return None


def _sum_of(leaf: Tensor) -> Tensor | None:
    """The gradient of earlier micro-steps, if backward may add to it in autograd's place.

    It may if that is what autograd is about to do (`torch.autograd.grad` does not), and no hook of
    the leaf waits for the gradient of this micro-step alone. Hooks of the leaf's node, such as
    DDP's, run as ever, and read the sum.
    """
    found = leaf.grad
    if (
        type(found) is not Tensor
        or found.dtype != torch.float32
        or not found.is_contiguous()
        or found.requires_grad
        or leaf._backward_hooks
        or leaf._post_accumulate_grad_hooks
        or found.device.type not in SUMS_IN_FLOAT32
        or not _on_default_stream(found)
    ):
        return None
    try:
        runs = torch._C._will_engine_execute_node(get_gradient_edge(leaf).node)
    except RuntimeError:  # autograd.grad takes the gradient of this leaf
        return None
    return found if runs else None


def _on_default_stream(tensor: Tensor) -> bool:
    """On another one readers might not wait: they wait for gradients that autograd has seen."""
    if not tensor.is_cuda:
        return True
    device = tensor.device
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
