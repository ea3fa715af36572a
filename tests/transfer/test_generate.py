"""Generation equals that of transformers; sampling equals its definition."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.hf.convert import decoder_layers
from npt_fast.transfer.generate import Sampling, continue_ids
from tests.transfer.models import FAMILIES, SOURCE, TEXT, converted, greedy, ids_of, tokenizer

# probabilities 0.4, 0.3, 0.2, 0.1 of tokens 2, 0, 3, 1
LOGITS = torch.tensor([0.3, 0.1, 0.4, 0.2]).log()


def lengths_of_passes(model: Any) -> list[int]:
    """A list that is filled with the number of tokens each pass reads."""
    found: list[int] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        found.append(kwargs["input_ids"].shape[1])

    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers(family: str) -> None:
    model = converted(family)
    expected, rows = greedy(model, {"input_ids": ids_of(TEXT)}, 10)
    found, logits = continue_ids(model, ids_of(TEXT)[0].tolist(), Sampling(tokens=10))
    assert found == expected[0].tolist()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, rows[0].float())


def test_the_prompt_is_read_once_with_an_injection_too() -> None:
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    ids = ids_of(TEXT)[0].tolist()
    lengths = lengths_of_passes(model)
    with npt.inject(model, m, when="both"):
        continue_ids(model, ids, Sampling(tokens=6))
    assert lengths == [len(ids), 1, 1, 1, 1, 1]
    lengths.clear()
    with npt.inject(model, m, when="both"):
        greedy(model, {"input_ids": ids_of(TEXT)}, 6)
    assert lengths == [len(ids), 1, 1, 1, 1, 1]


def test_it_ends_with_the_end_of_the_text() -> None:
    model = converted()
    ids = ids_of(TEXT)[0].tolist()
    whole, _ = continue_ids(model, ids, Sampling(tokens=8))
    for end in (whole[3], [300, whole[3]]):
        model.generation_config.eos_token_id = end
        found, logits = continue_ids(model, ids, Sampling(tokens=8))
        assert found == whole[: whole.index(whole[3]) + 1] and len(logits) == len(found)


def test_every_token_is_reported_as_it_comes() -> None:
    model = converted()
    seen: list[tuple[int, Tensor]] = []
    found, logits = continue_ids(
        model, [1, 2], Sampling(tokens=4), on_token=lambda token, row: seen.append((token, row))
    )
    assert [token for token, _ in seen] == found
    assert torch.equal(torch.stack([row for _, row in seen]), logits)
    assert not decoder_layers(model)[0]._forward_hooks


def drawn(sampling: Sampling, count: int = 4000) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    found = Counter(sampling.choose(LOGITS, generator) for _ in range(count))
    return {token: found[token] / count for token in sorted(found)}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), {2: 1.0}),
        (Sampling(temperature=9.0), {2: 1.0}),
        (Sampling(strategy="top_k"), {0: 0.3, 1: 0.1, 2: 0.4, 3: 0.2}),
        (Sampling(strategy="sample", top_k=2), {0: 3 / 7, 2: 4 / 7}),
        (Sampling(strategy="top_k", top_k=1), {2: 1.0}),
        # the fewest tokens that reach it, not one more, and 1.0 is all (design.md#sampling)
        (Sampling(strategy="top_p", top_p=0.3), {2: 1.0}),
        (Sampling(strategy="top_p", top_p=0.6), {0: 3 / 7, 2: 4 / 7}),
        (Sampling(strategy="top_p", top_p=0.85), {0: 1 / 3, 2: 4 / 9, 3: 2 / 9}),
        (Sampling(strategy="top_p", top_p=1.0), {0: 0.3, 1: 0.1, 2: 0.4, 3: 0.2}),
        # p ** (1 / temperature), normalised
        (
            Sampling(strategy="top_k", temperature=0.5),
            {0: 9 / 30, 1: 1 / 30, 2: 16 / 30, 3: 4 / 30},
        ),
    ],
    ids=str,
)
def test_what_is_drawn(sampling: Sampling, expected: dict[int, float]) -> None:
    assert drawn(sampling) == pytest.approx(expected, abs=0.03)


def test_a_seed_repeats() -> None:
    model = converted()
    texts = [
        tuple(continue_ids(model, [1, 2], Sampling(tokens=12, strategy="top_k", seed=seed))[0])
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"top_k": 0},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"strategy": "beam"},
    ],
    ids=str,
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(npt.TransferError, match=f"{next(iter(wrong))}.*, got"):
        Sampling(**wrong)
