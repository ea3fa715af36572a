"""Training saves what the original would have saved, and restores all of it.

The original keeps one parameter per tensor of the checkpoint. Its optimizer, built here over
separate tensors, must take the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaForCausalLM

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.mlp_layout import GATED, MLPLayout
from npt_fast.modules import NPComponent
from npt_fast.training.optimizer import BETAS
from npt_fast.training.state import (
    gather_optimizer,
    gather_weights,
    read_state,
    restore_optimizer,
)
from npt_fast.training.token_windows import TokenWindows
from tests import reference
from tests.checkpoints import (
    adamw_state,
    assert_same_tensors,
    layer_weights,
    load_state,
    read_weights,
)
from tests.training import runs, tiny
from tests.training.relative import rates, relative_step
from tests.training.runs import LENGTH, Place

WIDTHS: dict[str, Any] = {"d": 32, "f": 48}
PLAIN = MLPLayout(None)


# --- read by the original


class Original(nn.Module):
    """The original's component (design.md#keys): a parameter per tensor, lists where k > 1."""

    def __init__(self, rank: int, num_ranks: int, projections: list[str]) -> None:
        super().__init__()
        for name in projections:
            wide = (48, 32) if name == "_down" else (32, 48)
            for stem, shape in (
                ("W_down", (32, rank)),
                ("W_a_up", (rank, wide[0])),
                ("W_b_up", (rank, wide[1])),
            ):
                tensors = [nn.Parameter(torch.zeros(shape)) for _ in range(num_ranks)]
                value = nn.ParameterList(tensors) if num_ranks > 1 else tensors[0]
                setattr(self, stem + name, value)


@pytest.mark.parametrize(
    ("modulation", "projections", "num_ranks"),
    [
        ("triple", ["_gate", "_up", "_down"], 3),
        ("triple", ["_gate", "_up", "_down"], 1),
        ("dual", ["_gate", "_up"], 2),
        ("single", [""], 1),
    ],
)
def test_the_original_loads_it(
    place: Place, tmp_path: Path, modulation: str, projections: list[str], num_ranks: int
) -> None:
    """The original loads weights strictly, optimizer and schedule, with torch's safe loading."""
    path = place.train(
        tmp_path / "out",
        train_layers="2,0",
        modulation=modulation,
        num_ranks=num_ranks,
        np_rank=4,
        max_steps=2,
        warmup_steps=1,
    )
    weights = torch.load(path / "npt_weights.pt", weights_only=True)
    models = {layer: Original(4, num_ranks, projections) for layer in (0, 2)}
    names = []
    for layer, model in models.items():
        prefix = f"layer_{layer}_np."
        own = {name.removeprefix(prefix): t for name, t in weights.items() if prefix in name}
        model.load_state_dict(own, strict=True)
        names += [prefix + name for name, _ in model.named_parameters()]
    assert list(weights) == names  # in its order, too
    for tensor in weights.values():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # not a view of a joined one

    state = torch.load(path / "training_state.pt", weights_only=True)
    parameters = [p for model in models.values() for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.0)
    optimizer.load_state_dict(state["optimizer_state_dict"])
    assert all(optimizer.state[p]["step"] == 2 for p in parameters)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in parameters)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    schedule.load_state_dict(state["scheduler_state_dict"])
    assert schedule.last_epoch == state["global_step"] == 2
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


# --- separate tensors take the same steps

JOINED = {
    "w_down": ("W_down", ("_gate", "_up", "_down"), 1),
    "w_a_in": ("W_a_up", ("_gate", "_up"), 0),
    "w_a_mid": ("W_a_up", ("_down",), 0),
    "w_b_gate": ("W_b_up", ("_gate",), 0),
    "w_b_up": ("W_b_up", ("_up",), 0),
    "w_b_down": ("W_b_up", ("_down",), 0),
}
"""The original's tensors that each of our parameters joins, and the axis."""


