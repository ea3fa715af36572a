"""`modulated_mlp` with impl="triton": dtypes, autocast, and refused calls."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from npt_fast.kernels import factored
from npt_fast.kernels.swiglu import ACTIVATIONS
from npt_fast.testing import Problem, assert_within_budget, longest_sum, named_tensors
from tests.kernels.cases import (
    DEVICE,
    DTYPES,
    Inputs,
    cast,
    inputs_of,
    mlp,
    output_gradient,
    reference_mlp,
    results,
)
from tests.processes import run_python

LOW = DTYPES[-1]
PROBLEM = Problem(tokens=9, hidden=33, intermediate=43, num_ranks=3, rank=3, bias=True)
autocast = pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])


def triton_mlp(inputs: Inputs) -> Tensor:
    return mlp(inputs, impl="triton")


@autocast
@pytest.mark.parametrize("modulation", [torch.float32, LOW], ids=["np32", "np16"])
@pytest.mark.parametrize("base", [torch.float32, LOW], ids=["base32", "base16"])
@pytest.mark.parametrize("activations", [torch.float32, LOW], ids=["xh32", "xh16"])
def test_mixed_dtypes(
    activations: torch.dtype, base: torch.dtype, modulation: torch.dtype, autocast: bool
) -> None:
    """Arithmetic is in autocast's dtype or that of h; gradients have their tensor's dtype."""
    x, h, *weights = inputs_of(PROBLEM, torch.float32)
    inputs = (
        *cast((x, h), activations),
        cast(weights[0], base),
        cast(weights[1], modulation),
    )
    computed = LOW if autocast else activations
    dy = output_gradient(inputs).to(computed)
    with torch.autocast(DEVICE, dtype=LOW, enabled=autocast):
        found, eager = (results(f, inputs, dy) for f in (triton_mlp, reference_mlp))
    assert found["y"].dtype == computed
    exact = results(reference_mlp, cast(inputs, torch.float64), dy.double())
    for name, tensor in named_tensors(*inputs).items():
        assert found[name].dtype == tensor.dtype, name
    for name in found:
        # a float32 gradient of a 16-bit computation has 16-bit precision
        ours, low = (
            r[name].to(computed) if r[name].dtype == torch.float32 else r[name]
            for r in (found, eager)
        )
        assert_within_budget(ours, exact[name], low, name, terms=longest_sum(inputs))


def test_leading_dimensions() -> None:
    x, h, *weights = inputs_of(PROBLEM, DTYPES[0])
    expected = triton_mlp((x, h, *weights))
    batched = triton_mlp((x.view(3, 3, -1), h.view(3, 3, -1), *weights))
    assert torch.equal(batched.view(9, -1), expected)


@autocast
def test_gradient_checkpointing(autocast: bool) -> None:
    """Recomputation saves as many tensors, with the same dtypes and bits."""
    inputs = inputs_of(PROBLEM, torch.float32)
    dy = output_gradient(inputs).to(LOW if autocast else torch.float32)

    def again(inputs: Inputs) -> Tensor:
        return checkpoint(triton_mlp, inputs, use_reentrant=False)

    with torch.autocast(DEVICE, dtype=LOW, enabled=autocast):
        found, expected = (results(f, inputs, dy) for f in (again, triton_mlp))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    """Those that the kernels do not compute come below."""
    inputs = inputs_of(PROBLEM, DTYPES[0], requires_grad=False)
    y = mlp(inputs, impl="triton", activation=activation)
    exact, low = (reference_mlp(i, activation) for i in (cast(inputs, torch.float64), inputs))
    assert_within_budget(y, exact, low, terms=longest_sum(inputs))


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        pytest.param(torch.float64, "silu", id="float64"),
        pytest.param(torch.float32, "tanh", id="tanh"),
    ],
)
def test_what_triton_does_not_do(
    dtype: torch.dtype, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An explicit impl fails rather than fall back silently."""
    tanh = torch.tanh, torch.ops.aten.tanh_backward
    monkeypatch.setitem(factored.ACTIVATIONS, "tanh", tanh)
    inputs = inputs_of(PROBLEM, dtype)
    with pytest.raises(
        ValueError, match=f"impl='triton' needs Triton.*; got {dtype} on .*{activation}"
    ):
        mlp(inputs, impl="triton", activation=activation)
    assert mlp(inputs, activation=activation).dtype == dtype  # auto takes what fits


def in_a_new_process(code: str) -> str:
    """Output of a program that runs with Triton's compiler, not the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = (
        "import sys, torch\n"
        "from npt_fast.functional import modulated_mlp\n"
        "from npt_fast.testing import Problem, make_inputs\n"
        "x, h, weights, factors = make_inputs(Problem(), dtype=torch.float32)\n"
        "def run(impl):\n"
        "    return modulated_mlp(x, h, *weights[:3], factors, impl=impl)\n"
    )
    done = run_python(program + code, environment=environment)
    return done.stdout + done.stderr


def test_a_cpu_without_the_interpreter() -> None:
    said = in_a_new_process("run('triton')")
    assert "OptionError: impl='triton' needs Triton, a GPU" in said
    assert "got torch.float32 on cpu" in said


def test_auto_on_a_cpu() -> None:
    """auto takes the factored form and does not import Triton."""
    said = in_a_new_process(
        "print(torch.equal(run('auto'), run('factored')), 'triton' in sys.modules)"
    )
    assert said == "True False\n"
