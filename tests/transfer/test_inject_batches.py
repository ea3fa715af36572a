"""Injection into batches, with padding, and while text is generated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.config import InjectionMode, InjectionTime, Position
from npt_fast.hf.convert import components
from npt_fast.testing import assert_within_budget
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.positions import resolve
from tests.transfer.injected import IDS, MODES, close, truth
from tests.transfer.models import (
    FAMILIES,
    SOURCE,
    TEXT,
    converted,
    greedy,
    hooks,
    ids_of,
    left_padded,
    logits,
    random_modulation,
    terms,
    tokenizer,
)


def padded_logits(model: Any, texts: list[str]) -> list[Tensor]:
    """Logits of each row, without padding."""
    batch = left_padded(texts)
    mask = batch["attention_mask"]
    found = logits(model, **_ids(batch), position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    return [row[kept.bool()] for row, kept in zip(found, mask, strict=True)]


def _ids(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


TEXTS = ["the red house", "a red sky", "red"]


@pytest.mark.parametrize(
    "position", ["last", "first", "all", -3, slice(0, 2), "at:red", [0, 2]], ids=str
)
def test_padding_is_not_counted(position: Position) -> None:
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    with npt.inject(model, m, position=position, tokenizer=tokenizer) as hits:
        together = padded_logits(model, TEXTS)
    assert hits.positions == [resolve(position, list(text)) for text in TEXTS]
    for text, row, places in zip(TEXTS, together, hits.positions, strict=True):
        with npt.inject(model, m, position=places):
            close(row, logits(model, ids_of(text))[0])


def test_padding_on_the_right() -> None:
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    ids = torch.cat([IDS, IDS.new_zeros(1, 4)], 1)
    mask = (torch.arange(17) < 13).long()[None]
    with npt.inject(model, m) as hits:
        found = logits(model, ids, attention_mask=mask)[:, :13]
        assert hits.positions == [[12]]
    with npt.inject(model, m):
        close(found, logits(model, IDS))


def test_a_modulation_for_every_row() -> None:
    model = converted()
    ms: list[Modulation | None] = [
        npt.extract(model, tokenizer, SOURCE),
        None,
        random_modulation(layers=(2,), projections=("up",)),
    ]
    with npt.inject(model, ms) as hits:
        together = padded_logits(model, TEXTS)
    assert hits.count == 2 + 0 + 1 and hits.layers == [1, 2]
    for text, m, row in zip(TEXTS, ms, together, strict=True):
        if m is None:
            close(row, logits(model, ids_of(text))[0])
            continue
        with npt.inject(model, m):
            close(row, logits(model, ids_of(text))[0])
    # and by the definition, without padding
    ids = IDS.expand(3, -1)
    with npt.inject(model, ms, position=5):
        found = logits(model, ids)
    with truth(model, ms, [[5]] * 3):
        close(found, logits(model, ids))


@pytest.mark.parametrize("sampling", [{"num_return_sequences": 2}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_generate_repeats(sampling: dict[str, int], use_cache: bool) -> None:
    """All repetitions of a row receive that row's modulation."""
    model = converted()
    model.generation_config.pad_token_id = 0
    ms = [npt.extract(model, tokenizer, SOURCE), None]
    options: dict[str, Any] = {"max_new_tokens": 5, "use_cache": use_cache, **sampling}
    if "num_return_sequences" in sampling:  # sampling from one token is greedy
        options |= {"do_sample": True, "top_k": 1}
    with npt.inject(model, ms):
        together = model.generate(IDS.repeat(2, 1), **options)
    n = sampling.get("num_return_sequences", 1)
    with npt.inject(model, ms[:1]):
        assert torch.equal(together[:n], model.generate(IDS, **options))
    assert torch.equal(together[n:], model.generate(IDS, **options))
    assert not torch.equal(together[:n], together[n:])


def test_a_batch_that_the_modulations_do_not_divide() -> None:
    model = converted()
    m = random_modulation()
    with pytest.raises(npt.TransferError, match="2 modulations do not fit a batch of 3"):
        with npt.inject(model, [m, None]):
            logits(model, IDS.expand(3, -1))
    assert not hooks(model)


# --- generation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
def test_the_cache_changes_nothing(family: str, when: InjectionTime) -> None:
    model = converted(family)
    m = npt.extract(model, tokenizer, SOURCE)
    inputs = {"input_ids": IDS}
    plain = greedy(model, inputs)[1]
    with npt.inject(model, m, when=when, position=[3, -1]) as hits:
        cached, rows = greedy(model, inputs)
    assert hits.count == 2 * {"prefill": 2, "decode": 7, "both": 9}[when]
    assert hits.positions == [[3, 12]]
    with npt.inject(model, m, when=when, position=[3, -1]):
        again, all_anew = greedy(model, inputs, use_cache=False)
    assert torch.equal(cached, again) and (rows[:, 1:] - plain[:, 1:]).abs().max() > 1e-2
    close(rows, all_anew)
    # the whole text at once, by the definition: position 20 is not read to choose any of 8 tokens
    prompt = [] if when == "decode" else [3, 12]
    generated = [] if when == "prefill" else list(range(13, 20))
    whole = torch.cat([IDS, cached], 1)
    with truth(model, m, [prompt + generated]):
        close(rows[0], logits(model, whole)[0, 12:20])


