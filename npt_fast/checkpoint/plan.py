"""The plan of a merge, made from headers alone.

A plan holds every output file, and the recipe of every tensor in it. `merge` carries it out,
``--dry_run`` shows it, and `verify` compares the output with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.byte_mover import cloneable_bytes
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint, split_selection
from npt_fast.checkpoint.digests import InOrder, TensorDigest
from npt_fast.checkpoint.dtypes import BY_TORCH_NAME
from npt_fast.checkpoint.layout import (
    BytesFile,
    OutputFile,
    TorchZipLayout,
    compact_json,
    lay_out_safetensors,
    runs,
)
from npt_fast.checkpoint.merged_layer import (
    MergedLayer,
    MergeInput,
    make_uniform,
    resolve_conflicts,
)
from npt_fast.checkpoint.npt_config import NPT_CONFIG, Description, LayerDescription
from npt_fast.checkpoint.own_files import CONFIG
from npt_fast.checkpoint.recipe import Recipe, check_castable
from npt_fast.checkpoint.tensor_source import PT_WEIGHTS
from npt_fast.checkpoint.training_state import (
    MULTI_LAYER_STATE,
    TRAINING_STATE,
    SlotState,
    TrainingState,
    furthest_trained,
    join_multi_layer_states,
    read_multi_layer_state,
    read_training_state,
)
from npt_fast.config import MergeOptions
from npt_fast.errors import CheckpointError, MergeError
from npt_fast.paths import is_file, path_errors, user_path

_FRESH = "its layers start with a fresh optimizer"


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that a merge writes except ``merge_summary.json``, which needs the digests.

    Attributes:
        inputs: inputs in the given order.
        options: options of the merge.
        layers: merged layers, ascending.
        weights: recipes of all weights, in parameter order.
        files: output files.
        scalars_from: training state whose scalars the merge keeps; None if no training state is
            written.
        warnings: lines that the user should read.
        notes: lines that need no attention.
    """

    inputs: tuple[MergeInput, ...]
    options: MergeOptions
    layers: tuple[MergedLayer, ...]
    weights: tuple[Recipe, ...]
    files: tuple[OutputFile, ...]
    scalars_from: TrainingState | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def known_digests(self) -> Iterator[TensorDigest]:
        """Digests that the inputs recorded for the tensors copied from them, in file order.

        They are passed on through merges of merged checkpoints, so that damage in between is found.
        """
        recorded = {
            item.checkpoint.path: InOrder(
                ((file, name), digest) for file, name, digest in item.checkpoint.digests()
            )
            for item in self.inputs
        }
        for file in self.files:
            for piece in file.pieces:
                source = piece.recipe.source
                if source is None or not piece.recipe.is_copy:
                    continue
                path = source.file.path
                digests = recorded.get(path.parent)
                digest = digests.take((path.name, source.name)) if digests else None
                if digest is not None:
                    yield file.name, piece.recipe.name, digest

    def small_digests(self) -> dict[str, str]:
        """SHA-256 of each file's header, or of the whole file if it has no tensors, by name."""
        return {file.name: hashlib.sha256(file.header).hexdigest() for file in self.files}

    def bytes_by_kind(self) -> dict[str, int]:
        """Number of bytes that are ``cloneable`` (by reflink), ``copied`` or ``computed``."""
        kinds = {"cloneable": 0, "copied": 0, "computed": 0}
        for file in self.files:
            for run in runs(file.pieces):
                first, last = run[0], run[-1]
                length = last.offset + last.recipe.nbytes - first.offset
                if first.recipe.is_copy and first.recipe.source is not None:
                    clone = cloneable_bytes(first.recipe.source.offset, first.offset, length)
                    kinds["cloneable"] += clone
                    kinds["copied"] += length - clone
                else:
                    kinds["computed"] += length
        return kinds


