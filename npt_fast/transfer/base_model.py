"""The sizes of a base model, which decide whether a modulation fits it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from npt_fast.checkpoint.npt_config import SIZES as SIZES
from npt_fast.errors import ModelError, printable
from npt_fast.hf.base_sizes import base_sizes, own_widths
from npt_fast.hf.convert import components
from npt_fast.hf.fingerprint import fingerprint
from npt_fast.hf.wrappers import unwrapped

FITTING = SIZES[:-1]
"""Fields that must be equal for a modulation to fit a model; a token may have been added."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model's name, sizes and fingerprint; a modulation fits models of the same sizes.

    Attributes:
        name: Name or path that the model was loaded from; not compared.
        hidden_size: Width D of the residual stream.
        intermediate_size: Width F of the MLP; in layers that are mixtures of experts, of what
            changes.
        num_hidden_layers: Number of decoder layers.
        vocab_size: Number of tokens in the vocabulary; not compared.
        fingerprint: SHA-256 of a few weights, which tells models of the same sizes apart; None if
            it is not known.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    fingerprint: str | None = None

    @classmethod
    def of(cls, model: Any, layers: Iterable[int] | None = None) -> BaseModel:
        """The record of a Hugging Face model.

        Args:
            model: The model.
            layers: Layers that a modulation changes; None for all NP layers.

        Raises:
            ModelError: its config lacks a size, or the layers have MLPs of several widths, which
                no modulation can have.
        """
        config = unwrapped(model).config
        # a path need not be Unicode
        name = printable(getattr(config, "_name_or_path", "") or "")
        sizes = base_sizes(model) | _width(model, layers)
        if missing := ", ".join(size for size in SIZES if size not in sizes):
            raise ModelError(f"{type(model).__name__}: its config has no {missing}; not supported")
        return cls(name, **sizes, fingerprint=fingerprint(model))

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of `FITTING`, in its order."""
        return tuple(getattr(self, size) for size in FITTING)


def _width(model: Any, layers: Iterable[int] | None) -> dict[str, int]:
    """The ``intermediate_size`` of layers where it is not the config's; else nothing."""
    own = own_widths(model)
    used = {own.get(layer) for layer in (components(model) if layers is None else layers)}
    if len(used) > 1:
        raise ModelError(
            f"a modulation has MLPs of one width: those of layers {list(own)}, which are wider or "
            "narrower, and those of other layers need modulations of their own"
        )
    width = used.pop() if used else None
    return {} if width is None else {"intermediate_size": width}
