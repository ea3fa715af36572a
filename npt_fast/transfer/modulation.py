"""The modulation, which users extract from a text, combine, save and inject.

Each layer and projection has ``dW = sum_i v_b_i v_a_i'``, stored as ``v_a (n, in)`` and
``v_b (n, out)``. Arithmetic (``a + b``, ``a - b``, ``2 * a``, ``a / 2``, ``-a``, ``sum``, `mean`)
acts on dW and is exact: it concatenates terms or scales v_b. Arithmetic on the vectors would not
be: twice the vectors is four times dW, and their negatives are the same dW
(design.md#modulation-arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from npt_fast.arguments import check_arguments
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.errors import ModelError, OptionError, TransferError, printable
from npt_fast.hf.fingerprint import note_other_base
from npt_fast.layer_names import LayerList, resolve_layers
from npt_fast.paths import user_path
from npt_fast.schema import shown
from npt_fast.tables import escaped, html_table
from npt_fast.transfer import modulation_file
from npt_fast.transfer.base_model import FITTING, BaseModel
from npt_fast.transfer.origin import bounded, describe
from npt_fast.transfer.terms import Layers, Terms, truncated


@dataclass(frozen=True, eq=False, repr=False)
class Modulation:
    """Weight changes dW of some NP layers, as rank-1 terms.

    Attributes:
        layers: Terms by layer index and projection (``gate``, ``up``, ``down``).
        base: Name and sizes of the base model that the terms fit.
        origin: Source text with its tokens and positions and how it was read, or how other
            modulations were combined; plain data that JSON can hold. A combination too large to be
            saved has ``{"summary": TEXT}`` instead.
        vectors: Whether the terms are the vectors of NP components, one to one. The modes that mix
            vectors (blend, add) need that.
    """

    layers: Layers
    base: BaseModel
    origin: Mapping[str, Any] = field(default_factory=dict)
    vectors: bool = False

    def __add__(self, other: Modulation) -> Modulation:
        if not isinstance(other, Modulation):
            return NotImplemented
        return _concatenated([self, other], bounded({"sum": [self.origin, other.origin]}))

    def __radd__(self, other: int) -> Modulation:
        """``sum(modulations)`` begins with 0."""
        return self if other == 0 else NotImplemented

    def __sub__(self, other: Modulation) -> Modulation:
        return self + -other

    def __neg__(self) -> Modulation:
        return -1.0 * self

    def __mul__(self, factor: float) -> Modulation:
        """Multiply dW by a finite number, which goes into v_b alone."""
        try:
            usable = math.isfinite(factor)
        except OverflowError:  # an int beyond the range of float
            usable = False
        if not usable:
            raise TransferError(f"a modulation cannot be multiplied by {shown(factor)}")
        factor = float(factor)
        return replace(
            self,
            layers=_mapped(self.layers, lambda t: Terms(t.v_a, t.v_b * factor)),
            origin=bounded({"factor": factor, "of": self.origin}),
            vectors=False,
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Modulation:
        """Divide dW by a number that is not 0."""
        if isinstance(divisor, Modulation):
            return NotImplemented
        if divisor == 0:
            raise TransferError("a modulation cannot be divided by 0")
        return self * (1 / divisor)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        about = shorten(self.description, 80, placeholder=" ...")
        return f"<Modulation of layers {layers}: {about}; terms: {self.terms}>"

    def _repr_html_(self) -> str:
        rows = [
            [
                f"<th>{layer}</th>",
                f"<td>{escaped(', '.join(projections))}</td>",
                f"<td>{max(len(t.v_a) for t in projections.values())}</td>",
                f"<td>{self.magnitude(layer):.4g}</td>",
            ]
            for layer, projections in self.layers.items()
        ]
        about = shorten(self.description, 200, placeholder=" ...")
        table = html_table(["layer", "projections", "terms", "magnitude"], rows)
        return f"<p>Modulation: {escaped(about)}</p>{table}"

    @property
    def terms(self) -> int:
        """Number of terms of the projection that has most."""
        return max(len(t.v_a) for _, _, t in self.walk())

    def walk(self) -> Iterator[tuple[int, str, Terms]]:
        """Yield layer, projection and terms, layer by layer."""
        for layer, projections in self.layers.items():
            for projection, terms in projections.items():
                yield layer, projection, terms

    def magnitude(self, layer: int) -> float:
        """Mean Frobenius norm of the layer's v_a and v_b tensors, as the original reports it.

        Raises:
            TransferError: the modulation does not change the layer.
        """
        tensors = [t for _, _, terms in self.only(layer).walk() for t in terms]
        return float(sum(t.double().norm().item() for t in tensors)) / len(tensors)

    def dense(self, layer: int, projection: str) -> Tensor:
        """dW of one projection, ``(out, in)``; as large as the weight itself.

        Raises:
            TransferError: the modulation does not change it.
        """
        terms = self.only(layer).layers[layer].get(projection)
        if terms is None:
            raise TransferError(f"the modulation does not change {shown(projection)}")
        return terms.dense()

    @check_arguments
    def only(self, layers: LayerList) -> Modulation:
        """The part that changes these layers.

        Args:
            layers: Layers, as for `NPTConfig`; others than those it changes may be among them.

        Raises:
            TransferError: the modulation changes none of them.
        """
        chosen = resolve_layers(layers, self.base.num_hidden_layers)
        kept = {layer: self.layers[layer] for layer in self.layers if layer in chosen}
        if not kept:
            raise TransferError(
                f"the modulation changes layers {list(self.layers)}, none of {list(chosen)}"
            )
        return replace(self, layers=kept)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Modulation:
        """Copy to another device or dtype."""
        return replace(
            self,
            layers=_mapped(self.layers, lambda t: Terms(*(x.to(device, dtype) for x in t))),
        )

    @check_arguments
    def compress(self, rank: int | None = None, tol: float = 0.0) -> tuple[Modulation, float]:
        """Approximate dW with fewer terms, by QR of both factors and an SVD.

        Args:
            rank: Largest number of terms per projection; None for no limit.
            tol: Allowed relative error of each projection's dW (Frobenius norm); `rank` wins.

        Returns:
            The smaller modulation, and the largest relative error of a projection's dW.

        Raises:
            OptionError: `rank` is not positive, or `tol` negative.
        """
        if (rank is not None and rank < 1) or tol < 0:
            raise OptionError(f"rank must be positive and tol not negative, got {rank} and {tol}")
        errors = [0.0]

        def compressed(terms: Terms) -> Terms:
            found, error = truncated(terms, rank, tol)
            errors.append(error)
            return found

        layers = _mapped(self.layers, compressed)
        error = max(errors)
        origin = bounded({"compressed": self.origin, "rank": rank, "error": error})
        return replace(self, layers=layers, origin=origin, vectors=False), error

    def check_base_model(self, model: Any) -> None:
        """Check that the modulation fits a model; another one of the same sizes gives a warning.

        Raises:
            ModelError: it belongs to a base model of other sizes.
        """
        own = BaseModel.of(model, self.layers)
        for name, ours, theirs in zip(FITTING, self.base.sizes, own.sizes, strict=True):
            if ours != theirs:
                known = self.base.name[:80] or "unnamed"
                raise ModelError(
                    f"the modulation belongs to another base model ({known}): "
                    f"{name} {ours}, the model has {theirs}"
                )
        recorded, found = self.base.fingerprint, own.fingerprint
        note_other_base("the modulation", self.base.name[:80], recorded, found)

    @property
    def contents(self) -> modulation_file.Contents:
        """The same fields, in the form that is written to a file."""
        return modulation_file.Contents(self.layers, self.base, self.origin, self.vectors)

    @check_arguments
    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the origin in its header, replacing a file in one step.

        Raises:
            TransferError: the file cannot be written, or could not be read back.
        """
        modulation_file.write(self.contents, user_path(path))

    @cached_property
    def description(self) -> str:
        """The origin in a line of at most 1,000 characters."""
        return printable(describe(self.origin))


