"""Windows of tokens cut from a text, in a reproducible order that can be resumed anywhere.

Documents are tokenised, joined, and cut into windows; those of a sampled text, of a chat and of a
data set of token ids are tokens already.
The content of a window depends only on the text; the seed decides the order of the windows. A place
in the stream is a position of the documents' reader (kept by `datasets`) and the left-over tokens,
fewer than a window has, so that resuming does not read the text from its beginning.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from npt_fast.errors import DataError, ModelError, NPTError, OptionError
from npt_fast.hf.tokenizer import encode
from npt_fast.training.documents import WITHOUT_A_PATH, open_documents, reason
from npt_fast.training.rows import (
    Document,
    MissingContent,
    content_of,
    document_of,
    open_rows,
)
from npt_fast.training.self_text import SelfText

Window = dict[str, Tensor]
"""``input_ids``: int64 ``(max_length,)``. ``attention_mask``: likewise, 0 on padding. ``window``:
int64 scalar, the window's number in the order of the text, from 0."""

_BATCH = 256  # documents tokenised at once, enough for all threads of a fast tokenizer
_BATCH_TEXT = 1 << 18  # characters of a batch, unless one document has more: 300 bytes a token
_SHORTEST = 32  # tokens; a shorter last window is not worth training on
_REMEMBERED = 8192  # windows that loaders may read ahead of training


class _Place(NamedTuple):
    """A window of an epoch, and where to start reading to cut it.

    Attributes:
        epoch: number of the epoch, from 0.
        window: number of the window within the epoch, from 0.
        documents: position of the documents' reader.
        tokens: tokens left over from earlier documents, fewer than a window has.
        skip: number of tokens, first of `tokens` and then of the documents, before the window.
    """

    epoch: int
    window: int
    documents: Mapping[str, Any]
    tokens: list[int]
    skip: int


def _fits(position: Any, first: Any) -> bool:
    """Whether a reader's position has the structure of its first one, where None fits any value."""
    if isinstance(first, dict):
        return (
            isinstance(position, dict)
            and position.keys() == first.keys()
            and all(_fits(position[key], first[key]) for key in first)
        )
    if isinstance(first, list):
        return (
            isinstance(position, list)
            and len(position) == len(first)
            and all(map(_fits, position, first))
        )
    if isinstance(first, str):
        return bool(position == first)
    return first is None or (type(position) is type(first) and position >= 0)


