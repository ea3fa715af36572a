"""The factored MLP against the definition, and the definition against the original's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from npt_fast.functional import modulated_mlp
from npt_fast.kernels.factored import ACTIVATIONS, Factors, MLPWeights
from npt_fast.testing import Problem, assert_within_budget, longest_sum, make_inputs, named_tensors
from tests.checkpoints import layer_weights
from tests.processes import run_python
from tests.reference import Situation
from tests.reference import modulated_mlp as spelled_out

SIZES = [
    pytest.param(Problem(projections=c, num_ranks=k, rank=r, bias=bias), id=f"c{c}-k{k}-r{r}{b}")
    for c in (1, 2, 3)
    for k, r in ((1, 1), (1, 16), (3, 3), (8, 5))
    for bias, b in ((False, ""), (True, "-bias"))
]
Inputs = tuple[Tensor, Tensor, MLPWeights, Factors]


def run(inputs: Inputs, **options: Any) -> Tensor:
    x, h, weights, factors = inputs
    gate, up, down, *biases = weights
    names = ("gate_bias", "up_bias", "down_bias")
    options |= dict(zip(names, biases, strict=True))
    return modulated_mlp(x, h, gate, up, down, factors, **options)


def gradients(inputs: Inputs, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    tensors = named_tensors(*inputs)
    found = torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=True)
    return dict(zip(tensors, found, strict=True))


def output_gradient(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)


def as_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    x, h, weights, factors = inputs

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(dtype).requires_grad_()

    return cast(x), cast(h), MLPWeights(*map(cast, weights)), Factors(*map(cast, factors))


@pytest.mark.parametrize("modulation", ["single", "dual", "triple"])
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("impl", ["factored", "reference"])
def test_the_definition(modulation: str, num_ranks: int, impl: str) -> None:
    """Tensors under their names in a checkpoint, evaluated name by name, give the same result."""
    weights = {
        name: tensor.double()
        for name, tensor in layer_weights(5, modulation=modulation, num_ranks=num_ranks).items()
    }
    situation = Situation.random()
    parts = ["", "", ""] if modulation == "single" else ["_gate", "_up", "_down"]
    count = {"single": 1, "dual": 2, "triple": 3}[modulation]
    inputs = min(count, 2)

    def factor(stem: str, part: int, dim: int) -> Tensor:
        name = f"layer_5_np.{stem}{parts[part]}"
        names = [f"{name}.{i}" for i in range(num_ranks)] if num_ranks > 1 else [name]
        return torch.cat([weights[n] for n in names], dim)

    joined = Factors(
        torch.cat([factor("W_down", part, 1) for part in range(count)], 1),
        torch.cat([factor("W_a_up", part, 0) for part in range(inputs)]),
        factor("W_a_up", 2, 0) if count == 3 else None,
        factor("W_b_up", 0, 0),
        factor("W_b_up", 1, 0) if count > 1 else None,
        factor("W_b_up", 2, 0) if count == 3 else None,
        num_ranks,
    )
    s = situation
    y = modulated_mlp(s.attention, s.x, s.gate, s.up, s.down, joined, impl=impl)  # type: ignore[arg-type]
    torch.testing.assert_close(y, spelled_out([weights], 5, situation), rtol=1e-12, atol=0)


@pytest.mark.parametrize("problem", SIZES)
@pytest.mark.parametrize("save_probe", [True, False], ids=["saved", "recomputed"])
def test_factored_equals_the_definition(problem: Problem, save_probe: bool) -> None:
    inputs = make_inputs(problem)
    expected = run(inputs, impl="reference")
    y = run(inputs, save_probe=save_probe)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = output_gradient(y)
    wanted = gradients(inputs, expected, dy)
    for name, gradient in gradients(inputs, y, dy).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    inputs = make_inputs(Problem())
    y, expected = (run(inputs, activation=activation, impl=i) for i in ("auto", "reference"))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = output_gradient(y)
    wanted = gradients(inputs, expected, dy)
    for name, gradient in gradients(inputs, y, dy).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-11, msg=name)


def test_gradcheck() -> None:
    """Gradients equal finite differences, which are independent of both forms."""
    x, h, weights, factors = make_inputs(
        Problem(tokens=2, hidden=3, intermediate=4, num_ranks=2, rank=2)
    )
    *tensors, num_ranks = factors

    def function(*arguments: Tensor) -> Tensor:
        joined = Factors(*arguments[5:], num_ranks)  # type: ignore[arg-type]
        return modulated_mlp(*arguments[:5], joined)

    assert torch.autograd.gradcheck(function, (x, h, *weights[:3], *tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("projections", [1, 2, 3])
def test_low_precision_stays_within_budget(dtype: torch.dtype, projections: int) -> None:
    problem = Problem(tokens=63, hidden=64, intermediate=96, rank=16, projections=projections)
    low = as_dtype(make_inputs(problem), dtype)
    exact = as_dtype(low, torch.float64)  # the same numbers: only the arithmetic differs
    y, eager, truth = run(low), run(low, impl="reference"), run(exact, impl="reference")
    terms = longest_sum(low)
    assert_within_budget(y, truth, eager, "y", terms=terms)
    dy = output_gradient(truth).to(dtype)
    found, baseline = gradients(low, y, dy), gradients(low, eager, dy)
    for name, gradient in gradients(exact, truth, dy.double()).items():
        assert_within_budget(found[name], gradient, baseline[name], name, terms=terms)


def test_the_budget_can_be_exceeded() -> None:
    exact = torch.ones(100, dtype=torch.float64)
    low = exact.float()
    assert_within_budget(low, exact, low)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(low + 1e-3, exact, low)
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(low * torch.nan, exact, low)


LONG = 1024


def a_product(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two matrices of a dtype, with sums of `LONG` terms between them, and their exact product."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, LONG, generator=generator).to(dtype)
    b = torch.randn(LONG, 16, generator=generator).to(dtype)
    return a, b, a.double() @ b.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_budget_allows_another_order_of_a_sum(dtype: torch.dtype) -> None:
    """Adding terms one by one in float32 is allowed, even if torch itself rounds only once."""
    a, b, exact = a_product(dtype)
    found = torch.zeros(exact.shape)
    for column, row in zip(a.float().t(), b.float(), strict=True):
        found += torch.outer(column, row)
    assert_within_budget(found.to(dtype), exact, exact.to(dtype), terms=LONG)


def without_a_term(a: Tensor, b: Tensor) -> Tensor:
    return a[:, 1:] @ b[1:]


def a_wrong_scale(a: Tensor, b: Tensor) -> Tensor:
    return a @ b * (1 + 64 / LONG)  # as if padding of the last tile counted in a mean


def without_an_element(a: Tensor, b: Tensor) -> Tensor:
    product = a @ b
    product[-1, -1] = 0
    return product


def in_tf32(a: Tensor, b: Tensor) -> Tensor:
    def rounded(tensor: Tensor) -> Tensor:
        return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return rounded(a) @ rounded(b)


@pytest.mark.parametrize(
    ("dtype", "fault"),
    [
        *(
            pytest.param(dtype, fault, id=f"{fault.__name__}-{dtype}")
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for fault in (without_a_term, a_wrong_scale, without_an_element)
        ),
        pytest.param(torch.float32, in_tf32, id="in_tf32"),
    ],
)
def test_faults_exceed_the_budget(
    dtype: torch.dtype, fault: Callable[[Tensor, Tensor], Tensor]
) -> None:
    a, b, exact = a_product(dtype)
    with pytest.raises(AssertionError, match="allowed"):
        assert_within_budget(fault(a, b), exact, a @ b, terms=LONG)


def test_no_modulation_is_the_base_mlp() -> None:
    """W_b = 0 gives the unmodulated MLP, and nonzero gradients of W_b."""
    x, h, weights, factors = make_inputs(Problem(), dtype=torch.float32)
    zero = factors._replace(
        **{
            name: torch.zeros_like(getattr(factors, name)).requires_grad_()
            for name in ("w_b_gate", "w_b_up", "w_b_down")
        }
    )
    y = run((x, h, weights, zero))
    plain = (torch.nn.functional.silu(h @ weights.gate.T) * (h @ weights.up.T)) @ weights.down.T
    torch.testing.assert_close(y, plain)
    found = gradients((x, h, weights, zero), y, output_gradient(y))
    assert all(found[name].abs().max() > 0 for name in ("w_b_gate", "w_b_up", "w_b_down"))


def test_no_tokens() -> None:
    inputs = make_inputs(Problem(tokens=0))
    y = run(inputs)
    assert y.shape == (0, 24)
    y.sum().backward()
    assert inputs[3].w_down.grad is not None and not inputs[3].w_down.grad.any()


def test_leading_dimensions_and_strides() -> None:
    x, h, weights, factors = make_inputs(Problem(tokens=6))
    expected = run((x, h, weights, factors))
    batched = run((x.view(2, 3, -1), h.view(2, 3, -1), weights, factors))
    assert torch.equal(batched.view(6, -1), expected)
    columns = (x.t().contiguous().t(), h.repeat(1, 2)[:, :24], weights, factors)
    torch.testing.assert_close(run(columns), expected, rtol=1e-12, atol=1e-12)


def test_gradients_with_odd_strides() -> None:
    """The backward of ``sum()`` gives an expanded scalar, with every stride 0."""
    inputs = make_inputs(Problem())
    y = run(inputs)
    ones = torch.ones_like(y)
    dense = gradients(inputs, y, ones)
    expanded = gradients(inputs, y, torch.ones((), dtype=y.dtype).expand_as(y))
    transposed = gradients(inputs, y, ones.t().contiguous().t())
    for name, gradient in dense.items():
        torch.testing.assert_close(expanded[name], gradient, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(transposed[name], gradient, rtol=1e-12, atol=1e-12)


def test_backward_twice_and_inputs_unchanged() -> None:
    inputs = make_inputs(Problem())
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(*inputs).items()}
    y = run(inputs)
    dy = output_gradient(y)
    first, second = gradients(inputs, y, dy), gradients(inputs, y, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(*inputs).items())


@pytest.mark.parametrize(
    "trained",
    [
        pytest.param({"w_down", "w_a_in", "w_a_mid", "w_b_gate", "w_b_up", "w_b_down"}, id="npt"),
        pytest.param({"x"}, id="attention"),
        pytest.param({"h", "gate"}, id="h-and-gate"),
        pytest.param({"w_b_down"}, id="one-factor"),
    ],
)
def test_only_what_is_trained_gets_gradients(trained: set[str]) -> None:
    inputs = make_inputs(Problem())
    y = run(inputs)
    wanted = gradients(inputs, y, torch.ones_like(y))
    for name, tensor in named_tensors(*inputs).items():
        tensor.requires_grad_(name in trained)
    run(inputs).sum().backward()
    for name, tensor in named_tensors(*inputs).items():
        assert (tensor.grad is not None) == (name in trained), name
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, wanted[name], rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs(Problem())
    (dx,) = torch.autograd.grad(run(inputs).sum(), [inputs[0]], create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        dx.sum().backward()


def test_nothing_of_the_size_of_v_is_saved() -> None:
    """The factored form saves nothing of size (T, k, D) or (T, k, F)."""
    problem = Problem(tokens=8, hidden=64, intermediate=128, num_ranks=16, rank=1)
    inputs = make_inputs(problem)
    parameters = {id(t) for t in named_tensors(*inputs).values()}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(inputs)
    assert sizes and max(sizes) <= problem.tokens * problem.intermediate


def test_autocast() -> None:
    """float32 parameters give bfloat16 arithmetic and float32 gradients."""
    inputs = make_inputs(Problem(tokens=32, hidden=64, intermediate=96), dtype=torch.float32)
    exact = as_dtype(inputs, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, eager = run(inputs), run(inputs, impl="reference")
    assert y.dtype == torch.bfloat16
    truth = run(exact, impl="reference")
    assert_within_budget(y, truth, eager, terms=longest_sum(inputs))
    y.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in named_tensors(*inputs).values())


def test_float32_modulation_of_a_bfloat16_model() -> None:
    x, h, weights, _ = make_inputs(Problem(), dtype=torch.bfloat16)
    factors = make_inputs(Problem(), dtype=torch.float32)[3]
    y = run((x, h, weights, factors))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert factors.w_down.grad is not None and factors.w_down.grad.dtype == torch.float32


def test_gradient_checkpointing() -> None:
    inputs = make_inputs(Problem())
    y = checkpoint(run, inputs, use_reentrant=False)
    dy = output_gradient(y)
    found = gradients(inputs, y, dy)
    plain = run(inputs)
    for name, gradient in gradients(inputs, plain, dy).items():
        assert torch.equal(found[name], gradient), name


def test_compile_without_graph_breaks() -> None:
    inputs = make_inputs(Problem(), dtype=torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y, expected = compiled(inputs), run(inputs)
    torch.testing.assert_close(y, expected)
    dy = output_gradient(y)
    wanted = gradients(inputs, expected, dy)
    for name, gradient in gradients(inputs, y, dy).items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"up_weight": (40, 23)}, r"up_weight must be \(40, 24\)", id="up"),
        pytest.param({"down_weight": (40, 24)}, r"down_weight must be \(24, 40\)", id="down"),
        pytest.param({"w_down": (24, 29)}, r"w_down must be \(24, 30\)", id="w_down"),
        pytest.param({"w_a_in": (10, 24)}, r"w_a_in must be \(20, 24\)", id="w_a_in"),
        pytest.param({"w_a_mid": None}, "gate, of gate and up, or", id="half a projection"),
        pytest.param({"num_ranks": 3}, "num_ranks must divide the 10 rows", id="k"),
        pytest.param({"x": (6, 24)}, "x must be of the shape of h", id="x"),
        pytest.param({"h": (7, 25)}, r"h must be \(\.\.\., 24\)", id="h"),
        pytest.param({"activation": "tanh"}, "activation must be one of silu", id="activation"),
        pytest.param({"impl": "fast"}, "impl must be auto", id="impl"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    x, h, weights, factors = make_inputs(Problem())
    arguments: dict[str, Any] = {"x": x, "h": h}
    arguments |= dict(zip(("gate_weight", "up_weight", "down_weight"), weights, strict=False))
    for name, value in change.items():
        new = torch.zeros(value) if isinstance(value, tuple) else value
        if name in Factors._fields:
            factors = factors._replace(**{name: new})
        else:
            arguments[name] = new
    with pytest.raises(ValueError, match=message):
        modulated_mlp(**arguments, factors=factors)


def test_importing_it_needs_no_triton() -> None:
    result = run_python("import npt_fast.functional; assert 'triton' not in sys.modules")
    assert result.returncode == 0, result.stderr
