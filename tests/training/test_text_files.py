"""Files of text against other readers."""

from __future__ import annotations

import json
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npt_fast as npt
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.training import text_files
from npt_fast.training.documents import open_documents
from tests.training.texts import texts_of

ALPHABET = 'ab \n\t"\\{}[],:é語😀\u2028\x7f'


def texts(path: Path) -> list[str]:
    return list(text_files.read_contents(SourceFile.of(path)))


# ---- their documents


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read 7 characters at a time, so that short texts have pieces that end at any place."""
    monkeypatch.setattr(text_files, "_PIECE", 7)


def dumped(rows: list[dict[str, Any]], form: str, ascii: bool) -> str:
    dump = partial(json.dumps, ensure_ascii=ascii)
    match form:
        case "lines":
            return "".join(dump(row) + "\n" for row in rows)
        case "objects":
            return " \r\n".join(dump(row, indent=1) for row in rows)
        case "array":
            return dump(rows)
        case "tight array":
            return dump(rows, separators=(",", ":"))
    return " \n" + dump(rows, indent=2) + "\n\n"


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("form", ["lines", "objects", "array", "tight array", "indented array"])
@settings(max_examples=60)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"text": st.text(ALPHABET, max_size=30)},
            optional={
                "a": st.recursive(
                    st.none() | st.booleans() | st.floats() | st.integers() | st.text(ALPHABET),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(ALPHABET), inner),
                    max_leaves=5,
                )
            },
        ),
        max_size=5,
    ),
    ascii=st.booleans(),
)
def test_json_of_every_form(
    tmp_path_factory: pytest.TempPathFactory, form: str, rows: list[dict[str, Any]], ascii: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "a.json"
    path.write_text(dumped(rows, form, ascii), encoding="utf-8", newline="")
    assert texts(path) == [row["text"] for row in rows]


@pytest.mark.usefixtures("small_pieces")
@settings(max_examples=200)
@given(text=st.text("ab\n\r é😀", max_size=60))
def test_paragraphs(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    assert texts(path) == [part for part in lines.split("\n\n") if part]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt", ".md", ".parquet"])
def test_the_documents_are_those_of_the_loaders_of_datasets(tmp_path: Path, kind: str) -> None:
    rng = random.Random(0)
    rows = [
        {"n": n, "text": "".join(rng.choices("abé語 \n", k=rng.randint(1, 400))), "m": [0.5] * 9}
        for n in range(3000)
    ]
    path = tmp_path / f"a{kind}"
    match kind:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            truth = datasets.IterableDataset.from_json(str(path))
        case ".json":
            path.write_text(json.dumps(rows, ensure_ascii=False))
            truth = datasets.IterableDataset.from_json(str(path))
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path, batch_size=700)
            truth = datasets.IterableDataset.from_parquet(str(path))
        case _:
            path.write_text("\n\n".join(row["text"] for row in rows))
            truth = datasets.IterableDataset.from_text(str(path), sample_by="paragraph")
    expected = [row["text"] for row in truth]
    assert len(expected) >= 3000
    assert texts_of(path) == expected


def test_a_byte_order_mark_before_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert texts(path) == ["a"]


@pytest.mark.parametrize("data", [b"\xef", b"\xef\xbb", b"\xef\xbb\xef\xbb\xbf"])
def test_a_part_of_a_byte_order_mark_is_no_text(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(npt.DataError):
        texts_of(path)


def test_strings_in_an_array_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('["a", "b"]')
    assert texts(path) == ["a", "b"]


# ---- what is refused

BAD_JSON = {
    '{"text": "a"}\n{"text": "b"\n{"text": "c"}\n': "row 1: not valid JSON",
    '{"text": "a"}\n"b"\n': "row 1: not a JSON object",
    '{"text": "a"}\n[1]\n': "row 1: not a JSON object",
    "5": "row 0: not a JSON object",
    "]": "row 0: not a JSON object",
    '[{"text": "a"},]': "row 1: not a JSON object",
    '[{"text": "a"} {"text": "b"}]': "row 1: a comma is missing before it, or the array ends",
    '[{"text": "a"}': "row 1: a comma is missing before it, or the array ends",
    '[{"text": "a"}]\n{"text": "b"}': "row 1: the array has ended before it",
    '{"text": "a}': "row 0: not valid JSON",
    '{"text": "a\\': "row 0: not valid JSON",
    '{"text": "a\nb"}': "row 0: not valid JSON",
    '{"text": "a", "text": "b"}': "row 0: a key occurs twice",
    '{"text": "\\ud800"}': "row 0: its text holds half a character",
    '{"text": "a", "n": 1' + "0" * 5000 + "}": "row 0: Exceeds the limit",
    '{"n": 1}': r"row 0 needs .*, has n \(int\)",
    "{}": "row 0 needs .*, has nothing",
    '{"text": "a"}\n{"text": null}': r"row 1 needs .*, has text \(NoneType\)",
    '{"text": "a"}\n{"text": ["b"]}': r"row 1 needs .*, has text \(list\)",
    '{"text": "a"}\n{"n": 2}': r"row 1 needs .*, has n \(int\)",
}


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda content: content[:30])
def test_what_is_no_rows_of_json(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(npt.DataError, match=rf"a\.jsonl: .*{BAD_JSON[content]}") as raised:
        texts_of(path)
    assert len(str(raised.value)) < 300 + len(str(path))


def test_a_compressed_file_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\x1f\x8b\x08" + bytes(range(256)))
    with pytest.raises(npt.DataError, match=r"it is compressed with gzip; decompress it"):
        texts_of(path)


@pytest.mark.parametrize("change", ["truncated", "replaced", "removed"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".parquet"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, kind: str, change: str) -> None:
    path = tmp_path / f"a{kind}"
    rows = [f"{n} " + "x" * 2000 for n in range(3000)]
    match kind:
        case ".jsonl":
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        case ".txt":
            path.write_text("\n\n".join(rows))
        case _:
            datasets.Dataset.from_dict({"text": rows}).to_parquet(path)
    documents = iter(open_documents(str(path), seed=0))
    assert next(documents)["text"] == rows[0]
    if change == "truncated":
        os.truncate(path, 3_000_000)
    elif change == "replaced":
        (tmp_path / "b").write_bytes(path.read_bytes())
        (tmp_path / "b").replace(path)
    else:
        path.unlink()
    with pytest.raises(npt.DataError, match=rf"a{kind}: (changed while|cannot be)"):
        list(documents)
