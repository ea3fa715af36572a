"""Describe checkpoints and tell whether they can be merged; only headers are read by default."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from npt_fast.arguments import check_arguments
from npt_fast.checkpoint.certificate import Certificate
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.hub_headers import HubHeaders
from npt_fast.checkpoint.np_module import Architecture, NPModule, flat
from npt_fast.checkpoint.numbers import count_non_finite, read_number, sum_of_squares
from npt_fast.checkpoint.plan import plan_merge
from npt_fast.checkpoint.recipe import Recipe
from npt_fast.checkpoint.source_file import NearbyReader, is_hub_blob
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.checkpoint.tensor_source import newest_checkpoint
from npt_fast.checkpoint.training_state import (
    MULTI_LAYER_STATE,
    TRAINING_STATE,
    read_multi_layer_state,
    read_training_state,
)
from npt_fast.config import MergeOptions
from npt_fast.errors import CheckpointError, NPTError
from npt_fast.paths import path_errors, path_list, user_path
from npt_fast.tables import Report


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor; `norm` and `non_finite` are None unless values were asked for.

    Attributes:
        name: key in the checkpoint.
        dtype: element type, by its safetensors name.
        shape: size of each dimension.
        nbytes: size of the data in bytes.
        norm: Frobenius norm; always None for 8-bit floats.
        non_finite: number of NaN and infinite elements.
    """

    name: str
    dtype: str
    shape: list[int]
    nbytes: int
    norm: float | None = None
    non_finite: int | None = None


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of a checkpoint; facts that were not recorded are None.

    Attributes:
        layer: index of the layer.
        architecture: modulation type, num_ranks, rank and widths.
        dtypes: names of its element types.
        tensors: number of tensors.
        parameters: number of weights.
        nbytes: size of the weights in bytes.
        residual: ``"removed"`` or ``"kept"`` (design.md#layer).
        step: optimizer steps that the layer was trained for.
        source: checkpoint that a merge took the layer from.
        chain: checkpoints that `source` got the layer from in earlier merges, newest first.
        fidelity: measured error of the layer.
        certificate: what an evaluation measured of the checkpoint that the layer was saved in.
        details: report of each tensor.
    """

    layer: int
    architecture: Architecture
    dtypes: list[str]
    tensors: int
    parameters: int
    nbytes: int
    residual: str | None
    step: int | None
    source: str | None
    chain: list[str]
    fidelity: float | None
    certificate: Certificate | None
    details: list[TensorReport]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the certificate as ``npt_config.json`` has it."""
        return flat(self) | {"certificate": self.certificate and self.certificate.to_dict()}


@dataclass(frozen=True, slots=True, repr=False)
class CheckpointReport(Report):
    """Description of a checkpoint.

    Attributes:
        path: path of the checkpoint, or its name on the Hub with the commit.
        format: ``"pt"`` or ``"safetensors"``.
        total_keys: number of weight tensors.
        total_parameters: number of weights.
        modulation: modulation type of all layers, or ``"mixed"``.
        num_ranks: number of components k of all layers; None if they differ.
        rank: rank r of all layers; None if they differ.
        hidden_size: width D of the base model.
        intermediate_size: width F of the base model's MLP.
        model_name: name of the base model; None if it is not recorded.
        layers: report of each layer, ascending.
        training_state: facts about step, optimizer and schedule; None without a training state.
        config: content of ``config.json``.
        merge: layers and sources of a merged checkpoint; None for others.
        multi_layer_state: curriculum and weights of the layers; None if there is none.
        files: size in bytes of every file in the directory, by name.
        problems: one line for each part that could not be read.
        notes: lines that say where the checkpoint was found, and which weights were not read.
    """

    path: str
    format: str
    total_keys: int
    total_parameters: int
    modulation: str
    num_ranks: int | None
    rank: int | None
    hidden_size: int
    intermediate_size: int
    model_name: str | None
    layers: list[LayerInfo]
    training_state: dict[str, Any] | None
    config: dict[str, Any] | None
    merge: dict[str, Any] | None
    multi_layer_state: dict[str, Any] | None
    files: dict[str, int]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, object]:
        """What the checkpoint holds, in short."""
        return {
            "path": self.path,
            "format": self.format,
            "layers": ", ".join(f"{info.layer} ({info.architecture})" for info in self.layers),
            "parameters": f"{self.total_parameters:,}",
            "base model": self.model_name or "not recorded",
            "problems": len(self.problems),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; NaN and infinity, which JSON lacks, become None."""
        plain: dict[str, Any] = _finite(
            {**asdict(self), "layers": [layer.to_dict() for layer in self.layers]}
        )
        return plain


@dataclass(frozen=True, slots=True)
class MergeVerdict:
    """Whether checkpoints can be merged.

    Attributes:
        mergeable: whether a merge with default options would succeed.
        layers: layers of the merged checkpoint; empty if it would fail.
        remarks: conflicts and other warnings, or the reason why it would fail.
    """

    mergeable: bool
    layers: list[int]
    remarks: list[str]


@check_arguments
def inspect(path: str | Path, *, values: bool = False) -> CheckpointReport:
    """Describe a checkpoint.

    Args:
        path: checkpoint directory, weights file or name on the Hub; or the folder of a training
            run, whose newest checkpoint is described.
        values: whether to read the data too, for norms and counts of NaN.

    Raises:
        CheckpointError: there is no NPT checkpoint, or it cannot be read.
    """
    run = user_path(path)
    with path_errors(run, CheckpointError):
        newest = newest_checkpoint(run)
    notes = [f"{run}: using {newest}, the newest checkpoint of this run"] if newest else []
    with HubHeaders() as hub:
        checkpoint = open_checkpoint(newest or path) if values else hub.open(newest or path)
        return _describe(checkpoint, notes, values)


def _describe(checkpoint: Checkpoint, notes: Sequence[str], values: bool) -> CheckpointReport:
    problems = list(checkpoint.unread.values())
    training = multi_layer = None
    files: dict[str, int] = {}
    if checkpoint.directory is not None:
        try:
            training = _training_facts(checkpoint, checkpoint.directory / TRAINING_STATE)
        except NPTError as error:
            problems.append(str(error))
        try:
            multi_layer = read_multi_layer_state(checkpoint.directory / MULTI_LAYER_STATE)
        except NPTError as error:
            problems.append(str(error))
        try:
            with path_errors(checkpoint.directory, CheckpointError):
                entries = sorted(checkpoint.directory.iterdir())
                files = {entry.name: _size(entry) for entry in entries}
        except CheckpointError as error:
            problems.append(f"{error}; its files cannot be listed")
    layers = [_layer(checkpoint, module, values) for module in checkpoint.modules.values()]
    modulations = {info.architecture.modulation for info in layers}
    num_ranks = {info.architecture.num_ranks for info in layers}
    ranks = {info.architecture.rank for info in layers}
    architecture = next(iter(checkpoint.modules.values())).architecture
    merge = None
    if checkpoint.summary is not None:
        merged, origins = checkpoint.summary.merged_layers, checkpoint.summary.layers
        merge = {
            "merged_layers": None if merged is None else list(merged),
            "layer_sources": {str(layer): origin.source for layer, origin in origins.items()},
        }
    return CheckpointReport(
        path=checkpoint.place,
        format=checkpoint.weights.format,
        total_keys=len(checkpoint.weights.tensors),
        total_parameters=sum(info.parameters for info in layers),
        modulation=modulations.pop() if len(modulations) == 1 else "mixed",
        num_ranks=num_ranks.pop() if len(num_ranks) == 1 else None,
        rank=ranks.pop() if len(ranks) == 1 else None,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        model_name=checkpoint.model_name,
        layers=layers,
        training_state=training,
        config=dict(checkpoint.config) if checkpoint.config is not None else None,
        merge=merge,
        multi_layer_state=multi_layer,
        files=files,
        problems=problems,
        notes=[*notes, *checkpoint.notes],
    )


@check_arguments
def can_merge(paths: str | Path | Sequence[str | Path]) -> MergeVerdict:
    """Whether checkpoints can be merged, and what would conflict; reads headers only."""
    try:
        with HubHeaders() as hub:
            plan = plan_merge(path_list(paths), MergeOptions(), hub.open)
    except NPTError as error:
        return MergeVerdict(False, [], [str(error)])
    return MergeVerdict(True, [merged.layer for merged in plan.layers], list(plan.warnings))


def _size(file: Path) -> int:
    # a link inside a checkpoint is not followed, except those of the Hub's cache
    followed = file.is_symlink() and is_hub_blob(file)
    return file.stat(follow_symlinks=followed).st_size


def _layer(checkpoint: Checkpoint, module: NPModule, values: bool) -> LayerInfo:
    record = checkpoint.record(module.layer)
    reader = NearbyReader() if values else None
    return LayerInfo(
        layer=module.layer,
        architecture=module.architecture,
        dtypes=module.dtypes,
        tensors=len(module.entries),
        parameters=module.numel,
        nbytes=module.nbytes,
        residual=record.residual,
        step=record.step,
        source=record.source,
        chain=list(record.chain),
        fidelity=record.fidelity,
        certificate=record.certificate,
        details=[_tensor(entry, reader) for entry in module.entries],
    )


def _tensor(entry: TensorEntry, reader: NearbyReader | None) -> TensorReport:
    norm: float | None = None
    non_finite: int | None = None
    if reader is not None:
        squares: list[float | None] = []
        non_finite = 0
        for window in Recipe.unchanged(entry).windows(reader):
            non_finite += count_non_finite(window, entry.dtype)
            squares.append(sum_of_squares(window, entry.dtype))
        norm = None if None in squares else math.sqrt(sum(s for s in squares if s is not None))
    return TensorReport(
        entry.name, entry.dtype.name, list(entry.shape), entry.nbytes, norm, non_finite
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _training_facts(checkpoint: Checkpoint, path: Path) -> dict[str, Any] | None:
    state = read_training_state(path, checkpoint.modules)
    if state is None:
        return None
    facts: dict[str, Any] = {"global_step": state.global_step}
    if "batch_count" in state.content:
        facts["batch_count"] = _shown(state.content["batch_count"])
    if state.group is not None:
        facts["optimizer"] = {
            "num_param_groups": 1,
            "learning_rate": _shown(state.group.get("lr")),
            "layers_with_moments": sorted(state.optimizer),
        }
    facts["has_scheduler"] = state.content.get("scheduler_state_dict") is not None
    facts["mixed_precision"] = state.content.get("scaler_state_dict") is not None
    info = state.content.get("merge_info")
    if isinstance(info, Mapping):
        facts["merge_info"] = _shown(info)
    return facts


def _shown(value: Any) -> Any:
    """A copy of nested data with tensors of one element as numbers, and others as None."""
    if isinstance(value, TensorEntry):
        return read_number(value)
    if isinstance(value, Mapping):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    return value
