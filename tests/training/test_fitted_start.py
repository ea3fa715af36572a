"""The fitted start: against least squares written out with numpy, and what it does to errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import npt_fast as npt
from npt_fast.config import Residual
from npt_fast.functional import heads_of
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.training import fitted_start
from npt_fast.training.distillation import Distillation
from npt_fast.training.teacher_pass import run_teacher
from tests.hf.small_models import build
from tests.training.truth import converted, llama

pytestmark = pytest.mark.usefixtures("one_thread")

Batch = dict[str, Tensor]
SINK = 64.0
LAYER = 2


def text(count: int, rows: int = 8, length: int = 32, seed: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(3, 120, (rows, length), generator=generator)}
        for _ in range(count)
    ]


def fresh(model: Any, layers: Sequence[int] = (LAYER,), **options: Any) -> Distillation:
    """A training step of fresh layers, in a model whose attention and MLPs are large."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    npt.convert(model, npt.NPTConfig(layers=list(layers), **{"rank": 8, "num_ranks": 2, **options}))
    step = Distillation(model, sink_weight=SINK)
    step.calibrate(text(1)[0]["input_ids"], layers)
    return step


def error(step: Distillation, batches: Sequence[Batch], layer: int = LAYER) -> float:
    with torch.no_grad():
        found = [step(**batch) for batch in batches]
    direct = torch.stack([losses.direct[layer] for losses in found]).sum()
    return direct.item() / sum(int(losses.tokens) for losses in found)


def factors(step: Distillation, layer: int = LAYER) -> dict[str, Tensor]:
    joined = components(step.model)[layer].joined
    return {name: tensor.detach().clone() for name, tensor in joined.items()}


# ---- against least squares ----


def ridge(x: NDArray[Any], y: NDArray[Any], weights: NDArray[Any], share: float) -> NDArray[Any]:
    """Least squares with rows that pull the coefficients to 0."""
    root = np.sqrt(weights)[:, None]
    size = np.sqrt(share * np.mean(np.sum(weights[:, None] * x**2, 0)))
    rows = np.concatenate([x * root, size * np.eye(x.shape[1])])
    wanted = np.concatenate([y * root, np.zeros((x.shape[1], y.shape[1]))])
    found: NDArray[Any] = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return found


