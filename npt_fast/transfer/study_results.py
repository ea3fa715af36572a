"""What a study measures: a row for each pair and condition, and means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npt_fast.tables import Report

RESAMPLES = 2000
"""Bootstrap samples of an interval."""
ALL = "all"
"""Name of the relations together in summaries."""


class Condition(NamedTuple):
    """What is done to the pass over a prompt.

    Attributes:
        method: ``base model``, ``base patched``, ``no injection``, the mode of an injection, or
            ``baked``.
        strength: Strength of the injection; None without one.
        injected: Text that is injected: ``nothing``; ``same relation``, the prompt about the
            source; ``other relation``, another relation's prompt about the source; ``unrelated``,
            a control sentence; ``same, paraphrased``, the same relation, where the prompt is a
            paraphrase.
    """

    method: str
    strength: float | None
    injected: str

    @property
    def how(self) -> str:
        """Method and strength, as ``replace x1``."""
        return self.method if self.strength is None else f"{self.method} x{self.strength:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One pair of subjects under one condition: next-token probabilities, in float64.

    Attributes:
        relation: Name of the relation.
        target: Subject of the prompt.
        source: Subject whose text is injected.
        method: As in `Condition`.
        strength: As in `Condition`.
        injected: As in `Condition`.
        prompt: Prompt about the target.
        text: Text that was injected; empty for nothing.
        own: Object of the target.
        moved: Object of the source in the same relation.
        other_relation: Name of another relation of the source; empty if there is none.
        crossed: Object of the source in that relation; empty if there is none.
        own_probability: Probability of the first token of `own`.
        moved_probability: Probability of the first token of `moved`.
        crossed_probability: Probability of the first token of `crossed`; None if there is none.
        top: Text of the likeliest token.
        winner: Which object has the likeliest token as its first: ``own``, ``moved``, ``crossed``,
            or empty for none.
    """

    relation: str
    target: str
    source: str
    method: str
    strength: float | None
    injected: str
    prompt: str
    text: str
    own: str
    moved: str
    other_relation: str
    crossed: str
    own_probability: float
    moved_probability: float
    crossed_probability: float | None
    top: str
    winner: str

    @property
    def condition(self) -> Condition:
        """The condition of the row."""
        return Condition(self.method, self.strength, self.injected)

    @property
    def measures(self) -> dict[str, float]:
        """The numbers of the row that summaries average, by name; shares are 0 or 1."""
        found = {
            "own on top": float(self.winner == "own"),
            "source's on top": float(self.winner == "moved"),
            "source's above own": float(self.moved_probability > self.own_probability),
            "p(own)": self.own_probability,
            "p(source's)": self.moved_probability,
        }
        if self.crossed_probability is not None:
            found["other relation's on top"] = float(self.winner == "crossed")
            found["p(other relation's)"] = self.crossed_probability
        return found


MEASURES = (
    "own on top", "source's on top", "other relation's on top", "source's above own",
    "p(own)", "p(source's)", "p(other relation's)",
)  # fmt: skip
"""Names of `Row.measures`, in the order in which they are shown."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over pairs, with a 95 % interval.

    Attributes:
        mean: Mean.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One condition, over all pairs of a relation.

    Attributes:
        relation: Name of the relation; ``all`` for the pairs of all relations together.
        condition: The condition.
        pairs: Number of pairs.
        measures: Mean and interval of each measure, by its name in `MEASURES`.
    """

    relation: str
    condition: Condition
    pairs: int
    measures: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class Known:
    """What the base model knows of a relation.

    Attributes:
        relation: Name of the relation.
        prompt: Prompt of the relation.
        subjects: Number of subjects in the suite.
        known: Subjects after whose prompt the object is the likeliest next token.
        pairs: Number of pairs that were made of them.
    """

    relation: str
    prompt: str
    subjects: int
    known: list[str]
    pairs: int


@dataclass(frozen=True, slots=True, repr=False)
class Study(Report):
    """The results of `npt.study`.

    Attributes:
        layers: NP layers that were on.
        reading: How texts became tokens.
        seed: Seed of pairs and intervals.
        known: What the base model knows, by relation.
        rows: One row for each pair and condition.
    """

    layers: list[int]
    reading: str
    seed: int
    known: list[Known]
    rows: list[Row]

    @property
    def facts(self) -> dict[str, object]:
        """What was studied, in short."""
        return {
            "layers": ", ".join(map(str, self.layers)),
            "reading": self.reading,
            "pairs": ", ".join(f"{known.pairs} of {known.relation}" for known in self.known),
            "rows": len(self.rows),
        }

    def summaries(self) -> list[Summary]:
        """Means and intervals of each condition, of each relation and of all together."""
        names = [known.relation for known in self.known if known.pairs]
        return [*(s for name in names for s in self._of(name)), *self._of(ALL)]

    def _of(self, name: str) -> Iterator[Summary]:
        rows = [row for row in self.rows if name in (ALL, row.relation)]
        for condition in dict.fromkeys(row.condition for row in rows):
            measured = [row.measures for row in rows if row.condition == condition]
            measures = {
                measure: bootstrap([m[measure] for m in measured if measure in m], self.seed)
                for measure in MEASURES
                if any(measure in m for m in measured)
            }
            yield Summary(name, condition, len(measured), measures)


def bootstrap(values: Sequence[float], seed: int) -> Interval:
    """Mean and percentile bootstrap interval (95 %) of numbers, in float64.

    `RESAMPLES` samples of as many numbers are drawn with replacement; the ends are the 2.5th and
    97.5th percentile of their means. One seed draws the same pairs under every condition. Pairs
    that share a subject are drawn as if they were independent.
    """
    given = np.asarray(values, np.float64)
    drawn: Any = np.random.default_rng(seed).integers(len(given), size=(RESAMPLES, len(given)))
    low, high = np.percentile(given[drawn].mean(1), [2.5, 97.5])
    return Interval(float(given.mean()), float(low), float(high))
