"""Merging layers of several architectures into one that the original loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from tests.checkpoint.merging import EXACT, one_layer, only
from tests.checkpoints import layer_weights, read_weights
from tests.reference import Situation, modulated_mlp, relative_error

LAYERS: dict[int, dict[str, Any]] = {
    1: {"modulation": "single", "rank": 3, "num_ranks": 2},
    2: {"modulation": "dual", "rank": 5},
    3: {"modulation": "triple", "rank": 2, "num_ranks": 3},
    4: {"modulation": "single", "rank": 4},
}


@pytest.fixture
def uniform(tmp_path: Path) -> dict[str, Tensor]:
    paths = [one_layer(tmp_path / str(n), n, **kind) for n, kind in LAYERS.items()]
    npt.merge(paths, tmp_path / "out", verify=True, options=npt.MergeOptions(uniform=True))
    return read_weights(tmp_path / "out")


@pytest.mark.parametrize("layer", LAYERS)
def test_uniform_keeps_every_function(uniform: dict[str, Tensor], layer: int) -> None:
    where = Situation.random(seed=layer)
    expected = modulated_mlp([layer_weights(layer, **LAYERS[layer])], layer, where)
    assert relative_error(modulated_mlp([uniform], layer, where), expected) <= EXACT


class OriginalLayer(torch.nn.Module):
    """The parameters of the original's NP component: one list per projection and stem."""

    def __init__(self, d: int, f: int, rank: int, num_ranks: int) -> None:
        super().__init__()
        for projection, (a, b) in {"gate": (d, f), "up": (d, f), "down": (f, d)}.items():
            shapes = {"W_down": (d, rank), "W_a_up": (rank, a), "W_b_up": (rank, b)}
            for stem, shape in shapes.items():
                parameters = [torch.nn.Parameter(torch.full(shape, 9.0)) for _ in range(num_ranks)]
                name = f"{stem}_{projection}"
                if num_ranks == 1:
                    self.register_parameter(name, parameters[0])
                else:
                    setattr(self, name, torch.nn.ParameterList(parameters))


def test_uniform_loads_the_original_way(uniform: dict[str, Tensor]) -> None:
    """The original strips a prefix per layer and builds one architecture; all keys must match."""
    for layer in LAYERS:
        prefix = f"layer_{layer}_np."
        own = {k.removeprefix(prefix): v for k, v in uniform.items() if k.startswith(prefix)}
        module = OriginalLayer(16, 24, rank=5, num_ranks=3)
        assert len(own) == 27
        module.load_state_dict(own, strict=True)
        assert all(torch.equal(dict(module.named_parameters())[k], v) for k, v in own.items())


def old_names(layer: int) -> set[str]:
    """The names that a layer's old tensors have after a uniform merge."""
    names = set()
    for name in layer_weights(layer, **LAYERS[layer]):
        base, _, component = name.removeprefix(f"layer_{layer}_np.").partition(".")
        projection = "_gate" if LAYERS[layer]["modulation"] == "single" else ""
        names.add(f"layer_{layer}_np.{base}{projection}.{component or 0}")
    return names


def test_uniform_starts_new_components_at_zero_but_live(uniform: dict[str, Tensor]) -> None:
    checked = 0
    for layer in LAYERS:
        new = only(uniform, layer).keys() - old_names(layer)
        for name in new:
            tensor = uniform[name]
            assert tensor.isfinite().all()
            if "W_b_up" in name:
                assert not tensor.any(), name
            else:
                assert tensor.count_nonzero() > 0.9 * tensor.numel(), name
        checked += len(new)
    assert checked == 21 + 21 + 0 + 24


def test_gradients_reach_new_components(uniform: dict[str, Tensor]) -> None:
    where = Situation.random()
    live = {name: t.double().requires_grad_() for name, t in only(uniform, 4).items()}
    modulated_mlp([live], 4, where).square().sum().backward()
    for name, tensor in live.items():
        if "W_b_up" in name:
            assert tensor.grad is not None and tensor.grad.any(), name


def test_uniform_leaves_equal_layers_alone(tmp_path: Path) -> None:
    paths = [one_layer(tmp_path / str(n), n, num_ranks=2) for n in (1, 2)]
    report = npt.merge(paths, tmp_path / "out", options=npt.MergeOptions(uniform=True))
    assert {info.changed for info in report.layers} == {0}


def test_layers_with_and_without_a_gate_have_no_common_architecture(tmp_path: Path) -> None:
    """They merge, as those of a model that has both kinds, but cannot be padded to one."""
    plain = one_layer(tmp_path / "a", 1, modulation="plain")
    paths = [plain, one_layer(tmp_path / "b", 2, modulation="dual")]
    merged = npt.merge(paths, tmp_path / "out")
    assert [info.architecture.modulation for info in merged.layers] == ["plain", "dual"]
    for options, given in (
        (npt.MergeOptions(uniform=True), paths),
        (npt.MergeOptions(on_conflict="concat"), [plain, one_layer(tmp_path / "c", 1)]),
    ):
        with pytest.raises(npt.MergeError, match=r"plain.* cannot be padded to one"):
            npt.merge(given, tmp_path / "none", options=options)
    assert not (tmp_path / "none").exists()


def test_uniform_reports_what_changed(tmp_path: Path, uniform: dict[str, Tensor]) -> None:
    summary = npt.inspect(tmp_path / "out")
    assert (summary.modulation, summary.num_ranks, summary.rank) == ("triple", 3, 5)
