"""Float32 gradients of 16-bit products: not rounded on the way, and added where they belong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from npt_fast.functional import modulated_mlp
from npt_fast.kernels.factored import Factors
from npt_fast.kernels.products import product
from npt_fast.testing import Problem, make_inputs
from tests.kernels.float32_sums import Additions, float32_sums

PROBLEM = Problem(tokens=9, hidden=24, intermediate=40, num_ranks=2, rank=4)
NAMES = Factors._fields[:-1]


@pytest.fixture
def sums() -> Iterator[None]:
    with float32_sums():
        yield


class Layer:
    """An MLP in 16 bit with float32 factors, and batches for it."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, projections: int = 3) -> None:
        problem = Problem(tokens=9, num_ranks=2, rank=4, projections=projections)
        _, _, weights, factors = make_inputs(problem, dtype=torch.float32)
        self.weights = [t.detach().to(dtype) for t in weights[:3]]
        self.factors = factors
        self.dtype = dtype
        self.parameters = [t for t in factors[:-1] if t is not None]

    def __call__(self, batch: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        x, h = (torch.randn(9, 24, generator=generator).to(self.dtype) for _ in range(2))
        return self.of(x, h)

    def of(self, x: Tensor, h: Tensor) -> Tensor:
        return modulated_mlp(x, h, *self.weights, self.factors)

    def loss(self, batch: int = 0) -> Tensor:
        return self(batch).float().square().sum()

    def alone(self, batch: int = 0) -> list[Tensor]:
        """The gradients of one batch, in float64."""
        found = torch.autograd.grad(self.loss(batch), self.parameters)
        return [gradient.double() for gradient in found]

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


def assert_sums(layer: Layer, *parts: list[Tensor]) -> None:
    """The gradients are the sums of the parts, but for float32's rounding."""
    for name, gradient, *terms in zip(NAMES, layer.gradients(), *parts, strict=False):
        assert gradient.dtype == torch.float32
        assert_close(gradient, sum(terms), name)


def assert_close(found: Tensor, exact: Any, name: str = "") -> None:
    """Float32 sums of 9 tokens; a rounding to bfloat16 is off by 2e-3, to float16 by 2e-4."""
    assert (found.double() - exact).norm() <= 1e-6 * exact.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device_sums", [False, True], ids=["widened", "sums"])
def test_a_product_is_not_rounded_to_16_bit(dtype: torch.dtype, device_sums: bool) -> None:
    a, b = (torch.randn(shape).to(dtype) for shape in ((5, 70), (70, 6)))
    exact = a.double() @ b.double()
    if device_sums:
        with float32_sums():
            found = product(a, b, torch.float32)
    else:
        found = product(a, b, torch.float32)
    assert found.dtype == torch.float32
    assert_close(found, exact)
    assert product(a, b, dtype).dtype == dtype
    assert product(a.double(), b.double(), torch.float32).dtype == torch.float32


@pytest.mark.parametrize("projections", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_later_micro_steps_are_added_by_the_gemm(
    dtype: torch.dtype, projections: int, sums: None
) -> None:
    layer = Layer(dtype, projections)
    count = len(layer.parameters)
    parts = [layer.alone(batch) for batch in range(3)]
    layer.loss(0).backward()
    kept = [id(gradient) for gradient in layer.gradients()]
    for batch in (1, 2):
        loss = layer.loss(batch)
        with Additions() as additions:
            loss.backward()
        assert (additions.by_gemm, additions.by_autograd) == (count, 0)
    assert kept == [id(gradient) for gradient in layer.gradients()]
    assert_sums(layer, *parts)


def test_without_float32_sums_autograd_adds() -> None:
    layer = Layer()
    parts = [layer.alone(batch) for batch in range(2)]
    with Additions() as additions:
        for batch in range(2):
            layer.loss(batch).backward()
    assert additions.by_gemm == 0 and additions.by_autograd == len(layer.parameters)
    assert_sums(layer, *parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_dtype_is_left_to_autograd(dtype: torch.dtype, sums: None) -> None:
    layer = Layer(dtype)
    layer.factors = Factors._make(
        t.detach().to(dtype).requires_grad_() if isinstance(t, Tensor) else t for t in layer.factors
    )
    layer.parameters = [t for t in layer.factors[:-1] if t is not None]
    with Additions() as additions:
        for batch in range(2):
            layer.loss(batch).backward()
    assert (additions.by_gemm, additions.by_autograd) == (0, len(layer.parameters))


def test_gradients_that_are_asked_for_are_returned(sums: None) -> None:
    """`torch.autograd.grad` leaves what is there alone, also where it wants some factors only."""
    layer = Layer()
    part = layer.alone()
    layer.loss().backward()
    before = [gradient.clone() for gradient in layer.gradients()]
    asked = torch.autograd.grad(layer.loss(), layer.parameters[1:3])
    for gradient, expected in zip(asked, part[1:3], strict=True):
        assert_close(gradient, expected)
    assert all(map(torch.equal, layer.gradients(), before))
    # backward for one factor: the others stay
    layer.loss().backward(inputs=[layer.parameters[0]])
    torch.testing.assert_close(layer.gradients()[0], 2 * before[0])
    assert all(map(torch.equal, layer.gradients()[1:], before[1:]))


def test_hooks_see_the_gradient_of_the_micro_step(sums: None) -> None:
    layer = Layer()
    first, second, third = (layer.alone(batch) for batch in range(3))
    layer.loss(0).backward()
    seen: list[Tensor] = []
    tensor_hook = layer.parameters[1].register_hook(lambda g: seen.append(g.clone()))
    layer.loss(1).backward()
    assert_close(seen.pop(), second[1])
    tensor_hook.remove()
    after = layer.parameters[2].register_post_accumulate_grad_hook(
        lambda p: seen.append(p.grad.clone())  # type: ignore[union-attr]
    )
    layer.loss(2).backward()
    assert_close(seen.pop(), first[2] + second[2] + third[2])
    after.remove()
    assert_sums(layer, first, second, third)


def test_a_hook_may_change_the_gradient(sums: None) -> None:
    layer = Layer()
    part = layer.alone()
    layer.loss().backward()
    layer.parameters[0].register_hook(lambda g: 0 * g)
    layer.loss().backward()
    assert_sums(layer, part, [0 * part[0], *part[1:]])


def test_hooks_of_the_leafs_node_run(sums: None) -> None:
    """DDP waits for them."""
    layer = Layer()
    layer.loss().backward()
    nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in layer.parameters]
    ran: list[int] = []
    for index, node in enumerate(nodes):
        node.register_hook(lambda *_, index=index: ran.append(index))
    layer.loss().backward()
    assert sorted(ran) == list(range(len(nodes)))


def test_a_second_derivative_stays_an_error(sums: None) -> None:
    layer = Layer()
    layer.loss().backward()
    layer.loss().backward(create_graph=True)
    for gradient in layer.gradients():
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_add_once(reentrant: bool, sums: None) -> None:
    layer = Layer()
    parts = [layer.alone(batch) for batch in range(2)]
    for batch in range(2):
        generator = torch.Generator().manual_seed(batch)
        x, h = (torch.randn(9, 24, generator=generator).to(layer.dtype) for _ in range(2))
        y: Any = checkpoint(layer.of, x.requires_grad_(), h, use_reentrant=reentrant)
        y.float().square().sum().backward()
    assert_sums(layer, *parts)


@pytest.mark.parametrize("to_none", [False, True])
def test_gradients_set_to_zero_or_none(to_none: bool, sums: None) -> None:
    layer = Layer()
    part = layer.alone(1)
    optimizer = torch.optim.SGD(layer.parameters, lr=0.0)
    layer.loss(0).backward()
    optimizer.zero_grad(set_to_none=to_none)
    layer.loss(1).backward()
    assert_sums(layer, part)


def test_a_layer_that_is_used_twice(sums: None) -> None:
    """And whose factors have another use besides, such as a regularisation."""
    layer = Layer()
    parts = [layer.alone(batch) for batch in (0, 1, 2)]
    layer.loss(0).backward()
    extra = sum((p.square().sum() for p in layer.parameters), torch.zeros(()))
    (layer.loss(1) + layer.loss(2) + extra).backward()
    assert_sums(layer, *parts, [2 * p.detach().double() for p in layer.parameters])


def test_scaled_and_clipped_gradients(sums: None) -> None:
    layer = Layer()
    parts = [layer.alone(batch) for batch in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(layer.parameters, lr=0.0)
    for batch in range(2):
        scaler.scale(layer.loss(batch)).backward()
    scaler.unscale_(optimizer)
    exact = [a + b for a, b in zip(*parts, strict=True)]
    for gradient, expected in zip(layer.gradients(), exact, strict=True):
        # the 16-bit gradients between are of other numbers; a power of two changes no mantissa
        assert_close(gradient, expected)
    norm = torch.nn.utils.clip_grad_norm_(layer.parameters, 0.5)
    whole = torch.cat([e.flatten() for e in exact]).norm()
    torch.testing.assert_close(norm.double(), whole, rtol=1e-5, atol=0.0)
    clipped = torch.cat([g.flatten() for g in layer.gradients()]).norm()
    assert clipped.item() == pytest.approx(0.5, rel=1e-4)


def _strided(gradient: Tensor) -> Tensor:
    return gradient.t().contiguous().t()


def _double(gradient: Tensor) -> Tensor:
    return gradient.requires_grad_()


@pytest.mark.parametrize("change", [_strided, _double])
def test_other_gradients_are_left_to_autograd(
    change: Callable[[Tensor], Tensor], sums: None
) -> None:
    layer = Layer()
    part = layer.alone()
    layer.loss().backward()
    for parameter in layer.parameters:
        parameter.grad = change(parameter.grad)  # type: ignore[arg-type]
    loss = layer.loss()
    with Additions() as additions:
        loss.backward()
    assert additions.by_gemm == 0
    assert_sums(layer, part, part)


def test_factors_that_are_computed_pass_gradients_on(sums: None) -> None:
    """Factors that are no leaves have no gradient of their own to add to."""
    layer = Layer()
    part = layer.alone()
    layer.factors = Factors._make(t * 1.0 if isinstance(t, Tensor) else t for t in layer.factors)
    for _ in range(2):
        layer.loss().backward(retain_graph=True)
    assert_sums(layer, part, part)


def test_twice_the_same_bits(sums: None) -> None:
    found = []
    for _ in range(2):
        layer = Layer()
        for batch in range(3):
            layer.loss(batch).backward()
        found.append(layer.gradients())
    assert all(map(torch.equal, *found))


class Moved(TorchDispatchMode):
    """Bytes that casts of factors, their gradients and the additions of these move."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        read = [a for a in args if isinstance(a, Tensor)]
        # u and its gradient have the shape of W_down here, but no activation is float32
        wide = [t for t in (found, *read) if isinstance(t, Tensor) and t.dtype == torch.float32]
        if any(t.shape in self.shapes for t in wide):
            if name == "add_product":
                self.bytes[name] += 2 * args[0].nbytes  # read and written
            elif name == "mm":
                self.bytes[name] += found.nbytes
            elif name in ("_to_copy", "add", "add_"):
                self.bytes[name] += found.nbytes + sum(t.nbytes for t in read)
        return found


def moved_bytes(steps: int) -> tuple[float, int]:
    """Bytes per parameter and micro-step, and FLOPs of a step, at the sizes of Llama-3.2-1B."""
    problem = Problem(tokens=2048, hidden=2048, intermediate=8192, num_ranks=8, rank=512)
    x, h, weights, factors = make_inputs(problem, dtype=torch.float32, device="meta")
    x, h = (t.detach().bfloat16() for t in (x, h))
    frozen = [t.detach().bfloat16() for t in weights[:3]]
    parameters = [t for t in factors[:-1] if t is not None]
    with torch.no_grad():
        copies = Factors._make(t.bfloat16() if isinstance(t, Tensor) else t for t in factors)
    size = sum(p.numel() for p in parameters)
    shapes = {p.shape for p in parameters}
    with Moved(shapes) as moved, FlopCounterMode(display=False) as flops:
        for _ in range(steps):
            y = modulated_mlp(x, h, *frozen, factors, copies=copies, impl="factored")
            y.backward(torch.empty_like(y))
    # the copies are made once: 4 bytes are read and 2 written
    return (sum(moved.bytes.values()) / size + 6) / steps, flops.get_total_flops()


@pytest.mark.parametrize(("steps", "most"), [(1, 10.0), (2, 9.0), (4, 8.5), (32, 8.1)])
def test_bytes_of_casts_and_sums(steps: int, most: float) -> None:
    """Copies are made once (6), the first gradient is written (4), later ones read too (8)."""
    found, flops = moved_bytes(steps)
    assert found == pytest.approx((6 + 4 + 8 * (steps - 1)) / steps)
    assert found <= most
    # FLOP counters see every product, whoever adds
    _, once = moved_bytes(1)
    assert flops == steps * once
