"""What an evaluation measured of a checkpoint, as ``npt_config.json`` keeps it for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from npt_fast.errors import CheckpointError
from npt_fast.schema import (
    COUNT,
    MAPPING,
    PATH,
    TEXT,
    Kind,
    checked,
    list_of,
    mapping_of,
    or_none,
    shown,
)

# other programs write NaN and Infinity into JSON; readers treat these as null
ANY_NUMBER = or_none(Kind("a number", lambda value: type(value) in (int, float)))
_CLOSENESS = {"tokens": COUNT, "kl": ANY_NUMBER, "perplexity_ratio": ANY_NUMBER}
_CERTIFICATE = {
    "layers": list_of(COUNT),
    "step": or_none(COUNT),
    "data": or_none(PATH),
    **_CLOSENESS,
    "texts": mapping_of(TEXT, MAPPING),
    "worst": or_none(MAPPING),
}
_REQUIRED = ("layers", *_CLOSENESS, "texts")


def finite_or_none(value: float | None) -> float | None:
    """A number as JSON can hold it: None for NaN and infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Closeness:
    """How close a model with NP layers is to its base model on one text.

    Attributes:
        tokens: number of positions measured.
        kl: mean KL(base model, NPT model) over all positions, in nats; None if it is not finite.
        perplexity_ratio: perplexity of the NPT model over that of the base model; None if it is
            not finite.
    """

    tokens: int
    kl: float | None
    perplexity_ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "kl": self.kl, "perplexity_ratio": self.perplexity_ratio}

    @classmethod
    def parse(cls, content: Any, where: str) -> Closeness:
        """Build it from a mapping, all of whose values are checked; raises CheckpointError."""
        known = checked(content, _CLOSENESS, tuple(_CLOSENESS), where, CheckpointError)
        return cls(known["tokens"], *map(finite_or_none, (known["kl"], known["perplexity_ratio"])))


def worst_of(texts: Iterable[Closeness]) -> dict[str, float | None]:
    """The largest ``kl`` and the largest ``perplexity_ratio`` of some texts, each by itself.

    A figure that is not finite is the worst there is: None. Without texts, the result is empty.
    """
    found: dict[str, float | None] = {}
    for text in texts:
        for name in ("kl", "perplexity_ratio"):
            value, before = getattr(text, name), found.get(name, -math.inf)
            found[name] = None if value is None or before is None else max(value, before)
    return found


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the last evaluation before a checkpoint was written measured, all layers on together.

    Attributes:
        layers: the NP layers that were on. Of layers that were merged later it says nothing.
        step: optimizer steps that the run had taken; None if not known.
        data: name of the text that `held_out` was held out of; None if not known.
        held_out: figures on that text.
        texts: figures on each text of another kind, by its name.
    """

    layers: tuple[int, ...]
    step: int | None
    data: str | None
    held_out: Closeness
    texts: Mapping[str, Closeness] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file; `parse` turns it back into the same certificate."""
        return {
            "layers": list(self.layers),
            "step": self.step,
            "data": self.data,
            **self.held_out.to_dict(),
            "texts": {name: text.to_dict() for name, text in self.texts.items()},
            "worst": worst_of(self.texts.values()),
        }

    @classmethod
    def parse(cls, content: Any, where: str) -> Certificate:
        """Build a certificate from the file's content; ``worst`` is computed, not believed.

        Args:
            content: any value.
            where: file and place in it, for messages.

        Raises:
            CheckpointError: a value is missing or has the wrong type.
        """
        known = checked(content, _CERTIFICATE, _REQUIRED, where, CheckpointError)
        return cls(
            tuple(known["layers"]),
            known.get("step"),
            known.get("data"),
            Closeness.parse(content, where),
            {
                name: Closeness.parse(text, f"{where}: texts: {shown(name)}")
                for name, text in known["texts"].items()
            },
        )


def grouped(
    certificates: Iterable[tuple[int, Certificate | None]],
) -> list[tuple[Certificate, list[int]]]:
    """Each certificate once, with its layers: layers of one run share theirs.

    Args:
        certificates: layers with their certificates; those without one are left out.
    """
    groups: dict[str, tuple[Certificate, list[int]]] = {}
    for layer, certificate in certificates:
        if certificate is not None:
            groups.setdefault(repr(certificate), (certificate, []))[1].append(layer)
    return list(groups.values())
