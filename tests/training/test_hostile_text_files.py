"""Hostile files of text, each in a process whose memory and time are measured."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.training.text_files import LONGEST
from tests.training.texts import texts_of

PROGRAM = """
import os, resource, sys, time
import torch  # which datasets would load at the first file
from npt_fast.errors import DataError
from npt_fast.training.documents import open_documents

for path in sys.stdin:
    if os.fork():
        if os.wait()[1]:
            print(0, 0, "died", flush=True)
        continue
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        count = sum(1 for _ in zip(range(2000), open_documents(path[:-1], seed=0)))
        said = f"{count} rows"
    except DataError as error:
        said = str(error)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(memory, time.process_time() - begun, said, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def reader() -> Iterator[subprocess.Popen[str]]:
    """Start a reader that forks for each file it is told to read, after loading the libraries."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=pipe, stdout=pipe, text=True
    ) as process:
        yield process


def attack(reader: subprocess.Popen[str], path: Path) -> str:
    """Return what the reader says of a file, within 5 s of CPU time and 256 MB."""
    assert reader.stdin and reader.stdout
    reader.stdin.write(f"{path}\n")
    reader.stdin.flush()
    memory, seconds, said = reader.stdout.readline().split(" ", 2)
    assert int(memory) < 256 and float(seconds) < 20
    return said


def parquet(path: Path, texts: Any, **options: Any) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet as pq

    pq.write_table(pa.table({"text": texts}), path, compression="zstd", **options)


def lying_parquet(path: Path) -> None:
    """Write a file whose footer says that a page of 100 MB has 0 bytes."""
    parquet(path, ["x" * 100_000_000], use_dictionary=False)
    content = path.read_bytes()
    from pyarrow import parquet as pq

    size = pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
    number, groups = 2 * size, []
    while number:
        groups.append(number & 127 | 128)
        number >>= 7
    true = bytes([*groups[:-1], groups[-1] & 127])
    false = b"\x80" * (len(true) - 1) + b"\0"
    path.write_bytes(content.replace(true, false))
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 0


def contradicting_parquet(path: Path) -> None:
    """Write a file whose schema forbids missing texts, while a column's statistics allow them."""
    parquet(path, ["a", None, "b"])
    optional, required = b"\x15\x0c\x25\x02\x18\x04text", b"\x15\x0c\x25\x00\x18\x04text"
    content = path.read_bytes()
    assert content.count(optional) == 1
    path.write_bytes(content.replace(optional, required))


def sparse(path: Path) -> None:
    """Write 1 GiB of zero bytes that takes no space."""
    with path.open("wb") as file:
        file.truncate(1 << 30)


ATTACKS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "deep lines": (
        "a.jsonl",
        lambda path: path.write_text('{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        "row 0: nested more than 100 deep",
    ),
    "deep objects without an end": (
        "a.jsonl",
        lambda path: path.write_text('{"text": ' * 3_000_000),
        "row 0: nested more than 100 deep",
    ),
    "a deep array": (
        "a.json",
        lambda path: path.write_text("[" * 3_000_000),
        "row 0: not a JSON object",
    ),
    "empty lists": (
        "a.json",
        lambda path: path.write_text('[{"text": "a", "n": [' + "[]," * 5_000_000 + "1]}]"),
        "row 0: an object of more than 1,000,000 values",
    ),
    "short strings": (
        "a.jsonl",
        lambda path: path.write_text('{"text": "a", "n": [' + '"āb",' * 2_600_000 + "1]}"),
        "row 0: an object of more than 1,000,000 values",
    ),
    "quotes": ("a.jsonl", lambda path: path.write_text('"' * 16_000_000), "row 0: not a JSON"),
    "backslashes": (
        "a.jsonl",
        lambda path: path.write_text('{"text": "' + "\\" * 40_000_000),
        "row 0: an object of over 16,777,216 characters",
    ),
    "a line of wide characters": (
        "a.jsonl",
        lambda path: path.write_text('{"text": "' + "😀" * 17_000_000),
        "row 0: an object of over 16,777,216 characters",
    ),
    "a long text": (
        "a.jsonl",
        lambda path: path.write_text('{"text": "😀' + "x" * (LONGEST + 1) + '"}'),
        "row 0: a text of more than 8,388,608 characters",
    ),
    "many keys": (
        "a.jsonl",
        lambda path: path.write_text(
            "{" + ",".join(f'"{n}":1' for n in range(400_000)) + "}", newline=""
        ),
        "prompt and completion, or input_ids, has 0 (int), 1 (int)",
    ),
    "a paragraph without an end": (
        "a.txt",
        sparse,
        "a paragraph of more than 8,388,608 characters",
    ),
    "a paragraph of wide characters": (
        "a.md",
        lambda path: path.write_text("😀" * 9_000_000),
        "a paragraph of more than 8,388,608 characters",
    ),
    "white space": ("a.jsonl", lambda path: path.write_text(" " * 50_000_000), "0 rows"),
    "zero bytes": ("a.jsonl", sparse, "row 0: not a JSON object"),
    "zero bytes for parquet": ("a.parquet", sparse, "a.parquet: cannot be read"),
    "one text of many rows": (
        "a.parquet",
        lambda path: parquet(path, ["x" * 300_000] * 1500),
        "1500 rows",
    ),
    "one text of many rows, a dictionary": (
        "a.parquet",
        lambda path: parquet(path, dictionary("x" * 300_000, 4000)),
        "2000 rows",
    ),
    "texts that begin alike": (
        "a.parquet",
        lambda path: parquet(
            path,
            ["x" * 300_000] * 900,
            use_dictionary=False,
            column_encoding={"text": "DELTA_BYTE_ARRAY"},
        ),
        "900 rows",
    ),
    "a page of 100 MB": (
        "a.parquet",
        lambda path: parquet(path, ["x" * 100_000_000], use_dictionary=False),
        "row group 0 needs 100,000,010 bytes at once, over 67,108,864 are refused",
    ),
    "a page of 100 MB that is said to be small": (
        "a.parquet",
        lying_parquet,
        "row group 0 needs 100,000,010 bytes at once, over 67,108,864 are refused",
    ),
    "8 million blank rows": (
        "a.parquet",
        lambda path: parquet(path, dictionary("", 8_000_000)),
        "8,000,000 rows in ",
    ),
    "one text of many messages": (
        "a.parquet",
        lambda path: parquet(path, chat(dictionary("x" * 300_000, 4_000_000))),
        "over 134,217,728 and ",
    ),
    "a chat of a long text, again and again": (
        "a.parquet",
        lambda path: parquet(path, chat(dictionary("x" * 300_000, 400_000))),
        "a chat in row group 0 has over 8,388,608 characters",
    ),
    "a chat of a million blank messages": (
        "a.parquet",
        lambda path: parquet(path, chat(dictionary("", 900_000))),
        "a chat in row group 0 has over 100,000 messages",
    ),
    "statistics that contradict the schema": ("a.parquet", contradicting_parquet, "a.parquet: "),
    "a long text in a page": (
        "a.parquet",
        lambda path: parquet(path, ["😀" + "x" * 60_000_000]),
        "a text in row group 0 has over 8,388,608 characters",
    ),
    "a pipe": ("a.txt", os.mkfifo, "a.txt: not a regular file"),
    "a pipe of parquet": ("a.parquet", os.mkfifo, "a.parquet: not a regular file"),
    "a device": ("a.jsonl", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a link to nothing": (
        "a.jsonl",
        lambda path: path.symlink_to("nothing"),
        "a.jsonl: cannot be opened: No such file",
    ),
    "a link to itself": (
        "a.jsonl",
        lambda path: path.symlink_to(path),
        "a.jsonl: Too many levels of symbolic links",
    ),
}


def dictionary(text: str, rows: int) -> Any:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))


