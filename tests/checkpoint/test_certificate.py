"""Certificates: what they say of several texts, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from npt_fast.checkpoint.certificate import Certificate, Closeness, worst_of
from npt_fast.errors import CheckpointError

CONTENT: dict[str, Any] = {
    "layers": [3], "step": None, "data": None, "tokens": 4, "kl": 0.1, "perplexity_ratio": 1.0,
    "texts": {
        "a": {"tokens": 5, "kl": 0.2, "perplexity_ratio": 1.5},
        "b": {"tokens": 6, "kl": 0.3, "perplexity_ratio": 1.25},
    },
    "worst": {"kl": 0.3, "perplexity_ratio": 1.5},
}  # fmt: skip


def test_what_is_read_and_written_again_is_the_same() -> None:
    assert Certificate.parse(CONTENT, "file").to_dict() == CONTENT


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_not_finite_is_the_worst(order: int) -> None:
    texts = [Closeness(1, 0.5, 1.0), Closeness(1, None, 2.0), Closeness(1, 0.7, 0.5)]
    assert worst_of(texts[::order]) == {"kl": None, "perplexity_ratio": 2.0}


def test_the_worst_is_computed_and_not_believed() -> None:
    flattering = {**CONTENT, "worst": {"kl": 0.0, "perplexity_ratio": 1.0}}
    assert Certificate.parse(flattering, "file").to_dict() == CONTENT


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_null(number: float) -> None:
    found = Certificate.parse({**CONTENT, "kl": number}, "file")
    assert found.to_dict()["kl"] is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": ["3"]}, "layers must be a list"),
        ({"layers": [True]}, "layers must be a list"),
        ({"tokens": -1}, "tokens must be"),
        ({"kl": "0.1"}, "kl must be a number"),
        ({"perplexity_ratio": [1.0]}, "perplexity_ratio must be a number"),
        ({"texts": {"news": 5}}, "texts must be a mapping"),
        ({"texts": {"news": {"tokens": 5, "kl": 0.5}}}, "'news': perplexity_ratio is missing"),
        ({"texts": {"n\0": {"tokens": 0.5, "kl": 1, "perplexity_ratio": 1}}}, "tokens must be"),
        ({"worst": 0.3}, "worst must be a mapping"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(change: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Certificate.parse({**CONTENT, **change}, "file")
    line = str(caught.value)
    assert line.startswith("file: ") and told in line and line.isprintable()


@pytest.mark.parametrize("key", ["layers", "tokens", "kl", "perplexity_ratio", "texts"])
def test_a_missing_value_is_refused(key: str) -> None:
    content = {name: value for name, value in CONTENT.items() if name != key}
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        Certificate.parse(content, "file")