def apart(layer: int, name: str, joined: Tensor, num_ranks: int) -> dict[str, Tensor]:
    """Split a tensor of a parameter's shape into the original's tensors."""
    stem, projections, axis = JOINED[name]
    suffixes = [f".{n}" for n in range(num_ranks)] if num_ranks > 1 else [""]
    names = [f"layer_{layer}_np.{stem}{p}{suffix}" for p in projections for suffix in suffixes]
    return dict(zip(names, joined.chunk(len(names), axis), strict=True))


@contextmanager
def recorded_gradients(num_ranks: Mapping[int, int]) -> Iterator[list[dict[str, Tensor]]]:
    """Record AdamW's gradients of each step under the original's names."""
    steps: list[dict[str, Tensor]] = []

    def record(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = iter([p for group in optimizer.param_groups for p in group["params"]])
        step: dict[str, Tensor] = {}
        for layer, count in num_ranks.items():
            for name in JOINED:
                gradient = next(parameters).grad
                assert isinstance(gradient, Tensor)
                step |= apart(layer, name, gradient.clone(), count)
        assert next(parameters, None) is None
        steps.append(step)

    handle = register_optimizer_step_pre_hook(record)
    try:
        yield steps
    finally:
        handle.remove()


def cosine(step: int, warmup: int, end: int) -> float:
    """Factor of the learning rate at a step, counted from 0 (design.md#curriculum)."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup)))


def test_joined_parameters_are_optimized_as_separate_ones(place: Place, tmp_path: Path) -> None:
    """AdamW is elementwise but for its rates, and the saved state is the original's."""
    begin = runs.start(tmp_path / "start", 1, 2)
    with recorded_gradients({1: 2, 2: 2}) as gradients:
        path = place.train(
            tmp_path / "out", resume_from=str(begin), max_steps=5, warmup_steps=2, weight_decay=0.1
        )
    assert len(gradients) == 5
    tensors = {name: nn.Parameter(tensor) for name, tensor in read_weights(begin).items()}
    groups = [{"params": [tensor]} for tensor in tensors.values()]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=BETAS, weight_decay=0.1)
    for step, found in enumerate(gradients):
        for name, tensor in tensors.items():
            tensor.grad = found[name]
        own = rates(tensors, 1e-2 * cosine(step, 2, 5)).values()
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate
        optimizer.step()
    weights, states = read_weights(path), runs.by_name(path)
    for name, tensor in tensors.items():
        state = optimizer.state[tensor]
        assert states[name]["step"] == state["step"] == 5
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(states[name][moment], state[moment], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(weights[name], tensor.detach(), rtol=1e-6, atol=1e-7)
    assert list(states) == list(tensors)


class Independent:
    """The original's loop in the teacher stage, written in plain torch; it clips each layer.

    Args:
        base: folder of the base model.
        weights: trained tensors by full name.
        learning_rate: constant.
    """

    def __init__(self, base: Path, weights: Mapping[str, Tensor], learning_rate: float) -> None:
        self.model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.weights = {name: nn.Parameter(tensor) for name, tensor in weights.items()}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=learning_rate, betas=BETAS, weight_decay=0.01
        )

    def step(self, rows: list[dict[str, Tensor]]) -> None:
        ids = torch.stack([row["input_ids"] for row in rows])
        assert all(row["attention_mask"].all() for row in rows)
        seen: dict[tuple[int, str], Tensor] = {}
        for layer in (1, 2):
            block = self.model.model.layers[layer]

            def hidden(_: Any, args: Any, output: Any, layer: int = layer) -> None:
                seen[layer, "hidden"] = args[0]

            def attention(_: Any, args: Any, output: Any, layer: int = layer) -> None:
                seen[layer, "attention"] = output[0]

            def mlp(_: Any, args: Any, output: Any, layer: int = layer) -> None:
                seen[layer, "mlp"] = output

            block.register_forward_hook(hidden)
            block.self_attn.register_forward_hook(attention)
            block.mlp.register_forward_hook(mlp)
        loss = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            self.model(ids)
        for layer in (1, 2):
            block = self.model.model.layers[layer]
            with torch.no_grad():
                entered = block.post_attention_layernorm(seen[layer, "hidden"])
            target = (seen[layer, "attention"] + seen[layer, "mlp"]).double()
            where = reference.Situation(
                attention=seen[layer, "attention"].double(),
                x=entered.double(),
                gate=block.mlp.gate_proj.weight.detach().double(),
                up=block.mlp.up_proj.weight.detach().double(),
                down=block.mlp.down_proj.weight.detach().double(),
            )
            output = reference.modulated_mlp([self.weights], layer, where)
            loss = loss + 10 * (output - target).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        for layer in (1, 2):
            own = [tensor for name, tensor in self.weights.items() if f"layer_{layer}_" in name]
            nn.utils.clip_grad_norm_(own, 0.1)
        relative_step(self.optimizer, self.weights)


