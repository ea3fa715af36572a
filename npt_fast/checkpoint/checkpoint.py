"""Open a checkpoint: its weights and the small files beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from npt_fast import paths
from npt_fast.checkpoint import strict_json, whole_model
from npt_fast.checkpoint.certificate import Certificate
from npt_fast.checkpoint.digests import TensorDigest, read_digests
from npt_fast.checkpoint.merge_summary import MERGE_SUMMARY, MergeSummary, Provenance
from npt_fast.checkpoint.np_module import NPModule, collect_modules
from npt_fast.checkpoint.npt_config import (
    NPT_CONFIG,
    Description,
    LaterVersionError,
    LayerDescription,
)
from npt_fast.checkpoint.own_files import CONFIG
from npt_fast.checkpoint.place import Place, locate
from npt_fast.checkpoint.tensor_source import WHOLE_MODEL, TensorSource, open_tensors
from npt_fast.checkpoint.training_metadata import TRAINING_METADATA, parse_residual
from npt_fast.errors import CheckpointError, MergeError, ModelError
from npt_fast.hub import is_hub_name
from npt_fast.layer_names import layer_indices
from npt_fast.paths import expand, path_errors

_WITHOUT = {
    CONFIG: "the file is not used",
    MERGE_SUMMARY: "without it, earlier sources and digests of its layers are not known",
}
_RESTORE = "it records which layers keep their residual: restore it, or, if none does, remove it"
T = TypeVar("T")
# DOTALL: a file's name may hold a line break
_SELECTION = re.compile(r"(?P<path>.+):(?P<layers>[0-9][0-9, -]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What a checkpoint records about one layer; unknown facts are None.

    Attributes:
        residual: ``"removed"`` or ``"kept"``, as a file says or triple modulation implies
            (design.md#old-files).
        step: optimizer steps that the layer was trained for.
        fidelity: measured error of the layer, as training recorded it.
        source: checkpoint that a merge took the layer from; None if it was not merged.
        chain: checkpoints that `source` got the layer from in earlier merges, newest first.
        certificate: what an evaluation measured of the checkpoint that the layer was saved in.
    """

    residual: str | None = None
    step: int | None = None
    fidelity: float | None = None
    source: str | None = None
    chain: tuple[str, ...] = ()
    certificate: Certificate | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint; no tensor data has been read.

    Attributes:
        given: path as the user wrote it, without a selection and with ``~`` replaced; of a
            checkpoint on the Hub its name there with the commit, ``hf://org/repo@commit``.
        directory: folder of the small files; None if only a weights file was opened.
        notes: lines that say where the checkpoint was found, if elsewhere, and which weights were
            not read.
        weights: tensors of the weights file or files.
        modules: complete layers by index, ascending.
        config: content of ``config.json``, unchecked; None if it was not read.
        description: content of ``npt_config.json``, or of the same in the safetensors metadata.
        summary: content of ``merge_summary.json``; None if it was not read.
        old_residual: residual of layers that `description` is silent about, by
            ``training_metadata.json``; None if that does not tell.
        unread: for each of these files that exists but cannot be read, a line that says why.
    """

    given: str
    directory: Path | None
    notes: tuple[str, ...]
    weights: TensorSource
    modules: Mapping[int, NPModule]
    config: Mapping[str, Any] | None
    description: Description | None
    summary: MergeSummary | None
    old_residual: str | None
    unread: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.directory or self.weights.path

    @property
    def place(self) -> str:
        """Its path, or its name on the Hub."""
        return self.given if is_hub_name(self.given) else str(self.path)

    @property
    def model_name(self) -> str | None:
        """The name of the base model; None if it is not recorded."""
        name = (self.config or {}).get("model_name")
        if name is None and self.description is not None:
            name = self.description.base_name
        return name if isinstance(name, str) else None

    def base_size(self, name: str) -> int | None:
        """A size of the base model, such as ``vocab_size``; None if it is not recorded."""
        return self.description.base_sizes.get(name) if self.description else None

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the base model; None if it is not recorded."""
        return self.description.fingerprint if self.description else None

    def recorded_residual(self, layer: int) -> str | None:
        """The residual of a layer, ``"removed"`` or ``"kept"``, if a file says it."""
        # ``v1`` at three projections is a default of the tool that wrote it (design.md#old-files)
        old = None if self._is_triple(layer) else self.old_residual
        return self._described(layer).residual or old

    def _is_triple(self, layer: int) -> bool:
        return self.modules[layer].architecture.modulation == "triple"

    def _described(self, layer: int) -> LayerDescription:
        layers = self.description.layers if self.description else None
        return (layers or {}).get(layer) or LayerDescription()

    def record(self, layer: int) -> LayerRecord:
        """What is recorded about a layer; unknown facts are None."""
        described = self._described(layer)
        merged = self.summary and self.summary.layers.get(layer)
        merged = merged or Provenance()
        residual = self.recorded_residual(layer)
        if residual is None and self._is_triple(layer):
            residual = "removed"  # the original has triple modulation only with removed residuals
        step = merged.step if described.step is None else described.step
        return LayerRecord(
            residual,
            step,
            described.fidelity,
            merged.source,
            merged.chain,
            described.certificate,
        )

    def require(self, layers: Iterable[int]) -> None:
        """Raise ModelError if the checkpoint lacks one of these layers."""
        for layer in layers:
            if layer not in self.modules:
                raise ModelError(f"{self.given}: has no layer {layer}, only {list(self.modules)}")

    def check_sizes(
        self, base: Mapping[str, int | None], widths: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        """Raise ModelError if the checkpoint was trained on a base model of other sizes.

        Args:
            base: sizes of the base model, as far as they are known.
            widths: ``intermediate_size`` of layers where it is another one, by index.
        """

        def check(name: str, value: int | None, own: int | None) -> None:
            if value is not None and own is not None and own != value:
                raise ModelError(
                    f"{self.given}: was trained on another base model: "
                    f"{name} {value}, the model has {own}"
                )

        for layer, module in self.modules.items():
            width = widths.get(layer, base.get("intermediate_size"))
            check("hidden_size", module.architecture.hidden_size, base.get("hidden_size"))
            check("intermediate_size", module.architecture.intermediate_size, width)
        # not vocab_size: it changes when a token is added
        name = "num_hidden_layers"
        check(name, self.base_size(name), base.get(name))
        count, last = base.get("num_hidden_layers"), max(self.modules)
        if count is not None and last >= count:
            raise ModelError(f"{self.given}: has layer {last}, the model has {count}")

    def digests(self) -> Iterator[TensorDigest]:
        """The recorded digests of the checkpoint's tensors.

        Raises:
            CheckpointError: ``merge_digests.txt`` cannot be read.
        """
        if self.summary is None:
            return
        if self.summary.tensors is not None:  # early versions had no `merge_digests.txt`
            for file, tensors in self.summary.tensors.items():
                for name, digest in tensors.items():
                    yield file, name, digest
        elif self.directory is not None:
            yield from read_digests(self.directory)


def split_selection(given: str) -> tuple[str, tuple[int, ...] | None]:
    """Split ``"A:5,11-13"`` into path and layers, unless a path of that whole name exists.

    Raises:
        MergeError: the text after the colon looks like layers but is no valid list of them.
        PathError: `given` is not a valid path.
    """
    match = _SELECTION.fullmatch(given)
    # lexists is False if the name with a long list of layers is too long for the file system
    if match is None or os.path.lexists(expand(given)):
        return given, None
    try:
        return match["path"], tuple(layer_indices(match["layers"]))
    except ValueError as error:
        raise MergeError(f"{given:.200}: there is no such path, and {error}") from None


def open_checkpoint(given: str | Path | Place) -> Checkpoint:
    """Open a checkpoint; no tensor data is read.

    Args:
        given: path or name on the Hub, as for `locate`, or what that found.

    Raises:
        CheckpointError: there is no checkpoint, or it is broken, unsafe or incomplete.
        PathError: `given` is not a valid path.
    """
    place = given if isinstance(given, Place) else locate(given)
    with path_errors(place.name, CheckpointError):
        return _open(place)


def _open(place: Place) -> Checkpoint:
    path = place.path
    weights = open_tensors(path)
    if paths.is_directory(path):
        directory: Path | None = path
    else:  # a weights file with a usual name belongs to the checkpoint in its folder
        directory = (
            path.parent
            if path.name.startswith(("npt_weights", "accumulated_npt_weights"))
            else None
        )
    unread: dict[str, str] = {}

    def read(name: str, parse: Callable[[Mapping[str, Any], str], T]) -> T | None:
        if directory is None or not paths.exists(directory / name):
            return None
        try:
            return parse(strict_json.read_foreign(directory / name), str(directory / name))
        except LaterVersionError:
            raise
        except CheckpointError as error:
            # without it, layers with kept residual would lose the residual
            if name in (NPT_CONFIG, TRAINING_METADATA):
                raise CheckpointError(f"{error}; {_RESTORE}") from None
            unread[name] = f"{error}; {_WITHOUT[name]}"
            return None

    description = read(NPT_CONFIG, Description.parse)
    if description is None and "npt_config" in weights.metadata:
        where = f"{weights.path}: metadata npt_config"
        # the same reader as for the file: metadata of a header is untrusted too
        raw = weights.metadata["npt_config"].encode()
        description = Description.parse(strict_json.parse_foreign(raw, where), where)
    old_residual = read(TRAINING_METADATA, parse_residual)
    summary = read(MERGE_SUMMARY, MergeSummary.parse)
    config = read(CONFIG, lambda content, where: content)
    if config is not None and whole_model.NPT in config:
        config = None  # of an exported model, not of a run
    if weights.path.name in WHOLE_MODEL or whole_model.holds_np_layers(weights.tensors):
        description = _of_whole_model(weights.path.parent / CONFIG)
        layers = description.layers if description else None
        tensors = whole_model.np_tensors(weights.tensors, layers, str(weights.path))
        weights = replace(weights, tensors=tensors)
        config = None  # the model's, not that of a run
    modules = collect_modules(weights.tensors, str(weights.path))
    return Checkpoint(
        place.name,
        directory,
        tuple(line for line in (place.note, weights.note) if line),
        weights,
        modules,
        config,
        description,
        summary,
        old_residual,
        unread,
    )


def _of_whole_model(config: Path) -> Description | None:
    """What the ``config.json`` beside a whole model's weights says about its NP layers."""
    if not paths.exists(config):
        return None
    content = strict_json.read_foreign(config).get(whole_model.NPT)
    where = f"{config}: {whole_model.NPT}"
    if content is None:
        return None
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: must be an object")
    return Description.parse(content, where)
