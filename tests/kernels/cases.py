"""What tests of kernels share: device and dtypes, layouts of tensors, comparison with the truth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from npt_fast.functional import modulated_mlp
from npt_fast.kernels._tuning import MAX_CANDIDATES
from npt_fast.kernels.factored import Factors, MLPWeights
from npt_fast.testing import Problem, assert_within_budget, longest_sum, make_inputs, named_tensors

SIMULATED = "ttsem" in sys.modules
"""Whether this is `python -m ttsem.sanitize pytest`: it passes for a GPU, and checks accesses."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    DTYPES = [torch.float32, torch.float16]  # the interpreter cannot calculate in bfloat16
elif SIMULATED:
    DTYPES = [torch.bfloat16, torch.float16]
else:
    DTYPES = [torch.float32, torch.float16, torch.bfloat16]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
tiles_of_the_rule = pytest.mark.parametrize(
    ("dtype", "tokens", "number"),
    [
        (dtype, tokens, number)
        for dtype in (DTYPES[:1] if SIMULATED else DTYPES)  # those for 16 bits are alike
        for tokens, number in ((37, 0), *((130, number) for number in range(MAX_CANDIDATES)))
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
"""Tokens, and which of the tiles that a kernel may run with, where sizes are multiples of 8."""

Inputs = tuple[Tensor, Tensor, MLPWeights, Factors]


def padded(tensor: Tensor) -> Tensor:
    """The same values as a part of wider rows, the rest of which is NaN."""
    *rows, width = tensor.shape
    around = torch.full((*rows, width + 5), torch.nan, dtype=tensor.dtype, device=tensor.device)
    around[..., 2:-3] = tensor
    return around[..., 2:-3]


class PackedProducts(TorchDispatchMode):
    """Inside it torch's own matrix products get copies of their operands, without padding.

    In bfloat16 on a CPU with AMX they multiply what lies behind a row by 0, which leaves NaN as it
    is. Kernels still get the operands that a test has made.
    """

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in self.PRODUCTS:
            args = tuple(operand.contiguous() for operand in args)
        return func(*args, **(kwargs or {}))


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the strides of the last two dimensions exchanged."""
    return tensor.mT.contiguous().mT


def expanded(tensor: Tensor) -> Tensor:
    """Its first row, over and over: stride 0."""
    return tensor[..., :1, :].expand_as(tensor)


def joined(parts: Tensor) -> Tensor:
    """``(c, T, R)`` as the MLP has it: columns of ``(T, c R)``."""
    return parts.transpose(0, 1).contiguous().transpose(0, 1)


def constant(tensor: Tensor) -> Tensor:
    """One number, over and over, as `sum` sends back: every stride 0."""
    return torch.ones((), dtype=tensor.dtype, device=tensor.device).expand_as(tensor)


layouts = pytest.mark.parametrize("layout", [padded, transposed, expanded, constant])


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """Fail if a bit of them is another afterwards."""
    before = [_bits(tensor).clone() for tensor in tensors]
    yield
    for tensor, bits in zip(tensors, before, strict=True):
        assert torch.equal(_bits(tensor), bits)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same numbers in another dtype, as leaves; through lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(cast(v, dtype) for v in value)
    if isinstance(value, list | tuple):
        return type(value)(cast(v, dtype) for v in value)
    return value


def assert_like(oracle: Callable[..., Any], arguments: Sequence[Any], found: Any) -> None:
    """Compare results of a kernel with those of an oracle in float64, of the same numbers.

    The budget is the error of the oracle in the numbers' own dtype.
    """
    results = [found, oracle(*cast(arguments, torch.float64)), oracle(*arguments)]
    ours, exact, eager = ([r] if isinstance(r, Tensor) else r for r in results)
    for index, compared in enumerate(zip(ours, exact, eager, strict=True)):
        assert_within_budget(*compared, f"result {index}", terms=longest_sum(arguments))


def inputs_of(problem: Problem, dtype: torch.dtype, **options: Any) -> Inputs:
    """Inputs of the modulated MLP on the tests' device."""
    return make_inputs(problem, dtype=dtype, device=DEVICE, **options)


def arranged(inputs: Inputs, layout: Callable[[Tensor], Tensor]) -> Inputs:
    """The same leaves, every matrix of them in another layout."""
    x, h, weights, factors = inputs

    def arrange(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        return layout(value.detach()).requires_grad_(value.requires_grad)

    return (
        arrange(x),
        arrange(h),
        MLPWeights(*map(arrange, weights)),
        Factors(*map(arrange, factors)),
    )


def mlp(inputs: Inputs, **options: Any) -> Tensor:
    """`npt_fast.functional.modulated_mlp` of joined arguments."""
    x, h, weights, factors = inputs
    gate, up, down, *biases = weights
    names = ("gate_bias", "up_bias", "down_bias")
    options |= dict(zip(names, biases, strict=True))
    return modulated_mlp(x, h, gate, up, down, factors, **options)


def reference_mlp(inputs: Inputs) -> Tensor:
    """The definition."""
    return mlp(inputs, impl="reference")


def output_gradient(inputs: Inputs) -> Tensor:
    """A gradient for the output of `inputs`, in their dtype."""
    h = inputs[1]
    values = torch.randn(h.shape, generator=torch.Generator().manual_seed(9))
    return values.to(DEVICE, h.dtype)


def gradients(inputs: Inputs, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of every tensor among `inputs`, by name; the graph stays."""
    tensors = named_tensors(*inputs)
    found = torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=True)
    return dict(zip(tensors, found, strict=True))


def results(function: Callable[[Inputs], Tensor], inputs: Inputs, dy: Tensor) -> dict[str, Tensor]:
    """y and every gradient, by name."""
    y = function(inputs)
    return {"y": y.detach(), **gradients(inputs, y, dy)}


def assert_mlp_within_budget(
    found: dict[str, Tensor],
    inputs: Inputs,
    dy: Tensor,
    eager: Callable[[Inputs], Tensor] = reference_mlp,
) -> None:
    """Compare what is `found` of `results` with the definition in float64, of the same numbers."""
    exact = results(reference_mlp, cast(inputs, torch.float64), dy.double())
    low = results(eager, inputs, dy)
    for name, tensor in found.items():
        assert_within_budget(tensor, exact[name], low[name], name, terms=longest_sum(inputs))
