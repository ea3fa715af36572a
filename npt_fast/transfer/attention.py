"""Passes of a model for the next token alone, and hooks on the attention outputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from npt_fast.called_mlp import first
from npt_fast.errors import ModelError
from npt_fast.hf.convert import decoder_layers
from npt_fast.hf.families import attention_of

TOKENS = 1024
"""Tokens of a pass, over all rows of the batch."""


def batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows that one pass reads: of the same length, so that nothing is padded."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    for length, indices in by_length.items():
        size = max(1, TOKENS // length)
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def next_logits(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the next token of rows of one length, ``(rows, vocab)`` in float32 on the CPU."""
    ids = torch.tensor(rows, device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return logits[:, -1].float().cpu()


@contextmanager
def attention_hooks(
    model: Any, layers: Sequence[int], visit: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Within the context, call `visit` with each layer's attention output, which it may change.

    Args:
        model: Hugging Face causal language model.
        layers: Layers that are visited.
        visit: Takes the layer and its output, ``(rows, tokens, D)``.

    Raises:
        ModelError: a layer has no attention that `families.BLOCKS` knows.
    """
    with ExitStack() as stack:
        for index in layers:
            layer = decoder_layers(model)[index]
            attention = attention_of(layer)
            if attention is None:
                raise ModelError(f"layer {index} ({type(layer).__name__}) has no attention")

            def hook(_: Any, args: Any, output: Any, index: int = index) -> Any:
                # a copy: `visit` may write to it, and others may hold the original
                changed = first(output).clone()
                visit(index, changed)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            stack.callback(attention.register_forward_hook(hook).remove)
        yield
