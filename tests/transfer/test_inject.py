"""Injection, compared with layers that use dense weights for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.config import InjectionMode, Position
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.convert import decoder_layers
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.positions import resolve
from tests.conftest import DATA
from tests.transfer.injected import IDS, MODES, close, truth
from tests.transfer.models import (
    FAMILIES,
    PROJECTIONS,
    SOURCE,
    TEXT,
    base,
    converted,
    greedy,
    hooks,
    ids_of,
    logits,
    random_modulation,
    spelled_out,
    tokenizer,
)

POSITIONS: list[tuple[Position, list[int]]] = [
    (4, [4]),
    (-2, [11]),
    (slice(2, 5), [2, 3, 4]),
    ([0, -1, 6], [0, 6, 12]),
    ("last", [12]),
    ("first", [0]),
    ("all", list(range(13))),
    ("at:red", [4, 5, 6]),
    (npt.at("house"), [8, 9, 10, 11, 12]),
    ("after:red", [7]),
    (npt.after("the"), [3]),
]


def test_the_truth_is_the_model_where_nothing_is_injected() -> None:
    model = converted(layers=(0, 2, 3), residual="kept")
    expected = logits(model, IDS)
    with spelled_out(model, lambda *_: None):
        close(logits(model, IDS), expected)


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: InjectionMode, strength: float) -> None:
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    plain = logits(model, IDS)
    with npt.inject(model, m, position=slice(3, 6), mode=mode, strength=strength):
        found = logits(model, IDS)
    with truth(model, m, [[3, 4, 5]], mode, strength):
        expected = logits(model, IDS)
    close(found, expected)
    assert torch.equal(found[:, :3], plain[:, :3])
    assert (found[:, 3:] - plain[:, 3:]).abs().amax(
        -1
    ).min() > 1e-3  # later tokens change through attention


@pytest.mark.parametrize(("position", "places"), POSITIONS, ids=str)
def test_positions(position: Position, places: list[int]) -> None:
    assert resolve(position, list(TEXT)) == places
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    with npt.inject(model, m, position=position, tokenizer=tokenizer) as hits:
        found = logits(model, IDS)
    with truth(model, m, [places]):
        close(found, logits(model, IDS))
    assert hits.positions == [places]
    assert hits.layers == [1, 2] and hits.count == 2 * len(places)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("residual", ["removed", "kept"])
def test_families(family: str, residual: str) -> None:
    model = converted(family, residual=residual)
    m = npt.extract(model, tokenizer, SOURCE)
    for mode in ("replace", "exact-add"):
        with npt.inject(model, m, mode=mode):
            found = logits(model, IDS)
        with truth(model, m, [[12]], mode):
            close(found, logits(model, IDS))


def test_its_own_modulation_changes_nothing() -> None:
    """Injecting a text's modulation into the same token of the same text has no effect."""
    model = converted(layers=(1,))
    plain = logits(model, IDS)
    m = npt.extract(model, tokenizer, TEXT)
    for mode, strength in (("replace", 1.0), ("blend", 0.3), ("exact-blend", 0.3), ("add", 0.0)):
        with npt.inject(model, m, mode=mode, strength=strength):  # type: ignore[arg-type]
            close(logits(model, IDS), plain)
    with npt.inject(model, m, mode="exact-add", strength=-1.0):  # the token's own dW minus itself
        found = logits(model, IDS)
    with npt.inject(model, 0 * m):
        close(found, logits(model, IDS))


@pytest.mark.parametrize("source", ["single", "dual", "triple"])
@pytest.mark.parametrize("target", ["single", "dual", "triple"])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_may_have_other_projections(source: str, target: str, mode: InjectionMode) -> None:
    """A projection that the source lacks keeps the token's own change. One that the layer lacks
    is changed too, but has no vectors to mix with."""
    m = npt.extract(converted(modulation=source), tokenizer, SOURCE)
    model = converted(modulation=target)
    order = ["single", "dual", "triple"]
    if order.index(source) > order.index(target) and mode in ("blend", "add"):
        missing = PROJECTIONS[order.index(target) + 1]
        message = f"layer 1 does not change {missing}: {mode} has nothing .* use exact-{mode}"
        with pytest.raises(npt.TransferError, match=message), npt.inject(model, m, mode=mode):
            pass
        return
    with npt.inject(model, m, mode=mode, strength=0.5):
        found = logits(model, IDS)
    with truth(model, m, [[12]], mode, 0.5):
        close(found, logits(model, IDS))


