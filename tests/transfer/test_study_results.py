"""Intervals against a plain bootstrap, and summaries against a plain mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from npt_fast.transfer.study_results import Known, Row, Study, bootstrap

ROW = Row(
    "r", "t", "s", "replace", 1.0, "same relation", "p", "x", "o", "m", "q", "c",
    0.25, 0.5, 0.125, "m", "moved",
)  # fmt: skip


def study() -> Study:
    """Two relations; the second has no other one."""
    alone = {"relation": "z", "other_relation": "", "crossed": "", "crossed_probability": None}
    rows = [
        ROW,
        replace(ROW, winner="own", own_probability=0.75),
        replace(ROW, winner="crossed"),
        replace(ROW, injected="unrelated", winner=""),
        replace(ROW, **alone, winner=""),
    ]
    known = [Known("r", "{}", 4, ["s", "t"], 3), Known("z", "{}!", 3, ["s", "t"], 1)]
    return Study([1], "with special tokens", 3, [*known, Known("none", "?{}", 9, [], 0)], rows)


@pytest.mark.parametrize("values", [[0.0, 1.0, 1.0, 0.25, 0.5], [0.5], [1.0, 1.0]])
def test_the_bootstrap_is_a_plain_one(values: list[float]) -> None:
    draw = np.random.default_rng(7)
    places = draw.integers(len(values), size=(2000, len(values)))
    means = sorted(sum(values[i] for i in sample) / len(values) for sample in places)

    def percentile(share: float) -> float:
        place = share * (len(means) - 1)
        below = int(place)
        above = min(below + 1, len(means) - 1)
        return float(means[below] + (place - below) * (means[above] - means[below]))

    found = bootstrap(values, 7)
    assert found.mean == pytest.approx(sum(values) / len(values), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((percentile(0.025), percentile(0.975)))
    assert found == bootstrap(values, 7)
    if len(set(values)) > 1:
        assert found.low < found.mean < found.high


def test_summaries() -> None:
    found = {(s.relation, s.condition.injected): s for s in study().summaries()}
    assert list(found) == [
        ("r", "same relation"), ("r", "unrelated"), ("z", "same relation"),
        ("all", "same relation"), ("all", "unrelated"),
    ]  # fmt: skip
    one, everything = found["r", "same relation"], found["all", "same relation"]
    assert (one.pairs, everything.pairs) == (3, 4)
    assert one.condition.how == "replace x1"
    means = {name: interval.mean for name, interval in one.measures.items()}
    assert means == {
        "own on top": pytest.approx(1 / 3),
        "source's on top": pytest.approx(1 / 3),
        "other relation's on top": pytest.approx(1 / 3),
        "source's above own": pytest.approx(2 / 3),
        "p(own)": pytest.approx(1.25 / 3),
        "p(source's)": 0.5,
        "p(other relation's)": 0.125,
    }
    assert everything.measures["own on top"].mean == 0.25
    # of the pairs that have one
    assert everything.measures["other relation's on top"].mean == pytest.approx(1 / 3)
    assert "p(other relation's)" not in found["z", "same relation"].measures
