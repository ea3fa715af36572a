"""Read a column of strings, or of chats, from a Parquet file in bounded memory.

The metadata of row groups may be wrong. The size of a decompressed page is in the page's header,
and pyarrow allocates by that; so all headers of a row group are checked before it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import compute, parquet

LARGEST = 1 << 26
"""Largest size of a decompressed page in bytes; a page is decompressed at once."""
LARGEST_GROUP = 1 << 27
"""Largest size of a decompressed row group of chats in bytes; one chat may have all of it, and
takes three times as much. `datasets` writes groups of 100 MB."""

_AT_ONCE = 1 << 24  # bytes of text decoded at once, unless one text has more
_PIECE = 1 << 20  # bytes read at once
_MOST_ROWS = 256  # rows decoded at once
_FEW_ROWS = 1_000_000  # rows that any file may have
_ROWS_PER_BYTE = 10  # further rows per byte of the file; 5 million empty texts have 400
_CONTAINER = 100_000  # columns, or row groups, that a file may say it has
_MOST_MESSAGES = 100_000  # in a chat
_MOST_FIELDS = 20  # of a message; the footer is read once for each
_MOST_VALUES = 1 << 23  # fields of messages in a row group, of 16 bytes; a page may say any number


def parquet_columns(stream: BinaryIO) -> dict[str, str]:
    """Return the types of all columns by name.

    ``str`` and ``list`` are those that `parquet_values` reads: texts, and lists of messages whose
    fields are texts, numbers or truth values.

    Raises:
        Exception: errors of pyarrow, of many types, for a broken file.
    """
    return {field.name: _kind(field.type) for field in _opened(stream).schema_arrow}


def parquet_values(
    stream: BinaryIO, column: str, longest: int
) -> Iterator[str | list[dict[str, Any]] | None]:
    """Yield the values of a column of texts or of lists of messages.

    Args:
        stream: the file.
        column: name of the column.
        longest: characters that a value may have.

    Raises:
        ValueError: a page, a row group or a value is too large.
        Exception: errors of pyarrow, of many types, for a broken file.
    """
    file = _opened(stream)
    names = [file.schema.column(n).path for n in range(len(file.schema))]
    count = max(names.count(column), file.schema_arrow.names.count(column))
    if count > 1:
        raise ValueError(f"it has {count} columns named {column}")
    if column in names:
        yield from _values(file, stream, names.index(column), column, longest)
        return
    leaves = {n: path for n, path in enumerate(names) if path.startswith(f"{column}.")}
    if len(leaves) > _MOST_FIELDS:
        raise ValueError(f"messages in the column {column} have over {_MOST_FIELDS} fields")
    yield from _chats(stream, leaves, column, longest)


def _opened(stream: BinaryIO, **options: Any) -> Any:
    return parquet.ParquetFile(
        stream,
        buffer_size=_PIECE,  # otherwise a row group is read at once
        pre_buffer=False,
        thrift_container_size_limit=_CONTAINER,
        thrift_string_size_limit=_PIECE,
        **options,
    )


def _kind(type: Any) -> str:
    """Return the Python type of a column's values, or else the name of the Arrow type."""
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        message = type.value_type
        if (
            pa.types.is_struct(message)
            and len(message)
            and all(_is_plain(field.type) for field in message)
        ):
            return "list"
    if pa.types.is_dictionary(type):
        type = type.value_type
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if any(is_one(type) for is_one in strings):
        return "str"
    return "int" if pa.types.is_integer(type) else str(type)[:80]


def _is_plain(type: Any) -> bool:
    """Whether values are texts, or have 8 bytes or fewer."""
    types = pa.types
    numbers = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    return _kind(type) == "str" or any(is_one(type) for is_one in numbers)


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
        pages = [size for size, _ in _pages(stream, chunk)]
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


def _chats(
    stream: BinaryIO, leaves: Mapping[int, str], column: str, longest: int
) -> Iterator[list[dict[str, Any]] | None]:
    """Yield lists of messages, whose fields have these numbers and paths."""
    # texts that repeat stay in dictionaries: a page of few bytes may repeat one for ever
    file = _opened(stream, read_dictionary=list(leaves.values()))
    most = _FEW_ROWS + _ROWS_PER_BYTE * stream.seek(0, 2)
    groups = zip(*(_chunks(stream, leaf) for leaf in leaves), strict=True)
    for group, chunks in enumerate(groups):
        pages = [page for chunk in chunks for page in _pages(stream, chunk)]
        held, values = sum(size for size, _ in pages), sum(count for _, count in pages)
        most -= values
        if held > LARGEST_GROUP or values > _MOST_VALUES or most < 0:
            raise ValueError(
                f"the column {column} of row group {group} has {held:,} bytes and {values:,} "
                f"values, over {LARGEST_GROUP:,} and {min(_MOST_VALUES, most + values):,} are "
                "refused; write it with fewer rows to a row group"
            )
        for batch in file.iter_batches(_MOST_ROWS, [group], [column], use_threads=False):
            found = batch.column(0)
            found.validate(full=True)  # a damaged file may point behind a dictionary
            starts = found.offsets.to_numpy()
            characters = _before_each(found.values)[starts]
            if max(np.diff(characters), default=0) > longest:
                raise ValueError(f"a chat in row group {group} has over {longest:,} characters")
            if max(np.diff(starts), default=0) > _MOST_MESSAGES:
                raise ValueError(
                    f"a chat in row group {group} has over {_MOST_MESSAGES:,} messages"
                )
            for row in found:
                yield row.as_py()


def _before_each(messages: Any) -> Any:
    """Return the number of characters before each message, and before the end."""
    total = np.zeros(len(messages) + 1, np.int64)
    for field in messages.flatten():
        if pa.types.is_dictionary(field.type):
            lengths = compute.utf8_length(field.dictionary).take(field.indices)
            total[1:] += compute.fill_null(lengths, 0).to_numpy(zero_copy_only=False)
    return total.cumsum()


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


def _pages(stream: BinaryIO, chunk: _Struct) -> Iterator[tuple[int, int]]:
    """Yield the size in bytes, decompressed, and the number of values of each page of a chunk."""
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
        # of data of either version, or of a dictionary
        counts = [header.get((field, _STRUCT), {}).get((1, _I32), 0) for field in (5, 7, 8)]
        yield size, max(counts)
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