def plan_merge(
    checkpoints: Sequence[str],
    options: MergeOptions,
    open: Callable[[str], Checkpoint] = open_checkpoint,
) -> MergePlan:
    """Plan a merge.

    Args:
        checkpoints: paths, each with an optional selection of layers (``"A:11,13"``).
        options: options of the merge.
        open: opens the checkpoint at a path.

    Raises:
        CheckpointError: an input cannot be read.
        MergeError: the inputs do not fit together.
    """
    if not checkpoints:
        raise MergeError("no checkpoints given")
    warnings: list[str] = []
    inputs = tuple(_open_input(given, options, warnings, open) for given in checkpoints)
    inputs = _without_unlike_moments(inputs, options, warnings)
    _check_same_base(inputs, options)
    layers = resolve_conflicts(inputs, options, warnings)
    if options.uniform:
        layers = make_uniform(layers)
    for merged in layers:
        if merged.residual is None:
            warnings.append(
                f"Layer {merged.layer} does not record whether its residual was removed or kept; "
                "npt_fast finds it out when it is loaded"
            )
    dtype = BY_TORCH_NAME[options.dtype] if options.dtype else None
    weights = tuple(recipe for merged in layers for recipe in merged.recipes(dtype))
    merge_info = {
        "merged_from": [item.checkpoint.given for item in inputs],
        "merged_layers": [merged.layer for merged in layers],
    }
    scalars_from = (
        None if options.weights_only else furthest_trained([i.state for i in inputs if i.state])
    )
    npt_config = description_of(inputs, layers).to_dict()
    for merged in layers:
        if merged.factors and (options.format or inputs[0].checkpoint.weights.format) == "pt":
            raise MergeError(
                f"{merged.source}: layer {merged.layer}: int8 factors cannot be written as pt, "
                "which the original reads; use --format safetensors"
            )
    files = _weight_files(inputs, options, weights, npt_config)
    if scalars_from is not None:
        files.append(_training_state_file(scalars_from, inputs, layers, merge_info))
    elif not options.weights_only:
        warnings.append("No valid training states found; training starts with a fresh optimizer")
    files += _multi_layer_state_file(inputs, options, layers, scalars_from)
    sources = {str(merged.layer): merged.source for merged in layers}
    files += _config_file(inputs, {**merge_info, "layer_sources": sources}, warnings)
    files.append(BytesFile(NPT_CONFIG, strict_json.dump(npt_config)))
    notes = tuple(note for item in inputs for note in item.checkpoint.notes)
    return MergePlan(
        inputs, options, tuple(layers), weights, tuple(files), scalars_from, tuple(warnings), notes
    )


def _open_input(
    given: str,
    options: MergeOptions,
    warnings: list[str],
    open: Callable[[str], Checkpoint],
) -> MergeInput:
    path, selection = split_selection(given)
    checkpoint = open(path)
    warnings += checkpoint.unread.values()
    layers = tuple(checkpoint.modules)
    if selection is not None:
        for layer in selection:
            if layer not in checkpoint.modules:
                raise MergeError(f"{path}: has no layer {layer}, only {list(layers)}")
        layers = tuple(sorted(set(selection)))
    state = multi_layer = None
    if checkpoint.directory is not None and not options.weights_only:
        with _bad_state(options, warnings, _FRESH):
            state = read_training_state(checkpoint.directory / TRAINING_STATE, checkpoint.modules)
        with _bad_state(options, warnings, "its curriculum is left out"):
            multi_layer = read_multi_layer_state(checkpoint.directory / MULTI_LAYER_STATE)
    return MergeInput(checkpoint, layers, selection is not None, state, multi_layer)


@contextmanager
def _bad_state(options: MergeOptions, warnings: list[str], without: str) -> Iterator[None]:
    """Turn a state that cannot be used into an error or a warning, as the options say."""
    try:
        yield
    except CheckpointError as error:
        _do_without(str(error), options, warnings, without)


def _do_without(problem: str, options: MergeOptions, warnings: list[str], without: str) -> None:
    if options.on_bad_state != "skip":
        raise CheckpointError(
            f"{problem}; use --on_bad_state skip to merge without this state, "
            "or --weights_only to merge without any"
        ) from None
    warnings.append(f"{problem}; {without}")


