"""Rank-1 terms: how a modulation holds the weight changes of its projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PROJECTIONS = ("gate", "up", "down")


class Terms(NamedTuple):
    """Rank-1 terms of one projection's weight change.

    Attributes:
        v_a: what each reads, ``(n, in)``.
        v_b: what it writes, ``(n, out)``.
    """

    v_a: Tensor
    v_b: Tensor

    def dense(self) -> Tensor:
        """dW, ``(out, in)``."""
        return self.v_b.t() @ self.v_a


def truncated(terms: Terms, rank: int | None, tol: float) -> tuple[Terms, float]:
    """The best terms of smaller number, and the relative error of dW; in float64 inside."""
    dtype = terms.v_a.dtype
    q_a, r_a = torch.linalg.qr(terms.v_a.double().t())
    q_b, r_b = torch.linalg.qr(terms.v_b.double().t())
    left, values, right = torch.linalg.svd(r_b @ r_a.t())
    total = values.norm().item()
    # what leaving out all from the i-th on costs
    costs = values.flip(0).square().cumsum(0).sqrt().flip(0).tolist()
    kept = next((i for i, cost in enumerate(costs) if cost <= tol * total), len(costs))
    kept = max(1, min(kept, rank or kept))
    lost = costs[kept] if kept < len(costs) else 0.0
    v_a = right[:kept] @ q_a.t()
    v_b = (q_b @ left[:, :kept] * values[:kept]).t()
    return Terms(v_a.to(dtype), v_b.to(dtype)), lost / total if total else 0.0


Layers = Mapping[int, Mapping[str, Terms]]
