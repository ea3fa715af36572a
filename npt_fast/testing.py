"""Inputs and error budgets that tests and benchmarks of the operators share."""

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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from npt_fast import modules
from npt_fast.errors import OptionError
from npt_fast.functional import modulated_mlp
from npt_fast.kernels.factored import Factors, MLPWeights

PATHS = ("gemm", "fused", "decode")
"""Paths of the Triton kernels, see `npt_fast.kernels.modulated_mlp`."""
IMPLEMENTATIONS = ("auto", "factored", "reference", *PATHS)
"""All ways to compute an NP layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Sizes of one modulated MLP.

    Attributes:
        tokens: T.
        hidden: D.
        intermediate: F.
        num_ranks: number of components k.
        rank: rank r of each component.
        projections: number of modulated projections: 1 gate; 2 gate and up; 3 gate, up and down.
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
) -> tuple[Tensor, Tensor, MLPWeights, Factors]:
    """x, h, weights and factors, scaled by fan-in so that every term contributes about equally.

    Args:
        problem: sizes of the MLP.
        dtype: dtype of all tensors.
        device: device of all tensors.
        requires_grad: whether all tensors require gradients.
        generator: generator of the numbers, on its own device; None means one on the CPU, seed 0.
    """
    source = torch.Generator().manual_seed(0) if generator is None else generator
    drawn_on = device if device == "meta" else source.device  # numbers for no tensor take as long
    p = problem
    d, f, r = p.hidden, p.intermediate, p.num_ranks * p.rank

    def tensor(*shape: int, fan_in: int = 1) -> Tensor:
        values: Tensor = torch.randn(shape, generator=source, device=drawn_on, dtype=torch.float64)
        # drawn in float64 and rounded, so that all dtypes get the same problem
        values = (values / fan_in**0.5).to(device, dtype).requires_grad_(requires_grad)
        return values

    inputs = min(p.projections, 2)
    weights = MLPWeights(
        tensor(f, d, fan_in=d),
        tensor(f, d, fan_in=d),
        tensor(d, f, fan_in=f),
        *((tensor(f), tensor(f), tensor(d)) if p.bias else ()),
    )
    factors = Factors(
        tensor(d, p.projections * r, fan_in=d),
        tensor(inputs * r, d, fan_in=d),
        tensor(r, f, fan_in=f) if p.projections == 3 else None,
        tensor(r, f, fan_in=r),
        tensor(r, f, fan_in=r) if p.projections > 1 else None,
        tensor(r, d, fan_in=r) if p.projections == 3 else None,
        p.num_ranks,
    )
    return tensor(p.tokens, d), tensor(p.tokens, d), weights, factors


def named_tensors(x: Tensor, h: Tensor, weights: MLPWeights, factors: Factors) -> dict[str, Tensor]:
    """All tensors by name, except those that are None."""
    named = {"x": x, "h": h, **weights._asdict(), **factors._asdict()}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def longest_sum(arguments: Any) -> int:
    """The largest dimension of any tensor in nested `arguments`: no sum over one has more terms."""
    if isinstance(arguments, Tensor):
        return max(arguments.shape, default=0)
    if isinstance(arguments, list | tuple):
        return max(map(longest_sum, arguments), default=0)
    return 0


def assert_within_budget(
    actual: Tensor, exact: Tensor, low_precision: Tensor, name: str = "result", *, terms: int = 0
) -> None:
    """Fail unless `actual` is about as close to `exact` as torch's own result in its dtype.

    The budget is twice the Frobenius error of `low_precision`, plus one rounding of the dtype, plus
    the rounding error of float32 sums of `terms` terms, which grows with the root of their number
    (design.md#error-budgets). The last part is needed because `low_precision` may be much more
    exact than that; on some CPUs it is.

    Args:
        actual: tensor to test.
        exact: the same in float64.
        low_precision: the same, computed eagerly in the dtype of `actual`.
        name: name for the message.
        terms: number of terms of the sums that `actual` may add in another order.

    Raises:
        AssertionError: `actual` is not finite, has another shape or dtype, or is over budget.
    """
    if actual.shape != exact.shape or actual.dtype != low_precision.dtype:
        raise AssertionError(
            f"{name}: {actual.dtype}{tuple(actual.shape)} has the wrong shape or dtype"
        )
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{name}: not finite")
    norm = exact.norm().item()
    error = (actual.double() - exact).norm().item()
    allowed = 2 * (low_precision.double() - exact).norm().item()
    allowed += (torch.finfo(actual.dtype).eps + torch.finfo(torch.float32).eps * terms**0.5) * norm
    if error > allowed:
        raise AssertionError(f"{name}: error {error:.3e}, {allowed:.3e} allowed, norm {norm:.3e}")


class Operations(TorchDispatchMode):
    """Context that counts torch's operations below autograd, views included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


class ParameterCasts(TorchDispatchMode):
    """Context that counts the casts of a model's parameters, or parts of them, to another dtype.

    Casts in a graph of torch.compile are not seen.

    Args:
        module: module whose parameters are meant, as they are when the context is entered.

    Attributes:
        count: number of casts.
        bytes: bytes that they read and wrote.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._module = module
        self.count = 0
        self.bytes = 0

    def __enter__(self) -> ParameterCasts:
        self._storages = {p.untyped_storage().data_ptr() for p in self._module.parameters()}
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            source: Tensor = args[0]
            known = source.untyped_storage().data_ptr() in self._storages
            if known and source.dtype != result.dtype:
                self.count += 1
                self.bytes += source.nbytes + result.nbytes
        return result


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Compute every NP layer that is called inside the context, in any thread, in one way.

    Backward follows its forward, even after the context has ended.

    Args:
        name: a name of `IMPLEMENTATIONS`.

    Raises:
        OptionError: the name is unknown. A layer's call raises it if that way cannot compute it.
    """
    if name not in IMPLEMENTATIONS:
        raise OptionError(
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

            # the original rule, even if an outer context has replaced it
            rule = inspect.unwrap(kernels.choose_path)
            forced = wraps(rule)(lambda *_, **__: name)
            put(kernels, "choose_path", forced if path else rule)
        yield