@check_arguments
def load_modulation(path: str | Path) -> Modulation:
    """Open a file that `Modulation.save` wrote; tensors are read when they are used.

    Raises:
        CheckpointError: the file is no modulation, is damaged, or has another version.
    """
    return open_modulation(SourceFile.of(user_path(path), follow_links=True))


def open_modulation(source: SourceFile) -> Modulation:
    """Like `load_modulation`, for a file whose kind and size have been checked."""
    return Modulation(*modulation_file.read(source))


@check_arguments
def mean(modulations: Sequence[Modulation]) -> Modulation:
    """The modulation whose dW is the mean of the given ones.

    Raises:
        TransferError: the list is empty, or base models, layers or projections differ.
    """
    if not modulations:
        raise TransferError("the mean needs at least one modulation")
    scaled = [m * (1 / len(modulations)) for m in modulations]
    return _concatenated(scaled, bounded({"mean": [m.origin for m in modulations]}))


def combine_vectors(modulations: Sequence[Modulation], factors: Sequence[float]) -> Modulation:
    """Sum of the vectors v_a and v_b, each times its factor: the original's arithmetic.

    That is no arithmetic on dW: -m has the same dW as m, 2 m four times that of m, and a sum has
    cross terms (design.md#modulation-arithmetic).

    Args:
        modulations: Modulations whose terms are vectors of NP components.
        factors: A finite number for each of them.

    Returns:
        A modulation whose terms are vectors, which all modes take.

    Raises:
        TransferError: a factor is not finite, a modulation has no vectors, or base models, layers,
            projections or numbers of vectors differ.
    """
    if not all(map(math.isfinite, factors)):
        raise TransferError("a modulation cannot be multiplied by a number that is not finite")
    for one in modulations:
        if not one.vectors:
            raise TransferError(
                f"{one.description:.80}: was combined on dW and has no vectors; leave out -vectors"
            )
    _check_alike(modulations)

    def combined(layer: int, projection: str) -> Terms:
        terms = [one.layers[layer][projection] for one in modulations]
        if len({len(t.v_a) for t in terms}) > 1:
            counts = ", ".join(str(len(t.v_a)) for t in terms)
            raise TransferError(f"layer {layer}, {projection}: they have {counts} vectors")
        device = terms[0].v_a.device
        return Terms(
            *(
                torch.stack([f * t.to(device) for f, t in zip(factors, ts, strict=True)]).sum(0)
                for ts in zip(*terms, strict=True)
            )
        )

    parts = [
        {"factor": float(factor), "of": one.origin}
        for factor, one in zip(factors, modulations, strict=True)
    ]
    first = modulations[0]
    layers = {
        n: {p: combined(n, p) for p in projections} for n, projections in first.layers.items()
    }
    return Modulation(layers, first.base, bounded({"vectors": parts}), vectors=True)


