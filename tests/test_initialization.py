"""Every row of the table of initializations (design.md#initialization), by its distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npt_fast.config import NPTConfig
from npt_fast.hf.convert import convert
from npt_fast.modules import NPComponent
from tests.test_modules import MLP

D, F, R = 256, 320, 32
E = 0.002
Check = Callable[[Tensor], None]


def uniform(bound: float) -> Check:
    def check(tensor: Tensor) -> None:
        assert 0.99 * bound < tensor.abs().max() <= bound * (1 + 1e-6)
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)

    return check


def normal(std: float) -> Check:
    def check(tensor: Tensor) -> None:
        assert tensor.std().item() == pytest.approx(std, rel=0.03)
        assert tensor.abs().max() > 3 * std, "the tails of a uniform end at 1.7"

    return check


def orthogonal(gain: float) -> Check:
    def check(tensor: Tensor) -> None:
        rows = tensor.double() / gain
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double(), rtol=0, atol=1e-5)

    return check


def eye(diagonal: float, std: float) -> Check:
    def check(tensor: Tensor) -> None:
        rows, columns = tensor.shape
        mask = torch.eye(columns).repeat(-(-rows // columns), 1)[:rows].bool()
        mean, slack = tensor[mask].mean().item(), 5 * std / math.sqrt(rows)
        assert mean == pytest.approx(diagonal, abs=slack)
        normal(std)(tensor[~mask])

    return check


def zero(tensor: Tensor) -> None:
    assert not tensor.any()


XAVIER_D, XAVIER_F = uniform(math.sqrt(6 / (R + D))), uniform(math.sqrt(6 / (R + F)))
RF, RD = math.sqrt(2 / (R + F)), math.sqrt(2 / (R + D))

# init, modulation, k, what W_a_up and W_b_up of that name are
ROWS: list[tuple[str, str, int, str, Check, Check]] = [
    ("zero", "single", 1, "", XAVIER_D, zero),
    ("zero", "single", 2, ".1", XAVIER_D, zero),
    ("zero", "dual", 2, "_up.0", XAVIER_D, zero),
    ("zero", "triple", 1, "_gate", XAVIER_D, zero),
    ("zero", "triple", 2, "_down.1", XAVIER_F, zero),
    ("improved", "single", 1, "", eye(1.0, 0.1), normal(0.1 * RF)),
    ("conservative", "single", 1, "", eye(0.3, 0.01), uniform(E)),
    ("improved", "single", 2, ".0", eye(1.0, 0.1), normal(0.1 * RF)),
    ("conservative", "single", 2, ".0", eye(0.3, 0.01), uniform(E)),
    ("improved", "single", 16, ".15", orthogonal(E), orthogonal(0.1 * E)),
    ("conservative", "single", 2, ".1", orthogonal(E), orthogonal(0.1 * E)),
    ("improved", "single", 17, ".0", eye(1.0, 0.1), normal(0.1 * RF)),
    ("improved", "single", 17, ".1", normal(E), normal(0.1 * E)),
    ("conservative", "single", 17, ".16", normal(E), normal(0.1 * E)),
    ("improved", "dual", 1, "_gate", eye(0.5, 0.05), normal(0.05 * RF)),
    ("improved", "triple", 1, "_up", eye(0.5, 0.05), normal(0.05 * RF)),
    ("conservative", "dual", 1, "_up", uniform(E), uniform(E)),
    ("conservative", "triple", 1, "_gate", uniform(E), uniform(E)),
    ("improved", "dual", 2, "_gate.0", uniform(E), uniform(E)),
    ("conservative", "triple", 2, "_up.0", uniform(E), uniform(E)),
    ("improved", "triple", 2, "_gate.1", orthogonal(E), orthogonal(0.1 * E)),
    ("conservative", "dual", 17, "_up.16", orthogonal(E), orthogonal(0.1 * E)),
    ("improved", "triple", 1, "_down", normal(0.02 * RF), normal(0.02 * RD)),
    ("conservative", "triple", 1, "_down", uniform(E / 2), uniform(E / 2)),
    ("improved", "triple", 2, "_down.0", uniform(E / 2), uniform(E / 2)),
    ("conservative", "triple", 2, "_down.0", uniform(E / 2), uniform(E / 2)),
    ("improved", "triple", 2, "_down.1", orthogonal(E / 2), orthogonal(0.25 * E)),
    ("conservative", "triple", 2, "_down.1", orthogonal(E / 2), orthogonal(0.25 * E)),
]


def started(init: str, modulation: str, num_ranks: int, **options: Any) -> dict[str, Tensor]:
    options = {"rank": R, "num_ranks": num_ranks, "init_scale": E} | options
    part = NPComponent(D, F, modulation=modulation, init=init, **options)  # type: ignore[arg-type]
    return {name: view.detach() for name, view in part.split().items()}


@pytest.mark.parametrize(
    ("init", "modulation", "k", "name", "reads", "writes"),
    [pytest.param(*row, id="-".join(map(str, row[:4]))) for row in ROWS],
)
def test_the_table(
    init: str, modulation: str, k: int, name: str, reads: Check, writes: Check
) -> None:
    torch.manual_seed(1)
    state = started(init, modulation, k)
    XAVIER_D(state[f"W_down{name}"])
    reads(state[f"W_a_up{name}"])
    writes(state[f"W_b_up{name}"])


@pytest.mark.parametrize("modulation", ["single", "dual"])
def test_the_eye_is_repeated_below_itself(modulation: str) -> None:
    torch.manual_seed(1)
    state = started("improved", modulation, 1, rank=2 * D + 10)
    check = eye(1.0, 0.1) if modulation == "single" else eye(0.5, 0.05)
    check(state["W_a_up" if modulation == "single" else "W_a_up_gate"])


@pytest.mark.parametrize("num_ranks", [1, 2, 17])
@pytest.mark.parametrize("modulation", ["single", "triple"])
@pytest.mark.parametrize("init", ["zero", "improved", "conservative"])
def test_the_global_generator_decides(init: str, modulation: str, num_ranks: int) -> None:
    def drawn(seed: int) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(seed)
        return started(init, modulation, num_ranks, rank=3), torch.rand(4)

    (one, after), (same, after_same), (other, after_other) = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert torch.equal(after, after_same)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].any())
    assert not torch.equal(after, after_other), "reseeded: all that is drawn later would be equal"


def test_no_two_tensors_are_equal() -> None:
    state = started("improved", "single", 17, rank=3) | {
        f"other {name}": tensor
        for name, tensor in started("improved", "single", 17, rank=3).items()
    }
    assert len({tensor.numpy().tobytes() for tensor in state.values()}) == len(state)


def test_parameters_can_start_again() -> None:
    part = NPComponent(16, 24, rank=4, num_ranks=2, init="improved")
    torch.manual_seed(3)
    part.reset_parameters()
    torch.manual_seed(3)
    same = NPComponent(16, 24, rank=4, num_ranks=2, init="improved")
    assert all(torch.equal(p, q) for p, q in zip(part.parameters(), same.parameters(), strict=True))
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in part.parameters())


def test_converted_layers_start_as_configured() -> None:
    layer, model = nn.Module(), nn.Module()
    for name in ("input_layernorm", "self_attn", "post_attention_layernorm"):
        layer.add_module(name, nn.Identity())
    layer.mlp, model.layers = MLP(D, F), nn.ModuleList([layer])
    config = NPTConfig(layers=[0], rank=R, init="conservative", init_scale=0.5)
    convert(model, config, probe=False)  # these parts are no model that can run
    uniform(0.5)(layer.np_component.w_b_gate.detach())  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    state = started("conservative", "triple", 2, dtype=dtype)
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    rows = state["W_a_up_gate.1"].double() / E
    assert torch.dist(rows @ rows.T, torch.eye(R).double()) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "lora"}, "init must be .*zero, improved.*'lora'"),
        ({"init_scale": 0.0}, "init_scale must be positive and finite"),
        ({"init_scale": math.inf}, "init_scale must be positive and finite"),
        ({"init_scale": math.nan}, "init_scale must be positive and finite"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NPTConfig(layers=[1], **options)
    with pytest.raises(ValueError, match=message):
        NPComponent(16, 24, rank=4, **options)
