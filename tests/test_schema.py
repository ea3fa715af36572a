from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from npt_fast import schema
from npt_fast.errors import CheckpointError
from npt_fast.schema import Kind

_KINDS: Mapping[str, Kind] = {
    "name": schema.TEXT,
    "size": schema.COUNT,
    "scale": schema.or_none(schema.NUMBER),
    "layers": schema.list_of(schema.COUNT),
    "mode": schema.one_of(["add", "replace"]),
    "on": schema.FLAG,
}
_GOOD: dict[str, Any] = {
    "name": "é", "size": 0, "scale": None, "layers": [1, 2], "mode": "add", "on": False
}  # fmt: skip


def test_what_is_right_comes_back_without_what_nobody_asked_for() -> None:
    given = {**_GOOD, "other": object()}
    assert schema.checked(given, _KINDS, list(_KINDS), "f", CheckpointError) == _GOOD


@pytest.mark.parametrize(
    "key, value",
    [
        ("name", "\ud800"), ("name", 5), ("size", -1), ("size", True), ("size", 1 << 63),
        ("size", 1.0), ("scale", float("nan")), ("scale", float("inf")), ("scale", 10**400),
        ("scale", True), ("scale", "1"), ("layers", [1, "2"]), ("layers", 5), ("layers", (1,)),
        ("mode", "swap"), ("mode", ["add"]), ("on", 1), ("on", None),
    ],
)  # fmt: skip
def test_one_wrong_value_is_named_with_its_key(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"^f: {key} must be ") as raised:
        schema.checked({**_GOOD, key: value}, _KINDS, (), "f", CheckpointError)
    assert len(str(raised.value)) < 200


def test_a_missing_key_and_what_is_no_mapping() -> None:
    with pytest.raises(CheckpointError, match=r"^f: name is missing$"):
        schema.checked({}, _KINDS, ["name"], "f", CheckpointError)
    with pytest.raises(CheckpointError, match=r"^f: must be a mapping, not a list$"):
        schema.checked([], _KINDS, (), "f", CheckpointError)


def test_a_value_that_cannot_be_written_out_is_shown_at_once() -> None:
    doubled: Any = []
    for _ in range(100):
        doubled = [doubled, doubled]
    assert schema.shown(doubled) == "a list"
    assert schema.shown(10**5000) == "a number of more than 64 bits"
    assert len(schema.shown("x" * 1_000_000)) <= 80


@pytest.mark.parametrize(
    "value", [None, True, 0, -1.5, "a", [], {}, [[1]], {"a": {"b": "c"}}, (1,)]
)
def test_plain_data(value: Any) -> None:
    assert schema.is_plain(value, 2, 100)


@pytest.mark.parametrize(
    "value",
    [
        object(), b"a", {1}, {1: 2}, {"\ud800": 1}, "\ud800", [1j], [float("nan")], 1 << 63,
        [[[]]], {"a": {"b": {}}}, "a" * 101, ["a" * 99], [0] * 60, {"a" * 101: 1},
    ],
)  # fmt: skip
def test_what_is_no_plain_data_or_too_much(value: Any) -> None:
    assert not schema.is_plain(value, 2, 100)


def test_plain_data_is_measured_at_once() -> None:
    doubled: Any = "a"
    for _ in range(60):
        doubled = [doubled, doubled]
    own: Any = []
    own.append(own)
    assert not schema.is_plain(doubled, 64, 10_000) and not schema.is_plain(own, 64, 10_000)


def test_mappings_of_a_kind() -> None:
    kind = schema.mapping_of(schema.TEXT, schema.POSITIVE)
    assert kind.fits({}) and kind.fits({"a": 1})
    assert not any(map(kind.fits, ({"a": 0}, {1: 1}, {"\ud800": 1}, [1], None)))


def test_unknown_keys_of_a_closed_mapping() -> None:
    found = list(schema.mistakes({"nme": 1, 5: 2}, {"name": schema.TEXT}, closed=True))
    assert found == [
        "unknown key 'nme'; did you mean 'name'?", "unknown key 5; there are name"
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"^f: unknown key 'x'; there are name$"):
        schema.checked({"x": 1}, {"name": schema.TEXT}, (), "f", CheckpointError, closed=True)