def _mapped(layers: Layers, function: Callable[[Terms], Terms]) -> Layers:
    return {
        layer: {projection: function(terms) for projection, terms in projections.items()}
        for layer, projections in layers.items()
    }


def _concatenated(parts: Sequence[Modulation], origin: Mapping[str, Any]) -> Modulation:
    """The sum of dW: the terms of all parts, concatenated."""
    _check_alike(parts)
    first = parts[0]

    def joined(layer: int, projection: str) -> Terms:
        terms = [part.layers[layer][projection] for part in parts]
        device = terms[0].v_a.device
        return Terms(*(torch.cat([t.to(device) for t in ts]) for ts in zip(*terms, strict=True)))

    layers = {
        layer: {projection: joined(layer, projection) for projection in projections}
        for layer, projections in first.layers.items()
    }
    return Modulation(layers, first.base, origin)


def _check_alike(parts: Sequence[Modulation]) -> None:
    """Raise TransferError if base models, layers or projections differ."""
    first = parts[0]
    for other in parts[1:]:
        if other.base.sizes != first.base.sizes:
            raise TransferError(
                "the modulations belong to different base models: "
                f"{first.base.sizes} and {other.base.sizes}"
            )
        if set(other.layers) != set(first.layers):
            raise TransferError(
                f"the modulations change different layers: {sorted(first.layers)} and "
                f"{sorted(other.layers)}; take a part with .only(layers)"
            )
        for layer, projections in first.layers.items():
            if set(projections) != set(other.layers[layer]):
                raise TransferError(
                    f"layer {layer}: one changes {', '.join(projections)}, the other "
                    f"{', '.join(other.layers[layer])}"
                )
