"""Checkpoints in pictures: norms and spectra of their factors, fidelity, and provenance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from npt_fast.checkpoint.certificate import Certificate, grouped, worst_of
from npt_fast.checkpoint.checkpoint import Checkpoint
from npt_fast.checkpoint.keys import PROJECTIONS, STEMS
from npt_fast.checkpoint.spectra import spectra
from npt_fast.errors import NPTError, printable
from npt_fast.layer_names import ranges
from npt_fast.pictures.figure import (
    colours,
    figure_class,
    key,
    plain_legend,
    thinned,
    whole_numbers,
)
from npt_fast.pictures.provenance import draw_tree, provenance, tree_size

if TYPE_CHECKING:
    from npt_fast.checkpoint.spectra import Spectra

_STYLES = dict(zip(PROJECTIONS, ("-", "--", ":"), strict=True))
_MOST_CHECKPOINTS, _MOST_TICKS, _MOST_ENTRIES = 12, 12, 16

Row = tuple[float, Callable[[Any], None]]
"""A row of a checkpoint's picture: its height in inches, and what draws it into a subfigure."""


def draw_checkpoints(checkpoints: Sequence[Checkpoint]) -> Any:
    """Draw norms and spectra of all factors; fidelity and provenance where they are recorded.

    Args:
        checkpoints: Opened checkpoints, all of whose weights are read.

    Returns:
        A figure of matplotlib with a part for each checkpoint.

    Raises:
        NPTError: matplotlib is missing, a checkpoint cannot be read, or there is too much to draw.
    """
    Figure = figure_class()
    if len(checkpoints) > _MOST_CHECKPOINTS:
        raise NPTError(
            f"{len(checkpoints)} checkpoints are too many for a picture; "
            f"give {_MOST_CHECKPOINTS} at most"
        )
    parts = [(checkpoint, _rows(checkpoint)) for checkpoint in checkpoints]
    heights = [0.5 + sum(height for height, _ in rows) for _, rows in parts]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    places = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for place, (checkpoint, rows) in zip(places, parts, strict=True):
        place.suptitle(printable(checkpoint.given), parse_math=False, fontweight="bold")
        inner = place.subfigures(len(rows), 1, height_ratios=[h for h, _ in rows], squeeze=False)
        for one, (_, draw) in zip(inner[:, 0], rows, strict=True):
            draw(one)
    return figure


def _rows(checkpoint: Checkpoint) -> list[Row]:
    values = {layer: spectra(module) for layer, module in checkpoint.modules.items()}
    rows: list[Row] = []
    if any(values.values()):
        rows += [
            (2.8, lambda place: draw_norms(place.subplots(1, 3), values)),
            (3.2, lambda place: draw_spectra(place.subplots(1, 3, sharey=True), values)),
        ]
    measured = grouped((n, checkpoint.record(n).certificate) for n in checkpoint.modules)
    if measured:
        rows.append((2.8, lambda place: draw_fidelity(place.subplots(1, 2), measured)))
    tree = provenance(checkpoint)
    if tree is not None:
        rows.append((tree_size(tree)[1], lambda place: draw_tree(place.subplots(), tree)))
    if not rows:
        raise NPTError(
            f"{checkpoint.given}: nothing to draw: its factors are int8 or not finite, and it "
            "records neither fidelity nor sources"
        )
    return rows


def draw_norms(axes: Sequence[Any], layers: dict[int, Spectra]) -> None:
    """Draw the Frobenius norm of each layer's factors, over all components, as bars.

    Args:
        axes: Axes of the stems `keys.STEMS`, in their order.
        layers: Singular values by layer.
    """
    width = 0.8 / len(PROJECTIONS)
    for one, stem in zip(axes, STEMS, strict=True):
        for number, name in enumerate(PROJECTIONS):
            found = {
                place: float((values[projection, stem] ** 2).sum()) ** 0.5
                for place, values in enumerate(layers.values())
                for projection in (name, "")
                if (projection, stem) in values and (projection or "gate") == name
            }
            places = [place + (number - 1) * width for place in found]
            if found:
                one.bar(places, list(found.values()), width, color=f"C{number}", label=name)
        one.set_title(stem)
        _name_places(one, list(map(str, layers)), "layer")
    axes[0].set_ylabel("Frobenius norm")
    plain_legend(axes[-1], loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")


def draw_spectra(axes: Sequence[Any], layers: dict[int, Spectra]) -> None:
    """Draw the singular values of each layer's factors: the median over components, as lines.

    Args:
        axes: Axes of the stems `keys.STEMS`, in their order.
        layers: Singular values by layer.
    """
    import numpy as np

    shades = dict(zip(layers, colours(len(layers)), strict=True))
    for one, stem in zip(axes, STEMS, strict=True):
        for layer, values in layers.items():
            for (projection, own), found in values.items():
                if own == stem:
                    middle = np.median(found, 0)
                    places = np.arange(1, len(middle) + 1)
                    shown = middle > 0  # a factor of zeros has no place on a logarithmic scale
                    style = _STYLES[projection or "gate"]
                    one.plot(places[shown], middle[shown], style, color=shades[layer], lw=1.2)
        one.set(title=f"spectrum of {stem}", xlabel="rank", yscale="log")
        whole_numbers(one)
        one.grid(alpha=0.3)
    axes[0].set_ylabel("singular value")
    handles = [key(f"layer {n}", shades[n], "-") for n in thinned(list(layers), _MOST_ENTRIES)]
    handles += [key(name, "0.4", style) for name, style in _STYLES.items()]
    plain_legend(
        axes[-1], handles=handles, loc="upper left", bbox_to_anchor=(1, 1),
        fontsize="small", ncols=1 + len(handles) // 12,
    )  # fmt: skip


def draw_fidelity(
    axes: Sequence[Any], measured: Sequence[tuple[Certificate, Sequence[int]]]
) -> None:
    """Draw KL and perplexity ratio of each certificate as bars, with the worst of other kinds.

    Args:
        axes: Axes of KL and of the perplexity ratio.
        measured: Certificates and the layers that have them; layers of one were on together.
    """
    worst = [worst_of(certificate.texts.values()) for certificate, _ in measured]
    for one, name, label, base in (
        (axes[0], "kl", "KL from the base model, nats", 0.0),
        (axes[1], "perplexity_ratio", "perplexity over the base model's", 1.0),
    ):
        kinds = {
            "held-out text": [getattr(found.held_out, name) for found, _ in measured],
            "worst of other kinds": [found.get(name, base) for found in worst],
        }
        for number, (kind, values) in enumerate(kinds.items()):
            places = [place + 0.4 * number - 0.2 for place in range(len(values))]
            heights = [base if value is None else value for value in values]
            one.bar(
                places, [height - base for height in heights], 0.4, bottom=base,
                color=f"C{number}", label=kind,
            )  # fmt: skip
            for place, value in zip(places, values, strict=True):
                if value is None:
                    one.text(
                        place,
                        base,
                        "not finite",
                        rotation=90,
                        ha="center",
                        va="bottom",
                        size="x-small",
                    )
        one.axhline(base, color="0.4", lw=0.8)
        one.set_ylabel(label)
        _name_places(one, [ranges(layers) for _, layers in measured], "layers, by run")
    plain_legend(axes[-1], loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")


def _name_places(axes: Any, names: Sequence[str], label: str) -> None:
    places = thinned(range(len(names)), _MOST_TICKS)
    axes.set_xticks(places, [names[place] for place in places])
    axes.set_xlabel(label)