def test_the_originals_loop_gets_the_same_weights_and_goes_on_from_ours(
    place: Place, tmp_path: Path
) -> None:
    """It takes three steps from our start and three from our checkpoint, so both must be right.

    Float64 against float32, so not bit for bit: AdamW divides by small numbers.
    """
    begin = runs.start(tmp_path / "start", 1, 2)
    settings = {"lr_schedule": "constant", "warmup_steps": 0, "loss": "mse"}
    settings |= {"max_steps": 6, "save_steps": 3}
    end = place.train(tmp_path / "out", resume_from=str(begin), **settings)
    half = end.with_name("checkpoint-3")
    windows = iter(
        TokenWindows(str(place.text), tiny.tokenizer(), max_length=LENGTH, held_out=4, seed=42)
    )
    first = Independent(place.base, read_weights(begin), 1e-2)
    second = Independent(place.base, read_weights(half), 1e-2)
    second.optimizer.load_state_dict(load_state(half)["optimizer_state_dict"])
    for loop, path in ((first, half), (second, end)):
        before = {name: tensor.detach().clone() for name, tensor in loop.weights.items()}
        for _ in range(3):
            loop.step([next(windows) for _ in range(4)])
        found = read_weights(path)
        moved = torch.cat([(loop.weights[name] - before[name]).ravel() for name in before])
        wrong = torch.cat([(loop.weights[name] - found[name]).ravel() for name in before])
        assert moved.norm() > 0.1
        assert wrong.norm() < 1e-4 * moved.norm()


def test_a_merges_layers_have_their_own_moments(place: Place, tmp_path: Path) -> None:
    """One step after a merge of runs of 3 and 5 steps equals AdamW on each source's tensors."""
    sources = [
        place.train(tmp_path / "a", train_layers="1", np_rank=4, num_ranks=1, max_steps=3),
        place.train(tmp_path / "b", train_layers="2", np_rank=2, num_ranks=3, max_steps=5),
    ]
    npt.merge(sources, tmp_path / "merged")
    with recorded_gradients({1: 1, 2: 3}) as gradients:
        path = place.train(
            tmp_path / "out",
            resume_from=str(tmp_path / "merged"),
            max_steps=6,
            learning_rate=3e-3,
            lr_schedule="constant",
            weight_decay=0.2,
        )
    (found,) = gradients
    weights, states = read_weights(path), runs.by_name(path)
    for source, step in zip(sources, (4, 6), strict=True):
        begun = read_weights(source)
        for name, old in runs.by_name(source).items():
            first = 0.9 * old["exp_avg"].double() + 0.1 * found[name].double()
            second = 0.95 * old["exp_avg_sq"].double() + 0.05 * found[name].double().square()
            change = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            rate = rates(begun, 3e-3)[name]
            expected = begun[name].double() * (1 - rate * 0.2) - rate * change
            assert states[name]["step"] == step
            for value, moment in ((first, "exp_avg"), (second, "exp_avg_sq")):
                torch.testing.assert_close(
                    states[name][moment].double(), value, rtol=1e-5, atol=1e-10
                )
            torch.testing.assert_close(weights[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert load_state(path)["global_step"] == 6


# --- saved and restored


def parts_of(modulation: str, num_ranks: int) -> dict[int, NPComponent]:
    torch.manual_seed(0)
    return {
        layer: NPComponent(
            32,
            48,
            rank=4,
            num_ranks=num_ranks,
            modulation=modulation,
            layout=PLAIN if modulation == "plain" else GATED,
        )
        for layer in (3, 7)
    }


def optimizer_of(parts: Mapping[int, NPComponent]) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for part in parts.values() for p in part.parameters()], fused=True)


