"""Which layers of a base model carry the difference between two prompts.

The attention output of one prompt is put into the run of the other, a layer or a window of
neighbouring layers at a time. What then changes is what an NP layer there could carry over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npt_fast.config import Position
from npt_fast.errors import ModelError, TransferError
from npt_fast.hf.convert import decoder_layers, disabled
from npt_fast.pictures import figure_class, save
from npt_fast.transfer.compare import divergences
from npt_fast.transfer.extract import tokenize
from npt_fast.transfer.positions import resolve

_TOKENS = 1024  # of all rows of a pass


@dataclass(frozen=True, slots=True)
class Patch:
    """What the attention output of some layers changes.

    Attributes:
        layers: that were patched.
        tracked: probability of the tracked tokens, in their order.
        kl: KL(unpatched, patched) of the next token, nats.
        top: the likeliest next token.
    """

    layers: list[int]
    tracked: list[float]
    kl: float
    top: str


@dataclass(frozen=True, slots=True)
class Trace:
    """Two prompts, and every layer patched from one into the other.

    Attributes:
        source: tokens of the prompt that attention outputs are taken from.
        target: tokens of the prompt that they are put into.
        source_positions: where they are taken.
        target_positions: where they are put.
        tracked: tokens that are followed.
        source_tracked: their probability after the source.
        target_tracked: their probability after the target, unpatched.
        source_top: the likeliest token after the source.
        target_top: the likeliest token after the target, unpatched.
        window: how many layers are patched at a time.
        patches: one per window, by its first layer.
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
        """Those that change the likeliest token, the strongest first."""
        found = [patch for patch in self.patches if patch.top != self.target_top]
        return sorted(found, key=lambda patch: -patch.kl)

    @property
    def strongest(self) -> Patch:
        """The one that changes most."""
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
) -> Trace:
    """Patch attention outputs of `source` into the run of `target`, layer by layer.

    Layers are rows of one batch: a few passes do all of them. NP layers are off meanwhile.

    Args:
        model: a Hugging Face causal language model; training is not needed.
        tokenizer: of the model; no special tokens are added.
        source: the prompt that attention outputs come from.
        target: the prompt that they are put into.
        tracked: texts whose first token is followed; the likeliest token of each prompt if empty.
        window: layers that are patched at a time.
        source_position: where outputs are taken.
        target_position: where they are put; as many tokens as are taken, or any if one is.

    Raises:
        TransferError: a text is empty, a position outside it, `window` does not fit the model, or
            positions do not fit together.
        ModelError: the model is not built as needed.
    """
    layers = decoder_layers(model)
    if not 1 <= window <= len(layers):
        raise TransferError(f"a window of {window} layers: the model has {len(layers)}")
    source_ids, source_tokens = tokenize(tokenizer, source)
    target_ids, target_tokens = tokenize(tokenizer, target)
    taken = resolve(source_position, source_tokens)
    put = resolve(target_position, target_tokens)
    if len(taken) not in (1, len(put)):
        raise TransferError(
            f"{len(taken)} tokens cannot be put at {len(put)}; take one, or as many"
        )
    follow = [tokenize(tokenizer, text)[0][0] for text in tracked]
    with disabled(model):
        outputs: list[Tensor] = []  # (taken, D) by layer
        with _hooked(layers, lambda _, attention: outputs.append(attention[0, taken])):
            source_logits = _next(model, [source_ids])
        before = _next(model, [target_ids])
        if not follow:
            tops = [int(logits.argmax()) for logits in (source_logits, before)]
            follow = list(dict.fromkeys(tops))
        starts = range(len(layers) - window + 1)
        size = max(1, _TOKENS // len(target_ids))
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
    """Logits ``(len(starts), vocab)``; row b has the window that begins at ``starts[b]``."""

    def patch(layer: int, attention: Tensor) -> None:
        source = outputs[layer].to(attention)
        for row, start in enumerate(starts):
            if start <= layer < start + window:
                attention[row, put] = source

    with _hooked(decoder_layers(model), patch):
        return _next(model, [ids] * len(starts))


def _next(model: Any, ids: list[list[int]]) -> Tensor:
    """Logits of the next token, ``(rows, vocab)`` in float32 on the CPU."""
    rows = torch.tensor(ids, device=model.device)
    logits: Tensor = model(input_ids=rows, use_cache=False, logits_to_keep=1).logits
    return logits[:, -1].float().cpu()


@contextmanager
def _hooked(layers: nn.ModuleList, visit: Any) -> Iterator[None]:
    """Within the context `visit` gets every layer's attention output, which it may change."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            attention = getattr(layer, "self_attn", None)
            if attention is None:
                raise ModelError(f"layer {index} ({type(layer).__name__}) has no self_attn")

            def hook(_: Any, args: Any, output: Any, index: int = index) -> Any:
                changed = output[0].clone()
                visit(index, changed)
                return (changed, *output[1:])

            stack.callback(attention.register_forward_hook(hook).remove)
        yield


def draw(trace: Trace, path: str | Path) -> None:
    """A picture: KL by layer, and below it the probability of the tracked tokens.

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
