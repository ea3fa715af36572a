"""MLPs whose projections are called: equal to the fused path, whatever a projection is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from npt_fast.called_mlp import is_plain
from npt_fast.modules import NPComponent
from npt_fast.testing import assert_within_budget

D, F = 16, 24


class MLP(nn.Module):
    """A base MLP like Llama's."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, F, bias=bias)
        self.up_proj = nn.Linear(D, F, bias=bias)
        self.down_proj = nn.Linear(F, D, bias=bias)
        self.act_fn = nn.SiLU()


class Doubled(nn.Linear):
    """A projection whose weight is not what it computes with, as quantised ones are."""

    def forward(self, a: Tensor) -> Tensor:
        return nn.functional.linear(a, self.weight * 2, self.bias)


def component(modulation: str = "triple", num_ranks: int = 2) -> NPComponent:
    torch.manual_seed(0)
    part = NPComponent(D, F, rank=4, num_ranks=num_ranks, modulation=modulation)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_(std=0.3)
    return part


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    attention, h = torch.randn(2, *shape, D, generator=generator).requires_grad_()
    return attention, h


def hooked(mlp: Any, name: str) -> Any:
    """Make the MLP be called without changing what it computes."""
    mlp.get_submodule(name).register_forward_hook(lambda *_: None)
    return mlp


def gradients(y: Tensor, attention: Tensor, h: Tensor, *modules: nn.Module) -> dict[str, Tensor]:
    named = {"attention": attention, "h": h}
    for index, module in enumerate(modules):
        named |= {f"{index}.{name}": p for name, p in module.named_parameters()}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("modulation", ["single", "dual", "triple"])
@pytest.mark.parametrize("shape", [(7,), (2, 3)])
def test_outputs_and_gradients_are_those_of_the_fused_path(
    shape: tuple[int, ...], modulation: str, num_ranks: int, bias: bool
) -> None:
    part, mlp = component(modulation, num_ranks).double(), MLP(bias).double()
    attention, h = (t.detach().double().requires_grad_() for t in inputs(*shape))
    assert is_plain(mlp)
    fused = part(attention, h, mlp)
    expected = gradients(fused, attention, h, part, mlp)
    hooked(mlp, "up_proj")
    assert not is_plain(mlp)
    called = part(attention, h, mlp)
    torch.testing.assert_close(called, fused, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(called, attention, h, part, mlp).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(part(attention, h, mlp), fused, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["dtype", "autocast"])
def test_low_precision_keeps_the_budget_of_the_fused_path(dtype: torch.dtype, way: str) -> None:
    """Parameters of the component stay float32, as in training."""
    part, exact_part = component(), component().double()
    mlp = MLP()
    attention, h = (t.detach() for t in inputs(2, 64))
    if way == "autocast" and dtype == torch.float32:
        pytest.skip("autocast on a CPU has no float32")
    if way == "dtype":
        mlp, attention, h = mlp.to(dtype), attention.to(dtype), h.to(dtype)
    exact = exact_part(attention.double(), h.double(), copy.deepcopy(mlp).double())
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=way == "autocast"):
        fused = part(attention, h, mlp)
        called = part(attention, h, hooked(mlp, "gate_proj"))
    assert called.dtype == fused.dtype == dtype
    assert_within_budget(called, exact.detach(), fused, "called")


def a_parametrization(mlp: Any) -> None:
    parametrizations.weight_norm(mlp.down_proj)


def a_class(mlp: Any) -> None:
    mlp.gate_proj.__class__ = Doubled


def a_patched_forward(mlp: Any) -> None:
    linear = mlp.up_proj
    linear.forward = lambda a: 2 * nn.Linear.forward(linear, a)


def a_hook(mlp: Any) -> None:
    mlp.down_proj.register_forward_hook(lambda _, args, y: 2 * y)


def a_hook_before(mlp: Any) -> None:
    mlp.up_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],))


def a_hook_of_the_activation(mlp: Any) -> None:
    mlp.act_fn.register_forward_hook(lambda _, args, y: 2 * y)


def a_wrapper(mlp: Any) -> None:
    mlp.gate_proj = nn.Sequential(mlp.gate_proj, nn.Tanh())


def a_weight_of_another_type(mlp: Any) -> None:
    class Eight(nn.Parameter):
        pass

    mlp.gate_proj.weight = Eight(mlp.gate_proj.weight.data)


def bytes_for_a_weight(mlp: Any) -> None:
    """As fine-grained FP8: a scale beside the weight."""
    weight = mlp.gate_proj.weight.data
    mlp.gate_proj.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    mlp.gate_proj.forward = lambda a: a @ (mlp.gate_proj.weight.to(a.dtype) * 1.5).t()


@pytest.mark.parametrize(
    "change",
    [
        a_parametrization,
        a_class,
        a_patched_forward,
        a_hook,
        a_hook_before,
        a_hook_of_the_activation,
        a_wrapper,
        a_weight_of_another_type,
        bytes_for_a_weight,
    ],
)
def test_what_a_projection_computes_is_what_counts(change: Callable[[Any], None]) -> None:
    """``y = projection(a) + sum v_b (v_a . a)``, with the vectors formed in float64."""
    part, mlp = component().double(), MLP(bias=True).double()
    change(mlp)
    attention, h = (t.detach().double() for t in inputs(5))

    def changed(name: str, a: Tensor) -> Tensor:
        factors = part.split(dict(part.named_parameters()))
        total = getattr(mlp, f"{name}_proj")(a)
        for i in range(part.num_ranks):
            z = attention @ factors[f"W_down_{name}.{i}"]
            v_a, v_b = z @ factors[f"W_a_up_{name}.{i}"], z @ factors[f"W_b_up_{name}.{i}"]
            total = total + v_b * (v_a * a).sum(-1, keepdim=True)
        return total

    expected = changed("down", mlp.act_fn(changed("gate", h)) * changed("up", h))
    assert not is_plain(mlp)
    with torch.no_grad():
        torch.testing.assert_close(part(attention, h, mlp), expected, rtol=1e-11, atol=1e-11)


def test_a_hook_comes_and_goes() -> None:
    part, mlp = component(), MLP()
    attention, h = inputs(5)
    before = part(attention, h, mlp)
    handle = mlp.down_proj.register_forward_hook(lambda _, args, y: y + 1)
    torch.testing.assert_close(part(attention, h, mlp), before + 1)
    handle.remove()
    assert is_plain(mlp) and torch.equal(part(attention, h, mlp), before)


def test_a_backward_hook_of_a_projection_sees_its_gradient() -> None:
    part, mlp = component(), MLP()
    seen = []
    mlp.up_proj.register_full_backward_hook(lambda _, grads, outputs: seen.append(outputs[0]))
    part(*inputs(5), mlp).sum().backward()
    assert len(seen) == 1 and seen[0].shape == (5, F)