def restored(
    path: Path, parts: Mapping[int, NPComponent]
) -> tuple[torch.optim.Optimizer, list[int]]:
    checkpoint = open_checkpoint(str(path))
    saved = read_state(checkpoint)
    assert saved is not None
    optimizer = optimizer_of(parts)
    return optimizer, restore_optimizer(optimizer, parts, saved, checkpoint)


@pytest.mark.parametrize(
    ("modulation", "ranks"), [("single", 1), ("dual", 3), ("triple", 2), ("plain", 2)]
)
def test_there_and_back(tmp_path: Path, modulation: str, ranks: int) -> None:
    parts = parts_of(modulation, ranks)
    optimizer = optimizer_of(parts)
    for _ in range(3):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    path = runs.write(tmp_path / "a", gather_weights(parts), gather_optimizer(optimizer, parts))
    again, fresh = restored(path, parts)
    assert fresh == []
    assert again.state.keys() == optimizer.state.keys()
    for held, state in optimizer.state.items():
        assert_same_tensors(again.state[held], state)
    state_dict = {f"layer_{n}_np.{k}": v for n, p in parts.items() for k, v in p.split().items()}
    assert_same_tensors(read_weights(path), state_dict)


def test_a_layer_without_moments_starts_fresh(tmp_path: Path) -> None:
    """The merge took weights alone from one input."""
    parts = parts_of("dual", 2)
    optimizer = optimizer_of(parts)
    for parameter in parts[7].parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    saved = gather_optimizer(optimizer, parts)
    assert sorted(saved["state"]) == list(range(12, 24))
    again, fresh = restored(runs.write(tmp_path / "a", gather_weights(parts), saved), parts)
    assert fresh == [3]
    assert set(again.state) == set(parts[7].parameters())
    for held, state in optimizer.state.items():
        assert_same_tensors(again.state[held], state)


def test_tensors_of_one_layer_at_different_steps(tmp_path: Path) -> None:
    """A joined parameter has one step; the corrected moments stay the same."""
    weights = layer_weights(3, rank=4, num_ranks=2, **WIDTHS)
    state = adamw_state(weights, steps=3)["optimizer_state_dict"]
    for index, name in enumerate(weights):
        if name.endswith(".1"):
            state["state"][index]["step"] = torch.tensor(9.0)
    del state["state"][0]  # never stepped
    part = parts_of("triple", 2)[3]
    optimizer, fresh = restored(runs.write(tmp_path / "a", weights, state), {3: part})
    assert fresh == []
    own = dict(part.named_parameters())
    for moment, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
        found: dict[str, Tensor] = {}
        for name, parameter in own.items():
            held = optimizer.state[parameter]
            assert held["step"] == 9
            found |= apart(3, name, held[moment] / (1 - beta**9), 2)
        for index, name in enumerate(weights):
            old = state["state"].get(index)
            if old is None:
                assert not found[name].any()
                continue
            corrected = old[moment] / (1 - beta ** old["step"].item())
            torch.testing.assert_close(found[name], corrected, rtol=1e-5, atol=1e-12)
