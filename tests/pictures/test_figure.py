"""Pictures appear complete or not at all, and nothing in a text becomes a formula."""

from __future__ import annotations

import builtins
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest

from npt_fast.errors import NPTError, StorageError
from npt_fast.pictures.figure import (
    check,
    figure_class,
    plain_scale,
    save,
    thinned,
    whole_numbers,
)


def figure() -> Any:
    found = figure_class()(figsize=(2, 1))
    found.subplots().plot([1, 2], [3, 4])
    return found


def test_formats_and_size(tmp_path: Path) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        save(figure(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24]) == (240, 120)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png", "a.svg"]


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    for name, problem in (
        ("none/a.png", "there is no folder"),
        ("a.xyz", r"the name must end in \.png, \.svg or \.pdf"),
        ("folder.png", "it is a folder; name a file"),
    ):
        for do in (check, lambda path: save(figure(), path)):
            with pytest.raises(NPTError, match=problem):
                do(tmp_path / name)
    (tmp_path / "a.png").write_bytes(b"before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"a\.png"):
        save(figure(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "folder.png"]


def test_letters_that_the_font_lacks_are_no_warning(tmp_path: Path) -> None:
    drawn = figure()
    drawn.suptitle("\N{CJK UNIFIED IDEOGRAPH-4E2D}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(drawn, tmp_path / "a.png")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NPTError, match=r"pip install 'npt_fast\[plot\]'"):
        figure_class()


def test_ticks_are_plain_and_whole_numbers() -> None:
    for values, scale in (([0.97, 1.04], "linear"), ([0.01, 0.5], "log")):
        axes = figure_class()().subplots()
        axes.plot([1, 3], values)
        plain_scale(axes, "log")
        whole_numbers(axes)
        assert axes.get_yscale() == scale
        labels = axes.yaxis.get_major_formatter().format_ticks(axes.get_yticks())
        assert all(f"{float(label):g}" == label for label in labels)
        assert all(float(place).is_integer() for place in axes.get_xticks())


def test_thinned() -> None:
    assert list(thinned(range(5), 5)) == [0, 1, 2, 3, 4]
    assert list(thinned(range(6), 5)) == [0, 2, 4]
    assert list(thinned([], 5)) == []
