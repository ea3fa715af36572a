"""Inputs and error budgets shared by tests and benchmarks of the operators."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from npt_fast import modules
from npt_fast.functional import modulated_mlp
from npt_fast.kernels.factored import Base, Modulation

PATHS = ("gemm", "fused", "decode")
"""Of Triton's kernels, see `npt_fast.kernels.modulated_mlp`."""
IMPLEMENTATIONS = ("auto", "factored", "reference", *PATHS)
"""Every way to compute an NP layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Sizes of one modulated MLP.

    Attributes:
        tokens: T.
        hidden: D.
        intermediate: F.
        num_ranks: components k.
        rank: r of each.
        projections: 1 gate; 2 gate and up; 3 gate, up and down.
        bias: whether the base projections have biases.
    """

    tokens: int = 7
    hidden: int = 24
    intermediate: int = 40
    num_ranks: int = 2
    rank: int = 5
    projections: int = 3
    bias: bool = False


def make_inputs(
    problem: Problem,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    requires_grad: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Base, Modulation]:
    """x, h, base weights and modulation, scaled so that every path contributes about equally.

    Args:
        problem: sizes.
        dtype: of all tensors.
        device: where they are.
        requires_grad: of all tensors.
        generator: draws the numbers, on its own device; one on the CPU with seed 0 if None.
    """
    source = torch.Generator().manual_seed(0) if generator is None else generator
    p = problem
    d, f, r = p.hidden, p.intermediate, p.num_ranks * p.rank

    def tensor(*shape: int, fan_in: int = 1) -> Tensor:
        values: Tensor = torch.randn(
            shape, generator=source, device=source.device, dtype=torch.float64
        )
        values = (values / fan_in**0.5).to(device, dtype).requires_grad_(requires_grad)
        return values

    inputs = min(p.projections, 2)
    base = Base(
        tensor(f, d, fan_in=d),
        tensor(f, d, fan_in=d),
        tensor(d, f, fan_in=f),
        *((tensor(f), tensor(f), tensor(d)) if p.bias else ()),
    )
    modulation = Modulation(
        tensor(d, p.projections * r, fan_in=d),
        tensor(inputs * r, d, fan_in=d),
        tensor(r, f, fan_in=f) if p.projections == 3 else None,
        tensor(r, f, fan_in=r),
        tensor(r, f, fan_in=r) if p.projections > 1 else None,
        tensor(r, d, fan_in=r) if p.projections == 3 else None,
        p.num_ranks,
    )
    return tensor(p.tokens, d), tensor(p.tokens, d), base, modulation


def leaves(x: Tensor, h: Tensor, base: Base, modulation: Modulation) -> dict[str, Tensor]:
    """All tensors by name, without those that are None."""
    named = {"x": x, "h": h, **base._asdict(), **modulation._asdict()}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def longest_sum(arguments: Any) -> int:
    """The most terms of a sum over a dimension of any tensor among nested `arguments`."""
    if isinstance(arguments, Tensor):
        return max(arguments.shape, default=0)
    if isinstance(arguments, list | tuple):
        return max(map(longest_sum, arguments), default=0)
    return 0


def assert_within_budget(
    actual: Tensor, exact: Tensor, low_precision: Tensor, name: str = "result", *, terms: int = 0
) -> None:
    """Fail unless `actual` is about as close to `exact` as torch's own result in that precision.

    The budget is twice the Frobenius error of `low_precision`, plus one rounding of the dtype, plus
    the rounding of sums of `terms` terms. Sums are in float32 whatever the dtype is, and their
    error grows with the square root of the number of terms, since roundings are independent. It
    counts because `low_precision` may happen to be much better than that: on some CPUs it is.

    Args:
        actual: what is tested.
        exact: float64.
        low_precision: an eager computation in `actual`'s dtype.
        name: for the message.
        terms: of the sums, one after another, that `actual` may take in another order than
            `low_precision`.

    Raises:
        AssertionError: not finite, of another shape or dtype, or over budget.
    """
    if actual.shape != exact.shape or actual.dtype != low_precision.dtype:
        raise AssertionError(f"{name}: {actual.dtype}{tuple(actual.shape)} is of the wrong form")
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{name}: not finite")
    norm = exact.norm().item()
    error = (actual.double() - exact).norm().item()
    allowed = 2 * (low_precision.double() - exact).norm().item()
    allowed += (torch.finfo(actual.dtype).eps + torch.finfo(torch.float32).eps * terms**0.5) * norm
    if error > allowed:
        raise AssertionError(f"{name}: error {error:.3e}, {allowed:.3e} allowed, norm {norm:.3e}")


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Every NP layer that is called within the context, in any thread, is computed in one way.

    Backward goes the way of its forward, also after the context has ended.

    Args:
        name: one of `IMPLEMENTATIONS`.

    Raises:
        ValueError: an unknown name; and from the call of a layer, where that way cannot compute it.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}"
        )
    path = name in PATHS
    impl: Any = "triton" if path else name
    with ExitStack() as stack:

        def put(module: Any, function: str, replacement: Any) -> None:
            stack.enter_context(mock.patch.object(module, function, replacement))

        put(modules, "modulated_mlp", partial(modulated_mlp, impl=impl))
        if find_spec("triton"):
            from npt_fast.kernels import modulated_mlp as kernels

            # the rule itself, also where a context around this one has put something in its place
            rule = inspect.unwrap(kernels.choose_path)
            forced = wraps(rule)(lambda *_, **__: name)
            put(kernels, "choose_path", forced if path else rule)
        yield
