"""Find the layers of a base model that carry the difference between two prompts.

Activation patching: the attention output of one prompt replaces that of the other, in one layer or
a window of neighbouring layers at a time. An NP layer there could transfer what then changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npt_fast.config import Position
from npt_fast.errors import TransferError
from npt_fast.hf.convert import decoder_layers, disabled
from npt_fast.hf.tokenizer import DEFAULT_READING, Reading, first_token, read
from npt_fast.pictures.figure import figure_class, thinned
from npt_fast.transfer.attention import attention_hooks, batches, next_logits
from npt_fast.transfer.compare import divergences
from npt_fast.transfer.positions import find, named
from npt_fast.transfer.suite import filled


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

    @property
    def name(self) -> str:
        """The layers for people: ``23`` or ``22-24``."""
        first, last = self.layers[0], self.layers[-1]
        return str(first) if first == last else f"{first}-{last}"


@dataclass(frozen=True, slots=True)
class CrossRelation:
    """What patches carry of a text about the same subject in another relation.

    Attributes:
        text: Text that attention outputs are taken from, at its last token.
        subject: What the source has where the target differs; it is in the text as well.
        top: Likeliest token after the text itself.
        tops: Likeliest token after the target, by patch, in the order of `Trace.patches`.
    """

    text: str
    subject: str
    top: str
    tops: list[str]


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
        cross: The cross-relation test; None if it was not asked for.
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
    cross: CrossRelation | None = None

    @property
    def decisive(self) -> list[Patch]:
        """Patches that change the likeliest token, the largest KL first."""
        found = [patch for patch in self.patches if patch.top != self.target_top]
        return sorted(found, key=lambda patch: -patch.kl)

    @property
    def strongest(self) -> Patch:
        """The patch with the largest KL."""
        return max(self.patches, key=lambda patch: patch.kl)

    @property
    def finding(self) -> str:
        """What the patch that changes the answer most carries, in one sentence."""
        if not self.decisive:
            patch = self.strongest
            return (
                f"No layer changes the answer, which stays {self.target_top!r}; layer {patch.name} "
                f"changes it most (KL {patch.kl:.4f})."
            )
        patch = self.decisive[0]
        where = named(self.target_positions, self.target)
        begin = f"The attention of layer {patch.name} at token {where} carries"
        cross = self.cross
        if cross is None:
            return f"{begin} what differs between the two texts: it puts {patch.top!r} on top."
        top = cross.tops[self.patches.index(patch)]
        if top == self.source_top != cross.top:
            return (
                f"{begin} the subject {cross.subject!r}: taken from {cross.text!r}, it puts "
                f"{top!r} on top as well."
            )
        return (
            f"{begin} what differs between the two texts: taken from {cross.text!r}, it puts "
            f"{top!r} on top."
        )


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
    cross_relation: str | None = None,
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
        cross_relation: Another relation's prompt with ``{}`` for the source's subject, which is
            where the two prompts differ. Outputs at its last token are put into the target, too: if
            the source's answer comes on top, the layer carries the subject, not the fact.
        reading: How all prompts become tokens.

    Raises:
        TransferError: a text is empty, a position is outside it, `window` does not fit the model,
            the numbers of positions differ, or `cross_relation` has no ``{}`` or finds no subject.
        ModelError: a layer has no attention.
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
    subject = cross_text = ""
    if cross_relation is not None:
        subject = _subject(source, target)
        if "{}" not in cross_relation:
            raise TransferError(f"cross_relation {cross_relation!r}: write {{}} for the subject")
        cross_text = filled(cross_relation, subject)
    with disabled(model):
        outputs, source_logits = _outputs(model, source_ids, taken)
        before = next_logits(model, [target_ids])
        if not follow:
            tops = [int(logits.argmax()) for logits in (source_logits, before)]
            follow = list(dict.fromkeys(tops))
        after = _patched(model, target_ids, put, outputs, window)
        if cross_text:
            cross_ids = read(tokenizer, cross_text, reading).ids
            cross_outputs, cross_logits = _outputs(model, cross_ids, [len(cross_ids) - 1])
            crossed = _patched(model, target_ids, put, cross_outputs, window)

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
                kl[start],
                likeliest(logits),
            )
            for start, logits in enumerate(after)
        ],
        cross=CrossRelation(
            cross_text, subject, likeliest(cross_logits[0]), [likeliest(row) for row in crossed]
        )
        if cross_text
        else None,
    )


def _subject(source: str, target: str) -> str:
    """The words of the source where the target differs."""
    ours, other = source.split(), target.split()
    for end in (0, -1):
        while ours and other and ours[end] == other[end]:
            del ours[end], other[end]
    if not ours:
        raise TransferError(
            f"{source!r} has no subject of its own beside {target!r}; a cross-relation test needs "
            "two prompts that differ in their subject"
        )
    return " ".join(ours)


def _outputs(model: Any, ids: list[int], taken: list[int]) -> tuple[list[Tensor], Tensor]:
    """Attention outputs ``(taken, D)`` of each layer, and the logits of the next token."""
    outputs: list[Tensor] = []
    every = range(len(decoder_layers(model)))
    with attention_hooks(model, every, lambda _, out: outputs.append(out[0, taken])):
        return outputs, next_logits(model, [ids])


def _patched(
    model: Any, ids: list[int], put: list[int], outputs: list[Tensor], window: int
) -> Tensor:
    """Logits ``(windows, vocab)``; row b patches the window that begins at layer b."""
    starts = range(len(outputs) - window + 1)
    found = []
    for batch in batches([ids] * len(starts)):

        def patch(layer: int, attention: Tensor, batch: list[int] = batch) -> None:
            source = outputs[layer].to(attention)
            for row, start in enumerate(batch):
                if start <= layer < start + window:
                    attention[row, put] = source

        with attention_hooks(model, range(len(outputs)), patch):
            found.append(next_logits(model, [ids] * len(batch)))
    return torch.cat(found)


def trace_tokens(
    model: Any,
    tokenizer: Any,
    source: str,
    target: str,
    *,
    tracked: Sequence[str] = (),
    window: int = 1,
    reading: Reading = DEFAULT_READING,
) -> list[Trace]:
    """Patch token by token: the attention output of each token of `source` into its counterpart.

    Tokens are counted from the end, so that the last token of a subject meets that of the other.
    What both prompts begin with is left out, since its attention outputs are the same.

    Args:
        model: As for `trace`, as are all others.
        tokenizer: Tokenizer of the model.
        source: Prompt that attention outputs are taken from.
        target: Prompt that they are put into.
        tracked: Texts; the probability of each one's first token is reported.
        window: Number of neighbouring layers patched at a time.
        reading: How both prompts become tokens.

    Returns:
        A trace for each pair of tokens, in their order.

    Raises:
        TransferError: as `trace`.
        ModelError: as `trace`.
    """
    ours, other = (read(tokenizer, text, reading).ids for text in (source, target))
    shorter = min(len(ours), len(other))
    same = next((i for i in range(shorter) if ours[i] != other[i]), shorter)
    return [
        trace(
            model, tokenizer, source, target, tracked=tracked, window=window,
            source_position=-back, target_position=-back, reading=reading,
        )
        for back in range(max(shorter - same, 1), 0, -1)
    ]  # fmt: skip


def draw(traces: Sequence[Trace]) -> Any:
    """Draw heat maps of layers by tokens: of KL, and of the probability of each tracked token.

    Args:
        traces: What `trace_tokens` found.

    Returns:
        A figure of matplotlib.

    Raises:
        NPTError: matplotlib is missing.
    """
    Figure = figure_class()
    from matplotlib.colors import LogNorm

    first = traces[0]
    columns = min(1 + len(first.tracked), 3)
    rows = -(-(1 + len(first.tracked)) // columns)
    width, height = 2.2 + 0.3 * len(traces), 2.4 + 0.13 * len(first.patches)
    figure = Figure(figsize=(max(columns * width, 9), rows * height), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    kl = [[one.patches[row].kl for one in traces] for row in range(len(first.patches))]
    _map(places[0], first, traces, "KL, nats", kl, cmap="magma", vmin=0)
    for index, token in enumerate(first.tracked):
        values = [[one.patches[row].tracked[index] for one in traces] for row in range(len(kl))]
        unpatched = first.target_tracked[index]
        # logarithmic: a token that comes up from 0.0001 to 0.01 is a finding, too
        scale = LogNorm(1e-4, 1, clip=True)
        bar = _map(
            places[1 + index], first, traces, f"probability of {token!r}", values, norm=scale
        )
        bar.ax.axhline(max(unpatched, 1e-4), color="red", linewidth=2)
        bar.set_label(f"red: unpatched, {unpatched:.4f}")
    for unused in list(places)[1 + len(first.tracked) :]:
        unused.set_axis_off()
    title = f"attention output of {''.join(first.source)!r}\nin {''.join(first.target)!r}"
    figure.suptitle(title, parse_math=False)
    return figure


def _map(
    axes: Any,
    first: Trace,
    traces: Sequence[Trace],
    title: str,
    values: Sequence[Sequence[float]],
    **colours: Any,
) -> Any:
    """Draw a heat map; returns its colour bar."""
    image = axes.imshow(values, aspect="auto", origin="lower", interpolation="nearest", **colours)
    names = []
    for one in traces:
        taken, put = one.source[one.source_positions[0]], one.target[one.target_positions[0]]
        names.append(repr(put) if taken == put else f"{taken!r} in {put!r}")
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    rows = thinned(range(len(first.patches)), 16)
    axes.set_yticks(rows, [first.patches[row].name for row in rows])
    axes.set_ylabel("layer" if first.window == 1 else "layers")
    axes.set_title(title, parse_math=False, fontsize="medium")
    return axes.figure.colorbar(image, ax=axes)
