"""The two readers and the writer of JSON: written files are read back, odd ones are refused."""

from __future__ import annotations

import codecs
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npt_fast.checkpoint import strict_json
from npt_fast.errors import CheckpointError

FIXED = settings(max_examples=200, derandomize=True, deadline=None, database=None)
# low surrogates stand for bytes of a path that is not UTF-8
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text("a\udc80\udcff")


def documents(*, finite: bool) -> st.SearchStrategy[dict[str, Any]]:
    floats = st.floats(allow_nan=not finite, allow_infinity=not finite)
    integers = st.integers(1 - (1 << 127), (1 << 127) - 1)
    leaves = st.none() | st.booleans() | integers | floats | TEXT
    nested = st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=20
    )
    return st.dictionaries(TEXT, nested, max_size=3)


def same(a: Any, b: Any) -> bool:
    """Whether values are equal, including types, signs of zeros and NaN."""
    return repr(a) == repr(b)


@FIXED
@given(documents(finite=True))
def test_what_is_written_is_read_back(document: dict[str, Any]) -> None:
    data = strict_json.dump(document)
    assert same(strict_json.parse_object(data, "x"), document)
    assert same(strict_json.parse_foreign(data, "x"), document)
    assert same(json.loads(data), document)


@FIXED
@given(documents(finite=False))
def test_what_is_carried_over_is_read_back(document: dict[str, Any]) -> None:
    data = strict_json.dump(document, allow_nan=True)
    assert same(strict_json.parse_foreign(data, "x"), document)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_our_own_files_hold_finite_numbers(number: float) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        strict_json.dump({"a": [number]})


DOCUMENT = '{"name": "Zürich 漢",\r\n "a": [1, -0.0, 1e3],\r\n "b": %s}\r\n'
ENCODINGS = [
    "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be",
]  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e308", "4" * 38])
def test_other_peoples_files_mean_what_python_reads(encoding: str, number: str) -> None:
    text = DOCUMENT % number
    found = strict_json.parse_foreign(text.encode(encoding), "x")
    assert same(found, json.loads(text))


@pytest.mark.parametrize("encoding", ENCODINGS[1:])
def test_what_means_the_same_to_all_is_plain_utf_8(encoding: str) -> None:
    with pytest.raises(CheckpointError, match=r"^x: not valid JSON"):
        strict_json.parse_object((DOCUMENT % 1).encode(encoding), "x")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_means_the_same_to_all_has_finite_numbers(number: str) -> None:
    with pytest.raises(CheckpointError, match=f"^x: the number {number} is not allowed here"):
        strict_json.parse_object((DOCUMENT % number).encode(), "x")


def nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * depth + b"]" * depth + b"}"


REFUSED = {
    "too-large": (DOCUMENT % "1e400", "the number 1e400 does not fit a 64-bit float"),
    "too-large-negative": (DOCUMENT % "-1E400", "the number -1E400 does not fit"),
    "too-large-without-exponent": (DOCUMENT % f"{'9' * 400}.5", "the number 9{40} does not fit"),
    "too-small": (DOCUMENT % "1e-400", "the number 1e-400 does not fit"),
    "integer": (DOCUMENT % (1 << 127), "the number 170141183460469231731687303715884105728 is not"),
    "negative-integer": (DOCUMENT % -(1 << 127), "the number -1701411834604692317316873037158841"),
    "no-float-holds-it": (DOCUMENT % ("9" * 400), "the number 9{40} is not allowed"),
    "too-many-digits": (DOCUMENT % ("9" * 5000), "not valid JSON: Exceeds the limit"),
    "key-twice": ('{"a": 1, "b": 2, "a": 1}', "key 'a' occurs twice"),
    "key-twice-by-escape": ('{"x": {"a": 1, "\\u0061": 1}}', "key 'a' occurs twice"),
    "empty": (b"", "is empty"),
    "blank": (" \r\n", "not valid JSON"),
    "cut": ((DOCUMENT % 1)[:-4], "not valid JSON"),
    "cut-utf-16": ((DOCUMENT % 1).encode("utf-16")[:-1], "not utf-16"),
    "latin-1": ('{"a": "Zürich"}'.encode("latin-1"), "not utf-8 from byte 8 on"),
    "two-marks": (codecs.BOM_UTF8 * 2 + b"{}", "not valid JSON"),
    "list": ("[1]", "not a JSON object"),
    "nothing": ("null", "not a JSON object"),
    "comment": ('{"a": 1 // one\n}', "not valid JSON"),
    "trailing-comma": ('{"a": 1,}', "not valid JSON"),
    "zeros": (b"\0" * 99, "its data never reached the disk"),
    "git-lfs": ("version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
    "web-page": ("<!DOCTYPE html><html>", "a web page"),
    "gzip": (b"\x1f\x8b\x08\0{", "compressed with gzip"),
    "deep": (nested(100), "nested more than 100 deep"),
    "very-deep": (nested(100_000), "nested too deep"),
    "many-objects": (f'{{"a": [{"{}," * 600_000}1]}}', "too many objects"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, reason = REFUSED[case]
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=reason) as caught:
        strict_json.read_foreign(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_what_is_too_large_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    os.truncate(path, strict_json.MAX_SMALL + 1)
    for read in (strict_json.read_object, strict_json.read_foreign):
        with pytest.raises(CheckpointError, match=f"{path}: 4,194,305 bytes of JSON"):
            read(path)


@pytest.mark.parametrize("number", ["-0", "[-0, 1]", "[1,-0]", '{"-0": -0}'])
def test_minus_zero_is_no_integer_for_other_readers(number: str) -> None:
    text = (DOCUMENT % number).encode()
    with pytest.raises(CheckpointError, match="the number -0 is not allowed here"):
        strict_json.parse_object(text, "x")
    assert strict_json.parse_foreign(text, "x") == json.loads(text)


@pytest.mark.parametrize("text", ["-0.0", "-0e3", '"-0"', "-1"])
def test_what_only_looks_like_it_is_read(text: str) -> None:
    data = (DOCUMENT % text).encode()
    assert same(strict_json.parse_object(data, "x"), json.loads(data))


@pytest.mark.parametrize("value", [nested(100), {"a": 1 << 127}, {"a": "x" * (5 << 20)}])
@pytest.mark.parametrize("allow_nan", [False, True])
def test_what_could_not_be_read_is_not_written(value: Any, allow_nan: bool) -> None:
    value = json.loads(value) if isinstance(value, bytes) else value
    with pytest.raises(CheckpointError, match=r"^config: "):
        strict_json.dump(value, "config", allow_nan=allow_nan)


def test_the_largest_depth_is_read() -> None:
    assert strict_json.parse_foreign(nested(99), "x") == json.loads(nested(99))


@pytest.mark.parametrize(
    "number", ["0e-400", "-0.0e-999", "0.000", "5e-324", "1.7976931348623157e308"]
)
def test_numbers_at_the_edge_are_read(number: str) -> None:
    found = strict_json.parse_foreign(f'{{"a": {number}}}'.encode(), "x")
    assert same(found, {"a": float(number)})
