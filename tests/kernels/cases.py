"""Helpers of kernel tests: device and dtypes, tensor layouts, comparison with the truth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
"""Whether `python -m ttsem.sanitize pytest` runs this: it acts as a GPU and checks accesses."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    DTYPES = [torch.float32, torch.float16]  # the interpreter computes bfloat16 wrongly
elif SIMULATED:  # float16, too, has these tiles and accesses; the interpreter computes its values
    DTYPES = [torch.bfloat16]
else:
    DTYPES = [torch.float32, torch.float16, torch.bfloat16]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
tiles_of_the_rule = pytest.mark.parametrize(
    ("dtype", "tokens", "number"),
    [
        (dtype, tokens, number)
        for dtype in DTYPES
        for tokens, number in ((37, 0), *((130, number) for number in range(MAX_CANDIDATES)))
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
"""Tokens, and the number of a rule's candidate tiles, for sizes that are multiples of 8."""

Inputs = tuple[Tensor, Tensor, MLPWeights, Factors]


def padded(tensor: Tensor) -> Tensor:
    """The same values inside wider rows that are NaN elsewhere."""
    *rows, width = tensor.shape
    around = torch.full((*rows, width + 5), torch.nan, dtype=tensor.dtype, device=tensor.device)
    around[..., 2:-3] = tensor
    return around[..., 2:-3]


class PackedProducts(TorchDispatchMode):
    """Gives torch's own matrix products unpadded copies of their operands.

    In bfloat16 on a CPU with AMX they multiply the values behind a row by 0, and NaN stays NaN.
    Kernels still get the padded operands of the test.
    """

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in self.PRODUCTS:
            args = tuple(operand.contiguous() for operand in args)
        return func(*args, **(kwargs or {}))


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the last two strides exchanged."""
    return tensor.mT.contiguous().mT


def strided(tensor: Tensor) -> Tensor:
    """The same values with NaN between them, in rows and columns."""
    around = tensor.new_full([*tensor.shape[:-1], tensor.shape[-1], 2], torch.nan)
    around = torch.stack([around, around], -3)
    around[..., 0, :, 0] = tensor
    return around[..., 0, :, 0]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values from an address on that is no multiple of 16 bytes."""
    around = tensor.new_full([tensor.numel() + 1], torch.nan)[1:].view(tensor.shape)
    around.copy_(tensor)
    return around


def expanded(tensor: Tensor) -> Tensor:
    """The first row, repeated with stride 0."""
    return tensor[..., :1, :].expand_as(tensor)


def spread(vector: Tensor) -> Tensor:
    """The same values with NaN between them."""
    return torch.stack([vector, torch.full_like(vector, torch.nan)], -1)[..., 0]


def joined(parts: Tensor) -> Tensor:
    """``(c, T, R)`` with the MLP's strides: slices of ``(T, c R)``."""
    return parts.transpose(0, 1).contiguous().transpose(0, 1)


def constant(tensor: Tensor) -> Tensor:
    """One number repeated with all strides 0, as the backward of `sum` gives it."""
    return torch.ones((), dtype=tensor.dtype, device=tensor.device).expand_as(tensor)


layouts = pytest.mark.parametrize("layout", [padded, transposed, expanded, constant])


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """Fail if a bit of the tensors changes inside the context."""
    before = [_bits(tensor).clone() for tensor in tensors]
    yield
    for tensor, bits in zip(tensors, before, strict=True):
        assert torch.equal(_bits(tensor), bits)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same numbers as leaves of another dtype, through nested lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(cast(v, dtype) for v in value)
    if isinstance(value, list | tuple):
        return type(value)(cast(v, dtype) for v in value)
    return value


def assert_like(oracle: Callable[..., Any], arguments: Sequence[Any], found: Any) -> None:
    """Compare a kernel's results with those of an oracle in float64 on the same numbers.

    The budget is the error of the oracle in the arguments' own dtype.
    """
    results = [found, oracle(*cast(arguments, torch.float64)), oracle(*arguments)]
    ours, exact, eager = ([r] if isinstance(r, Tensor) else r for r in results)
    for index, compared in enumerate(zip(ours, exact, eager, strict=True)):
        assert_within_budget(*compared, f"result {index}", terms=longest_sum(arguments))


def inputs_of(problem: Problem, dtype: torch.dtype, **options: Any) -> Inputs:
    """Inputs of the modulated MLP on the test device."""
    return make_inputs(problem, dtype=dtype, device=DEVICE, **options)


def arranged(inputs: Inputs, layout: Callable[[Tensor], Tensor]) -> Inputs:
    """The same leaves with every matrix in another layout, and biases spread."""
    x, h, weights, factors = inputs

    def arrange(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        arranged = spread if value.ndim == 1 else layout
        return arranged(value.detach()).requires_grad_(value.requires_grad)

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


def reference_mlp(inputs: Inputs, activation: str = "silu") -> Tensor:
    """The definition of the MLP."""
    return mlp(inputs, impl="reference", activation=activation)


def output_gradient(inputs: Inputs) -> Tensor:
    """A gradient for the output of `inputs`, in their dtype."""
    h = inputs[1]
    values = torch.randn(h.shape, generator=torch.Generator().manual_seed(9))
    return values.to(DEVICE, h.dtype)


def gradients(inputs: Inputs, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Gradients of all tensors in `inputs`, by name; the graph is kept."""
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
    eager: Callable[[Inputs], Tensor] | None = None,
    activation: str = "silu",
) -> None:
    """Compare `found`, as `results` returns it, with the definition in float64."""
    definition = partial(reference_mlp, activation=activation)
    exact = results(definition, cast(inputs, torch.float64), dy.double())
    low = results(eager or definition, inputs, dy)
    for name, tensor in found.items():
        assert_within_budget(tensor, exact[name], low[name], name, terms=longest_sum(inputs))