class TokenWindows(IterableDataset[Window]):
    """Endless stream of windows; each epoch has the same windows in another order.

    Windows are shuffled within blocks, so that memory holds one block. An epoch that fits in one
    is kept there and tokenised only once, so its tensors come again: do not change them in place.
    Use it in the main process, with one iterator at a time. If several processes train, each reads
    the same stream.

    Args:
        source: source of the documents, as for `open_documents`.
        tokenizer: makes tokens of each document.
        max_length: tokens per window; the last window of an epoch may be padded.
        stride: tokens from the start of one window to the next; default `max_length`.
        seed: seed of the order.
        held_out: number of windows at the beginning of the text to keep from training.
        block: number of windows that are shuffled together.
        special_tokens: let the tokenizer add its special tokens to each document.
        sampled: a sampled text, in place of the documents that `source` would name.
        rows: a data set, likewise.
        text_column: column of the documents, as for `npt_fast.training.rows.content_of`.
        vocabulary: number of token ids that the model knows; None does not check them.
        start: result of `state_after`, to resume there.

    Attributes:
        held_out: number of windows held out: a tenth of a text that has no more than `held_out`.
        position: windows used before this stream, by training and by the fit of fresh layers.

    Raises:
        ValueError: a number is out of range, or `start` belongs to other settings or other data.
        DataError: the source cannot be read, or is too short; also while iterating.
        ModelError: the tokenizer makes a token that the model does not know; also while iterating.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        stride: int | None = None,
        seed: int = 42,
        held_out: int = 0,
        block: int = 2048,
        special_tokens: bool = True,
        sampled: SelfText | None = None,
        rows: Iterable[Any] | None = None,
        text_column: str | None = None,
        vocabulary: int | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        stride = max_length if stride is None else stride
        for name, value, least in (
            ("max_length", max_length, 1),
            ("stride", stride, 1),
            ("held_out", held_out, 0),
            ("block", block, 1),
        ):
            if value < least:
                raise OptionError(f"{name} must be at least {least}, got {value}")
        if stride > max_length:
            raise OptionError(f"stride must not exceed max_length {max_length}, got {stride}")
        self._source = source
        self._tokenizer = tokenizer
        self._column = None if source in WITHOUT_A_PATH else text_column
        self._vocabulary = vocabulary
        if sampled is not None:
            self._documents = open_rows(sampled.ids)
        elif rows is not None:
            self._documents = open_rows(rows)
        else:
            self._documents = open_documents(source, seed=seed, column=self._column)
        self._first_document = self._documents.state_dict()
        # number of the row that is read next, for messages; in the middle of a text nobody knows it
        self._row: int | None = 0
        key = self._first_key() if rows is not None else sampled and sampled.key
        self._settings = {
            "source": source,
            "max_length": max_length,
            "stride": stride,
            "seed": seed,
            "held_out": held_out,
            "block": block,
            # only if they are left out: states of before do not say, and added them
            **({} if special_tokens else {"special_tokens": 0}),
            **({} if key is None else {"text": key}),
            **({} if self._column is None else {"text_column": self._column}),
        }
        if start is not None and (field := self._misfit(start)):
            raise ValueError(f"cannot resume with this data: {field} is not as it was")

        self._special_tokens = special_tokens
        self._length = max_length
        self._shortest = min(_SHORTEST if max_length >= _SHORTEST else 2, max_length)
        self._stride = stride
        self._seed = seed
        self._block = block
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self._padding = next((i for i in candidates if i is not None and self._knows(i)), 0)
        self._held = self._hold_out(held_out)
        self.held_out = len(self._held)

        self.position = 0
        self._start = (0, self._beginning(0))
        if start is not None:
            place = _Place(*(start[name] for name in _Place._fields))
            documents = json.loads(start["documents"])
            if not _fits(documents, self._first_document):
                raise ValueError("cannot resume with this data: documents is not a position in it")
            self.position = start["windows"]
            self._start = start["before"], place._replace(documents=documents)
        # where the latest blocks start, and how many windows came before each
        self._marks = deque([self._start])

    def held_out_windows(self) -> list[Window]:
        """Return the held-out windows: full, not overlapping, numbered from -held_out to -1."""
        return list(self._held)

    def skip(self, windows: int) -> None:
        """Begin so many windows later."""
        self.position += windows

    def state_after(self, windows: int) -> dict[str, Any]:
        """Return the `start` from which another stream continues.

        Args:
            windows: number of windows that training has used, including those before `start`; at
                most the number yielded so far, and at least that minus 8192.

        Returns:
            Values of type str, int and list of int; ``windows`` is the argument.
        """
        marks = [mark for mark in self._marks if mark[0] <= windows]
        assert marks, f"the way back to window {windows} is forgotten"
        before, place = marks[-1]
        # only `datasets` knows what a position holds; as text, its 128-bit numbers fit anywhere
        documents = json.dumps(place.documents)
        numbers = {"windows": windows, "before": before}
        return {**self._settings, **numbers, **place._asdict(), "documents": documents}

    def accepts(self, state: Mapping[str, Any]) -> bool:
        """Whether a stream with these settings can start at `state`."""
        return isinstance(state, Mapping) and self._misfit(state) is None

    def _misfit(self, state: Mapping[str, Any]) -> str | None:
        for name in (*self._settings, "special_tokens", "text", "text_column"):
            if state.get(name) != self._settings.get(name):
                return name
        kinds = {"documents": str, "tokens": list}
        for name in ("windows", "before", *_Place._fields):
            if type(state.get(name)) is not kinds.get(name, int):
                return name
        return None

    def __iter__(self) -> Iterator[Window]:
        before, place = self._start
        passed = self.position - before  # windows of the first block that were used already
        # a second iterator starts where the first one did
        self._marks.clear()
        epoch: list[Window] = []  # stays empty unless an epoch fits in one block
        while True:
            block: list[Window] = []
            blocks = [(place, epoch)] if epoch else self._blocks(place)
            for place, block in blocks:
                self._remember(before, place)
                for index in self._order(place, len(block))[passed:]:
                    yield block[index]
                before += len(block)
                passed = max(0, passed - len(block))
            if place.window == 0:
                epoch = block
                if not block:  # otherwise it would look for text forever
                    raise DataError(f"{self._source}: has no text any more; resume when it is back")
            place = self._beginning(place.epoch + 1)

    def _beginning(self, epoch: int) -> _Place:
        return _Place(epoch, 0, self._first_document, [], self.held_out * self._length)

    def _remember(self, before: int, place: _Place) -> None:
        self._marks.append((before, place))
        while len(self._marks) > 1 and self._marks[1][0] <= before - _REMEMBERED:
            self._marks.popleft()

    def _order(self, place: _Place, windows: int) -> list[int]:
        name = f"{self._seed} {place.epoch} {place.window // self._block}"
        # seeding with a string hashes it, so neighbouring epochs and seeds give unrelated orders
        generator = torch.Generator().manual_seed(random.Random(name).getrandbits(63))
        order: list[int] = torch.randperm(windows, generator=generator).tolist()
        return order

    def _blocks(self, place: _Place) -> Iterator[tuple[_Place, list[Window]]]:
        windows = self._windows(place)
        while block := list(islice(windows, self._block)):
            yield block[0][0], [window for _, window in block]

    def _windows(self, place: _Place) -> Iterator[tuple[_Place, Window]]:
        """Yield the windows of an epoch from `place` on, in the order of the text."""
        epoch, number, documents, tokens, skip = place
        buffer = tokens
        for documents, new in self._batches(place.documents):
            tokens, skip = buffer[skip:], max(0, skip - len(buffer))
            buffer = tokens + new
            while len(buffer) - skip >= self._length:
                window = self._window(number, buffer[skip : skip + self._length])
                yield _Place(epoch, number, documents, tokens, skip), window
                number += 1
                skip += self._stride
        rest = buffer[skip:]
        overlap = self._length - self._stride if number else 0
        if len(rest) >= self._shortest and len(rest) > overlap:
            yield _Place(epoch, number, documents, tokens, skip), self._window(number, rest)

    def _batches(
        self, documents: Mapping[str, Any]
    ) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
        """Yield the reader's position before each batch of documents, and the batch's tokens."""
        self._documents.load_state_dict(documents)
        self._row = 0 if documents == self._first_document else None
        rows = iter(self._documents)
        while batch := self._next_documents(rows):
            tokens = list(chain.from_iterable(self._ids(batch)))
            if not self._knows(largest := max(tokens, default=0)):
                raise ModelError(
                    f"{self._source}: the tokenizer has a token {largest}, the model knows "
                    f"{self._vocabulary} tokens; give the model's own tokenizer, or resize the "
                    "model's embeddings"
                )
            yield documents, tokens
            documents = self._documents.state_dict()

    def _knows(self, token: int) -> bool:
        return self._vocabulary is None or token < self._vocabulary

    def _ids(self, batch: list[Document]) -> Iterator[list[int]]:
        # a blank document would give special tokens only; a tokenizer needs one text or more
        texts = [text for text in batch if isinstance(text, str) and text and not text.isspace()]
        options = {"verbose": False, "add_special_tokens": self._special_tokens}
        encoded = encode(self._tokenizer, texts, **options).input_ids if texts else []
        tokens = iter(encoded)
        for document in batch:
            if not isinstance(document, str):
                yield document
            elif document and not document.isspace():
                yield next(tokens)

    def _next_documents(self, rows: Iterator[Any]) -> list[Document]:
        batch: list[Document] = []
        size = 0
        with self._read_errors():
            for row in islice(rows, _BATCH):
                content = content_of(row, self._column)
                batch.append(document_of(content, self._tokenizer, self._vocabulary))
                size += len(batch[-1])
                self._row = None if self._row is None else self._row + 1
                if size >= _BATCH_TEXT:
                    break
        return batch

    def _first_key(self) -> str:
        """Digest of the first document of a data set, which has no name to know it by."""
        found = self._next_documents(islice(self._documents, 1))
        if not found:
            raise DataError(f"{self._source}: is empty; give a data set with texts")
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except MissingContent as error:
            raise DataError(f"{self._source}: {self._row_name()} {error}") from None
        except ModelError as error:  # of the chat template
            raise ModelError(f"{self._source}: {self._row_name()}: {error}") from error
        except NPTError:
            raise
        except Exception as error:  # the network, the Hub and every loader fail in their own way
            raise DataError(
                f"{self._source}: reading broke off: {reason(error)}; resume from a checkpoint"
            ) from error

    def _row_name(self) -> str:
        return "a row" if self._row is None else f"row {self._row}"

    def _window(self, number: int, tokens: list[int]) -> Window:
        padding = self._length - len(tokens)
        return {
            "input_ids": torch.tensor(tokens + [self._padding] * padding),
            "attention_mask": torch.tensor([1] * len(tokens) + [0] * padding),
            "window": torch.tensor(number),
        }

    def _hold_out(self, wanted: int) -> list[Window]:
        """Read until it is clear how many windows can be held out; return them."""
        length = self._length
        tokens: list[int] = []
        for _, new in self._batches(self._first_document):
            tokens += new
            if len(tokens) >= wanted * length + self._shortest:
                held = wanted
                break
        else:  # that was all the text there is
            windows = len(tokens) // length + (len(tokens) % length >= self._shortest)
            # a text that is too short gives a tenth, so that training keeps nine
            held = max(1, windows // 10) if wanted else 0
            if windows <= held:
                raise DataError(
                    f"{self._source}: has {len(tokens)} tokens, {held * length + self._shortest} "
                    f"are needed for windows of {length}; give more text or shorter windows"
                )
        return [
            self._window(index - held, tokens[index * length : (index + 1) * length])
            for index in range(held)
        ]