def _without_unlike_moments(
    inputs: Sequence[MergeInput], options: MergeOptions, warnings: list[str]
) -> tuple[MergeInput, ...]:
    """The inputs, without the training states that lack a moment the merged optimizer needs."""
    group = _group(inputs)
    if group is None or group.group is None or not group.group.get("amsgrad"):
        return tuple(inputs)
    kept = []
    for item in inputs:
        slots = item.state.optimizer if item.state else {}
        moments = (state for layer in item.layers for state in slots.get(layer, {}).values())
        if item.state and any("max_exp_avg_sq" not in state for state in moments):
            problem = (
                f"{item.state.path}: its optimizer does not use amsgrad, that of {group.path} does"
            )
            _do_without(problem, options, warnings, _FRESH)
            item = replace(item, state=None)
        kept.append(item)
    return tuple(kept)


def _group(inputs: Sequence[MergeInput]) -> TrainingState | None:
    """The state that gives the merged optimizer its hyperparameters; None if no input has one."""
    states = [item.state for item in inputs if item.state is not None]
    return furthest_trained([state for state in states if state.group is not None])


def _check_same_base(inputs: Sequence[MergeInput], options: MergeOptions) -> None:
    """Raise MergeError unless all layers can belong to one base model."""
    first = inputs[0].checkpoint
    common = next(iter(first.modules.values())).architecture
    widths: dict[int, int] = {}
    for item in inputs:
        checkpoint = item.checkpoint
        # layers of a mixture of experts have other widths than its other layers
        is_same = checkpoint.fingerprint is not None and checkpoint.fingerprint == first.fingerprint
        for layer, module in checkpoint.modules.items():
            found = module.architecture
            width = (found if is_same else common).intermediate_size
            expected = {
                "hidden_size": common.hidden_size,
                "intermediate_size": widths.setdefault(layer, width),
            }
            for name, size in expected.items():
                if getattr(found, name) != size:
                    raise MergeError(
                        f"{checkpoint.given}: layer {layer} was trained on another base model: "
                        f"{name} {getattr(found, name)}, {size} in {first.given}"
                    )
    # not vocab_size: no NP layer depends on it, and adding a token changes it
    name = "num_hidden_layers"
    _refuse_difference(name, {i.checkpoint.given: i.checkpoint.base_size(name) for i in inputs})
    if not options.allow_different_base:
        remedy = "; use --allow_different_base if they are the same model"
        for name in ("model_name", "fingerprint"):
            facts = {i.checkpoint.given: getattr(i.checkpoint, name) for i in inputs}
            _refuse_difference(name, facts, remedy)


def _refuse_difference(name: str, facts: Mapping[str, object], remedy: str = "") -> None:
    known = {path: value for path, value in facts.items() if value is not None}
    if len(set(known.values())) > 1:
        (path_a, a), *rest = known.items()
        path_b, b = next((path, value) for path, value in rest if value != a)
        raise MergeError(
            f"the base models differ: {name} is {a!r} in {path_a} and {b!r} in {path_b}{remedy}"
        )


def description_of(inputs: Sequence[MergeInput], layers: Sequence[MergedLayer]) -> Description:
    """The content of the merged checkpoint's ``npt_config.json``."""
    checkpoints = [item.checkpoint for item in inputs]
    architecture = layers[0].architecture

    def first_known(values: Iterator[Any]) -> Any:
        return next((value for value in values if value is not None), None)

    sizes = {
        "hidden_size": architecture.hidden_size,
        "intermediate_size": first_known(c.base_size("intermediate_size") for c in checkpoints)
        or architecture.intermediate_size,
        "num_hidden_layers": first_known(c.base_size("num_hidden_layers") for c in checkpoints),
        "vocab_size": first_known(c.base_size("vocab_size") for c in checkpoints),
    }
    described = {}
    for merged in layers:
        record = merged.parts[0].origin.checkpoint.record(merged.layer)
        described[merged.layer] = LayerDescription.of(
            merged.architecture,
            merged.residual,
            step=merged.step,
            source=merged.source,
            fidelity=record.fidelity if len(merged.parts) == 1 else None,
            factors=merged.factors,
            certificate=record.certificate if len(merged.parts) == 1 else None,
        )
    name, fingerprint = (
        first_known(getattr(c, fact) for c in checkpoints) for fact in ("model_name", "fingerprint")
    )
    return Description(name, sizes, described, fingerprint)


