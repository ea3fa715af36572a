"""Arithmetic of modulations is exactly that of dW."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.errors import NPTWarning
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.modulation import Modulation, combine_vectors
from tests.transfer.models import PROJECTIONS, SOURCE, base, converted, random_modulation, tokenizer

Combination = Callable[[Any, Any], Any]
COMBINATIONS: dict[str, tuple[Combination, Combination]] = {
    "a + b": (lambda a, b: a + b, lambda a, b: a + b),
    "a - b": (lambda a, b: a - b, lambda a, b: a - b),
    "2 * a": (lambda a, b: 2 * a, lambda a, b: a + a),
    "a * 0.5": (lambda a, b: a * 0.5, lambda a, b: a / 2),
    "a / 4": (lambda a, b: a / 4, lambda a, b: 0.25 * a),
    "sum": (lambda a, b: sum([a, b, b]), lambda a, b: a + b + b),  # type: ignore[return-value]
    "-a": (lambda a, b: -a, lambda a, b: 0 - a),
    "mean": (lambda a, b: npt.mean([a, b, b]), lambda a, b: (a + b + b) / 3),
    "0.7 * a - (b - a)": (lambda a, b: 0.7 * a - (b - a), lambda a, b: 1.7 * a - b),
}


def dense(m: Modulation, layer: int, projection: str) -> Tensor:
    """The sum of outer products, one after another."""
    terms = m.layers[layer][projection]
    pairs = zip(terms.v_a.unbind(), terms.v_b.unbind(), strict=True)
    return torch.stack([torch.outer(b, a) for a, b in pairs]).sum(0)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_arithmetic_is_that_of_dense_changes(name: str) -> None:
    combine, expected = COMBINATIONS[name]
    a, b = random_modulation(1), random_modulation(2, terms=3)
    found = combine(a, b)
    for layer in (1, 2):
        for projection in PROJECTIONS:
            exact = expected(dense(a, layer, projection), dense(b, layer, projection))
            for actual in (dense(found, layer, projection), found.dense(layer, projection)):
                torch.testing.assert_close(actual, exact, rtol=0, atol=1e-12)
    assert found.base == a.base and not found.vectors


@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, -1.0), (0.5, 0.5), (-3.0, 0.25)])
def test_arithmetic_on_vectors_is_elementwise(factors: tuple[float, float]) -> None:
    a, b = (replace(random_modulation(seed), vectors=True) for seed in (1, 2))
    found = combine_vectors([a, b], factors)
    for layer, projection, terms in found.walk():
        for v, x, y in zip(
            terms, a.layers[layer][projection], b.layers[layer][projection], strict=True
        ):
            torch.testing.assert_close(v, factors[0] * x + factors[1] * y, rtol=0, atol=1e-15)
    assert found.vectors and found.base == a.base
    assert found.description == (
        f"on vectors {factors[0]:g} * ({a.description}) + {factors[1]:g} * ({b.description})"
    )


def test_what_vectors_do_to_dw() -> None:
    """The original's scale and negate, which are not what their names say."""
    m = replace(random_modulation(1), vectors=True)
    for factor in (2.0, -1.0):
        found = combine_vectors([m], [factor])
        torch.testing.assert_close(found.dense(1, "up"), factor**2 * m.dense(1, "up"))
        assert found.magnitude(1) == pytest.approx(abs(factor) * m.magnitude(1))


def test_vectors_must_be_alike() -> None:
    m = replace(random_modulation(1), vectors=True)
    more = replace(random_modulation(2, terms=3), vectors=True)
    for others, factors, problem in (
        ([m, 2 * m], [1, 1], "has no vectors; leave out -vectors"),
        ([m, more], [1, 1], "layer 1, gate: they have 2, 3 vectors"),
        ([m, replace(random_modulation(layers=[1]), vectors=True)], [1, 1], "different layers"),
        ([m], [math.inf], "not finite"),
    ):
        with pytest.raises(npt.TransferError, match=problem):
            combine_vectors(others, factors)


def test_operands_stay_as_they_are() -> None:
    a, b = random_modulation(1), random_modulation(2)
    npt.mean([2 * a - b, -a])
    for m, seed in ((a, 1), (b, 2)):
        again = random_modulation(seed)
        assert all(torch.equal(dense(m, 1, p), dense(again, 1, p)) for p in PROJECTIONS)