@pytest.mark.parametrize("mode", ["replace", "exact-blend", "exact-add"])
@pytest.mark.parametrize("terms", [1, 5])
def test_combined_ones_of_any_number_of_terms(mode: InjectionMode, terms: int) -> None:
    model = converted()
    m = 0.5 * random_modulation(terms=terms) - npt.extract(model, tokenizer, SOURCE)
    with npt.inject(model, m, mode=mode, strength=0.7, position="all"):
        found = logits(model, IDS)
    with truth(model, m, [list(range(13))], mode, 0.7):
        close(found, logits(model, IDS))


def test_a_sum_is_one_injection_after_the_other_of_exact_add() -> None:
    model = converted()
    a, b = random_modulation(1), random_modulation(2)
    with npt.inject(model, a + b, mode="exact-add", position="all"):
        found = logits(model, IDS)
    baked = npt.bake(model, a)
    with npt.inject(model, b, mode="exact-add", position="all"):
        close(found, logits(model, IDS))
    baked.undo()


def test_more_tokens_than_are_formed_at_a_time() -> None:
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    ids = ids_of("the red house " * 12)
    with npt.inject(model, m, mode="blend", strength=0.5, position="all"):
        found = logits(model, ids)
    with truth(model, m, [list(range(ids.shape[1]))], "blend", 0.5):
        close(found, logits(model, ids))


def test_hooks_go_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    m = random_modulation()
    plain = logits(model, IDS)
    with pytest.raises(ZeroDivisionError), npt.inject(model, m):
        assert hooks(model) == 3
        raise ZeroDivisionError
    assert not hooks(model)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(decoder_layers(model)[3], "forward", fail)
        with pytest.raises(KeyboardInterrupt), npt.inject(model, m):
            logits(model, IDS)
    assert not hooks(model) and torch.equal(logits(model, IDS), plain)


def test_nothing_hit_is_an_error() -> None:
    model = converted()
    m = random_modulation()
    with pytest.raises(npt.TransferError, match="the model did not run within the context"):
        with npt.inject(model, m):
            pass
    with pytest.raises(npt.TransferError, match="no token was at -1 when the model ran"):
        with npt.inject(model, m, when="decode"):  # one token is generated and never read
            greedy(model, {"input_ids": IDS}, 1)
    with pytest.raises(npt.TransferError, match="nothing was injected"):
        with npt.inject(model, m), npt.disabled(model):
            logits(model, IDS)
    assert not hooks(model)


@pytest.mark.parametrize("position", [13, -14, "at:blue", "after:house", "nowhere"])
def test_positions_that_a_prompt_does_not_have(position: Position) -> None:
    model = converted()
    with pytest.raises(npt.TransferError):
        with npt.inject(model, random_modulation(), position=position, tokenizer=tokenizer):
            logits(model, IDS)
    assert not hooks(model)


def test_disabled_and_unload_are_the_base_model_still() -> None:
    plain, model = base(), converted()
    m = npt.extract(model, tokenizer, SOURCE)
    expected, on = logits(plain, IDS), logits(model, IDS)
    with npt.inject(model, m):
        injected = logits(model, IDS)
        with npt.disabled(model):
            assert torch.equal(logits(model, IDS), expected)
        assert torch.equal(logits(model, IDS), injected)
        with npt.disabled(model, [1]):
            partly = logits(model, IDS)
    assert torch.equal(logits(model, IDS), on)
    with npt.disabled(model, [1]), npt.inject(model, m.only([2])):
        close(logits(model, IDS), partly)
    with npt.inject(model, m):
        logits(model, IDS)
        npt.unload(model)
        assert torch.equal(logits(model, IDS), expected)
    assert torch.equal(logits(model, IDS), expected) and not hooks(model)


# --- what is refused before anything runs


def wide() -> Modulation:
    return random_modulation(sizes=(16, 48))


