"""Find the layers of a base model that carry the difference between two prompts.

Activation patching: the attention output of one prompt replaces that of the other, in one layer or
a window of neighbouring layers at a time. An NP layer there could transfer what then changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npt_fast.config import Position
from npt_fast.errors import TransferError
from npt_fast.hf.convert import decoder_layers, disabled
from npt_fast.hf.tokenizer import DEFAULT_READING, Reading, first_token, read
from npt_fast.pictures import figure_class, save
from npt_fast.transfer.attention import TOKENS, attention_hooks, next_logits
from npt_fast.transfer.compare import divergences
from npt_fast.transfer.positions import find


@dataclass(frozen=True, slots=True)
class Patch:
    """The effect of patching the attention output of some layers.

    Attributes:
        layers: Layers that were patched.
        tracked: Probabilities of the tracked tokens, in their order.
        kl: KL(unpatched || patched) of the next token, in nats.
        top: Likeliest next token.
    """

    layers: list[int]
    tracked: list[float]
    kl: float
    top: str


@dataclass(frozen=True, slots=True)
class Trace:
    """Two prompts, and the effect of patching each layer from one into the other.

    Attributes:
        source: Tokens of the prompt that attention outputs are taken from.
        target: Tokens of the prompt that they are put into.
        source_positions: Positions that they are taken from.
        target_positions: Positions that they are put at.
        tracked: Tokens whose probability is reported.
        source_tracked: Probabilities of the tracked tokens after the source.
        target_tracked: Probabilities of the tracked tokens after the target, unpatched.
        source_top: Likeliest token after the source.
        target_top: Likeliest token after the target, unpatched.
        window: Number of layers patched at a time.
        patches: One per window, in the order of first layers.
    """

    source: list[str]
    target: list[str]
    source_positions: list[int]
    target_positions: list[int]
    tracked: list[str]
    source_tracked: list[float]
    target_tracked: list[float]
    source_top: str
    target_top: str
    window: int
    patches: list[Patch]

    @property
    def decisive(self) -> list[Patch]:
        """Patches that change the likeliest token, the largest KL first."""
        found = [patch for patch in self.patches if patch.top != self.target_top]
        return sorted(found, key=lambda patch: -patch.kl)

    @property
    def strongest(self) -> Patch:
        """The patch with the largest KL."""
        return max(self.patches, key=lambda patch: patch.kl)


@torch.no_grad()
def trace(
    model: Any,
    tokenizer: Any,
    source: str,
    target: str,
    *,
    tracked: Sequence[str] = (),
    window: int = 1,
    source_position: Position = -1,
    target_position: Position = -1,
    reading: Reading = DEFAULT_READING,
) -> Trace:
    """Patch attention outputs of `source` into the pass of `target`, layer by layer.

    Each row of a batch patches another layer, so a few passes cover all of them. NP layers are
    turned off meanwhile.

    Args:
        model: Hugging Face causal language model; needs no training.
        tokenizer: Tokenizer of the model.
        source: Prompt that attention outputs are taken from.
        target: Prompt that they are put into.
        tracked: Texts; the probability of each one's first token is reported. The likeliest token
            of each prompt if empty.
        window: Number of neighbouring layers patched at a time.
        source_position: Tokens that outputs are taken from.
        target_position: Tokens that they are put at: as many as are taken, or any number if one is.
        reading: How both prompts become tokens.

    Raises:
        TransferError: a text is empty, a position is outside it, `window` does not fit the model,
            or the numbers of positions differ.
        ModelError: a layer has no `self_attn`.
    """
    layers = decoder_layers(model)
    if not 1 <= window <= len(layers):
        raise TransferError(f"a window of {window} layers: the model has {len(layers)}")
    source_ids, source_tokens = read(tokenizer, source, reading)
    target_ids, target_tokens = read(tokenizer, target, reading)
    taken = find(source_position, source_ids, tokenizer)
    put = find(target_position, target_ids, tokenizer)
    if len(taken) not in (1, len(put)):
        raise TransferError(
            f"{len(taken)} source positions do not fit {len(put)} target positions; "
            "give one, or as many"
        )
    follow = [first_token(tokenizer, text) for text in tracked]
    with disabled(model):
        outputs: list[Tensor] = []  # (taken, D) by layer
        every = range(len(layers))
        with attention_hooks(model, every, lambda _, out: outputs.append(out[0, taken])):
            source_logits = next_logits(model, [source_ids])
        before = next_logits(model, [target_ids])
        if not follow:
            tops = [int(logits.argmax()) for logits in (source_logits, before)]
            follow = list(dict.fromkeys(tops))
        starts = range(len(layers) - window + 1)
        size = max(1, TOKENS // len(target_ids))
        after = torch.cat(
            [
                _patched(model, target_ids, put, outputs, starts[i : i + size], window)
                for i in range(0, len(starts), size)
            ]
        )

    def probabilities(logits: Tensor) -> list[float]:
        found: list[float] = logits.double().softmax(-1)[follow].tolist()
        return found

    def likeliest(logits: Tensor) -> str:
        return str(tokenizer.decode([int(logits.argmax())]))

    kl = divergences(before, after)
    return Trace(
        source=source_tokens,
        target=target_tokens,
        source_positions=taken,
        target_positions=put,
        tracked=[tokenizer.decode([token]) for token in follow],
        source_tracked=probabilities(source_logits[0]),
        target_tracked=probabilities(before[0]),
        source_top=likeliest(source_logits[0]),
        target_top=likeliest(before[0]),
        window=window,
        patches=[
            Patch(
                list(range(start, start + window)),
                probabilities(logits),
                kl[row],
                likeliest(logits),
            )
            for row, (start, logits) in enumerate(zip(starts, after, strict=True))
        ],
    )


def _patched(
    model: Any, ids: list[int], put: list[int], outputs: list[Tensor], starts: range, window: int
) -> Tensor:
    """Logits ``(len(starts), vocab)``; row b patches the window that begins at ``starts[b]``."""

    def patch(layer: int, attention: Tensor) -> None:
        source = outputs[layer].to(attention)
        for row, start in enumerate(starts):
            if start <= layer < start + window:
                attention[row, put] = source

    with attention_hooks(model, range(len(outputs)), patch):
        return next_logits(model, [ids] * len(starts))


def draw(trace: Trace, path: str | Path) -> None:
    """Draw KL by layer, and below it the probabilities of the tracked tokens.

    Raises:
        NPTError: matplotlib is missing, or the file cannot be written.
    """
    Figure = figure_class()
    firsts = [patch.layers[0] for patch in trace.patches]
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.bar(firsts, [patch.kl for patch in trace.patches], color="0.6")
    above.set_ylabel("KL, nats")
    title = f"attention output of {''.join(trace.source)!r}\nin {''.join(trace.target)!r}"
    above.set_title(title, parse_math=False)
    for index, token in enumerate(trace.tracked):
        values = [patch.tracked[index] for patch in trace.patches]
        (line,) = below.plot(firsts, values, marker="o", markersize=4, label=repr(token))
        below.axhline(trace.target_tracked[index], color=line.get_color(), linestyle=":")
    below.set_ylabel("probability")
    below.set_ylim(-0.02, 1.02)
    below.set_xlabel("layer" if trace.window == 1 else f"first of {trace.window} layers")
    for text in below.legend(title="dotted: unpatched").get_texts():
        text.set_parse_math(False)
    save(figure, path)