def median(values: NDArray[Any]) -> float:
    """The lower one of two in the middle, as torch has it."""
    return float(np.sort(values)[(len(values) - 1) // 2])


@pytest.mark.parametrize("rows", [8, 1], ids=["many tokens", "fewer than numbers to fit"])
@pytest.mark.parametrize("residual", ["removed", "kept"])
def test_the_factors_are_least_squares(residual: Residual, rows: int) -> None:
    step = fresh(converted(llama(), []), residual=residual).double()
    batches = text(3 if rows > 1 else 1, rows)
    step.fit(batches)
    layer: Any = decoder_layers(step.model)[LAYER]
    component = components(step.model)[LAYER]
    seen = [run_teacher(step.model, b["input_ids"], None).activations[LAYER] for b in batches]
    h, a, m = (torch.cat([s[n].flatten(0, 1) for s in seen]) for n in range(3))
    norm = layer.post_attention_layernorm
    x, read = (norm(state).detach().numpy() for state in (h, h + a))
    h, a, m = (tensor.numpy() for tensor in (h, a, m))
    target = m if residual == "kept" else a + m
    squares = (target**2).sum(1)
    least = median(squares) / 10
    weights = 1 / np.maximum(squares, least)
    begins = np.arange(len(h)) % 32 == 0
    weights += SINK * begins / np.maximum(((h + a + m) ** 2).sum(1), least)
    weights /= weights.mean()
    one = np.ones((len(a), 1))

    def reader(v: NDArray[Any]) -> NDArray[Any]:
        return v @ ridge(v, one, weights, fitted_start._RIDGE_OF_ONE)

    values, directions = np.linalg.eigh((a * weights[:, None]).T @ a)
    count = min(2 * 7, 32, len(a) // 16)
    z = a @ directions[:, np.argsort(-values)[:count]]
    z /= median(np.sqrt((z**2).mean(1)))
    basis = np.concatenate([reader(a), z], 1)
    weight = {
        name: getattr(layer.mlp, f"{name}_proj").weight.detach().numpy()
        for name in ("gate", "up", "down")
    }

    def check(name: str, inner: NDArray[Any], missing: NDArray[Any]) -> NDArray[Any]:
        features = basis * reader(a) * reader(inner)
        expected = features @ ridge(features, missing, weights, fitted_start._RIDGE)
        change = component.change(torch.from_numpy(a))
        found = change(name, getattr(layer.mlp, f"{name}_proj"), torch.from_numpy(inner))
        assert found is not None
        difference = np.abs(found.detach().numpy() - expected).max() / np.abs(expected).max()
        assert difference < 1e-8
        return expected

    gate, up = (
        x @ weight[name].T + check(name, x, (read - x) @ weight[name].T) for name in ("gate", "up")
    )
    inner = gate / (1 + np.exp(-gate)) * up
    check("down", inner, target - inner @ weight["down"].T)


# ---- errors ----


@pytest.mark.parametrize(
    ("family", "residual", "most"),
    [
        ("llama", "removed", 0.92),
        ("llama", "kept", 0.9),
        ("gpt2", "removed", 0.3),
        ("gpt_neox", "removed", 0.3),
        ("phi3", "removed", 0.9),
        ("qwen3", "kept", 0.8),
        ("granite", "removed", 0.92),
        ("cohere", "removed", 0.9),
        ("gemma2", "kept", 0.85),
        ("gemma4_text", "kept", 0.9),
        ("olmo2", "kept", 0.8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_lower_on_other_text(
    family: str, residual: Residual, most: float, dtype: torch.dtype
) -> None:
    step = fresh(build(family).to(dtype), residual=residual)
    other = text(4, seed=6)
    before = error(step, other)
    step.fit(text(9))
    assert error(step, other) < most * before


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"modulation": "single"}, text(9)),
        ({"modulation": "dual"}, text(9)),
        ({"rank": 1, "num_ranks": 1}, text(9)),
        ({"rank": 3, "num_ranks": 4}, text(9)),
        ({"rank": 40, "num_ranks": 2}, text(9)),  # more columns than directions
        ({}, text(1, rows=1, length=5)),  # fewer tokens than a direction needs
        ({}, [*text(2), *text(1, rows=3, length=9)]),  # batches of several lengths
    ],
    ids=["single", "dual", "rank 1", "four components", "wide", "five tokens", "lengths"],
)
@pytest.mark.parametrize("residual", ["removed", "kept"])
def test_architectures_and_texts(
    options: dict[str, Any], batches: list[Batch], residual: Residual
) -> None:
    step = fresh(build("llama"), residual=residual, **options)
    before = error(step, batches)
    step.fit(batches)
    assert error(step, batches) < before
    assert all(tensor.isfinite().all() for tensor in factors(step).values())


def test_columns_that_are_left_over_are_for_training() -> None:
    """With equal columns, two components would learn the same."""
    step = fresh(build("llama"), rank=40)
    before = factors(step)["w_down"]
    step.fit(text(9))
    after = factors(step)["w_down"]
    kept = (before == after).all(0).sum()
    assert kept == 3 * (2 * 40 - 2 - 32)  # 32 directions, and a number near 1 in each component
    assert len(after.T.unique(dim=0)) == len(after.T) - (6 - 1) - 2 * 32


def test_factors_are_as_large_as_each_other() -> None:
    step = fresh(build("llama"))
    step.fit(text(2))
    for w_a, w_b in heads_of(components(step.model)[LAYER].factors):
        assert w_a.norm().item() == pytest.approx(w_b.norm().item(), rel=1e-5)


def test_only_the_layers_that_are_named_or_fresh_change() -> None:
    step = fresh(build("llama"), layers=(1, LAYER))
    before = {n: factors(step, n) for n in (1, LAYER)}
    step.fit(text(2), [1])
    assert not torch.equal(factors(step, 1)["w_down"], before[1]["w_down"])
    after = factors(step, 1)
    assert all(torch.equal(t, before[LAYER][n]) for n, t in factors(step, LAYER).items())
    step.fit(text(3))  # by default those that are the base model's yet
    assert all(torch.equal(t, after[n]) for n, t in factors(step, 1).items())
    assert not torch.equal(factors(step, LAYER)["w_down"], before[LAYER]["w_down"])


def test_layers_that_take_turns_get_the_same_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = (fresh(build("llama"), layers=(0, 1, LAYER)) for _ in range(2))
    together.fit(text(2))
    monkeypatch.setattr(fitted_start, "_BYTES", 1)
    apart.fit(text(2))
    for layer in (0, 1, LAYER):
        found, expected = factors(apart, layer), factors(together, layer)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_padding_and_unlabelled_tokens_do_not_count() -> None:
    ids = torch.cat([batch["input_ids"] for batch in text(2)])
    mask = (torch.arange(32) < 32 - torch.arange(16)[:, None]).long()
    labels = ids.masked_fill(torch.arange(32) % 5 == 3, -100)
    found = []
    for padding in (1, 77):
        step = fresh(build("llama"))
        given = torch.where(mask > 0, ids, padding)
        step.fit([{"input_ids": given, "attention_mask": mask, "labels": labels}])
        found.append(factors(step))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    step = fresh(build("llama"))
    step.fit([{"input_ids": ids, "attention_mask": mask}])
    assert not torch.equal(factors(step)["w_down"], found[0]["w_down"])


def test_a_step_that_is_not_calibrated_is_calibrated_by_its_longest_rows() -> None:
    ids = text(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[::2, 20:] = 0
    by_hand, by_fit = (Distillation(fresh(build("llama")).model) for _ in range(2))
    by_hand.calibrate(ids[1::2])
    by_fit.fit([{"input_ids": ids, "attention_mask": mask}], [])
    assert by_fit.calibrated and by_fit._typical == by_hand._typical


def test_a_text_in_which_no_token_counts_changes_nothing() -> None:
    step = fresh(build("llama"))
    before = factors(step)
    ids = text(1)[0]["input_ids"]
    step.fit([{"input_ids": ids, "labels": torch.full_like(ids, -100)}])
    assert all(torch.equal(tensor, before[name]) for name, tensor in factors(step).items())


@pytest.mark.parametrize(
    ("family", "residual"),
    [("mixtral", "kept"), ("gemma2", "removed"), ("olmo2", "removed"), ("glm4", "removed")],
)
def test_what_cannot_be_fitted_stays_as_it_is(family: str, residual: Residual) -> None:
    """A mixture of experts, and an MLP that goes without its post-norm."""
    step = fresh(build(family), residual=residual)
    before = factors(step)
    step.fit(text(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in factors(step).items())


def test_a_text_that_gives_no_numbers_is_refused() -> None:
    step = fresh(build("llama"))
    decoder_layers(step.model)[LAYER].post_attention_layernorm.weight.data.fill_(torch.nan)
    with pytest.raises(npt.TrainingError, match=r"^layer 2: no finite start fits this text"):
        step.fit(text(2))


def test_no_text_is_refused() -> None:
    step = Distillation(fresh(build("llama")).model)
    with pytest.raises(npt.DataError, match=r"^there is nothing to fit layers to: give at least"):
        step.fit([])