REFUSED: dict[str, tuple[Callable[[Any], Any], dict[str, Any], type[npt.NPTError], str]] = {
    "another base": (lambda m: wide(), {}, npt.ModelError, "another base model .* hidden_size 16"),
    "one of them": (lambda m: [m, wide()], {}, npt.ModelError, "another base model"),
    "no NP layer": (
        lambda m: random_modulation(layers=(0, 1)),
        {},
        npt.ModelError,
        r"layer 0 of the modulation is not an NP layer that is on; on are \[1, 2\]",
    ),
    "nothing": (lambda m: [], {}, npt.TransferError, "the modulations change no layer"),
    "only None": (lambda m: [None], {}, npt.TransferError, "the modulations change no layer"),
    "sum to blend": (
        lambda m: m + m,
        {"mode": "blend"},
        npt.TransferError,
        "blend mixes vectors, which a combined modulation does not have; use exact-blend",
    ),
    "scaled to add": (lambda m: 2 * m, {"mode": "add"}, npt.TransferError, "use exact-add"),
    "k": (
        lambda m: replace(random_modulation(terms=3), vectors=True),
        {"mode": "add"},
        npt.TransferError,
        "layer 1, gate: 3 vectors for a layer with 2; use exact-add",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    make, options, kind, message = REFUSED[what]
    model = converted()
    given = make(npt.extract(model, tokenizer, SOURCE))
    with pytest.raises(kind, match=message), npt.inject(model, given, **options):
        pytest.fail("the context was entered")
    assert not hooks(model)


def test_layers_that_are_off_are_refused() -> None:
    model = converted()
    with npt.disabled(model, [2]):
        with pytest.raises(npt.ModelError, match=r"layer 2 .* is on; on are \[1\]"):
            with npt.inject(model, random_modulation()):
                pass


def test_what_positions_cannot_be_counted_in() -> None:
    model = converted()
    m = random_modulation()
    embedded = model.get_input_embeddings()(IDS)
    with pytest.raises(npt.TransferError, match="embeddings have no positions"):
        with npt.inject(model, m), torch.no_grad():
            model(inputs_embeds=embedded)
    with pytest.raises(npt.TransferError, match=r"an attention mask of \(batch, tokens\)"):
        with npt.inject(model, m):
            logits(model, IDS, attention_mask=torch.ones(1, 1, 13, 13, dtype=torch.bool))
    with pytest.raises(npt.TransferError, match="the position at:red needs a tokenizer"):
        with npt.inject(model, m, position="at:red"):
            logits(model, IDS)
    for options in ({"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(npt.TransferError, match="whole prompt in one pass, then one token"):
            with npt.inject(model, m):
                greedy(model, {"input_ids": ids_of("the red house is a red house")}, **options)
    assert not hooks(model)


def test_a_static_cache() -> None:
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    found = []
    ways: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}]
    for options in ways:
        with npt.inject(model, m, when="both"):
            found.append(greedy(model, {"input_ids": IDS}, **options))
    assert torch.equal(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


# --- the real model


@pytest.mark.slow
def test_smollm2(smollm2: Path) -> None:
    """A trained layer in float32: with and without a cache, alone and in a padded batch."""
    model, tokenizer = load_base_model(str(smollm2))
    npt.load(model, DATA / "layer13" / "checkpoint-600")
    tokenizer.padding_side = "left"
    m = npt.extract(model, tokenizer, "The capital of France is")
    texts = ["The capital of Germany is", "In Italy, the capital is the city of"]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False))
    batch.pop("token_type_ids", None)
    lengths = []
    with npt.inject(model, m, when="both") as hits:
        hook = model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        together, rows = greedy(model, batch)
        hook.remove()
    assert lengths == [batch["input_ids"].shape[1]] + [1] * 7
    assert hits.positions == [[4], [8]]
    for row, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        for use_cache in (True, False):
            with npt.inject(model, m, when="both"):
                tokens, expected = greedy(model, {"input_ids": ids}, use_cache=use_cache)
            assert torch.equal(tokens[0], together[row])
            error = (rows[row] - expected[0]).norm() / expected[0].norm()
            assert error < 1e-5
