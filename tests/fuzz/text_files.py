"""Files of text to train on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from npt_fast.training.documents import open_documents
from tests.fuzz import mutations
from tests.fuzz.shell_files import SCRIPT
from tests.fuzz.target import Target, fixed

_ROWS = [
    {"text": "the red house", "n": 1},
    {"text": "", "more": {"a": [None, 0.5]}},
    {"text": "é\n"},
]


def _documents(path: Path) -> list[str]:
    return [row["text"] for row in open_documents(str(path), seed=0)]


def _json_rows(path: Path) -> list[Any]:
    text = path.read_bytes().decode("utf-8-sig")
    decoder, rows, at = json.JSONDecoder(), [], 0
    while text[at:].strip(" \t\r\n"):
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n"))
        row, at = decoder.raw_decode(text, at)
        rows.append(row)
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows


def _same_json_texts(path: Path, found: list[str]) -> None:
    rows = _json_rows(path)
    assert found == [row if isinstance(row, str) else row["text"] for row in rows]


def _parquet_files(folder: Path) -> list[bytes]:
    rows = [[row["text"] for row in _ROWS] * 20, ["a", "b"], [str(n) for n in range(300)]]
    ways: list[dict[str, Any]] = [
        {}, {"compression": "zstd", "use_dictionary": False}, {"data_page_version": "2.0"},
        {"compression": "gzip", "row_group_size": 7},
    ]  # fmt: skip
    found = []
    for texts in rows:
        for way in ways:
            file = io.BytesIO()
            table = pa.table({"n": list(range(len(texts))), "text": texts})
            pq.write_table(table, file, **way)
            found.append(file.getvalue())
    return found


def _same_parquet_texts(path: Path, found: list[str]) -> None:
    empty = not path.stat().st_size  # a file without documents
    assert found == ([] if empty else pq.read_table(path, columns=["text"])["text"].to_pylist())


def _same_paragraphs(path: Path, found: list[str]) -> None:
    assert " ".join(found).split() == path.read_bytes().decode().split()


_LINES = "".join(json.dumps(row) + "\n" for row in _ROWS)


TARGETS = [
    Target("jsonl", "text.jsonl", mutations.JSON_LINES, fixed(_LINES), _documents,
           _same_json_texts),
    Target("json", "text.json", mutations.JSON,
           fixed(json.dumps(_ROWS), json.dumps(_ROWS, indent=1)), _documents, _same_json_texts),
    Target("parquet", "text.parquet", mutations.BINARY, _parquet_files, _documents,
           _same_parquet_texts),
    Target("txt", "text.txt", mutations.TEXT, fixed(SCRIPT, "a\n\nb\n\n\n c"), _documents,
           _same_paragraphs),
]  # fmt: skip
