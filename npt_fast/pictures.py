"""Draw pictures with matplotlib, without a display."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from npt_fast.errors import NPTError
from npt_fast.paths import is_directory, path_errors, user_path


def figure_class() -> Any:
    """The class Figure of matplotlib.

    Raises:
        NPTError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NPTError("a picture needs matplotlib; pip install 'npt_fast[plot]'") from None
    return Figure


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
    if path.suffix.removeprefix(".") not in formats:
        raise NPTError(f"{path}: the name must end in .png, .svg or .pdf")


def save(figure: Any, path: str | Path) -> None:
    """Write a figure; the ending of the file's name selects the format.

    Raises:
        NPTError: the file cannot be written, or the format is unknown.
    """
    path = user_path(path)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise NPTError(f"{path}: cannot be written: {error}") from error


def png(figure: Any) -> bytes:
    """A figure as the content of a file, 150 dots per inch."""
    out = BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
