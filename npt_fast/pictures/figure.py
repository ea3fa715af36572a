"""Figures of matplotlib, without a display, and the files that they are written to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from npt_fast.checkpoint.publish import disk_errors
from npt_fast.checkpoint.replaced_file import replacing
from npt_fast.errors import NPTError
from npt_fast.paths import is_directory, path_errors, user_path

_DPI = 120


def figure_class() -> Any:
    """The class Figure of matplotlib, which notebooks show as it is.

    Raises:
        NPTError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NPTError("a picture needs matplotlib; pip install 'npt_fast[plot]'") from None

    return _picture(Figure)


@cache
def _picture(figure: Any) -> Any:
    return type("Picture", (figure,), {"_repr_png_": png})  # matplotlib's own needs pyplot


def check(given: str | Path) -> None:
    """Check that a picture can be drawn and written, before minutes of work are spent on it.

    Raises:
        NPTError: matplotlib or the folder is missing, or the file's name has no known ending.
    """
    path = user_path(given)
    formats = figure_class()().canvas.get_supported_filetypes()
    with path_errors(path, NPTError):
        if not is_directory(path.parent):
            raise NPTError(f"{path}: cannot be written: there is no folder {path.parent}")
        if is_directory(path):
            raise NPTError(f"{path}: cannot be written: it is a folder; name a file")
    if path.suffix.removeprefix(".") not in formats:
        raise NPTError(f"{path}: cannot be written: the name must end in .png, .svg or .pdf")


def save(figure: Any, given: str | Path) -> None:
    """Write a figure in one step; the ending of the file's name selects the format.

    Raises:
        NPTError: the file cannot be written, or the format is unknown.
    """
    check(given)
    path = user_path(given)
    content = _content(figure, path.suffix.removeprefix("."))
    with disk_errors(path, NPTError), replacing(path) as temporary:
        temporary.write_bytes(content)


def png(figure: Any) -> bytes:
    """A figure as the content of a PNG file."""
    return _content(figure, "png")


def _content(figure: Any, format: str) -> bytes:
    out = BytesIO()
    with warnings.catch_warnings():
        # a token may have letters that the font lacks: they become boxes, which says as much
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(out, format=format, dpi=_DPI)
    return out.getvalue()


def colours(count: int) -> list[Any]:
    """Colours of layers by their order; first and last ones differ most."""
    from matplotlib import colormaps

    shades = colormaps["plasma"]
    return [shades(0.85 * index / max(count - 1, 1)) for index in range(count)]


def thinned(items: Sequence[Any], most: int) -> Sequence[Any]:
    """At most so many of the items, evenly spaced, for ticks and legends with room for no more."""
    return items[:: -(-len(items) // most) or 1]


def plain_scale(axes: Any, scale: str) -> None:
    """Set the scale of the values, with ticks that are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale(scale)
    low, high = axes.get_ylim()
    if high < 5 * low:
        axes.set_yscale("linear")  # 1, 2 and 5 times powers of ten would be too few ticks
    elif scale == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")


def whole_numbers(axes: Any) -> None:
    """Put the ticks of what is counted at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plain_legend(owner: Any, **options: Any) -> None:
    """Add a legend to a figure or axes, whose texts are no formulas."""
    for text in owner.legend(**options).get_texts():
        text.set_parse_math(False)


def key(name: str, colour: Any, style: Any) -> Any:
    """A line for a legend, which stands for many lines of a picture."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, label=name)
