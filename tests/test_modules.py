"""NPComponent: the original's names, the operator's layout, and a neutral start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from npt_fast.mlp_layout import GATED, MLPLayout
from npt_fast.modules import NPComponent
from tests.checkpoints import PROJECTIONS, layer_weights

CASES = [
    pytest.param(modulation, num_ranks, id=f"{modulation}-k{num_ranks}")
    for modulation in PROJECTIONS
    for num_ranks in (1, 3)
]


class MLP(nn.Module):
    """A base MLP like Llama's."""

    def __init__(self, d: int = 16, f: int = 24) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


def component(modulation: str = "triple", num_ranks: int = 2) -> NPComponent:
    torch.manual_seed(0)
    layout = MLPLayout(None) if modulation == "plain" else GATED
    return NPComponent(16, 24, rank=4, num_ranks=num_ranks, modulation=modulation, layout=layout)


@pytest.mark.parametrize(("modulation", "num_ranks"), CASES)
def test_names_order_and_shapes_are_the_originals(modulation: str, num_ranks: int) -> None:
    expected = layer_weights(1, modulation=modulation, num_ranks=num_ranks, prefix="")
    found = component(modulation, num_ranks).split()
    assert [(n, t.shape) for n, t in found.items()] == [(n, t.shape) for n, t in expected.items()]


@pytest.mark.parametrize(("modulation", "num_ranks"), CASES)
def test_the_state_dict_has_the_parameters_names(modulation: str, num_ranks: int) -> None:
    part = component(modulation, num_ranks)
    state = part.state_dict()
    assert [(n, t.data_ptr()) for n, t in state.items()] == [
        (n, p.data_ptr()) for n, p in part.named_parameters()
    ]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("modulation", "num_ranks"), CASES)
def test_state_dicts_of_earlier_versions_load(
    modulation: str, num_ranks: int, assign: bool
) -> None:
    """They had the original's names, as files still have."""
    weights = layer_weights(1, modulation=modulation, num_ranks=num_ranks, prefix="0.")
    model = nn.Sequential(component(modulation, num_ranks)).to("meta" if assign else "cpu")
    given = dict(weights)
    model.load_state_dict(given, assign=assign)
    assert given.keys() == weights.keys()
    for name, tensor in model[0].split().items():
        assert torch.equal(tensor, weights[f"0.{name}"]), name


@pytest.mark.parametrize(("modulation", "num_ranks"), CASES)
def test_moments_split_as_weights_do(modulation: str, num_ranks: int) -> None:
    """AdamW's state has the parameters' shapes, so `split` gives each tensor its moments."""
    part = component(modulation, num_ranks)
    part.load_state_dict(layer_weights(1, modulation=modulation, num_ranks=num_ranks, prefix=""))
    moments = {name: parameter.detach().square() for name, parameter in part.named_parameters()}
    views, weights = part.split(moments), part.split()
    assert list(views) == list(weights)
    for name, view in views.items():
        assert torch.equal(view, weights[name].square()), name
        view.fill_(-1)
    assert all((moment == -1).all() for moment in moments.values()), "views, and of everything"


def test_every_parameter_is_split() -> None:
    part = component()
    assert sum(t.numel() for t in part.split().values()) == sum(
        p.numel() for p in part.parameters()
    )


def test_loading_is_strict() -> None:
    part = component("dual", 1)
    weights = layer_weights(1, modulation="dual", prefix="")
    missing = {name: tensor for name, tensor in weights.items() if name != "W_a_up_up"}
    with pytest.raises(RuntimeError, match=r"Missing key.*w_a_in"):
        part.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*W_a_up_down"):
        part.load_state_dict(layer_weights(1, modulation="triple", prefix=""))
    with pytest.raises(RuntimeError, match=r"W_down_gate is \[16, 5\], \[16, 4\] expected"):
        part.load_state_dict(weights | {"W_down_gate": torch.zeros(16, 5)})
    with pytest.raises(RuntimeError):  # num_ranks is never guessed
        part.load_state_dict(layer_weights(1, modulation="dual", num_ranks=2, prefix=""))


def test_a_new_component_changes_nothing_and_can_learn() -> None:
    part, mlp = component(), MLP()
    x, h = torch.randn(5, 16), torch.randn(5, 16)
    y = part(x, h, mlp)
    torch.testing.assert_close(y, mlp(h))
    y.square().sum().backward()
    for name in ("w_b_gate", "w_b_up", "w_b_down"):
        assert getattr(part, name).grad.abs().max() > 0, name


def test_the_gradient_reaches_every_parameter() -> None:
    part, mlp = component(), MLP()
    part.load_state_dict(layer_weights(1, num_ranks=2, prefix=""))
    part(torch.randn(5, 16), torch.randn(5, 16), mlp).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in part.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modulation": "both"}, "modulation must be single"),
        ({"residual": "gone"}, "residual must be removed"),
        ({"rank": 0}, "must be positive"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NPComponent(16, 24, **({"rank": 4} | options))
