"""Read a column of strings from a Parquet file in bounded memory.

The metadata of row groups may be wrong. The size of a decompressed page is in the page's header,
and pyarrow allocates by that; so all headers of a row group are checked before it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import compute, parquet

LARGEST = 1 << 26
"""Largest size of a decompressed page in bytes; a page is decompressed at once."""

_AT_ONCE = 1 << 24  # bytes of text decoded at once, unless one text has more
_PIECE = 1 << 20  # bytes read at once
_MOST_ROWS = 256  # rows decoded at once
_FEW_ROWS = 1_000_000  # rows that any file may have
_ROWS_PER_BYTE = 10  # further rows per byte of the file; 5 million empty texts have 400
_CONTAINER = 100_000  # columns, or row groups, that a file may say it has


def parquet_values(
    stream: BinaryIO, column: str, longest: int
) -> tuple[dict[str, str], Iterator[str | None] | None]:
    """Open a column of strings.

    Args:
        stream: the file.
        column: name of the column.
        longest: characters that a value may have.

    Returns:
        The types of all columns by name, and the values of the column: None if there is no such
        column of strings.

    Raises:
        ValueError: a page or a value is too large; also while iterating.
        Exception: errors of pyarrow, of many types, for a broken file; also while iterating.
    """
    file = parquet.ParquetFile(
        stream,
        buffer_size=_PIECE,  # otherwise a row group is read at once
        pre_buffer=False,
        thrift_container_size_limit=_CONTAINER,
        thrift_string_size_limit=_PIECE,
    )
    schema = file.schema_arrow
    columns = {field.name: _kind(field.type) for field in schema}
    if columns.get(column) != "str":
        return columns, None
    names = [file.schema.column(n).path for n in range(len(file.schema))]
    if names.count(column) > 1:
        raise ValueError(f"it has {names.count(column)} columns named {column}")
    return columns, _values(file, stream, names.index(column), column, longest)


def _kind(type: Any) -> str:
    """Return the Python type of a column's values, or else the name of the Arrow type."""
    if pa.types.is_dictionary(type):
        type = type.value_type
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if any(is_one(type) for is_one in strings):
        return "str"
    return "int" if pa.types.is_integer(type) else str(type)[:80]


def _values(
    file: Any, stream: BinaryIO, index: int, column: str, longest: int
) -> Iterator[str | None]:
    shared = pa.types.is_dictionary(file.schema_arrow.field(column).type)
    chunks = _chunks(stream, index)
    size = stream.seek(0, 2)
    rows = max(file.metadata.num_rows, sum(chunk.get((5, _I64), 0) for chunk in chunks))
    if rows > _FEW_ROWS + _ROWS_PER_BYTE * size:
        raise ValueError(f"{rows:,} rows in {size:,} bytes; no texts are as short as that")
    for group, chunk in enumerate(chunks):
        pages = list(_pages(stream, chunk))
        # a column written as a dictionary keeps the texts of all its pages
        held = sum(pages) if shared else max(pages, default=0)
        if held > LARGEST:
            raise ValueError(
                f"the column {column} of row group {group} needs {held:,} bytes at once, over "
                f"{LARGEST:,} are refused; write it with fewer rows to a page and row group"
            )
        # a text that is in the page once may belong to many rows
        rows = max(1, min(_MOST_ROWS, _AT_ONCE // max(held, 1)))
        for batch in file.iter_batches(rows, [group], [column], use_threads=False):
            values = batch.column(0)
            values = values.dictionary_decode() if shared else values
            if pa.types.is_string_view(values.type):  # utf8_length does not support it
                values = values.cast(pa.large_string())
            if (compute.max(compute.utf8_length(values)).as_py() or 0) > longest:
                raise ValueError(f"a text in row group {group} has over {longest:,} characters")
            yield from values.to_pylist()


def _chunks(stream: BinaryIO, index: int) -> list[_Struct]:
    """Read a column's metadata in each row group; empty for groups without rows.

    pyarrow is not asked for it: damaged statistics there end the process.
    """
    # a file ends with the footer, its length in four bytes, and PAR1
    stream.seek(-8, 2)
    length = int.from_bytes(stream.read(4), "little")
    stream.seek(-8 - length, 2)
    chunks: list[_Struct] = []
    for group in _struct(stream).get((4, _LIST), ()):
        columns = group.get((1, _LIST), ())
        chunk = columns[index].get((3, _STRUCT), {}) if index < len(columns) else {}
        rows = group.get((3, _I64), 0)
        if rows and not chunk.keys() >= {(7, _I64), (9, _I64)}:
            raise ValueError(f"row group {len(chunks)} does not say where its pages are")
        chunks.append(chunk if rows else {})
    return chunks


def _pages(stream: BinaryIO, chunk: _Struct) -> Iterator[int]:
    """Yield the decompressed size in bytes of each page of a column in a row group."""
    if not chunk:
        return  # no rows: its offsets may lead nowhere
    begin = chunk[9, _I64]
    if 0 < chunk.get((11, _I64), 0) < begin:  # a dictionary comes before the data
        begin = chunk[11, _I64]
    end = begin + chunk[7, _I64]
    while begin < end:
        stream.seek(begin)
        header = _struct(stream)
        size, stored = header.get((2, _I32), -1), header.get((3, _I32), -1)
        if size < 0 or stored < 0:
            raise ValueError(f"the page at byte {begin} does not say its size")
        yield size
        begin = stream.tell() + stored


# The footer and the headers of pages are in Thrift's compact protocol.

_I32, _I64, _LIST, _STRUCT = 5, 6, 9, 12
_Struct = dict[tuple[int, int], Any]
"""Fields that are numbers, structs or lists of structs, by field number and type."""


def _struct(stream: BinaryIO, depth: int = 0) -> _Struct:
    """Read a struct; fields that neither are nor hold numbers are skipped."""
    found: _Struct = {}
    field = 0
    while head := _byte(stream):
        kind = head & 15
        field = field + (head >> 4) if head >> 4 else _number(stream)
        if kind not in (1, 2):  # true and false have no bytes after the head
            found[field, kind] = _value(stream, kind, depth + 1)
    return found


def _value(stream: BinaryIO, kind: int, depth: int) -> Any:
    if depth > 20:
        raise ValueError("the description of its pages is nested too deep")
    match kind:
        case 1 | 2 | 3:  # in a list, a truth value takes a byte
            _byte(stream)
        case 4 | 5 | 6:
            return _number(stream)
        case 7:
            stream.seek(7, 1)
            _byte(stream)
        case 8:
            stream.seek(_unsigned(stream), 1)
        case 9 | 10:
            head = _byte(stream)
            size = head >> 4 if head >> 4 < 15 else _unsigned(stream)
            values = (_value(stream, head & 15, depth + 1) for _ in range(size))
            return [value for value in values if isinstance(value, dict)]
        case 12:
            return _struct(stream, depth)
        case _:
            raise ValueError("the description of its pages has a field of unknown type")
    return None


def _byte(stream: BinaryIO) -> int:
    found = stream.read(1)
    if not found:
        raise ValueError("it ends within a page")
    return found[0]


def _unsigned(stream: BinaryIO) -> int:
    number = shift = 0
    while shift < 64:
        byte = _byte(stream)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
        shift += 7
    raise ValueError("a page's header holds a number of more than 64 bits")


def _number(stream: BinaryIO) -> int:
    found = _unsigned(stream)
    # Thrift's zigzag: 0, -1, 1, -2 are 0, 1, 2, 3
    return (found >> 1) ^ -(found & 1)
