"""Initialization of the tensors of an NP component, as one table (design.md#initialization).

``W_down`` is always Xavier-uniform. For the others there are three families; e is the scale:

- ``zero``: ``W_a_up`` is Xavier-uniform and ``W_b_up`` is zero. The model starts as the base model,
  with full-sized gradients for ``W_b_up``. e is not used.
- ``improved`` and ``conservative``: the original's, as in its single-layer mode. With several
  components (k > 1) they differ only in the first component of single modulation. The original
  reseeds the global generator, which makes layers equal; we do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from npt_fast.checkpoint.keys import parse_key
from npt_fast.config import Initialization

_Fill = Callable[[Tensor], object]
_Row = tuple[_Fill, _Fill]
"""Functions that fill ``W_a_up`` and ``W_b_up``."""


@torch.no_grad()
def initialize(
    views: Mapping[str, Tensor], *, init: Initialization, scale: float, num_ranks: int
) -> None:
    """Fill the tensors of one layer in place, in order, from torch's global generator.

    Args:
        views: original name without the layer, such as ``W_down_gate.0`` -> tensor to fill.
        init: family of the table.
        scale: e of the table.
        num_ranks: number of components k.
    """
    for name, view in views.items():
        key = parse_key(f"layer_0_np.{name}")
        assert key is not None, name
        if key.stem == "W_down":
            nn.init.xavier_uniform_(view)
        else:
            reads, writes = _row(init, key.projection, key.component or 0, num_ranks, scale)
            (reads if key.stem == "W_a_up" else writes)(view)


def _row(init: Initialization, projection: str, component: int, k: int, e: float) -> _Row:
    if init == "zero":
        return nn.init.xavier_uniform_, nn.init.zeros_
    improved = init == "improved"
    if projection == "":
        return _single(improved, component, k, e)
    if projection == "down":
        return _down(improved, component, k, 0.5 * e)
    return _gate_or_up(improved, component, k, e)


def _single(improved: bool, component: int, k: int, e: float) -> _Row:
    if component == 0:
        return (_eye(1.0, 0.1), _xavier(0.1)) if improved else (_eye(0.3, 0.01), _uniform(e))
    # orthogonal fills need a QR each, which is slow for more than 16 components
    return (_orthogonal(e), _orthogonal(0.1 * e)) if k <= 16 else (_normal(e), _normal(0.1 * e))


def _gate_or_up(improved: bool, component: int, k: int, e: float) -> _Row:
    if k == 1 and improved:
        return _eye(0.5, 0.05), _xavier(0.05)
    return (_uniform(e), _uniform(e)) if component == 0 else (_orthogonal(e), _orthogonal(0.1 * e))


def _down(improved: bool, component: int, k: int, e: float) -> _Row:
    if k == 1 and improved:
        return _xavier(0.02), _xavier(0.02)
    return (_uniform(e), _uniform(e)) if component == 0 else (_orthogonal(e), _orthogonal(0.5 * e))


def _uniform(bound: float) -> _Fill:
    return partial(nn.init.uniform_, a=-bound, b=bound)


def _normal(std: float) -> _Fill:
    return partial(nn.init.normal_, std=std)


def _xavier(gain: float) -> _Fill:
    """Normal with standard deviation ``gain * sqrt(2 / (rows + columns))``."""
    return partial(nn.init.xavier_normal_, gain=gain)


def _orthogonal(gain: float) -> _Fill:
    def fill(tensor: Tensor) -> None:
        # torch has no QR for 16-bit dtypes
        exact = torch.empty_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        tensor.copy_(nn.init.orthogonal_(exact, gain))

    return fill


def _eye(diagonal: float, std: float) -> _Fill:
    """Normal noise plus an identity that repeats every ``columns`` rows."""

    def fill(tensor: Tensor) -> None:
        tensor.normal_(std=std)
        rows = torch.arange(tensor.shape[0], device=tensor.device)
        tensor[rows, rows % tensor.shape[1]] += diagonal

    return fill
