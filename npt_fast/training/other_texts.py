"""Texts of other kinds than the training text, which every evaluation measures too.

They are in the package (``texts/``), so that figures of all runs compare, and short: of each, at
most 2,048 tokens are read.
"""

from __future__ import annotations

import warnings
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from npt_fast.errors import NPTWarning
from npt_fast.hf.tokenizer import encode
from npt_fast.hf.wrappers import unwrapped
from npt_fast.training.token_windows import Window

TEXTS = ("news", "story", "code", "french")
_LONGEST_WINDOW = 256
"""Tokens; the same in every run, whatever its --max_length, or its figures would not compare."""
_MOST_TOKENS = 2048  # SmolLM2 has 1,055 to 1,692; a tokenizer of bytes has 4,600


def read_text(name: str) -> str:
    """The text of a name in `TEXTS`."""
    return (files("npt_fast.training") / "texts" / f"{name}.txt").read_text(encoding="utf-8")


def other_texts(
    model: nn.Module, tokenizer: Any, *, special_tokens: bool = True
) -> dict[str, list[Window]]:
    """The windows of each text, in the form of `TokenWindows.held_out_windows`, none padded.

    A text is cut into windows of one length, as few as the model's context and 256 tokens allow;
    fewer tokens than there are windows are left over. A text that has fewer than two tokens, or
    tokens that the model does not know, is left out with an `NPTWarning`.

    Args:
        model: the model, which tells its context and its vocabulary.
        tokenizer: the model's tokenizer.
        special_tokens: let the tokenizer add its special tokens, such as BOS, to each text.

    Raises:
        ModelError: the tokenizer cannot encode a text.
    """
    config = unwrapped(model).config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or _LONGEST_WINDOW
    longest = max(2, min(_LONGEST_WINDOW, context))
    found = {}
    for name in TEXTS:
        ids = encode(
            tokenizer, read_text(name), verbose=False, add_special_tokens=special_tokens
        ).input_ids[:_MOST_TOKENS]
        if len(ids) < 2 or max(ids) >= config.vocab_size:
            warnings.warn(
                f"the text {name!r} is not measured: the tokenizer makes {len(ids)} tokens of it, "
                f"up to id {max(ids, default=0)}; two or more are needed, and ids below the "
                f"model's vocabulary of {config.vocab_size}",
                NPTWarning,
                stacklevel=2,
            )
            continue
        count = -(-len(ids) // longest)
        length = max(2, len(ids) // count)
        found[name] = [
            {
                "input_ids": torch.tensor(ids[start : start + length]),
                "attention_mask": torch.ones(length, dtype=torch.long),
                "window": torch.tensor(start // length),
            }
            for start in range(0, len(ids) - length + 1, length)
        ]
    return found
