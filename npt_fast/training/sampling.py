"""Sample a text from a base model: what it writes at temperature 1 (design.md#self-text)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from npt_fast.arguments import Positive, check_arguments
from npt_fast.config import Progress
from npt_fast.errors import DataError, ModelError
from npt_fast.hf.convert import AnyModel, disabled
from npt_fast.hf.tokenizer import Tokenizer, encode
from npt_fast.text_sources import DEFAULT_TOKENS

BATCH = 64
"""Rows that are sampled at once."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Tokens that begin and end documents, and those that are never drawn.

    Attributes:
        starts: ids that a row begins with; the rows take turns with them.
        end: id of the token that ends a document.
        unknown: ids that the model has and the tokenizer does not, as where a vocabulary is padded.
    """

    starts: tuple[tuple[int, ...], ...]
    end: int
    unknown: tuple[int, ...]

    def start(self, row: int) -> tuple[int, ...]:
        """Ids that a row begins with."""
        return self.starts[row % len(self.starts)]

    def next_start(self, row: int) -> tuple[int, ...]:
        """Ids of a row behind the end of a document, where the end may be the first of them."""
        start = self.start(row)
        return start[1:] if start[0] == self.end else start


def marks(model: Any, tokenizer: Any, first_tokens: Sequence[str] = ()) -> Marks:
    """Find the tokens that begin and end documents.

    A document ends with the special token that is called end of text, or else with EOS. EOS of a
    chat model ends a message, and its BOS may begin one. So a document begins with what the
    tokenizer puts in front of a text by itself, or else with the token that ends documents.

    Args:
        model: the base model, which tells its vocabulary.
        tokenizer: its tokenizer.
        first_tokens: texts of one or more tokens that rows begin with instead.

    Raises:
        DataError: a text of `first_tokens` is empty.
        ModelError: the tokenizer has no such end, or the model does not know these tokens.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    special = tokenizer.added_tokens_decoder.items()
    ends = [i for i, token in special if token.special and _is_end_of_text(token.content)]
    end = ends[0] if ends else tokenizer.eos_token_id
    if end is None:
        raise ModelError(
            f"{name}: the tokenizer has no token that ends a text, which separates documents; "
            "set eos_token in its tokenizer_config.json, or name another text with --data"
        )
    starts = []
    for text in first_tokens:
        ids = encode(tokenizer, text, add_special_tokens=False).input_ids if text else []
        if not ids:
            raise DataError("first_tokens: a text is empty; leave it out")
        starts.append(tuple(ids))
    vocabulary = model.get_input_embeddings().num_embeddings
    unknown = set(range(vocabulary)).difference(tokenizer.get_vocab().values())
    found = Marks(tuple(starts) or (front(tokenizer) or (end,),), end, tuple(sorted(unknown)))
    largest = max(end, *(i for start in found.starts for i in start))
    if largest >= vocabulary:
        raise ModelError(
            f"{name}: the tokenizer has a token {largest}, the model knows {vocabulary} tokens"
        )
    return found


def _is_end_of_text(token: str) -> bool:
    """Whether a token is called ``<|endoftext|>`` or ``<|end_of_text|>``."""
    return "".join(filter(str.isalpha, token.lower())) == "endoftext"


def front(tokenizer: Any) -> tuple[int, ...]:
    """Ids that a tokenizer puts in front of each text by itself."""
    whole, plain = (
        encode(tokenizer, "a", add_special_tokens=special).input_ids for special in (True, False)
    )
    starts = range(len(whole) - len(plain) + 1)
    return tuple(next((whole[:at] for at in starts if whole[at:][: len(plain)] == plain), ()))


@check_arguments
def sample_text(
    model: AnyModel,
    tokenizer: Tokenizer,
    tokens: Positive = DEFAULT_TOKENS,
    *,
    max_length: Positive = 512,
    seed: int = 42,
    first_tokens: Sequence[str] = (),
    batch_size: Positive = BATCH,
    progress: Progress | None = None,
) -> Tensor:
    """Sample a text from a base model, at temperature 1 and from all tokens of its tokenizer.

    Each row begins with the model's first token. Behind the end of a document the row goes on with
    another one. A row depends on the seed and its number, and not on the rows that are sampled
    beside it, except for the rounding of logits.

    Args:
        model: causal language model; meanwhile its NP layers are off, and it is in eval mode.
        tokenizer: the model's tokenizer, which tells the tokens that begin and end documents.
        tokens: number of tokens; the last row is sampled to its end.
        max_length: tokens per row.
        seed: seed of the draws.
        first_tokens: texts of one or more tokens that rows begin with, in turn; by default what the
            tokenizer puts in front of a text by itself, or else the token that ends documents.
        batch_size: rows that are sampled at once.
        progress: called with the name of the work, tokens done and all tokens.

    Returns:
        Ids, int64 ``(ceil(tokens / max_length), max_length)``, on the CPU.

    Raises:
        OptionError: a number is out of range.
        DataError: a text of `first_tokens` is empty or fills a whole row.
        ModelError: the tokenizer has no token that ends a text, the model reads no rows of
            `max_length`, or the logits are not numbers.
    """
    found = marks(model, tokenizer, first_tokens)
    if max_length <= max(map(len, found.starts)):
        raise DataError(
            f"first_tokens: {max(map(len, found.starts))} tokens leave nothing to sample of "
            f"{max_length}; give shorter texts or a larger max_length"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ModelError(
            f"max_length {max_length}: the base model reads at most {longest} tokens, and writes "
            f"no text that is longer; give {longest} or less"
        )
    rows = -(-tokens // max_length)
    ids = torch.empty(rows, max_length, dtype=torch.long)
    with disabled(model), _evaluating(model), torch.no_grad():
        for first in range(0, rows, batch_size):
            batch = ids[first : first + batch_size]
            for column in _sample(model, found, batch, first, seed):
                if progress is not None:
                    done = first * max_length + len(batch) * (column + 1)
                    progress("Sampling", done, ids.numel())
    return ids


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Context in eval mode: dropout would draw another text, and checkpointing leaves no cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _sample(model: Any, marks: Marks, ids: Tensor, first: int, seed: int) -> Iterator[int]:
    """Fill rows column by column; yield each column's number.

    The noise makes the draws stable: argmax(logits - log(noise)) with exponential noise is a draw
    from softmax(logits), which another rounding of the logits changes only if the two largest sums
    are as near as that. A draw from sums of probabilities would change with any of them.
    """
    numbers = range(first, first + len(ids))
    # float64: 0 comes once in 2^53 numbers, which would choose its token whatever its logit is
    generators = [np.random.default_rng([seed % 2**64, number]) for number in numbers]
    given = [list(marks.start(number)) for number in numbers]  # what is not drawn
    unknown = list(marks.unknown)
    noise = None
    cache = None
    for column in range(ids.shape[1]):
        if column:
            step = ids[:, column - 1 : column].to(model.device)
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            if noise is None:
                noise = np.empty(logits.shape)
            for row, generator in zip(noise, generators, strict=True):
                generator.standard_exponential(out=row)
            sums = logits - torch.from_numpy(noise).log().to(logits)
            if sums.isnan().any():
                raise ModelError("the base model's logits are not numbers; nothing can be sampled")
            sums[:, unknown] = -torch.inf
            ids[:, column] = sums.argmax(-1).cpu()
        for row, number in enumerate(numbers):
            if given[row]:
                ids[row, column] = given[row].pop(0)
            elif ids[row, column] == marks.end:
                given[row] = list(marks.next_start(number))
        yield column
