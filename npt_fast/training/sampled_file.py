"""A sampled text as a file of training data, which people can read, change and keep."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from npt_fast.checkpoint.publish import disk_errors
from npt_fast.checkpoint.replaced_file import replacing
from npt_fast.errors import DataError
from npt_fast.hf.tokenizer import encode, library_errors
from npt_fast.paths import is_directory, path_errors, user_path
from npt_fast.training.sampling import front

_SUFFIX = ".jsonl"


def check(given: str | Path) -> None:
    """Check that rows can be written to a file.

    Raises:
        DataError: the name has another ending, or there is no such folder.
    """
    path = user_path(given)
    if path.suffix != _SUFFIX:
        raise DataError(f"{path}: the name must end in {_SUFFIX}, or --data cannot read the file")
    with path_errors(path, DataError):
        if not is_directory(path.parent):
            raise DataError(f"{path}: cannot be written: there is no folder {path.parent}")
        if is_directory(path):
            raise DataError(f"{path}: is a folder; name a file")


def write_rows(ids: Tensor, tokenizer: Any, given: str | Path) -> dict[str, int]:
    """Write rows of tokens as texts, one JSON object a line, in one step.

    A text has its special tokens, since they separate documents; those that the tokenizer puts in
    front of a text by itself are left out, and so is a character that the end of a row cuts.

    Args:
        ids: ids of a text, ``(rows, max_length)``.
        tokenizer: the tokenizer that they belong to.
        given: file to write; one of that name is replaced.

    Returns:
        ``rows`` and ``tokens`` that were written, and ``same``: rows that the tokenizer reads back
        as the same ids.

    Raises:
        DataError: the file cannot be written.
        ModelError: the tokenizer cannot decode the ids.
        StorageError: the disk is full.
    """
    path = user_path(given)
    before = list(front(tokenizer))
    lines = []
    same = 0
    for row in ids.tolist():
        own = row[len(before) :] if row[: len(before)] == before else row
        with library_errors(f"{path}: the tokenizer cannot decode the text"):
            text = tokenizer.decode(own, clean_up_tokenization_spaces=False).rstrip("\ufffd")
        same += encode(tokenizer, text, add_special_tokens=False).input_ids == own if text else 0
        lines.append(json.dumps({"text": text}, ensure_ascii=False))
    with disk_errors(path, DataError), replacing(path) as temporary:
        with temporary.open("x", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
    return {"rows": len(lines), "tokens": ids.numel(), "same": same}
