"""``npt_config.json``: its schema, and the code that writes and reads it.

It describes the layers of a checkpoint and their base model. A safetensors file carries the same
description in its metadata. The file is untrusted: the types of its fields are checked once, here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from npt_fast.checkpoint.certificate import ANY_NUMBER, Certificate, finite_or_none
from npt_fast.checkpoint.np_module import Architecture, NPModule
from npt_fast.errors import CheckpointError
from npt_fast.schema import (
    COUNT,
    INDEX,
    MAPPING,
    PATH,
    TEXT,
    checked,
    mapping_of,
    one_of,
    or_none,
)

NPT_CONFIG = "npt_config.json"
FORMAT_VERSION = 1
_DESCRIPTION = {"base_model": or_none(MAPPING), "layers": or_none(mapping_of(INDEX, MAPPING))}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
_BASE_MODEL = {
    "name": or_none(PATH),
    "fingerprint": or_none(TEXT),
    **dict.fromkeys(SIZES, or_none(COUNT)),
}
_LAYER = {
    "modulation": or_none(TEXT),
    "num_ranks": or_none(COUNT),
    "rank": or_none(COUNT),
    "residual": or_none(one_of(["removed", "kept"])),
    "factors": or_none(one_of(["int8"])),
    "step": or_none(COUNT),
    "source": or_none(PATH),
    "fidelity": ANY_NUMBER,
    "certificate": or_none(MAPPING),
}


class LaterVersionError(CheckpointError):
    """The file was written by a later npt_fast; it is not damaged."""


@dataclass(frozen=True, slots=True)
class LayerDescription:
    """What ``npt_config.json`` says about one layer; fields that the file leaves out are None.

    Attributes:
        modulation: ``"single"``, ``"dual"``, ``"triple"`` or ``"plain"``.
        num_ranks: components k per projection.
        rank: bottleneck r of each component.
        residual: ``"removed"`` or ``"kept"`` (design.md#layer).
        step: optimizer steps that the layer was trained for.
        source: checkpoint that a merge took the layer from.
        fidelity: measured error of the layer.
        factors: ``"int8"`` if the factors are int8 numbers with scales; None for floats.
        certificate: what an evaluation measured of the checkpoint that the layer was saved in.
    """

    modulation: str | None = None
    num_ranks: int | None = None
    rank: int | None = None
    residual: str | None = None
    step: int | None = None
    source: str | None = None
    fidelity: float | None = None
    factors: str | None = None
    certificate: Certificate | None = None

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        residual: str | None,
        *,
        step: int | None,
        source: str | None = None,
        fidelity: float | None,
        factors: str | None = None,
        certificate: Certificate | None = None,
    ) -> LayerDescription:
        """Describe a layer; a fidelity that is not finite becomes None, since JSON has no NaN."""
        return cls(
            modulation=architecture.modulation,
            num_ranks=architecture.num_ranks,
            rank=architecture.rank,
            residual=residual,
            step=step,
            source=source,
            fidelity=finite_or_none(fidelity),
            factors=factors,
            certificate=certificate,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of the file; of float factors and a missing certificate it says nothing."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("factors", "certificate"):
            if content[name] is None:
                del content[name]
        if self.certificate is not None:
            content["certificate"] = self.certificate.to_dict()
        return content


@dataclass(frozen=True, slots=True)
class Description:
    """The content of ``npt_config.json`` (design.md#checkpoint-files).

    Attributes:
        base_name: name of the base model that the layers were trained on.
        base_sizes: ``hidden_size``, ``intermediate_size``, ``num_hidden_layers`` and
            ``vocab_size`` of the base model, as far as they are recorded.
        layers: description of each layer by its index; None if the file has no ``layers``.
        fingerprint: SHA-256 of a few weights of the base model, if it is recorded.
    """

    base_name: str | None
    base_sizes: Mapping[str, int]
    layers: Mapping[int, LayerDescription] | None
    fingerprint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of the file; `parse` turns it back into the same description."""
        return {
            "format_version": FORMAT_VERSION,
            "base_model": {
                "name": self.base_name,
                **{name: self.base_sizes.get(name) for name in SIZES},
                **({"fingerprint": self.fingerprint} if self.fingerprint else {}),
            },
            "layers": {str(layer): about.to_dict() for layer, about in (self.layers or {}).items()},
        }

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str) -> Description:
        """Build a description from the file's content; the type of every used field is checked.

        Args:
            content: JSON object of the file.
            where: name of the file, for messages.

        Raises:
            LaterVersionError: the file has another ``format_version``.
            CheckpointError: a field has the wrong type, or ``format_version`` is missing.
        """
        version = content.get("format_version")
        if "format_version" not in content:
            raise CheckpointError(f"{where}: has no format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise LaterVersionError(
                f"{where}: this npt_fast knows format_version {FORMAT_VERSION}, "
                "the file has another; update npt_fast"
            )
        top = checked(content, _DESCRIPTION, (), where, CheckpointError)
        base = checked(
            top.get("base_model") or {}, _BASE_MODEL, (), f"{where}: base_model", CheckpointError
        )
        layers = top.get("layers")
        return cls(
            base.get("name"),
            {name: base[name] for name in SIZES if base.get(name) is not None},
            layers
            and {
                int(key): _layer(facts, f"{where}: layers: {key}") for key, facts in layers.items()
            },
            base.get("fingerprint"),
        )

    def contradictions(self, modules: Mapping[int, NPModule]) -> Iterator[str]:
        """One line for each fact about a layer that its tensors contradict."""
        if self.layers is None:
            return
        for layer, module in modules.items():
            for name in ("modulation", "num_ranks", "rank"):
                value = getattr(module.architecture, name)
                if getattr(self.layers.get(layer), name, None) != value:
                    yield f"{NPT_CONFIG}: layer {layer}: {name} is not {value}, as the tensors say"
            if getattr(self.layers.get(layer), "factors", None) != module.factors:
                kind = module.factors or "floats"
                yield f"{NPT_CONFIG}: layer {layer}: factors are not {kind}, as the tensors say"


def _layer(facts: Any, where: str) -> LayerDescription:
    known = checked(facts, _LAYER, (), where, CheckpointError)
    known["fidelity"] = finite_or_none(known.get("fidelity"))
    if known.get("certificate") is not None:
        known["certificate"] = Certificate.parse(known["certificate"], f"{where}: certificate")
    return LayerDescription(**known)
