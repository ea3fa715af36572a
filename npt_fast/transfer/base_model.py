"""The sizes of a base model, which decide whether a modulation fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npt_fast.errors import printable

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
"""Fields that must be equal for a modulation to fit a model."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model's name and sizes; a modulation fits models of the same sizes.

    Attributes:
        name: Name or path that the model was loaded from; not compared.
        hidden_size: Width D of the residual stream.
        intermediate_size: Width F of the MLP.
        num_hidden_layers: Number of decoder layers.
        vocab_size: Number of tokens in the vocabulary.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int

    @classmethod
    def of(cls, model: Any) -> BaseModel:
        """The record of a Hugging Face model."""
        c = model.config
        name = printable(getattr(c, "_name_or_path", "") or "")  # a path need not be Unicode
        return cls(name, *(getattr(c, size) for size in SIZES))

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes, in the order of `SIZES`."""
        return tuple(getattr(self, size) for size in SIZES)
