"""A checkpoint as a user names it: the weights and the small files beside them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npt_fast import paths
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.digests import DIGESTS, TensorDigest, read_digests
from npt_fast.checkpoint.np_module import NPModule, collect_modules
from npt_fast.checkpoint.tensor_source import (
    WEIGHTS,
    TensorSource,
    locate_checkpoint,
    open_tensors,
)
from npt_fast.checkpoint.training_state import MULTI_LAYER_STATE, TRAINING_STATE
from npt_fast.config import layer_indices
from npt_fast.errors import CheckpointError, MergeError
from npt_fast.paths import expand, path_errors

CONFIG = "config.json"
NPT_CONFIG = "npt_config.json"
MERGE_SUMMARY = "merge_summary.json"
FORMAT_VERSION = 1
_WITHOUT = {
    CONFIG: "the file is not used",
    MERGE_SUMMARY: "without it, earlier sources and digests of its layers are not known",
}
_RESTORE = "it records which layers keep their residual: restore it, or, if none does, remove it"
_FILES = {
    *WEIGHTS,
    TRAINING_STATE,
    MULTI_LAYER_STATE,
    CONFIG,
    NPT_CONFIG,
    MERGE_SUMMARY,
    DIGESTS,
}
_OWN_SHARD = re.compile(r"npt_weights-[0-9]+-of-[0-9]+\.safetensors")
_SELECTION = re.compile(r"(?P<path>.+):(?P<layers>[0-9][0-9, -]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What a checkpoint says about where a layer comes from.

    Attributes:
        residual: ``"removed"``, ``"kept"``, or None where nothing tells (SPEC 1.3).
        step: optimizer steps the layer was trained for.
        fidelity: measured quality, as training recorded it.
        source: the checkpoint that this one got the layer from; None when it trained it itself.
        chain: where that one got it from, and so on, nearest first.
    """

    residual: str | None = None
    step: int | None = None
    fidelity: float | None = None
    source: str | None = None
    chain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint; no tensor data has been read.

    Attributes:
        given: path as the user wrote it, without a selection and with ``~`` replaced.
        directory: folder of the small files; None for bare weights.
        notes: where it was found, if not where it was looked for; weights that were not read.
        weights: the tensors.
        modules: complete layers, ascending.
        config: content of ``config.json``.
        npt_config: content of ``npt_config.json``, or of the safetensors metadata.
        summary: content of ``merge_summary.json``.
        unread: of these files, those that are there and cannot be read, with a line that says why.
    """

    given: str
    directory: Path | None
    notes: tuple[str, ...]
    weights: TensorSource
    modules: Mapping[int, NPModule]
    config: Mapping[str, Any] | None
    npt_config: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None
    unread: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.directory or self.weights.path

    @property
    def model_name(self) -> str | None:
        """The base model that the checkpoint was trained on, where it says so."""
        name = _get(self.config, "model_name") or _get(self.npt_config, "base_model", "name")
        return name if isinstance(name, str) else None

    def base_fact(self, name: str) -> int | None:
        """An integer of the base model's fingerprint, where recorded."""
        value = _get(self.npt_config, "base_model", name)
        return value if type(value) is int else None

    def record(self, layer: int) -> LayerRecord:
        """What is recorded about a layer; unknown facts are None."""
        key = str(layer)
        source = _get(self.summary, "layers", key, "source")
        if source is None:  # a merge by the original says no more than this
            source = _get(self.summary, "layer_sources", key)
        step = _get(self.npt_config, "layers", key, "step")
        if step is None:
            step = _get(self.summary, "layers", key, "step")
        residual = _get(self.npt_config, "layers", key, "residual")
        if residual is None and self.modules[layer].architecture.modulation == "triple":
            residual = "removed"  # triple modulation came after the residual had gone
        fidelity = _get(self.npt_config, "layers", key, "fidelity")
        if type(fidelity) is int:
            fidelity = float(fidelity)
        chain = _get(self.summary, "layers", key, "chain")
        return LayerRecord(
            residual if residual in ("removed", "kept") else None,
            step if type(step) is int else None,
            fidelity if type(fidelity) is float and math.isfinite(fidelity) else None,
            source if isinstance(source, str) else None,
            tuple(s for s in chain if isinstance(s, str)) if isinstance(chain, list) else (),
        )

    def digests(self) -> Iterator[TensorDigest]:
        """Recorded digests of the tensors in the checkpoint's files.

        Raises:
            CheckpointError: the file of digests cannot be read.
        """
        recorded = _get(self.summary, "tensors")  # where they were before they had a file
        if isinstance(recorded, dict):
            for file, tensors in recorded.items():
                for name, digest in tensors.items() if isinstance(tensors, dict) else ():
                    yield file, name, digest
        elif self.summary is not None and self.directory is not None:
            yield from read_digests(self.directory)


