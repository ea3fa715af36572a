"""What ``npt_config.json`` and ``merge_summary.json`` record, as typed objects.

The files may be anybody's: what is in them is held against its types once, here, and whoever uses
it meets no surprise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npt_fast.errors import CheckpointError
from npt_fast.schema import (
    COUNT,
    FLAG,
    INDEX,
    MAPPING,
    PATH,
    TEXT,
    Kind,
    checked,
    list_of,
    mapping_of,
    one_of,
    or_none,
)

FORMAT_VERSION = 1
"""Of ``npt_config.json``."""

_DESCRIPTION = {"base_model": or_none(MAPPING), "layers": or_none(mapping_of(INDEX, MAPPING))}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
_BASE_MODEL = {"name": or_none(PATH), **dict.fromkeys(_SIZES, or_none(COUNT))}
_LAYER = {
    "modulation": or_none(TEXT),
    "num_ranks": or_none(COUNT),
    "rank": or_none(COUNT),
    "residual": or_none(one_of(["removed", "kept"])),
    "step": or_none(COUNT),
    # JSON of other programs has NaN and Infinity, which say as little as null
    "fidelity": or_none(Kind("a number", lambda value: type(value) in (int, float))),
}
_SUMMARY = {
    "merged_layers": or_none(list_of(COUNT)),
    "layer_sources": or_none(mapping_of(INDEX, PATH)),
    "total_parameters": or_none(COUNT),
    "checkpoint_keys": or_none(COUNT),
    "layers": or_none(mapping_of(INDEX, MAPPING)),
    "working_directory": or_none(PATH),
    "inputs": or_none(list_of(MAPPING)),
    "options": or_none(MAPPING),
    "files": or_none(mapping_of(TEXT, TEXT)),
    "tensors": or_none(mapping_of(TEXT, mapping_of(TEXT, TEXT))),
}
_PROVENANCE = {"source": or_none(PATH), "step": or_none(COUNT), "chain": or_none(list_of(PATH))}
_INPUT = {"path": PATH, "layers": or_none(list_of(COUNT))}
_OPTIONS = {
    "uniform": FLAG,
    "weights_only": FLAG,
    "allow_different_base": FLAG,
    "max_shard_size": COUNT,
    "copy_multi_layer_state": or_none(PATH),
}


class LaterVersionError(CheckpointError):
    """A file was written by a later npt_fast; it is not damaged."""


@dataclass(frozen=True, slots=True)
class LayerDescription:
    """What ``npt_config.json`` says of a layer; what it leaves out is None."""

    modulation: str | None = None
    num_ranks: int | None = None
    rank: int | None = None
    residual: str | None = None
    step: int | None = None
    fidelity: float | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """The content of ``npt_config.json``.

    Attributes:
        base_name: the base model that the layers were trained on.
        base_sizes: its ``hidden_size``, ``intermediate_size``, ``num_hidden_layers`` and
            ``vocab_size``, as far as they are recorded.
        layers: by index; None where the file has no list of layers.
    """

    base_name: str | None
    base_sizes: Mapping[str, int]
    layers: Mapping[int, LayerDescription] | None

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str) -> Description:
        """Hold what is used against its types.

        Raises:
            LaterVersionError: the file is of another version.
            CheckpointError: something has another type.
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
            {name: base[name] for name in _SIZES if base.get(name) is not None},
            layers
            and {
                int(key): _layer(facts, f"{where}: layers: {key}") for key, facts in layers.items()
            },
        )


def _layer(facts: Any, where: str) -> LayerDescription:
    known = checked(facts, _LAYER, (), where, CheckpointError)
    fidelity = known.get("fidelity")
    if fidelity is not None:
        known["fidelity"] = float(fidelity) if math.isfinite(fidelity) else None
    return LayerDescription(**known)


@dataclass(frozen=True, slots=True)
class Provenance:
    """What ``merge_summary.json`` says of a layer.

    Attributes:
        source: the checkpoint that the merge got it from.
        step: optimizer steps that it was trained for.
        chain: where that checkpoint had it from, and so on, nearest first.
    """

    source: str | None = None
    step: int | None = None
    chain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """The content of ``merge_summary.json``; what it leaves out is None, or empty.

    Attributes:
        merged_layers: layers of the output.
        layers: where each came from; all that a merge by the original says are the sources.
        total_parameters: weights.
        checkpoint_keys: weight tensors.
        inputs: path and selected layers of each; None for all of its layers.
        working_directory: what relative paths of inputs are relative to, seen from the output.
        options: keywords of `MergeOptions`, perhaps of another version.
        files: SHA-256 of files, or of what describes their tensors, by name.
        tensors: digests by file and tensor, where they were before they had a file of their own.
    """

    merged_layers: tuple[int, ...] | None
    layers: Mapping[int, Provenance]
    total_parameters: int | None
    checkpoint_keys: int | None
    inputs: tuple[tuple[str, tuple[int, ...] | None], ...] | None
    working_directory: str | None
    options: Mapping[str, Any] | None
    files: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, str]] | None

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str) -> MergeSummary:
        """Hold what is used against its types.

        Raises:
            CheckpointError: something has another type.
        """
        top = checked(content, _SUMMARY, (), where, CheckpointError)
        layers = {
            int(n): Provenance(source) for n, source in (top.get("layer_sources") or {}).items()
        }
        for key, facts in (top.get("layers") or {}).items():
            own = checked(facts, _PROVENANCE, (), f"{where}: layers: {key}", CheckpointError)
            source = own.get("source") or layers.get(int(key), Provenance()).source
            layers[int(key)] = Provenance(source, own.get("step"), tuple(own.get("chain") or ()))
        inputs = top.get("inputs")
        if inputs is not None:
            inputs = tuple(
                _input(item, f"{where}: inputs: item {i}") for i, item in enumerate(inputs, 1)
            )
        options = top.get("options")
        if options is not None:
            checked(options, _OPTIONS, (), f"{where}: options", CheckpointError)
        merged = top.get("merged_layers")
        return cls(
            merged_layers=None if merged is None else tuple(merged),
            layers=layers,
            total_parameters=top.get("total_parameters"),
            checkpoint_keys=top.get("checkpoint_keys"),
            inputs=inputs,
            working_directory=top.get("working_directory"),
            options=options,
            files=top.get("files") or {},
            tensors=top.get("tensors"),
        )


def _input(item: Any, where: str) -> tuple[str, tuple[int, ...] | None]:
    known = checked(item, _INPUT, ["path"], where, CheckpointError)
    layers = known.get("layers")
    return known["path"], None if layers is None else tuple(layers)
