"""Rank-1 terms, the form in which a modulation holds the weight change of a projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """Rank-1 terms of one projection's weight change.

    Attributes:
        v_a: Directions that are read, ``(n, in)``.
        v_b: Directions that are written, ``(n, out)``.
    """

    v_a: Tensor
    v_b: Tensor

    def dense(self) -> Tensor:
        """The weight change dW, ``(out, in)``."""
        return self.v_b.t() @ self.v_a


def truncated(terms: Terms, rank: int | None, tol: float) -> tuple[Terms, float]:
    """The best approximation of dW with fewer terms, and its relative error (Frobenius).

    QR of both factors leaves an SVD of n x n instead of one of out x in. All of it runs in
    float64, since ``tol`` may be below the resolution of the terms' dtype.
    """
    dtype = terms.v_a.dtype
    q_a, r_a = torch.linalg.qr(terms.v_a.double().t())
    q_b, r_b = torch.linalg.qr(terms.v_b.double().t())
    left, values, right = torch.linalg.svd(r_b @ r_a.t())
    total = values.norm().item()
    # costs[i]: the error if term i and all smaller ones are left out
    costs = values.flip(0).square().cumsum(0).sqrt().flip(0).tolist()
    kept = next((i for i, cost in enumerate(costs) if cost <= tol * total), len(costs))
    kept = max(1, min(kept, rank or kept))
    lost = costs[kept] if kept < len(costs) else 0.0
    v_a = right[:kept] @ q_a.t()
    v_b = (q_b @ left[:, :kept] * values[:kept]).t()
    return Terms(v_a.to(dtype), v_b.to(dtype)), lost / total if total else 0.0


Layers = Mapping[int, Mapping[str, Terms]]
"""Terms by layer index and projection."""
