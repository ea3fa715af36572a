"""The folder of a study: what is in it, and that it is complete or absent."""

from __future__ import annotations

import csv
import json
import math
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from npt_fast.errors import TransferError
from npt_fast.transfer import study_report
from npt_fast.transfer.study_report import study_folder, study_html, study_lines
from npt_fast.transfer.study_results import MEASURES
from tests.transfer.test_report import HOSTILE, Reader
from tests.transfer.test_study_results import ROW, study

NAMES = ["rows.csv", "study.html", "study.json", "study.png", "summary.csv"]


def test_the_files(tmp_path: Path) -> None:
    found = study()
    with study_folder(tmp_path / "a") as write:
        assert not (tmp_path / "a").exists()
        write(found)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == NAMES
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with (tmp_path / "a" / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, given in zip(rows, found.rows, strict=True):
        assert row == {k: "" if v is None else str(v) for k, v in asdict(given).items()}
    document = json.loads((tmp_path / "a" / "study.json").read_text())
    summaries = document.pop("summaries")
    assert document == json.loads(json.dumps(asdict(found)))
    with (tmp_path / "a" / "summary.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == sum(len(s["measures"]) for s in summaries)
    for line in table:
        (one,) = (
            s for s in summaries
            if (s["relation"], s["injected"]) == (line["relation"], line["injected"])
        )  # fmt: skip
        interval = one["measures"][line["measure"]]
        assert interval == {key: float(line[key]) for key in ("mean", "low", "high")}
        assert (one["pairs"], one["strength"]) == (int(line["pairs"]), float(line["strength"]))
    picture = (tmp_path / "a" / "study.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and min(struct.unpack(">II", picture[16:24])) > 1000


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(study_report, "find_spec", lambda name: None)
    with study_folder(tmp_path / "a") as write:
        write(study())
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        name for name in NAMES if name != "study.png"
    ]


def test_complete_or_absent(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    for name, problem in (
        ("there", "exists already; choose another folder"),
        ("file", "exists already"),
        ("file/a", "Not a directory"),
    ):
        with pytest.raises(TransferError, match=problem) as caught, study_folder(tmp_path / name):
            raise AssertionError
        assert "\n" not in str(caught.value)
    for name in ("a", "none/a"):
        with pytest.raises(KeyError), study_folder(tmp_path / name):
            raise KeyError
    assert sorted(tmp_path.iterdir()) == before


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """A broken layer gives NaN, which JSON does not have."""
    broken = replace(ROW, own_probability=math.nan)
    with study_folder(tmp_path / "a") as write:
        write(replace(study(), rows=[broken]))
    document = json.loads((tmp_path / "a" / "study.json").read_text())
    assert document["rows"][0]["own_probability"] is None


def test_the_page(tmp_path: Path) -> None:
    found = study()
    page = study_html(found, found.summaries())
    cells = Reader(page).cells()
    assert {"replace x1", "same relation", "unrelated", *MEASURES} <= set(cells)
    assert "0.333" in "".join(cells) and "default-src 'none'" in page
    hostile = replace(
        found,
        known=[replace(known, relation=HOSTILE, prompt=HOSTILE) for known in found.known[:1]],
        rows=[replace(row, relation=HOSTILE) for row in found.rows],
    )
    after = study_html(hostile, hostile.summaries())
    assert {tag for tag, _ in Reader(after).tags} == {tag for tag, _ in Reader(page).tags}
    assert "\x00" not in after and "\x1b" not in after


def test_lines_fit_a_terminal() -> None:
    long = "x" * 200
    found = study()
    wide = replace(
        found,
        known=[replace(found.known[0], relation=long, prompt=long)],
        rows=[
            replace(row, relation=long, method="exact-blend", strength=0.25) for row in found.rows
        ],
    )
    lines = list(study_lines(wide))
    assert max(map(len, lines)) <= 100
    text = "\n".join(study_lines(found))
    assert "2 of 4" in text
    assert "33 [0, 100]" in text and "Each relation, replace x1" in text
