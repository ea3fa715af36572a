"""The sizes of a base model, by which a modulation knows whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npt_fast.errors import printable

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What a base model must have for a modulation to fit.

    Attributes:
        name: it was loaded under; not compared.
        hidden_size: D.
        intermediate_size: F.
        num_hidden_layers: layers.
        vocab_size: tokens.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int

    @classmethod
    def of(cls, model: Any) -> BaseModel:
        """That of a Hugging Face model."""
        c = model.config
        name = printable(getattr(c, "_name_or_path", "") or "")  # a path need not be Unicode
        return cls(name, *(getattr(c, size) for size in SIZES))

    @property
    def sizes(self) -> tuple[int, ...]:
        """What is compared."""
        return tuple(getattr(self, size) for size in SIZES)