def _get(value: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def is_checkpoint_file(name: str) -> bool:
    """Whether training, merging, saving or the original gives a file in a checkpoint this name."""
    return name in _FILES or _OWN_SHARD.fullmatch(name) is not None


def split_selection(given: str) -> tuple[str, tuple[int, ...] | None]:
    """``"A:5,11-13"`` -> path and layers; a path that exists as it stands is all path.

    Raises:
        MergeError: what follows the colon looks like layers and is none.
        PathError: it is no path.
    """
    match = _SELECTION.fullmatch(given)
    # a list of many layers is too long for a name: whatever forbids to look, the path alone tells
    if match is None or os.path.lexists(expand(given)):
        return given, None
    try:
        return match["path"], tuple(layer_indices(match["layers"]))
    except ValueError as error:
        raise MergeError(f"{given:.200}: there is no such path, and {error}") from None


def open_checkpoint(given: str | Path) -> Checkpoint:
    """Open the checkpoint at a path.

    Raises:
        CheckpointError: nothing there, or anything in it is broken, unsafe or incomplete.
        PathError: it is no path.
    """
    given = expand(given)
    with path_errors(given, CheckpointError):
        return _open(given)


def _open(given: str) -> Checkpoint:
    path, note = locate_checkpoint(given)
    weights = open_tensors(path)
    if paths.is_directory(path):
        directory: Path | None = path
    else:  # a file of the usual name belongs to the folder around it
        directory = (
            path.parent
            if path.name.startswith(("npt_weights", "accumulated_npt_weights"))
            else None
        )
    small: dict[str, Mapping[str, Any]] = {}
    unread: dict[str, str] = {}
    for name in (CONFIG, NPT_CONFIG, MERGE_SUMMARY):
        if directory is None or not paths.exists(directory / name):
            continue
        try:
            small[name] = strict_json.read_foreign(directory / name)
        except CheckpointError as error:
            if name == NPT_CONFIG:  # without it, a layer that needs its residual would lose it
                raise CheckpointError(f"{error}; {_RESTORE}") from None
            unread[name] = f"{error}; {_WITHOUT[name]}"
    npt_config = small.get(NPT_CONFIG)
    if npt_config is None and "npt_config" in weights.metadata:
        raw = weights.metadata["npt_config"].encode("utf-8", "surrogatepass")
        npt_config = strict_json.parse_foreign(raw, f"{weights.path}: metadata npt_config")
    if npt_config is not None:
        version = npt_config.get("format_version")
        if "format_version" not in npt_config:
            raise CheckpointError(f"{path}: {NPT_CONFIG} has no format_version; {_RESTORE}")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: this npt_fast knows format_version {FORMAT_VERSION} of {NPT_CONFIG}, "
                "the file has another; update npt_fast"
            )
    modules = collect_modules(weights.tensors, str(weights.path))
    return Checkpoint(
        given,
        directory,
        tuple(line for line in (note, weights.note) if line),
        weights,
        modules,
        small.get(CONFIG),
        npt_config,
        small.get(MERGE_SUMMARY),
        unread,
    )
