"""Kernels as torch operations: registration, `torch.compile`, and no dispatcher in eager mode."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode

from npt_fast.kernels import modulated_mlp as kernels
from npt_fast.testing import Problem
from tests.kernels.cases import (
    DEVICE,
    Inputs,
    arranged,
    gradients,
    inputs_of,
    joined,
    mlp,
    output_gradient,
    padded,
    transposed,
)

PROBLEM = Problem(tokens=9, hidden=33, intermediate=43, num_ranks=3, rank=5, bias=True)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


def operations() -> dict[str, Sequence[Any]]:
    """Operation -> arguments."""
    c_T_R, T_D, T_F, F_D, R_F = (2, 9, 15), (9, 33), (9, 43), (43, 33), (15, 43)
    x, h, weights, factors = inputs_of(PROBLEM, torch.float32, requires_grad=False)
    return {
        "add_product": tensors(T_F, T_D, (33, 43)),
        "batched_product": tensors((2, 9, 15), (2, 15, 3)),
        "coefficients_fwd": (*tensors(c_T_R, c_T_R), 3),
        "coefficients_bwd": (
            *tensors(c_T_R, c_T_R, c_T_R, (2, 9, 3)),
            *map(joined, tensors(c_T_R)),
        ),
        "swiglu_fwd": tensors(T_F, T_F),
        "swiglu_bwd": (*tensors(T_F, T_F, T_F), "gelu"),
        "modulated_linear": (tensors(T_D, (9, 15)), tensors((33, 43), R_F), *tensors((43,))),
        "modulated_gate_up": (*tensors(T_D, F_D, F_D, c_T_R, R_F, R_F), None, None, True, "relu"),
        "probe": (*tensors(T_D, (30, 33), c_T_R), 3, True),
        "decode_mlp": (x, h, *weights, *factors, [], "gelu_pytorch_tanh"),
    }


def ours(names: Iterable[object]) -> set[str]:
    """Names of our operations among the given ones."""
    found = (re.match(r"npt_fast(?:::|\.)(\w+)", str(name)) for name in names)
    return {match[1] for match in found if match}


def test_every_operation_is_checked() -> None:
    assert set(operations()) == ours(torch._C._dispatch_get_all_op_names())


@pytest.mark.parametrize("name", operations())
def test_operation(name: str) -> None:
    """Check the schema, mutation, shapes and strides of fake outputs, and dynamic shapes."""
    torch.manual_seed(0)
    torch.library.opcheck(getattr(torch.ops.npt_fast, name).default, operations()[name])


class Noting(TorchDispatchMode):
    """Records the names of dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("path", ["gemm", "fused", "decode"])
def test_eager_calls_do_not_pay_for_the_dispatcher(path: kernels.Path) -> None:
    inputs = inputs_of(PROBLEM, torch.float32, requires_grad=path != "decode")
    with Noting() as noting:
        y = kernels.modulated_mlp(*inputs, path=path)
        if path != "decode":
            y.backward(output_gradient(inputs))
    assert any(name.startswith("aten::") for name in noting.names)
    assert not ours(noting.names)


@pytest.fixture
def compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[kernels.Path], tuple[Callable[[Inputs], Tensor], set[str]]]:
    """A compiler of impl="triton" on a path as one graph, and the names of our operations in it."""
    found: set[str] = set()

    def noting(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        for module in graph.modules():  # a Function's forward and backward are modules of their own
            if isinstance(module, torch.fx.GraphModule):
                found.update(ours(node.target for node in module.graph.nodes))
        return lookup_backend("aot_eager")(graph, examples)

    def compile_path(path: kernels.Path) -> tuple[Callable[[Inputs], Tensor], set[str]]:
        torch.compiler.reset()
        monkeypatch.setattr(kernels, "choose_path", lambda *sizes, **options: path)
        return torch.compile(triton_mlp, fullgraph=True, backend=noting), found

    return compile_path


def triton_mlp(inputs: Inputs) -> Tensor:
    return mlp(inputs, impl="triton")


IN_GRAPH = {
    "gemm": {
        "add_product",
        "coefficients_fwd",
        "coefficients_bwd",
        "swiglu_fwd",
        "swiglu_bwd",
    },
    "fused": {"probe", "modulated_gate_up", "modulated_linear", "coefficients_bwd", "swiglu_bwd"},
}


@pytest.mark.parametrize("layout", [Tensor.contiguous, transposed, padded])
@pytest.mark.parametrize("path", IN_GRAPH)
def test_compiled(path: kernels.Path, layout: Callable[[Tensor], Tensor], compiled: Any) -> None:
    """Forward and backward are one graph with the kernels in it, for inputs of any strides."""
    inputs = arranged(inputs_of(PROBLEM, torch.float32), layout)
    function, names = compiled(path)
    dy = output_gradient(inputs)
    y, expected = function(inputs), triton_mlp(inputs)
    torch.testing.assert_close(y, expected)
    wanted = gradients(inputs, expected, dy)
    for name, gradient in gradients(inputs, y, dy).items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
    assert names == IN_GRAPH[path]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("decode", {"decode_mlp"}),
        ("gemm", {"add_product", "coefficients_fwd", "swiglu_fwd"}),
        ("fused", {"probe", "modulated_gate_up", "modulated_linear"}),
    ],
)
def test_compiled_without_gradients(path: kernels.Path, names: set[str], compiled: Any) -> None:
    inputs = inputs_of(PROBLEM, torch.float32)
    function, found = compiled(path)
    with torch.no_grad():
        torch.testing.assert_close(function(inputs), triton_mlp(inputs))
    assert found == names
