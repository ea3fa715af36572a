"""Forcing the way in which NP layers are computed; inputs and budgets are used all over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npt_fast import modules
from npt_fast.kernels import modulated_mlp as kernels
from npt_fast.modules import NPComponent
from npt_fast.testing import IMPLEMENTATIONS, implementation
from tests.computed import record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AUTO = "decode" if torch.cuda.is_available() else "factored"
D, F = 16, 32


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return record(monkeypatch)


@pytest.fixture(scope="module")
def component() -> NPComponent:
    torch.manual_seed(0)
    part = NPComponent(D, F, rank=16, num_ranks=2, device=DEVICE)
    nn.init.normal_(part.w_b_gate)
    return part


@pytest.fixture(scope="module")
def mlp() -> nn.Module:
    torch.manual_seed(0)
    part = nn.Module()
    part.gate_proj, part.up_proj = (nn.Linear(D, F, bias=False) for _ in range(2))
    part.down_proj = nn.Linear(F, D, bias=False)
    return part.to(DEVICE).requires_grad_(False)


def compute(component: NPComponent, mlp: nn.Module) -> Tensor:
    x, h = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y: Tensor = component(x, h, mlp)
    return y


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@torch.no_grad()
def test_layers_are_computed_in_that_way(
    name: str, component: NPComponent, mlp: nn.Module, taken: list[str]
) -> None:
    with implementation(name):
        y = compute(component, mlp)
    assert taken == [AUTO if name == "auto" else name]
    with implementation("reference"):
        torch.testing.assert_close(y, compute(component, mlp), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_innermost_context_counts(
    component: NPComponent, mlp: nn.Module, taken: list[str]
) -> None:
    names = ("gemm", "auto", "fused", "reference")
    with implementation("gemm"):
        for name in names[1:]:
            with implementation(name):
                compute(component, mlp)
        compute(component, mlp)
    compute(component, mlp)
    assert taken == [AUTO, "fused", "reference", "gemm", AUTO]


def test_backward_goes_the_way_of_its_forward(
    component: NPComponent, mlp: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def swiglu_bwd(*tensors: Tensor) -> Any:
        seen.append("fused")
        return kernels.swiglu_bwd(*tensors)

    steps = kernels.FUSED_STEPS._replace(gated_activation_backward=lambda *a: swiglu_bwd(*a[:-1]))
    monkeypatch.setattr(kernels, "FUSED_STEPS", steps)
    with implementation("fused"):
        y = compute(component, mlp)
    y.sum().backward()
    component.zero_grad()
    assert seen == ["fused"]


def test_everything_is_restored_after_an_error() -> None:
    before = modules.modulated_mlp, kernels.choose_path
    with pytest.raises(RuntimeError, match="in between"), implementation("gemm"):
        assert modules.modulated_mlp is not before[0] and kernels.choose_path is not before[1]
        raise RuntimeError("in between")
    assert (modules.modulated_mlp, kernels.choose_path) == before


def test_what_a_way_cannot_compute_is_refused(component: NPComponent, mlp: nn.Module) -> None:
    with (
        implementation("decode"),
        pytest.raises(ValueError, match=r"^decode takes .* no gradients$"),
    ):
        compute(component, mlp)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError) as caught, implementation("triton"):
        pass
    message = "implementation must be one of auto, factored, reference, gemm, fused, decode"
    assert str(caught.value) == f"{message}, got 'triton'"
