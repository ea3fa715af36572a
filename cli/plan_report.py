"""A plan as a folder of a table, JSON and a picture, and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from npt_fast.cli.output import figure, size
from npt_fast.errors import NPTError
from npt_fast.pictures.figure import figure_class, plain_scale, png, whole_numbers
from npt_fast.report_files import csv_file, json_file, report_folder
from npt_fast.tables import markdown_table

if TYPE_CHECKING:
    from npt_fast.training.plan import Measured, Plan

_COLUMNS = ("tokens", "kl", "perplexity_ratio", "nbytes", "seconds")
_WORST = ("kl", "perplexity_ratio")


@contextmanager
def plan_folder(output: str) -> Iterator[Callable[[Plan], None]]:
    """Make a folder, hidden until a plan is written to it, as `report_folder` does.

    Yields:
        Writes a plan: plan.json, plan.csv, and plan.png if there is matplotlib.

    Raises:
        NPTError: the folder exists already or cannot be written.
    """
    with report_folder(output, NPTError) as write_files:

        def write(plan: Plan) -> None:
            files = {"plan.json": json_file(plan_json(plan)), "plan.csv": _csv(plan)}
            if find_spec("matplotlib") is not None:
                files["plan.png"] = draw(plan)
            write_files(files)

        yield write


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return asdict(plan)


def plan_lines(plan: Plan) -> Iterator[str]:
    """Each layer alone, the order, and both orders' first layers, as lines for a terminal."""
    tokens = plan.alone[0].tokens
    yield f"Each layer alone, best first: {tokens:,} tokens of {plan.data}; worst of other kinds"
    yield ""
    yield from markdown_table(
        ["layer", "KL, nats", "ratio", "worst KL", "worst ratio"],
        [[str(one.layers[0]), *_figures(one)] for one in plan.alone],
    ).splitlines()
    yield ""
    yield f"Order: {','.join(map(str, plan.order))}"
    yield ""
    yield f"The first layers together, and as many of a random order (seed {plan.seed})"
    yield ""
    yield from markdown_table(
        ["layers", "weights", "seconds", "KL", "ratio", "worst KL", "random: KL", "ratio"],
        [
            [
                str(prefix.count),
                size(prefix.planned.nbytes),
                f"{prefix.planned.seconds:.1f}",
                *_figures(prefix.planned)[:3],
                figure(prefix.control.kl),
                figure(prefix.control.perplexity_ratio),
            ]
            for prefix in plan.prefixes
        ],
    ).splitlines()


def _figures(measured: Measured) -> list[str]:
    """KL and perplexity ratio of the text, and the worst of each of the others, if any."""
    worst = [figure(measured.worst[n]) if n in measured.worst else "-" for n in _WORST]
    return [figure(measured.kl), figure(measured.perplexity_ratio), *worst]


def _csv(plan: Plan) -> bytes:
    """A line for each layer alone, and for each order's first layers."""
    rows = [("alone", one) for one in plan.alone]
    for prefix in plan.prefixes:
        rows += [("plan", prefix.planned), ("random", prefix.control)]
    return csv_file(
        ["order", "count", "layers", *_COLUMNS, *(f"worst_{name}" for name in _WORST)],
        [
            [
                order,
                len(one.layers),
                ",".join(map(str, one.layers)),
                *(getattr(one, name) for name in _COLUMNS),
                *(one.worst.get(name) for name in _WORST),
            ]
            for order, one in rows
        ],
    )


def draw(plan: Plan) -> bytes:
    """Bars of each layer alone; KL and perplexity ratio against the number of layers, both orders.

    Returns:
        A picture as PNG.

    Raises:
        NPTError: matplotlib is missing.
    """
    Figure = figure_class()
    drawn = Figure(figsize=(11, 8), layout="constrained")
    places = drawn.subplot_mosaic([["alone", "alone"], ["kl", "perplexity_ratio"]])
    alone = {one.layers[0]: one.kl for one in plan.alone if one.kl is not None}
    places["alone"].bar(list(alone), list(alone.values()))
    places["alone"].set_xticks(sorted(plan.order))
    places["alone"].set_title("each layer alone")
    places["alone"].set_xlabel("layer")
    places["alone"].set_ylabel("KL, nats")
    for name, label in (("kl", "KL, nats"), ("perplexity_ratio", "perplexity ratio")):
        axes = places[name]
        _line(axes, "the plan's order", name, [prefix.planned for prefix in plan.prefixes])
        _line(axes, "a random order", name, [prefix.control for prefix in plan.prefixes])
        plain_scale(axes, "log")
        whole_numbers(axes)
        axes.set_xlabel("layers converted")
        axes.set_ylabel(label)
        axes.legend()
    return png(drawn)


def _line(axes: Any, label: str, name: str, measured: Sequence[Measured]) -> None:
    """A line over the number of layers; what is not finite has no point."""
    there = [(len(one.layers), getattr(one, name)) for one in measured]
    there = [(count, value) for count, value in there if value is not None]
    axes.plot([count for count, _ in there], [value for _, value in there], "o-", label=label)
