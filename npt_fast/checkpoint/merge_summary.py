"""``merge_summary.json``: its schema, and the code that writes and reads it.

It records how a merged checkpoint was made (design.md#checkpoint-files): the original's keys, then
ours. The file is untrusted: the types of its fields are checked once, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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

MERGE_SUMMARY = "merge_summary.json"

_TOP = {
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
_LAYER = {
    "source": or_none(PATH),
    "step": or_none(COUNT),
    "chain": or_none(list_of(PATH)),
    "digest": or_none(TEXT),
    "parts": or_none(list_of(MAPPING)),
}
_PART = {
    "source": PATH,
    "step": or_none(COUNT),
    "chain": list_of(PATH),
    "num_ranks": COUNT,
    "divisor": COUNT,
}
_INPUT = {"path": PATH, "layers": or_none(list_of(COUNT))}
_OPTIONS = {
    "uniform": FLAG,
    "weights_only": FLAG,
    "allow_different_base": FLAG,
    "max_shard_size": COUNT,
    "copy_multi_layer_state": or_none(PATH),
}


@dataclass(frozen=True, slots=True)
class PartProvenance:
    """Where one part of a joined layer comes from.

    Attributes:
        source: checkpoint that the merge took the part from.
        step: optimizer steps that the part was trained for.
        chain: checkpoints that `source` got the part from in earlier merges, newest first.
        num_ranks: number of its components in the joined layer.
        divisor: number that its ``W_b_up`` were divided by.
    """

    source: str
    step: int | None
    chain: tuple[str, ...]
    num_ranks: int
    divisor: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a layer comes from.

    Attributes:
        source: checkpoint that the merge took the layer from; several are joined by ``+``.
        step: optimizer steps that the layer was trained for.
        chain: checkpoints that `source` got the layer from in earlier merges, newest first.
        digest: SHA-256 over the names and digests of its tensors; None unless all are known.
        parts: origin of each part of a layer that ``concat`` or ``mean`` joined, else empty.
    """

    source: str | None = None
    step: int | None = None
    chain: tuple[str, ...] = ()
    digest: str | None = None
    parts: tuple[PartProvenance, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The layer's entry in the file; ``parts`` is left out unless there are several."""
        facts = {
            "step": self.step,
            "source": self.source,
            "chain": self.chain,
            "digest": self.digest,
        }
        return {**facts, "parts": [asdict(part) for part in self.parts]} if self.parts else facts


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
    tensors: Mapping[str, Mapping[str, str]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of the file; `parse` turns it back into the same summary."""
        return {
            "merged_layers": self.merged_layers,
            "layer_sources": {str(layer): facts.source for layer, facts in self.layers.items()},
            "total_parameters": self.total_parameters,
            "checkpoint_keys": self.checkpoint_keys,
            "layers": {str(layer): facts.to_dict() for layer, facts in self.layers.items()},
            "working_directory": self.working_directory,
            "inputs": [{"path": path, "layers": layers} for path, layers in self.inputs or ()],
            "options": self.options,
            "files": self.files,
        }

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str) -> MergeSummary:
        """Build a summary from the file's content; the type of every used field is checked.

        Args:
            content: JSON object of the file.
            where: name of the file, for messages.

        Raises:
            CheckpointError: a field has the wrong type.
        """
        top = checked(content, _TOP, (), where, CheckpointError)
        sources = top.get("layer_sources") or {}
        layers = {int(key): Provenance(source) for key, source in sources.items()}
        for key, facts in (top.get("layers") or {}).items():
            layers[int(key)] = _provenance(facts, sources.get(key), f"{where}: layers: {key}")
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


def _provenance(facts: Any, source: str | None, where: str) -> Provenance:
    own = checked(facts, _LAYER, (), where, CheckpointError)
    return Provenance(
        own.get("source") or source,
        own.get("step"),
        tuple(own.get("chain") or ()),
        own.get("digest"),
        tuple(_part(item, where) for item in own.get("parts") or ()),
    )


def _part(item: Any, where: str) -> PartProvenance:
    known = checked(item, _PART, list(_PART), f"{where}: parts", CheckpointError)
    return PartProvenance(**{**known, "chain": tuple(known["chain"])})


def _input(item: Any, where: str) -> tuple[str, tuple[int, ...] | None]:
    known = checked(item, _INPUT, ["path"], where, CheckpointError)
    layers = known.get("layers")
    return known["path"], None if layers is None else tuple(layers)
