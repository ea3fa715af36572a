"""AdamW whose rates follow the size of what they change, against formulas in float64."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.hf.convert import components
from npt_fast.modules import NPComponent
from tests.training import tiny
from tests.training.relative import named, rates


def converted(modulation: str = "triple", **sizes: float) -> Any:
    """A model with NP layers 1 and 2, whose tensors have a size by what their name has in it."""
    torch.manual_seed(0)
    config = npt.NPTConfig(layers=[1, 2], rank=4, num_ranks=2, modulation=modulation)
    model = npt.convert(tiny.model(), config)
    with torch.no_grad():
        for name, tensor in named(model).items():
            for stem, size in sizes.items():
                if stem in name:
                    tensor.normal_(std=size)
    return model


def give_gradients(model: Any, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    gradients = {}
    for n, component in components(model).items():
        own = dict(component.named_parameters())
        for parameter in own.values():
            parameter.grad = torch.randn_like(parameter)
        split = component.split({name: p.grad for name, p in own.items()})
        gradients |= {f"layer_{n}_np.{name}": g.double().clone() for name, g in split.items()}
    return gradients


SIZES = {
    "large": {"W_down": 3.0, "W_a_up": 0.5, "W_b_up": 0.4},
    "small": {"W_down": 1e-3, "W_a_up": 2e-3, "W_b_up": 5e-3},
    "zero start": {"W_down": 0.05, "W_a_up": 0.1, "W_b_up": 0.0},
    "between": {"W_down": 0.01, "W_a_up": 0.01, "W_b_up": 0.005},
}


@pytest.mark.parametrize("modulation", ["single", "dual", "triple"])
@pytest.mark.parametrize("sizes", SIZES)
def test_steps_are_adamws_with_the_rates_of_the_formula(sizes: str, modulation: str) -> None:
    model = converted(modulation, **SIZES[sizes])
    optimizer = npt.RelativeAdamW(model, 3e-3, weight_decay=0.1)
    expected = {name: view.detach().double().clone() for name, view in named(model).items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in (1, 2, 3):
        gradients = give_gradients(model, step)
        for name, rate in rates(expected, 3e-3 / step).items():
            first[name] = 0.9 * first[name] + 0.1 * gradients[name]
            second[name] = 0.95 * second[name] + 0.05 * gradients[name].square()
            change = (first[name] / (1 - 0.9**step)) / (
                (second[name] / (1 - 0.95**step)).sqrt() + 1e-8
            )
            expected[name] = expected[name] * (1 - 0.1 * rate) - rate * change
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 / step  # as a schedule does
        optimizer.step()
        assert {group["lr"] for group in optimizer.param_groups} == {3e-3 / step}
    for name, view in named(model).items():
        torch.testing.assert_close(view.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def copied(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(optimizer)


def saved_and_read(optimizer: torch.optim.Optimizer) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy_of", [copied, saved_and_read])
def test_a_copy_takes_the_same_step(copy_of: Any) -> None:
    model = converted(**SIZES["small"])
    optimizer = npt.RelativeAdamW(model)
    give_gradients(model, 0)
    other = copy_of(optimizer)
    theirs = [p for group in other.param_groups for p in group["params"]]
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, own in zip(theirs, ours, strict=True):
        parameter.grad = own.grad
    optimizer.step()
    other.step()
    for parameter, own in zip(theirs, ours, strict=True):
        assert torch.equal(parameter, own) and parameter is not own


def test_a_step_that_fails_leaves_the_rates_to_the_next() -> None:
    """As where memory runs out: the schedule's rates count again, or those set meanwhile."""
    weights = []
    for failures, changed in ((0, False), (3, False), (1, True)):
        model = converted(**SIZES["small"])
        optimizer = npt.RelativeAdamW(model, 2e-3 if changed else 1e-3)
        give_gradients(model, 0)

        def fail() -> float:
            raise MemoryError

        for _ in range(failures):
            with pytest.raises(MemoryError):
                optimizer.step(fail)
        if changed:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
        optimizer.step()
        assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
        weights.append([p.detach() for p in npt.trainable_parameters(model)])
    for found in weights[1:]:
        assert all(map(torch.equal, found, weights[0]))


def test_parameters_of_others_have_the_rate_itself() -> None:
    model = converted(**SIZES["large"])
    optimizer = npt.RelativeAdamW(model, 1e-3, weight_decay=0.0)
    other = torch.nn.Parameter(torch.full((3,), 7.0))
    optimizer.add_param_group({"params": [other]})
    other.grad = torch.ones_like(other)
    optimizer.step()
    torch.testing.assert_close(other.detach(), torch.full((3,), 7.0 - 1e-3))


def test_hooks_of_users_run_once() -> None:
    model = converted()
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # torch wraps its step then
    optimizer = npt.RelativeAdamW(model)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    give_gradients(model, 0)
    optimizer.step()
    assert seen == ["before", "after"]


def test_what_is_frozen_stays() -> None:
    model = converted()
    frozen: NPComponent = components(model)[1]
    frozen.requires_grad_(False)
    components(model)[2].w_down.requires_grad_(False)
    optimizer = npt.RelativeAdamW(model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p.requires_grad for p in held) and len(held) == 5


def test_a_model_without_np_layers_is_refused() -> None:
    with pytest.raises(npt.ModelError, match="no NP layers that require gradients"):
        npt.RelativeAdamW(tiny.model())
