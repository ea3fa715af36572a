"""How layers are written."""

from __future__ import annotations

from typing import Any

import pytest

from npt_fast.errors import OptionError
from npt_fast.layer_names import check_layers, chosen_layers, parse_layers, resolve_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("11", (11,)),
        ("13, 11", (13, 11)),
        ("11-13,20", (11, 12, 13, 20)),
        ("7-7", (7,)),
        ("-1", (-1,)),
        ([4, -2], (4, -2)),
        (11, (11,)),
        (range(2, 4), (2, 3)),
        ({5: "a"}, (5,)),
        ([], ()),
    ],
)
def test_layers(text: Any, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    "text",
    ["", "a", "1,,2", "3-1", "1,1", "1-3,2", "5,3-1", "0-99999", "1-2-3", [1.5], [True], 1.5, None],
)
def test_what_is_no_list_of_layers(text: Any) -> None:
    with pytest.raises(OptionError):
        parse_layers(text)


def test_layers_to_convert_name_a_layer() -> None:
    with pytest.raises(OptionError, match=r"layers must name a layer, got \[\]"):
        check_layers([])


@pytest.mark.parametrize(
    ("layers", "chosen"), [(None, [1, 3, 7]), ("upper_half", [7]), ("-1,0", [7, 0]), (3, [3])]
)
def test_chosen_layers(layers: Any, chosen: list[int]) -> None:
    """Of a part of the model, those that are there; the caller refuses others that are named."""
    assert chosen_layers(layers, (1, 3, 7), 8) == chosen


def test_no_layer_of_a_part_is_there() -> None:
    with pytest.raises(OptionError, match=r"there are layers \[1, 3\], none of upper_half"):
        chosen_layers("upper_half", (1, 3), 8)


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
    with pytest.raises(OptionError, match=problem):
        resolve_layers(text, 5)
