"""Windows cut from plain lists, and a tokenizer with one token per word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from npt_fast.training.token_windows import TokenWindows
from tests.training.texts import WORDS, texts_of

BOS, PAD = 0, 1


@cache
def real_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<bos>": BOS, "<pad>": PAD, **{f"w{n}": n + 2 for n in range(WORDS)}}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<bos>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")


class Words:
    """A tokenizer with one token per word that puts BOS before each text and keeps the texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.pad_token_id: int | None = PAD
        self.eos_token_id: int | None = None

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += texts
        return real_tokenizer()(texts, **options)


def ids(texts: Sequence[str]) -> list[int]:
    return list(chain.from_iterable([BOS, *(int(w[1:]) + 2 for w in t.split())] for t in texts))


def cut(tokens: list[int], length: int, stride: int) -> list[list[int]]:
    """The truth: windows in the order of the text, the last one not padded."""
    starts = list(range(0, len(tokens), stride))
    full = [tokens[at : at + length] for at in starts if at + length <= len(tokens)]
    tail = tokens[len(full) * stride :]
    covered = (len(full) - 1) * stride + length if full else 0
    if len(tail) >= (32 if length >= 32 else 2) and covered < len(tokens):
        return [*full, tail]
    return full


def plain(window: Mapping[str, torch.Tensor]) -> tuple[int, list[int]]:
    """Return number and tokens of a window, after checking and removing its padding."""
    tokens, mask = window["input_ids"], window["attention_mask"]
    assert tokens.dtype == mask.dtype == window["window"].dtype == torch.int64
    assert tokens.shape == mask.shape and tokens.ndim == 1 and window["window"].ndim == 0
    length = int(mask.sum())
    assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
    assert set(tokens[length:].tolist()) <= {PAD}
    return int(window["window"]), tokens[:length].tolist()


def take(stream: TokenWindows | Iterator[Any], count: int) -> list[tuple[int, list[int]]]:
    return [plain(window) for window in islice(stream, count)]


def stream(source: str | Path, **options: Any) -> TokenWindows:
    tokenizer = options.pop("tokenizer", None) or Words()
    return TokenWindows(str(source), tokenizer, **{"max_length": 8, "block": 4, **options})


def epochs(source: Path, count: int, **options: Any) -> list[list[int]]:
    """Return the numbers of the windows in their order, by epoch."""
    one = len(cut(ids(texts_of(source)), 8, 8))
    windows = iter(stream(source, **options))
    return [[number for number, _ in take(windows, one)] for _ in range(count)]