def chat(contents: Any) -> Any:
    """One row whose messages have these contents."""
    import pyarrow as pa

    messages = pa.StructArray.from_arrays([contents], ["content"])
    return pa.ListArray.from_arrays(pa.array([0, len(messages)], pa.int32()), messages)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_file(reader: subprocess.Popen[str], tmp_path: Path, name: str) -> None:
    file, make, message = ATTACKS[name]
    make(tmp_path / file)
    assert message in attack(reader, tmp_path / file)


@pytest.fixture
def bound_socket(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "a.txt"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        yield path


def test_a_socket(bound_socket: Path) -> None:
    for source in (bound_socket, bound_socket.parent):
        with pytest.raises(npt.DataError, match=r"a\.txt: (cannot be opened|not a regular file)"):
            texts_of(source)


@pytest.mark.parametrize("name", ["a pipe", "a device", "a link to nothing", "a link to itself"])
def test_what_is_no_file_in_a_folder_is_not_left_out(tmp_path: Path, name: str) -> None:
    file, make, message = ATTACKS[name]
    (tmp_path / "0.txt").write_text("text")
    make(tmp_path / file)
    for source in (tmp_path, tmp_path / "*"):
        with pytest.raises(npt.DataError) as raised:
            texts_of(source)
        assert message in str(raised.value)


def test_devices_that_are_named() -> None:
    for device in ("/dev/zero", "/dev/null", "/dev/stdin"):
        with pytest.raises(npt.DataError, match=rf"{device}: not a regular file"):
            texts_of(Path(device))


def test_links_to_folders_in_circles(tmp_path: Path) -> None:
    """Two links to folders would be followed 2^40 ways."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("text")
    for name in ("c", "d"):
        (tmp_path / "a" / name).symlink_to("..")
    for source in (tmp_path, tmp_path / "**" / "*.txt", tmp_path / "*" / "*.txt"):
        assert texts_of(source) == ["text"]
