"""The metrics of training runs as curves over the optimizer steps, several runs in one picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from npt_fast.checkpoint.training_log import RunLog
from npt_fast.pictures.figure import (
    colours,
    figure_class,
    key,
    plain_legend,
    plain_scale,
    thinned,
)

_STYLES = ("-", "--", ":", "-.")
_STAGES = {"teacher": "#cfe2f3", "mixed": "#fff2cc", "student": "#d9ead3"}
_MOST_ENTRIES = 24
_LONGEST_NAME = 32


class _Panel(NamedTuple):
    """Metrics in one pair of axes, by the marks that show them."""

    title: str
    label: str
    scale: str
    line: str | None
    dots: str | None = None
    crosses: str | None = None


_PANELS = (
    _Panel("total loss", "loss", "log", "loss/total", "eval_loss/total"),
    _Panel("fidelity loss", "loss", "log", "loss/fidelity"),
    _Panel("KL from the base model", "nats", "log", None, "eval/kl", "eval_worst/kl"),
    _Panel(
        "perplexity over the base model's", "ratio", "linear", None,
        "eval/perplexity_ratio", "eval_worst/perplexity_ratio",
    ),
    _Panel("learning rate", "learning rate", "linear", "training/learning_rate"),
)  # fmt: skip
_KEY = "lines: training text; dots: held-out text; crosses: worst text of another kind"


class _Look(NamedTuple):
    """How a run is drawn: its name in the legend, its colour, and the style of its lines."""

    name: str
    colour: str
    style: str


def draw_runs(runs: Sequence[RunLog]) -> Any:
    """Draw losses, fidelity, learning rate and stages of runs over the optimizer steps.

    The colour of a layer's line is the layer's, and its style is the run's. What no run measured
    has no panel.

    Args:
        runs: Logs of at least one run.

    Returns:
        A figure of matplotlib.

    Raises:
        NPTError: matplotlib is missing.
    """
    looks = [
        _Look(name, f"C{index % 10}", style)
        for index, (name, style) in enumerate(zip(_names(runs), cycle(_STYLES)))
    ]
    panels = [panel for panel in _PANELS if any(_measured(run, panel) for run in runs)]
    layers = sorted({layer for run in runs for layer in run.layers})
    staged = any(run.stages for run in runs)
    places: list[Any] = [["layers"] * 2] if layers else []
    for index in range(0, len(panels), 2):
        pair = list(range(index, min(index + 2, len(panels))))
        places.append(pair * (2 // len(pair)))
    if staged:
        places.append(["stages"] * 2)
    heights = [1.4 if row[0] == "layers" else 1.0 for row in places]
    if staged:
        heights[-1] = 0.12 * (1 + len(runs))
    figure = figure_class()(figsize=(11, 1 + 2.8 * sum(heights)), layout="constrained")
    axes = figure.subplot_mosaic(places, height_ratios=heights)
    if layers:
        _draw_layers(axes["layers"], runs, looks, layers)
    for index, panel in enumerate(panels):
        _draw_panel(axes[index], runs, looks, panel)
    if staged:
        _draw_stages(axes["stages"], runs, looks)
    last = max(max(steps) for run in runs for steps, _ in run.metrics.values())
    for one in axes.values():
        one.set_xlim(0, 1.02 * max(last, 1))
        one.set_xlabel("optimizer step")
    if any(name.startswith("eval") for run in runs for name in run.metrics):
        figure.supxlabel(_KEY, fontsize="small")
    if len(runs) == 1:
        figure.suptitle(looks[0].name, parse_math=False)
    else:
        handles = [key(look.name, look.colour, look.style) for look in looks]
        columns = min(len(runs), 3)
        plain_legend(figure, handles=handles, loc="outside upper center", ncols=columns)
    return figure


def _names(runs: Sequence[RunLog]) -> list[str]:
    """Names of the runs' folders, or their paths if two have the same; the end of long ones."""
    names = [run.path.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    return [n if len(n) <= _LONGEST_NAME else f"...{n[3 - _LONGEST_NAME :]}" for n in names]


def _measured(run: RunLog, panel: _Panel) -> bool:
    return any(name in run.metrics for name in (panel.line, panel.dots, panel.crosses) if name)


def _draw_layers(
    axes: Any, runs: Sequence[RunLog], looks: Iterable[_Look], layers: Sequence[int]
) -> None:
    shades = dict(zip(layers, colours(len(layers)), strict=True))
    for run, look in zip(runs, looks, strict=True):
        for layer in run.layers:
            colour = shades[layer]
            axes.plot(
                *run.values(f"mlp_direct_loss/layer_{layer}"), look.style, color=colour, lw=1.2
            )
            axes.plot(*run.values(f"eval_mlp_direct_loss/layer_{layer}"), "o", ms=3, color=colour)
    axes.set(ylabel="squared error / squared target", title="direct loss of each layer")
    plain_scale(axes, "log")
    handles = [
        key(f"layer {layer}", shades[layer], "-") for layer in thinned(layers, _MOST_ENTRIES)
    ]
    plain_legend(
        axes, handles=handles, loc="upper left", bbox_to_anchor=(1, 1),
        fontsize="small", ncols=1 + len(handles) // 13,
    )  # fmt: skip


def _draw_panel(axes: Any, runs: Sequence[RunLog], looks: Iterable[_Look], panel: _Panel) -> None:
    for run, look in zip(runs, looks, strict=True):
        for name, form in ((panel.line, look.style), (panel.dots, "o"), (panel.crosses, "x")):
            if name in run.metrics:
                # evaluations are joined by a faint line, so that the eye finds the next one
                axes.plot(*run.values(name), form, color=look.colour, ms=4, lw=1.2)
                if form in ("o", "x"):
                    axes.plot(*run.values(name), look.style, color=look.colour, lw=0.8, alpha=0.5)
    axes.set_ylabel(panel.label)
    axes.set_title(panel.title, fontsize="medium")
    plain_scale(axes, panel.scale)


def _draw_stages(axes: Any, runs: Sequence[RunLog], looks: Sequence[_Look]) -> None:
    """A row for each run, first one on top, with a bar for each stage up to the next one."""
    for place, run in enumerate(runs):
        for index, (name, first, last) in enumerate(run.stages):
            begin = 0 if index == 0 and first <= 10 else first
            end = run.stages[index + 1][1] if index + 1 < len(run.stages) else last
            bar = axes.barh(
                place,
                end - begin,
                0.8,
                left=begin,
                color=_STAGES.get(name, "#eeeeee"),
                edgecolor="white",
            )
            axes.bar_label(
                bar, [name[:20]], label_type="center", fontsize="small", parse_math=False
            )
    axes.set_yticks(range(len(runs)), [look.name for look in looks], parse_math=False)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.yaxis.tick_right()  # beside the legend of layers, there is room for names
    axes.set_title("stage of the curriculum", fontsize="medium")