def _weight_files(
    inputs: Sequence[MergeInput],
    options: MergeOptions,
    weights: Sequence[Recipe],
    npt_config: Mapping[str, Any],
) -> list[OutputFile]:
    if (options.format or inputs[0].checkpoint.weights.format) == "pt":
        return [TorchZipLayout.seal(PT_WEIGHTS, {recipe.name: recipe for recipe in weights})]
    for recipe in weights:
        if not recipe.dtype.safetensors:
            raise MergeError(f"{recipe.name}: safetensors has no type {recipe.dtype.name}")
    metadata = {"format": "pt", "npt_config": compact_json(npt_config)}
    return lay_out_safetensors(weights, metadata, options.max_shard_size)


def _training_state_file(
    scalars_from: TrainingState,
    inputs: Sequence[MergeInput],
    layers: Sequence[MergedLayer],
    merge_info: Mapping[str, Any],
) -> OutputFile:
    """The merged ``training_state.pt``: one input's scalars and the moments of all layers."""
    content = dict(scalars_from.content)
    group = _group(inputs)
    if group is not None and group.group is not None:
        moments: dict[int, dict[str, Any]] = {}
        count = 0
        for state, shape in chain.from_iterable(merged.moments() for merged in layers):
            if state is not None:
                moments[count] = dict(_slot_recipes(count, state, shape))
            count += 1
        content["optimizer_state_dict"] = {
            "state": moments,
            "param_groups": [{**group.group, "params": list(range(count))}],
        }
    content["merge_info"] = {
        **merge_info,
        "layer_sources": {merged.layer: merged.source for merged in layers},
    }
    return TorchZipLayout.seal(TRAINING_STATE, content)


def _slot_recipes(
    index: int, state: SlotState, shape: tuple[int, ...]
) -> Iterator[tuple[str, Recipe | float | int]]:
    for name, value in state.items():
        if isinstance(value, (int, float)):
            yield name, value
            continue
        grown = shape if name != "step" else value.shape
        recipe = Recipe(f"optimizer.{index}.{name}", value.dtype, grown, value)
        check_castable(str(value.file.path), recipe)
        yield name, recipe


def _config_file(
    inputs: Sequence[MergeInput], merge_info: Mapping[str, Any], warnings: list[str]
) -> list[OutputFile]:
    """The first input's ``config.json`` that can be written, with `merge_info` added."""
    for item in inputs:
        config = item.checkpoint.config
        if config is None:
            continue
        where = f"{item.checkpoint.path / CONFIG} with its merge_info"
        try:  # the limit of 4 MiB may be exceeded: indentation makes the file longer
            data = strict_json.dump({**config, "merge_info": merge_info}, where, allow_nan=True)
        except CheckpointError as error:
            warnings.append(f"{error}; the file is not used")
            continue
        return [BytesFile(CONFIG, data)]
    return []


def _multi_layer_state_file(
    inputs: Sequence[MergeInput],
    options: MergeOptions,
    layers: Sequence[MergedLayer],
    scalars_from: TrainingState | None,
) -> list[OutputFile]:
    template: Mapping[str, Any] | None
    if options.copy_multi_layer_state is not None:
        path = user_path(options.copy_multi_layer_state)
        with path_errors(path, CheckpointError):
            if not is_file(path):
                raise CheckpointError(f"{path}: no such file; --copy_multi_layer_state needs one")
        template = read_multi_layer_state(path)
    else:
        # the curriculum's stages count the steps of the run that gives the step
        preferred = [i for i in inputs if i.state is scalars_from is not None]
        template = next(
            (i.multi_layer_state for i in [*preferred, *inputs] if i.multi_layer_state), None
        )
    if template is None:
        return []
    sources = {merged.layer: merged.parts[0].origin.multi_layer_state for merged in layers}
    joined = join_multi_layer_states(template, sources)
    return [TorchZipLayout.seal(MULTI_LAYER_STATE, joined)]
