"""Sampled texts written as training data, and read back."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.training.sampled_file import check, write_rows
from npt_fast.training.text_files import read_contents
from tests.training import runs, tiny
from tests.training.runs import umask


def ids_of(tokenizer: Any, *texts: str) -> Any:
    return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids for text in texts])


def test_rows_are_read_back(tmp_path: Path) -> None:
    """With the tokens that separate documents, and without a second BOS in front."""
    tokenizer = tiny.bos_tokenizer()
    ids = ids_of(
        tokenizer, '<bos>ab "c"\n', "<bos>xx<eos><bos>yy\\", "abc<eos>de\u00e9", "ab<bos>cdefg"
    )
    path = tmp_path / "a.jsonl"
    with umask(0o027):
        report = write_rows(ids, tokenizer, path)
    texts = list(read_contents(SourceFile.of(path)))
    assert texts == ['ab "c"\n', "xx<eos><bos>yy\\", "abc<eos>de\u00e9", "ab<bos>cdefg"]
    assert report == {"rows": 4, "tokens": 32, "same": 4}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_what_is_not_read_back(tmp_path: Path) -> None:
    """Half a character at the end is left out, and there may be nothing else."""
    tokenizer = tiny.tokenizer()
    whole = ids_of(tokenizer, "ab\u00e9")[0]
    ids = torch.stack([whole[:3], ids_of(tokenizer, "abc")[0], whole[[2, 2, 2]]])
    path = tmp_path / "a.jsonl"
    path.write_text("before")
    assert write_rows(ids, tokenizer, path) == {"rows": 3, "tokens": 9, "same": 1}
    rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert rows == ["ab", "abc", ""]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("before")
    ids = ids_of(tiny.tokenizer(), "abc" * 1000)
    with runs.file_size_limit(100), pytest.raises(npt.StorageError, match=r"a\.jsonl"):
        write_rows(ids, tiny.tokenizer(), path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, problem in (
        ("a.txt", r"must end in \.jsonl"),
        ("none/a.jsonl", "there is no folder"),
        ("folder.jsonl", "is a folder"),
    ):
        with pytest.raises(npt.DataError, match=problem):
            check(tmp_path / name)
    check(tmp_path / "a.jsonl")
