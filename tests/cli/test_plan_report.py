"""The folder of a plan and its lines, also of figures that are not finite."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from npt_fast.cli import plan_report
from npt_fast.cli.plan_report import plan_folder, plan_lines
from npt_fast.errors import NPTError
from npt_fast.training.plan import Measured, Plan, Prefix


def measured(
    *layers: int, kl: float | None, worst: Mapping[str, float | None] | None = None
) -> Measured:
    ratio = None if kl is None else 1 + kl
    worst = {"kl": kl, "perplexity_ratio": 3.5} if worst is None else worst
    return Measured(layers, 5120, kl, ratio, worst, 2_000_000 * len(layers), 12.25)


ALONE = (measured(13, kl=0.0125), measured(2, kl=0.5, worst={}), measured(5, kl=None))
PREFIXES = (
    Prefix(1, ALONE[0], ALONE[1]),
    Prefix(3, measured(2, 5, 13, kl=None), measured(2, 5, 13, kl=None)),
)
PLAN = Plan("python-docs", 42, (13, 2, 5), (2, 13, 5), ALONE, PREFIXES)


def test_the_table_has_every_measurement(tmp_path: Path) -> None:
    with plan_folder(str(tmp_path / "a")) as write:
        assert not (tmp_path / "a").exists()
        write(PLAN)
    with (tmp_path / "a" / "plan.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["order"], row["count"], row["layers"]) for row in rows] == [
        ("alone", "1", "13"), ("alone", "1", "2"), ("alone", "1", "5"), ("plan", "1", "13"),
        ("random", "1", "2"), ("plan", "3", "2,5,13"), ("random", "3", "2,5,13"),
    ]  # fmt: skip
    assert rows[0] == {
        "order": "alone", "count": "1", "layers": "13", "tokens": "5120", "kl": "0.0125",
        "perplexity_ratio": "1.0125", "nbytes": "2000000", "seconds": "12.25",
        "worst_kl": "0.0125", "worst_perplexity_ratio": "3.5",
    }  # fmt: skip
    assert (rows[1]["worst_kl"], rows[2]["kl"]) == ("", "")
    document = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert document["order"] == [13, 2, 5] and document["alone"][2]["kl"] is None
    picture = (tmp_path / "a" / "plan.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and min(struct.unpack(">II", picture[16:24])) > 900


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan_report, "find_spec", lambda name: None)
    with plan_folder(str(tmp_path / "a")) as write:
        write(PLAN)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["plan.csv", "plan.json"]


def test_complete_or_absent(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with (
        pytest.raises(NPTError, match="there: exists already; choose another folder"),
        plan_folder(str(tmp_path / "there")),
    ):
        raise AssertionError
    with pytest.raises(KeyError), plan_folder(str(tmp_path / "a")):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_lines_fit_a_terminal() -> None:
    lines = list(plan_lines(PLAN))
    assert max(map(len, lines)) <= 100
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert rows[2] == ["13", "0.0125", "1.0125", "0.0125", "3.5000"]
    assert rows[3] == ["2", "0.5000", "1.5000", "-", "-"]
    assert rows[4] == ["5", "not finite", "not finite", "not finite", "3.5000"]
    assert rows[7] == [
        "1", "2.0 MB", "12.2", "0.0125", "1.0125", "0.0125", "0.5000", "1.5000",
    ]  # fmt: skip
    assert "Order: 13,2,5" in lines
    assert lines[0].startswith("Each layer alone, best first: 5,120 tokens of python-docs")