def test_a_difference_with_itself_is_nothing() -> None:
    a = random_modulation()
    nothing = (a - a).dense(2, "up")
    assert nothing.norm() < 1e-12 * a.dense(2, "up").norm()
    assert (a - a).compress()[0].dense(2, "up").norm() < 1e-12


def test_what_vectors_would_do() -> None:
    """Twice the vectors is four times dW, their negatives are the same dW.

    See design.md#modulation-arithmetic.
    """
    a = random_modulation()
    v_a, v_b = a.layers[1]["gate"]
    torch.testing.assert_close((2 * v_b).t() @ (2 * v_a), 4 * a.dense(1, "gate"))
    assert torch.equal((-v_b).t() @ -v_a, a.dense(1, "gate"))
    assert torch.equal((-a).dense(1, "gate"), -a.dense(1, "gate"))


@pytest.mark.parametrize("rank", [1, 3, 5, 8, 40])
def test_compress_to_a_rank_is_the_best_there_is(rank: int) -> None:
    m = npt.mean([random_modulation(seed, terms=4) for seed in range(2)])  # of rank 8
    found, stated = m.compress(rank=rank)
    errors = []
    for layer, projection, terms in found.walk():
        exact = dense(m, layer, projection)
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(found.dense(layer, projection), best, rtol=0, atol=1e-12)
        assert len(terms.v_a) == len(terms.v_b) == min(rank, 8)
        errors.append(((dense(found, layer, projection) - exact).norm() / exact.norm()).item())
    assert stated == pytest.approx(max(errors), rel=1e-9, abs=1e-13)
    assert (stated > 1e-3) == (rank < 8)


@pytest.mark.parametrize("tol", [0.9, 0.5, 0.1, 1e-3])
def test_compress_to_an_error_takes_no_term_too_many(tol: float) -> None:
    m = random_modulation(terms=6) + random_modulation(1, terms=6)
    found, stated = m.compress(tol=tol)
    for layer, projection, terms in found.walk():
        exact = dense(m, layer, projection)
        values = torch.linalg.svdvals(exact)
        errors = [(values[n:].norm() / values.norm()).item() for n in range(len(values) + 1)]
        needed = next(n for n, error in enumerate(errors) if error <= tol)
        assert len(terms.v_a) == needed
        error = ((dense(found, layer, projection) - exact).norm() / exact.norm()).item()
        assert error <= tol and error <= stated + 1e-12
    assert stated <= tol


def test_compress_takes_both_and_more_terms_than_widths() -> None:
    """`rank` wins over `tol`; 60 terms exceed the 32 inputs and 48 outputs."""
    m = random_modulation(terms=60)
    lossless, error = m.compress()
    torch.testing.assert_close(lossless.dense(1, "down"), m.dense(1, "down"), rtol=0, atol=1e-11)
    assert lossless.terms == 32 and error < 1e-12
    found, error = m.compress(rank=2, tol=1e-9)
    assert found.terms == 2 and error > 1e-2
    assert not found.vectors and f"an error of {error:.1e}" in found.description


@pytest.mark.parametrize(("rank", "tol"), [(0, 0.0), (-1, 0.0), (None, -0.1)])
def test_compress_refuses_nonsense(rank: int | None, tol: float) -> None:
    with pytest.raises(npt.OptionError, match="rank must be positive and tol not negative"):
        random_modulation().compress(rank, tol)


def test_magnitude_is_the_mean_norm_of_the_tensors() -> None:
    """Over the 2c tensors of a layer with c projections (design.md#modulation-arithmetic)."""
    m = random_modulation(projections=("gate", "up"))
    tensors = [*m.layers[2]["gate"], *m.layers[2]["up"]]
    expected = sum(math.sqrt(t.square().sum().item()) for t in tensors) / 4
    assert m.magnitude(2) == pytest.approx(expected, rel=1e-12)


def test_its_repr_is_a_line_without_numbers() -> None:
    found = repr(npt.extract(converted(), tokenizer, SOURCE) / 2)
    assert found.startswith("<Modulation of layers 1, 2: 0.5 * ") and "lake" in found
    assert "\n" not in found and "tensor" not in found and len(found) < 140


