"""``merge_summary.json`` as a typed object: the sources of a merge's layers, and its digests.

The file is untrusted: the types of its fields are checked once, here. `merge_report.summary_of`
makes its content.
"""

from __future__ import annotations

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
    checked,
    list_of,
    mapping_of,
    or_none,
)

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


@dataclass(frozen=True, slots=True)
class Provenance:
    """What ``merge_summary.json`` says about one layer.

    Attributes:
        source: checkpoint that the merge took the layer from.
        step: optimizer steps that the layer was trained for.
        chain: checkpoints that `source` got the layer from in earlier merges, newest first.
    """

    source: str | None = None
    step: int | None = None
    chain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """The content of ``merge_summary.json``; fields that the file leaves out are None or empty.

    Attributes:
        merged_layers: layers of the merged checkpoint.
        layers: origin of each layer, by index; the original records only the sources.
        total_parameters: number of weights.
        checkpoint_keys: number of weight tensors.
        inputs: path and selected layers of each input; None stands for all of its layers.
        working_directory: directory that relative paths of inputs are relative to, itself relative
            to the merged checkpoint.
        options: keywords of `MergeOptions`, perhaps of another version.
        files: SHA-256 of each file, or of its header if it has tensors, by name.
        tensors: digests by file and tensor; files of early versions have them here instead of in
            ``merge_digests.txt``.
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
        """Build a summary from the file's content; the type of every used field is checked.

        Args:
            content: JSON object of the file.
            where: name of the file, for messages.

        Raises:
            CheckpointError: a field has the wrong type.
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
