"""How layers are written."""

from __future__ import annotations

from typing import Any

import pytest

from npt_fast.layer_names import check_layers, parse_layers, resolve_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("11", (11,)),
        ("13, 11", (13, 11)),
        ("11-13,20", (11, 12, 13, 20)),
        ("7-7", (7,)),
        ("-1", (-1,)),
        ([4, -2], (4, -2)),
    ],
)
def test_layers(text: Any, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    "text", ["", "a", "1,,2", "3-1", "1,1", "1-3,2", "5,3-1", "0-99999", "1-2-3", [], [1.5], [True]]
)
def test_what_is_no_list_of_layers(text: Any) -> None:
    with pytest.raises(ValueError):
        parse_layers(text)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", (0, 1, 2, 3, 4)),
        ("upper_half", (2, 3, 4)),
        ("lower_half", (0, 1)),
        ("3,-5", (3, 0)),
        ([4], (4,)),
    ],
)
def test_layers_of_a_model(text: Any, layers: tuple[int, ...]) -> None:
    check_layers(text)
    assert resolve_layers(text, 5) == layers


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("5", "there is no layer 5, the model has 5 layers"),
        ("-6", "there is no layer -6"),
        ("1,-4", "names a layer twice"),
        ("upper", "all, upper_half, lower_half"),
    ],
)
def test_layers_that_a_model_lacks(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        resolve_layers(text, 5)
