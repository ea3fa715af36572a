"""Random texts, and files that hold them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from npt_fast.training.documents import open_documents

WORDS = 3000
"""Number of words in the vocabulary: ``w0``, ``w1``, and so on."""


def random_texts(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Return texts in which each word is new, so that the words of a window tell its place."""
    rng, word = random.Random(seed), iter(range(WORDS))
    return [" ".join(f"w{n}" for n in islice(word, rng.randint(1, longest))) for _ in range(count)]


def write_texts(path: Path, texts: Sequence[Any], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps({column: t, "n": 1}) + "\n" for t in texts))
        case ".json":
            path.write_text(json.dumps([{column: t} for t in texts]))
        case ".parquet":
            parquet.write_table(pyarrow.table({"n": list(range(len(texts))), column: texts}), path)
        case _:
            path.write_text("\n\n".join(texts))
    return path


def texts_of(source: str | Path) -> list[str]:
    """Return the documents of a source."""
    return [row["text"] for row in open_documents(str(source), seed=0)]
