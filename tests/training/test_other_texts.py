"""Texts of other kinds: as windows of any model, and what is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from npt_fast.errors import NPTWarning
from npt_fast.training.other_texts import TEXTS, other_texts, read_text
from tests.training import tiny


def tokens_of(windows: Any) -> list[int]:
    assert all(bool(window["attention_mask"].all()) for window in windows)
    (length,) = {len(window["input_ids"]) for window in windows}
    assert [int(window["window"]) for window in windows] == list(range(len(windows)))
    assert all(len(window["attention_mask"]) == length for window in windows)
    return [token for window in windows for token in window["input_ids"].tolist()]


@pytest.mark.parametrize(("context", "count", "length"), [(256, 8, 256), (100, 21, 97), (1, 0, 2)])
def test_windows_fit_the_context(context: int, count: int, length: int) -> None:
    """Of a tokenizer of bytes, 2,048 tokens are read; 2048 = 21 * 97 + 11."""
    tokenizer: Any = tiny.tokenizer()
    found = other_texts(tiny.model(max_position_embeddings=context), tokenizer)
    assert tuple(found) == TEXTS
    for name, windows in found.items():
        assert len(windows) == (count or 1024) and len(windows[0]["input_ids"]) == length
        whole = tokenizer(read_text(name)).input_ids
        assert tokens_of(windows) == whole[: len(windows) * length]


@pytest.mark.parametrize("special_tokens", [True, False])
def test_special_tokens_stand_at_the_beginning_or_nowhere(special_tokens: bool) -> None:
    model, tokenizer = tiny.model(vocab_size=258), tiny.bos_tokenizer()
    for windows in other_texts(model, tokenizer, special_tokens=special_tokens).values():
        assert tokens_of(windows).count(257) == special_tokens
        assert (windows[0]["input_ids"][0] == 257) == special_tokens


def tokenizer_of(ids: list[int]) -> Any:
    return lambda text, **options: SimpleNamespace(input_ids=list(ids))


@pytest.mark.parametrize("ids", [[3, 4], [5] * 255, [5] * 257])
def test_few_tokens_are_enough(ids: list[int]) -> None:
    for windows in other_texts(tiny.model(), tokenizer_of(ids)).values():
        assert tokens_of(windows) == ids[: len(ids) // len(windows) * len(windows)]


def test_no_window_has_a_single_token() -> None:
    """Such a window predicts nothing, and has no perplexity."""
    for windows in other_texts(
        tiny.model(max_position_embeddings=2), tokenizer_of([5] * 9)
    ).values():
        assert tokens_of(windows) == [5] * 8


@pytest.mark.parametrize("ids", [[], [3], [3, 257]])
def test_a_text_that_the_model_cannot_read_is_left_out(ids: list[int]) -> None:
    with pytest.warns(NPTWarning, match=f"makes {len(ids)} tokens of it") as caught:
        assert other_texts(tiny.model(), tokenizer_of(ids)) == {}
    assert len(caught) == len(TEXTS)


def test_the_texts_are_of_different_kinds() -> None:
    texts = {name: read_text(name) for name in TEXTS}
    assert all(3_500 < len(text) < 5_000 for text in texts.values())
    assert "#include" in texts["code"] and "é" in texts["french"]
    assert texts["news"].isascii() and texts["story"].isascii()
