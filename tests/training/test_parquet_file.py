"""Strings of Parquet files in every encoding that pyarrow writes, and damaged files."""

from __future__ import annotations

import io
from itertools import islice
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from npt_fast.training import parquet_file
from npt_fast.training.parquet_file import parquet_columns, parquet_values

TEXTS = [None if n % 50 == 7 else f"é{n} " * (n % 30) for n in range(700)]

WRITERS: list[dict[str, Any]] = [
    {},
    {"use_dictionary": False},
    {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}},
    {"data_page_version": "2.0", "compression": "zstd", "data_page_size": 300},
    {"compression": "none", "dictionary_pagesize_limit": 500},
    {"row_group_size": 33, "compression": "gzip", "write_page_checksum": True},
]


def written(column: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    table = pa.table({"n": pa.array(range(len(column)), pa.int32()), "text": column})
    parquet.write_table(table, file, **options)
    return file.getvalue()


def values(content: bytes) -> list[Any]:
    file = io.BytesIO(content)
    assert parquet_columns(file) == {"n": "int", "text": "str"}
    return list(parquet_values(file, "text", 1000))


@pytest.mark.parametrize("options", WRITERS, ids=str)
@pytest.mark.parametrize(
    "type", [pa.string(), pa.large_string(), pa.string_view(), "a dictionary"], ids=str
)
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_every_encoding(
    monkeypatch: pytest.MonkeyPatch, type: Any, options: dict[str, Any], at_once: int
) -> None:
    monkeypatch.setattr(parquet_file, "_AT_ONCE", at_once)
    plain = pa.array(TEXTS)
    column = plain.dictionary_encode() if type == "a dictionary" else plain.cast(type)
    if type == "a dictionary" and "column_encoding" in options:
        pytest.skip("pyarrow does not read it")
    assert values(written(column, **options)) == TEXTS


def test_no_rows() -> None:
    assert values(written(pa.array([], pa.string()))) == []


@pytest.mark.parametrize(
    ("column", "kind"),
    [([1, 2], "int"), ([0.5], "double"), ([b"a"], "binary"), ([["a"]], "list<element: string>")],
)
def test_a_column_of_another_type(column: list[Any], kind: str) -> None:
    assert parquet_columns(io.BytesIO(written(pa.array(column))))["text"] == kind


def test_two_columns_of_a_name() -> None:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), file)
    with pytest.raises(ValueError, match="2 columns named text"):
        next(parquet_values(file, "text", 1000))


MESSAGE = {"role": pa.string(), "content": pa.string(), "weight": pa.float64(), "name": pa.null()}
CHATS: list[Any] = [
    None
    if n % 50 == 7
    else [
        {
            "role": ("user", "é")[m % 2],
            "content": None if n % 20 == 3 else f"é{n} {m}" * (n % 30),
            "weight": m / 2,
            "name": None,
        }
        for m in range(n % 5)
    ]
    for n in range(700)
]


def chats(rows: list[Any] = CHATS, list_of: Any = pa.list_, **changes: Any) -> Any:
    return pa.array(rows, list_of(pa.struct({**MESSAGE, **changes})))


@pytest.mark.parametrize("options", [w for w in WRITERS if "column_encoding" not in w], ids=str)
@pytest.mark.parametrize("list_of", [pa.list_, pa.large_list])
@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_chats(list_of: Any, text: Any, options: dict[str, Any]) -> None:
    file = io.BytesIO(written(chats(list_of=list_of, content=text), **options))
    assert parquet_columns(file) == {"n": "int", "text": "list"}
    assert list(parquet_values(file, "text", 1000)) == CHATS


@pytest.mark.parametrize("changes", [{"name": pa.list_(pa.string())}, {"name": pa.binary()}])
def test_messages_with_other_fields(changes: dict[str, Any]) -> None:
    kind = parquet_columns(io.BytesIO(written(chats(**changes))))["text"]
    assert kind.startswith("list<element: struct<role: string, ")


def test_chats_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(content: bytes) -> int:
        return len(list(parquet_values(io.BytesIO(content), "text", 1000)))

    long = [[{"role": "a", "content": "x" * 499}] * 2]
    assert read(written(chats(long))) == 1
    with pytest.raises(ValueError, match="a chat in row group 0 has over 1,000 characters"):
        read(written(chats([[*long[0], {"role": "a"}]])))
    short = [[{"role": ""}] * 40] * 30
    assert read(written(chats(short))) == 30
    for limit, value in ("_MOST_VALUES", 4000), ("_ROWS_PER_BYTE", -999), ("LARGEST_GROUP", 99):
        with monkeypatch.context() as patch:
            patch.setattr(parquet_file, limit, value)
            with pytest.raises(ValueError, match=r"row group 0 has .* bytes and .* values, over"):
                read(written(chats(short)))
    monkeypatch.setattr(parquet_file, "_MOST_VALUES", 4000)
    assert read(written(chats(short), row_group_size=10)) == 30
    monkeypatch.setattr(parquet_file, "_MOST_MESSAGES", 39)
    with pytest.raises(ValueError, match="a chat in row group 0 has over 39 messages"):
        read(written(chats(short), row_group_size=10))
    with pytest.raises(ValueError, match="messages in the column text have over 20 fields"):
        read(written(chats(**{f"x{n}": pa.int8() for n in range(17)})))


def test_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    assert values(written(pa.array(["x" * 1000]))) == ["x" * 1000]
    with pytest.raises(ValueError, match="a text in row group 0 has over 1,000 characters"):
        values(written(pa.array(["x" * 1001])))
    monkeypatch.setattr(parquet_file, "LARGEST", 5000)
    few, many = [f"{n}" * 300 for n in range(4)], [f"{n}" * 300 for n in range(40)]
    assert values(written(pa.array(few))) == few
    with pytest.raises(ValueError, match=r"column text of row group 0 needs .* bytes at once"):
        values(written(pa.array(many)))
    assert values(written(pa.array(many), row_group_size=4)) == many
    # the page holds the repeated text once
    assert values(written(pa.array(few * 10))) == few * 10


@settings(max_examples=300)
@given(
    content=st.sampled_from(
        [written(pa.array(TEXTS[:100]), **options) for options in WRITERS]
        + [written(chats(CHATS[:100]), **WRITERS[n]) for n in (0, 1, 4, 6)]
    ),
    changes=st.lists(
        st.tuples(st.integers(0, 1500), st.booleans(), st.integers(0, 255)), min_size=1, max_size=4
    ),
)
def test_a_damaged_file_is_an_error_at_most(
    content: bytes, changes: list[tuple[int, bool, int]]
) -> None:
    """No damaged file ends the process, and none yields more texts than it claims to have."""
    damaged = bytearray(content)
    for at, from_the_end, byte in changes:
        damaged[(len(damaged) - 1 - at if from_the_end else at) % len(damaged)] = byte
    try:
        file = io.BytesIO(damaged)
        if parquet_columns(file)["text"] in ("str", "list"):
            # a page may say that it has 2^31
            for value in islice(parquet_values(file, "text", 1000), 1000):
                assert not isinstance(value, str) or len(value) <= 1000
    except Exception as error:
        assert not isinstance(error, (AssertionError, MemoryError, RecursionError))