@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
def test_float32_keeps_the_budget(when: InjectionTime) -> None:
    """A cache and a padded batch lose no accuracy against single texts without a cache."""
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    low_model, low_m = copy.deepcopy(model).float(), m.to("cpu", torch.float32)
    rows: dict[str, list[Tensor]] = {"exact": [], "low": [], "cached": [], "batch": []}
    for mode in MODES:

        def run(inputs: dict[str, Tensor], mode: InjectionMode = mode, **options: Any) -> Any:
            with npt.inject(low_model, low_m, when=when, mode=mode, strength=0.5):
                return greedy(low_model, inputs, 6, **options)

        together, batch = run(left_padded(TEXTS))
        for row, text in enumerate(TEXTS):
            ids = ids_of(text)
            n = ids.shape[1]
            tokens, low = run({"input_ids": ids}, use_cache=False)
            same, cached = run({"input_ids": ids})
            assert torch.equal(tokens, same) and torch.equal(tokens[0], together[row])
            prompt = [] if when == "decode" else [n - 1]
            places = prompt + ([] if when == "prefill" else list(range(n, n + 5)))
            with npt.inject(model, m, position=places, mode=mode, strength=0.5):
                exact = logits(model, torch.cat([ids, tokens[:, :-1]], 1))[0, n - 1 :]
            for name, found in zip(rows, (exact, low[0], cached[0], batch[row]), strict=True):
                rows[name].append(found)
    exact, low, cached, batch = (torch.cat(found) for found in rows.values())
    assert torch.equal(low.argmax(-1), exact.argmax(-1))
    assert_within_budget(cached, exact, low, "cached", terms=terms(model))
    assert_within_budget(batch, exact, low, "in a batch", terms=terms(model))


def test_a_bfloat16_base_keeps_the_budget() -> None:
    """NP components stay float32, as `load` leaves them, on a bfloat16 base model."""
    model = converted(layers=(1,)).bfloat16()
    components(model)[1].float()
    exact_model = copy.deepcopy(model).double()
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for mode in MODES:
        for text in ("a boat", "on the lake", "blue"):
            m = npt.extract(model, tokenizer, text)
            with npt.inject(model, m, mode=mode, strength=0.5):
                found = logits(model, IDS)
            with truth(model, m, [[12]], mode, 0.5):
                low = logits(model, IDS)
            m = m.to("cpu", torch.float64)
            with truth(exact_model, m, [[12]], mode, 0.5):
                rows.append((found, logits(exact_model, IDS), low))
    found, exact, low = (torch.cat(each) for each in zip(*rows, strict=True))
    assert found.dtype == torch.bfloat16
    assert_within_budget(found, exact, low)


def test_generation_in_a_padded_batch_with_a_modulation_for_every_row() -> None:
    model = converted()
    ms = [npt.extract(model, tokenizer, SOURCE), None, random_modulation()]
    with npt.inject(model, ms, when="both"):
        together, rows = greedy(model, left_padded(TEXTS))
    for row, (text, m) in enumerate(zip(TEXTS, ms, strict=True)):
        inputs = {"input_ids": ids_of(text)}
        if m is None:
            tokens, expected = greedy(model, inputs)
        else:
            with npt.inject(model, m, when="both"):
                tokens, expected = greedy(model, inputs)
        assert torch.equal(together[row], tokens[0])
        close(rows[row], expected[0])


def test_another_prompt_begins_anew() -> None:
    """Prompts run one after another, even if one begins with the other."""
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    long = ids_of(TEXT + " and")
    with npt.inject(model, m, when="prefill"):
        expected = greedy(model, {"input_ids": long}, 4)
    with npt.inject(model, m, when="prefill") as hits:
        for ids, last in ((IDS, 12), (long, 16), (IDS[:, :5], 4), (long, 16)):
            found = greedy(model, {"input_ids": ids}, 4)
            assert hits.positions == [[last]]
    close(found[1], expected[1])
    with npt.inject(model, m) as hits:
        logits(model, IDS)
        logits(model, long)
        assert hits.positions == [[16]]
    with npt.inject(model, m) as hits:  # with a new cache, one token more is another prompt
        for text in (TEXT, TEXT + "s"):
            greedy(model, {"input_ids": ids_of(text)}, 1)
            assert hits.positions == [[len(text) - 1]]
