"""A modulation: weight changes as rank-1 terms, taken from a text, that can be combined and kept.

Per layer and projection ``dW = sum_i v_b_i v_a_i'``, kept as ``v_a (n, in)`` and ``v_b (n, out)``.
Arithmetic is on dW and exact, by concatenating terms: ``a + b``, ``a - b``, ``2 * a``, ``-a``,
`mean`. (On the vectors themselves nothing means what it says: twice the vectors is four times dW,
and their negatives are the same dW.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npt_fast.errors import ModelError, TransferError, printable
from npt_fast.paths import user_path
from npt_fast.schema import Kind, is_plain, shown

PROJECTIONS = ("gate", "up", "down")
FORMAT = "npt_modulation"
VERSION = 1
_DEEPEST, _LARGEST = 64, 3 << 20  # of an origin: mappings in one another, bytes in a file's header
_LONGEST = 1000  # characters of a description


def _can_be_saved(origin: Any) -> bool:
    # measured before it is written out, which follows every path to what is shared
    if not isinstance(origin, Mapping) or not is_plain(origin, _DEEPEST, _LARGEST):
        return False
    text = json.dumps(origin, ensure_ascii=False)
    return len(json.dumps(text, ensure_ascii=False).encode()) <= _LARGEST


ORIGIN = Kind(
    "a mapping of texts, finite numbers, true, false, null, lists and mappings, at most "
    f"{_DEEPEST} deep and {_LARGEST:,} bytes long",
    _can_be_saved,
)
"""What an origin must be, so that it can be saved."""


class Terms(NamedTuple):
    """Rank-1 terms of one projection's weight change.

    Attributes:
        v_a: what each reads, ``(n, in)``.
        v_b: what it writes, ``(n, out)``.
    """

    v_a: Tensor
    v_b: Tensor

    def dense(self) -> Tensor:
        """dW, ``(out, in)``."""
        return self.v_b.t() @ self.v_a


@dataclass(frozen=True, slots=True)
class Base:
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
    def of(cls, model: Any) -> Base:
        """That of a Hugging Face model."""
        c = model.config
        return cls(
            printable(getattr(c, "_name_or_path", "") or ""),  # a path need not be Unicode
            c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.vocab_size,
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, ...]:
        """What is compared."""
        return (
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.vocab_size,
        )


Layers = Mapping[int, Mapping[str, Terms]]


@dataclass(frozen=True, eq=False)
class Modulation:
    """Weight changes of some layers of one base model.

    Attributes:
        layers: terms by layer index and projection (``gate``, ``up``, ``down``).
        base: the model they fit.
        origin: where they come from: a text with its tokens and positions, or how others were
            combined; plain data, as JSON has it. Where a combination would be more than `ORIGIN`
            allows, its description takes its place, as ``{"summary": TEXT}``.
        vectors: whether terms still are the components' vectors, one to one, so that the modes
            that work on vectors (blend, add) can be used.
    """

    layers: Layers
    base: Base
    origin: Mapping[str, Any] = field(default_factory=dict)
    vectors: bool = False

    def __add__(self, other: Modulation) -> Modulation:
        return _concatenated([self, other], _bounded({"sum": [self.origin, other.origin]}))

    def __sub__(self, other: Modulation) -> Modulation:
        return self + -other

    def __neg__(self) -> Modulation:
        return -1.0 * self

    def __mul__(self, factor: float) -> Modulation:
        """dW times `factor`, which goes into v_b alone."""
        try:
            usable = math.isfinite(factor)
        except OverflowError:  # a whole number that no float holds
            usable = False
        if not usable:
            raise TransferError(f"a modulation cannot be multiplied by {shown(factor)}")
        factor = float(factor)
        return replace(
            self,
            layers=_mapped(self.layers, lambda t: Terms(t.v_a, t.v_b * factor)),
            origin=_bounded({"factor": factor, "of": self.origin}),
            vectors=False,
        )

    __rmul__ = __mul__

    @property
    def terms(self) -> int:
        """The largest number of terms of a projection."""
        return max(len(t.v_a) for _, _, t in self.walk())

    def walk(self) -> Iterator[tuple[int, str, Terms]]:
        """Layer, projection and terms of all."""
        for layer, projections in self.layers.items():
            for projection, terms in projections.items():
                yield layer, projection, terms

    def magnitude(self, layer: int) -> float:
        """Mean Frobenius norm of a layer's tensors, as the original reports it."""
        tensors = [t for terms in self.layers[layer].values() for t in terms]
        return float(sum(t.double().norm().item() for t in tensors)) / len(tensors)

    def dense(self, layer: int, projection: str) -> Tensor:
        """dW, ``(out, in)``: for looking, and for small models."""
        return self.layers[layer][projection].dense()

    def only(self, layers: Sequence[int]) -> Modulation:
        """The part of some layers.

        Raises:
            TransferError: it has none of them.
        """
        kept = {layer: terms for layer, terms in self.layers.items() if layer in layers}
        if not kept:
            raise TransferError(f"it changes layers {list(self.layers)}, none of {list(layers)}")
        return replace(self, layers=kept)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Modulation:
        """On another device, or in another precision."""
        return replace(
            self,
            layers=_mapped(self.layers, lambda t: Terms(*(x.to(device, dtype) for x in t))),
        )

    def compress(self, rank: int | None = None, tol: float = 0.0) -> tuple[Modulation, float]:
        """Fewer terms for nearly the same change, by QR of both sides and the SVD in between.

        Args:
            rank: terms per projection, at most; no limit if None.
            tol: relative error of dW (Frobenius) that each projection may have.

        Returns:
            The modulation, and the largest relative error of a projection's dW.

        Raises:
            ValueError: `rank` is not positive, or `tol` negative.
        """
        if (rank is not None and rank < 1) or tol < 0:
            raise ValueError(f"rank must be positive and tol not negative, got {rank} and {tol}")
        errors = [0.0]

        def compressed(terms: Terms) -> Terms:
            found, error = _truncated(terms, rank, tol)
            errors.append(error)
            return found

        layers = _mapped(self.layers, compressed)
        error = max(errors)
        origin = _bounded({"compressed": self.origin, "rank": rank, "error": error})
        return replace(self, layers=layers, origin=origin, vectors=False), error

    def check_base(self, model: Any) -> None:
        """Whether it fits a model.

        Raises:
            ModelError: it was taken from another one.
        """
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
        own = Base.of(model)
        for name, ours, theirs in zip(names, self.base.sizes, own.sizes, strict=True):
            if ours != theirs:
                known = self.base.name[:80] or "unnamed"
                raise ModelError(
                    f"the modulation is of another base model ({known}): "
                    f"{name} {ours}, the model has {theirs}"
                )

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, its origin in the header; replaces a file in one step."""
        from npt_fast.transfer.files import save_modulation

        save_modulation(self, user_path(path))

    @cached_property
    def description(self) -> str:
        """Where it comes from, in a line of at most 1,000 characters."""
        return printable(describe(self.origin))


def mean(modulations: Sequence[Modulation]) -> Modulation:
    """The exact mean of dW.

    Raises:
        TransferError: none is given, or they do not fit together.
    """
    if not modulations:
        raise TransferError("there is nothing to take the mean of")
    scaled = [m * (1 / len(modulations)) for m in modulations]
    return _concatenated(scaled, _bounded({"mean": [m.origin for m in modulations]}))


def describe(origin: Mapping[str, Any]) -> str:
    """An origin in a line of at most 1,000 characters; "unknown" where it says nothing."""
    pieces: list[str] = []
    try:
        for piece in _told(origin):  # a piece at a time: an origin may share its parts endlessly
            pieces.append(piece)
            if sum(map(len, pieces)) > _LONGEST:
                return "".join(pieces)[: _LONGEST - 1] + "…"
        return "".join(pieces)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return "unknown"  # it comes from a file, which may say anything


def _told(origin: Mapping[str, Any]) -> Iterator[str]:
    if "text" in origin:
        positions = origin.get("positions") or []
        where = f"mean of {len(positions)} tokens" if len(positions) > 1 else f"at {positions}"
        yield f"{json.dumps(origin['text'][:_LONGEST], ensure_ascii=False)} {where}"
    elif "sum" in origin:
        for number, part in enumerate(origin["sum"]):
            yield " + (" if number else "("
            yield from _told(part)
            yield ")"
    elif "factor" in origin:
        yield f"{origin['factor']:g} * ("
        yield from _told(origin["of"])
        yield ")"
    elif "mean" in origin:
        for number, part in enumerate(origin["mean"]):
            yield ", " if number else "mean of "
            yield from _told(part)
    elif "compressed" in origin:
        yield from _told(origin["compressed"])
        yield f", compressed to an error of {origin['error']:.1e}"
    else:
        yield origin.get("summary", "unknown")


def _bounded(origin: Mapping[str, Any]) -> Mapping[str, Any]:
    """An origin, or its description where it could not be saved."""
    return origin if ORIGIN.fits(origin) else {"summary": describe(origin)}


def _mapped(layers: Layers, function: Callable[[Terms], Terms]) -> Layers:
    return {
        layer: {projection: function(terms) for projection, terms in projections.items()}
        for layer, projections in layers.items()
    }


def _concatenated(parts: Sequence[Modulation], origin: Mapping[str, Any]) -> Modulation:
    """The sum of dW: all terms side by side."""
    first = parts[0]
    for other in parts[1:]:
        if other.base.sizes != first.base.sizes:
            raise TransferError(
                f"modulations of different base models: {first.base.sizes} and {other.base.sizes}"
            )
        if set(other.layers) != set(first.layers):
            raise TransferError(
                f"modulations of different layers: {sorted(first.layers)} and "
                f"{sorted(other.layers)}; .only(layers) takes a part"
            )
        for layer, projections in first.layers.items():
            if set(projections) != set(other.layers[layer]):
                raise TransferError(
                    f"layer {layer}: one changes {', '.join(projections)}, the other "
                    f"{', '.join(other.layers[layer])}"
                )

    def joined(layer: int, projection: str) -> Terms:
        terms = [part.layers[layer][projection] for part in parts]
        device = terms[0].v_a.device
        return Terms(*(torch.cat([t.to(device) for t in ts]) for ts in zip(*terms, strict=True)))

    layers = {
        layer: {projection: joined(layer, projection) for projection in projections}
        for layer, projections in first.layers.items()
    }
    return Modulation(layers, first.base, origin)


def _truncated(terms: Terms, rank: int | None, tol: float) -> tuple[Terms, float]:
    """The best terms of smaller number, and the relative error of dW; in float64 inside."""
    dtype = terms.v_a.dtype
    q_a, r_a = torch.linalg.qr(terms.v_a.double().t())
    q_b, r_b = torch.linalg.qr(terms.v_b.double().t())
    left, values, right = torch.linalg.svd(r_b @ r_a.t())
    total = values.norm().item()
    # what leaving out all from the i-th on costs
    costs = values.flip(0).square().cumsum(0).sqrt().flip(0).tolist()
    kept = next((i for i, cost in enumerate(costs) if cost <= tol * total), len(costs))
    kept = max(1, min(kept, rank or kept))
    lost = costs[kept] if kept < len(costs) else 0.0
    v_a = right[:kept] @ q_a.t()
    v_b = (q_b @ left[:, :kept] * values[:kept]).t()
    return Terms(v_a.to(dtype), v_b.to(dtype)), lost / total if total else 0.0