def test_terms_of_extracted_ones_are_vectors_and_of_combined_ones_are_not() -> None:
    m = npt.extract(converted(), tokenizer, SOURCE)
    assert m.vectors and m.terms == 2 and m.only([2]).vectors and m.to("cpu").vectors
    combined = [m + m, m - m, 2 * m, -m, npt.mean([m]), m.compress()[0]]
    assert not any(c.vectors for c in combined)
    assert (m + m).terms == 4


def test_a_part_and_another_precision() -> None:
    m = random_modulation()
    part = m.only([2, 3])
    assert list(part.layers) == [2] and torch.equal(part.dense(2, "up"), m.dense(2, "up"))
    for name in (2, "2", "upper_half", range(2, 4)):
        assert list(m.only(name).layers) == [2]
    for missing in (lambda: m.only([3]), lambda: m.magnitude(3), lambda: m.dense(3, "up")):
        with pytest.raises(npt.TransferError, match=r"changes layers \[1, 2\], none of \[3\]"):
            missing()
    with pytest.raises(npt.TransferError, match="does not change 'side'"):
        m.dense(2, "side")
    low = m.to("cpu", torch.bfloat16)
    assert {t.dtype for _, _, terms in low.walk() for t in terms} == {torch.bfloat16}
    assert {t.dtype for _, _, terms in low.compress(1)[0].walk() for t in terms} == {torch.bfloat16}


OTHERS = {
    "width": random_modulation(sizes=(16, 48)),
    "layers of the model": replace(random_modulation(), base=BaseModel("", 32, 48, 5, 257)),
    "layers": random_modulation(layers=(1,)),
    "projections": random_modulation(projections=("gate",)),
}
REFUSALS = {
    "width": r"different base models: \(32, 48, 4\) and \(16, 48, 4\)",
    "layers of the model": r"different base models: .* and \(32, 48, 5\)",
    "layers": r"different layers: \[1, 2\] and \[1\]; take a part with \.only\(layers\)",
    "projections": "layer 1: one changes gate, up, down, the other gate",
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_does_not_fit_together(what: str) -> None:
    a, b = random_modulation(), OTHERS[what]
    ways: list[Combination] = [COMBINATIONS[name][0] for name in ("a + b", "a - b", "mean")]
    for combine in ways:
        with pytest.raises(npt.TransferError, match=REFUSALS[what]):
            combine(a, b)


def test_nothing_and_what_is_no_number() -> None:
    with pytest.raises(npt.TransferError, match="needs at least one modulation"):
        npt.mean([])
    for factor in (math.nan, math.inf, 10**400):
        with pytest.raises(npt.TransferError, match="cannot be multiplied by"):
            factor * random_modulation()
    with pytest.raises(npt.TransferError, match="cannot be divided by 0"):
        random_modulation() / 0
    with pytest.raises(TypeError, match=r"for /: 'Modulation' and 'Modulation'"):
        random_modulation() / random_modulation()  # type: ignore[operator]
    with pytest.raises(TypeError):
        random_modulation() * random_modulation()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size 32, the model has 64"),
        ({"intermediate_size": 40}, "intermediate_size 48, the model has 40"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 4, the model has 3"),
    ],
)
def test_a_model_it_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(npt.ModelError, match=rf"another base model \(unnamed\): {message}"):
        random_modulation().check_base_model(base(**changes))
    random_modulation().check_base_model(base("qwen3"))
    random_modulation().check_base_model(base(vocab_size=300))  # tokens may have been added


def test_another_base_of_the_same_sizes_gives_a_note(tmp_path: Path) -> None:
    model = converted()
    model.config._name_or_path = "some/model"
    npt.extract(model, tokenizer, SOURCE).save(tmp_path / "m")
    m = npt.load_modulation(tmp_path / "m")
    with torch.no_grad():
        model.get_input_embeddings().weight[3] += 1
    with pytest.warns(NPTWarning) as caught:
        m.check_base_model(model)
    assert [str(each.message) for each in caught] == [
        "the modulation belongs to another base model of the same sizes (some/model): "
        "its weights are not this model's"
    ]
    m = replace(m, base=replace(m.base, fingerprint=None))  # as files of earlier versions
    m.save(tmp_path / "older")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        npt.load_modulation(tmp_path / "older").check_base_model(model)


def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    """The name of a folder need not be UTF-8."""
    model = converted()
    model.config._name_or_path = "caf\udce9"
    npt.extract(model, tokenizer, SOURCE).save(tmp_path / "m")
    assert npt.load_modulation(tmp_path / "m").base.name == "caf\\udce9"
