"""Load NPT checkpoints into a Hugging Face model, and save them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from npt_fast.arguments import check_arguments
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.np_module import Architecture, NPModule
from npt_fast.checkpoint.npt_config import NPT_CONFIG
from npt_fast.checkpoint.place import locate
from npt_fast.checkpoint.publish import StagedDirectory, disk_errors
from npt_fast.checkpoint.read_back import read_back
from npt_fast.checkpoint.source_file import NearbyReader
from npt_fast.config import FileFormat, NPTConfig, Residual
from npt_fast.errors import ModelError, NPTError, NPTWarning, OptionError
from npt_fast.hf.base_sizes import base_sizes, own_widths
from npt_fast.hf.convert import (
    Model,
    add_layers,
    components,
    computes_in,
    decoder_layers,
    inference_dtype,
    remove_layers,
)
from npt_fast.hf.description import describe, record
from npt_fast.hf.fingerprint import fingerprint, note_other_base
from npt_fast.hf.quantize import quantize
from npt_fast.hf.residual import probe_residuals
from npt_fast.hf.weights_file import read_tensor, write_weights
from npt_fast.layer_names import LayerList, chosen_layers
from npt_fast.modules import NPComponent
from npt_fast.paths import exists, path_errors, user_path


@check_arguments
def load(
    model: Model,
    path: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    layers: LayerList | None = None,
    residual: Residual | None = None,
    probe: bool = True,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
    factors: Literal["int8"] | None = None,
) -> Model:
    """Load a checkpoint's layers into a model; layers that are not converted yet are converted.

    The architecture of every layer is read from the checkpoint. Its numbers are rounded if the
    parameters have a narrower dtype; no copy of them in a wider one is made in between.

    Args:
        model: Hugging Face causal language model.
        path: checkpoint directory or weights file, its name on the Hub (``"org/repo"``,
            ``"org/repo@revision"``), or a checkpoint that is open already.
        revision: branch, tag or commit of a name on the Hub.
        layers: layers to load, as for `NPTConfig`; of a named part, such as ``"upper_half"``, those
            that the checkpoint has; all if not given.
        residual: ``"removed"`` or ``"kept"``: what happens to the attention output in layers of
            which no file says it, as in the original's. If not given, layers that the model has
            keep theirs, and the others are run on random tokens to find out; an `NPTWarning` says
            what was found.
        probe: as for `npt_fast.convert`.
        trainable: whether the layers will be trained: their parameters are float32 then, and
            require gradients. Otherwise they require none, and have the dtype of their MLP's
            weights, or the model's where those are no floats of 16 bits or more. Layers that were
            converted before keep both, unless `trainable` is true.
        dtype: dtype of the parameters of all loaded layers, also of those that were converted
            before; it wins over what `trainable` says.
        factors: ``"int8"`` rounds the factors of all loaded layers to int8, as `npt_fast.quantize`
            does. None leaves them as the checkpoint has them: floats or int8.

    Returns:
        The same model.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ModelError: the checkpoint was trained on another base model or lacks one of `layers`, or a
            layer of the model cannot be converted, or is with another architecture, or a number of
            the checkpoint is too large for the dtype; or int8 factors are to be trained or to have
            another dtype; or a file contradicts `residual`, or nothing tells a layer's.
        OptionError: an argument has a value that is not allowed, or `dtype` is no float of 16 bits
            or more.
    """
    if dtype is not None and not computes_in(dtype):
        raise OptionError(f"dtype must be a float of 16 bits or more, got {dtype}")
    if not isinstance(path, Checkpoint):
        path = open_checkpoint(locate(path, revision))
    checkpoint = path
    check_base(model, checkpoint)
    chosen = chosen_layers(layers, checkpoint.modules, len(decoder_layers(model)))
    checkpoint.require(chosen)
    for layer in chosen:
        if (trainable or dtype) and (factors or checkpoint.modules[layer].factors):
            raise ModelError(
                f"{checkpoint.given}: layer {layer}: int8 factors cannot be trained and have no "
                "other dtype; take the float checkpoint that they come from"
            )
    present = components(model)
    fresh: dict[tuple[Architecture, str], list[int]] = {}
    unknown: list[int] = []
    # all are compared before the first is converted, so that an error changes nothing
    for layer in chosen:
        recorded = checkpoint.recorded_residual(layer)
        if residual and recorded and residual != recorded:
            raise ModelError(
                f"{checkpoint.given}: layer {layer} is recorded with residual {recorded}, which "
                f"residual {residual} contradicts; leave it out"
            )
        known = recorded or residual
        if layer not in present:
            if known is None:
                unknown.append(layer)
            wanted = checkpoint.modules[layer].architecture, known or "removed"
            fresh.setdefault(wanted, []).append(layer)
            continue
        found = present[layer].architecture, present[layer].residual
        wanted = checkpoint.modules[layer].architecture, known or found[1]
        if found != wanted:
            raise ModelError(
                f"{checkpoint.given}: layer {layer} is {wanted[0]}, residual {wanted[1]}; "
                f"the model's is {found[0]}, residual {found[1]}"
            )
    # from floats of 32 bits, so that factors are rounded once
    dtype = dtype or (torch.float32 if trainable or factors else None)

    def dtype_of(layer: int) -> torch.dtype:
        kept = layer in present and not present[layer].is_int8
        return dtype or (present[layer].w_down.dtype if kept else inference_dtype(model, layer))

    for layer in chosen:
        if checkpoint.modules[layer].factors:
            continue
        check_range(checkpoint.modules[layer], dtype_of(layer))
    # together: each call of convert probes one layer of a kind, and describes the model anew
    reader = NearbyReader()
    try:
        for wanted, alike in fresh.items():
            config = _config(alike, *wanted)
            try:
                add_layers(model, config, probe=probe, trainable=trainable, dtype=dtype)
            except OptionError:  # of a modulation type that the file has, not the caller
                raise ModelError(
                    f"{checkpoint.given}: layers {alike} are {config.modulation}, which is for "
                    "MLPs of another kind than the model's; take the base model that they were "
                    "trained on"
                ) from None
        converted = components(model)
        for layer in sorted(converted.keys() - present.keys()):
            _check(layer, converted[layer].architecture, checkpoint)
            _fill(converted[layer], checkpoint.modules[layer], reader)
        if unknown:
            _find_residuals(model, checkpoint, unknown)
    except NPTError:
        remove_layers(model, list(components(model).keys() - present.keys()))
        raise
    for layer in present.keys() & chosen:
        wide = dtype_of(layer)
        if present[layer].is_int8 and not checkpoint.modules[layer].factors:
            present[layer].dequantize()
        present[layer].to(wide)
        if trainable:
            present[layer].requires_grad_()
        _fill(present[layer], checkpoint.modules[layer], reader)
    if factors:
        quantize(model, chosen)
    else:
        record(model, converted)
    return model


@check_arguments
def save(model: nn.Module, output: str | Path, *, format: FileFormat = "safetensors") -> Path:
    """Write the NP layers of a model as a checkpoint, which appears complete or not at all.

    Args:
        model: model with NP layers.
        output: directory to write; it must not exist.
        format: format of the weights file; the original reads ``"pt"`` only.

    Returns:
        Path of the checkpoint. Its tensors have the parameters' dtype; an `NPTWarning` tells of
        layers that `load` has rounded to it.

    Raises:
        CheckpointError: the checkpoint could not be read back and was not published.
        ModelError: the model has no NP layers, the directory exists, or it cannot be written.
        PathError: the output is not a valid path.
        StorageError: the disk is full.
    """
    converted = components(model)
    if not converted:
        raise ModelError("the model has no NP layers to save")
    target = user_path(output)
    with path_errors(target, ModelError):
        if exists(target):
            raise ModelError(f"{target}: exists already; choose another directory")
    rounded = [layer for layer, component in converted.items() if component.rounded]
    weights = {
        # a copy, because saving a view would save the whole joined tensor
        f"layer_{layer}_np.{name}": view.detach().cpu().clone()
        for layer, component in converted.items()
        for name, view in component.split().items()
    }
    int8 = [layer for layer, component in converted.items() if component.is_int8]
    if int8 and format == "pt":
        raise ModelError(
            f"{target}: layers {int8} have int8 factors, which the original cannot read; "
            "save them as safetensors"
        )
    for layer in int8:
        scales = converted[layer].split_scales().items()
        key = converted[layer].architecture.scale_key
        # in front, where four bytes are aligned
        weights = {str(key(layer, slot)): view.cpu().clone() for slot, view in scales} | weights
    with disk_errors(target, ModelError), StagedDirectory(target, replace=False) as staged:
        write_weights(staged, weights, format)
        with staged.file(NPT_CONFIG) as file:
            file.write(strict_json.dump(describe(model, converted)))
        read_back(staged.path, target)
        staged.publish()
    if rounded:
        message = (
            f"{target}: layers {rounded} were rounded when they were loaded, and are saved so; "
            "npt.load with dtype=torch.float32 keeps their precision"
        )
        warnings.warn(NPTWarning(message), stacklevel=3)
    return target


def read_component(checkpoint: Checkpoint, layer: int) -> NPComponent:
    """One layer of a checkpoint on the CPU, with its numbers in float32 or int8, for inference."""
    architecture = checkpoint.modules[layer].architecture
    component = NPComponent(
        architecture.hidden_size,
        architecture.intermediate_size,
        rank=architecture.rank,
        num_ranks=architecture.num_ranks,
        modulation=architecture.modulation,
        residual=checkpoint.record(layer).residual or "removed",
        device="cpu",
        dtype=torch.float32,
    ).requires_grad_(False)
    _fill(component, checkpoint.modules[layer], NearbyReader())
    return component


def _find_residuals(model: Any, checkpoint: Checkpoint, layers: Sequence[int]) -> None:
    """Set the residual of fresh layers of which no file tells it.

    Raises:
        ModelError: nothing tells it. A guess would be wrong in silence.
    """
    found: dict[str, list[int]] = {}
    for layer, probed in probe_residuals(model, layers).items():
        # the original's layers of three projections are all removed (design.md#old-files)
        residual = probed or checkpoint.record(layer).residual
        if residual is None:
            raise ModelError(
                f"{checkpoint.given}: no file says whether layer {layer} keeps attention in the "
                "residual stream, and what it computes does not tell; give the residual, removed "
                "or kept (--residual)"
            )
        components(model)[layer].residual = residual
        if residual != checkpoint.record(layer).residual:
            found.setdefault(residual, []).append(layer)
    if found:
        said = ", ".join(f"residual {name} for layers {layers}" for name, layers in found.items())
        message = (
            f"{checkpoint.given}: no file says whether layers keep attention in the residual "
            f"stream; what they compute tells {said} (--residual overrides it)"
        )
        warnings.warn(NPTWarning(message), stacklevel=4)


def _check(layer: int, made: Architecture, checkpoint: Checkpoint) -> None:
    """Raise ModelError if a layer that was made for a checkpoint's has other tensors than it."""
    given = checkpoint.modules[layer].architecture
    if made != given:
        widths = "{0.modulation}, {0.hidden_size} x {0.intermediate_size}"
        raise ModelError(
            f"{checkpoint.given}: layer {layer} is {widths.format(given)}; the model's MLP there "
            f"takes {widths.format(made)}"
        )


def _fill(component: NPComponent, module: NPModule, reader: NearbyReader) -> None:
    """Read a layer's tensors into a component, and note whether that rounds any."""
    component.rounded = False
    if module.factors and not component.is_int8:
        component.quantize()
    scales = component.split_scales() if module.factors else {}
    for scale, entry in module.scales.items():
        scales[scale].copy_(read_tensor(entry, reader))
    views = component.split()
    for slot, entry in module.tensors.items():
        name = str(module.architecture.key(0, slot)).removeprefix("layer_0_np.")
        given, view = read_tensor(entry, reader), views[name].detach()
        narrow = given.to(view.dtype)
        if narrow is not given and not torch.equal(narrow.to(given.dtype), given):
            component.rounded = True
        view.copy_(narrow)


def check_range(module: NPModule, dtype: torch.dtype) -> None:
    """Raise ModelError if a number would become infinite in float16, whose largest is 65,504."""
    reader = NearbyReader()
    for entry in module.tensors.values():
        if dtype != torch.float16 or entry.dtype.name == "F16":
            continue
        given = read_tensor(entry, reader)
        if (given.to(dtype).isinf() & ~given.isinf()).any():
            raise ModelError(
                f"{entry.file.path}: {entry.name}: has numbers that are too large for float16; "
                "load the model in bfloat16, or the layers with dtype=torch.float32"
            )


def _config(layers: Sequence[int], architecture: Architecture, residual: str) -> NPTConfig:
    return NPTConfig(
        layers=layers,
        rank=architecture.rank,
        num_ranks=architecture.num_ranks,
        modulation=architecture.modulation,  # type: ignore[arg-type]
        residual=residual,  # type: ignore[arg-type]
    )


def check_base(model: Any, checkpoint: Checkpoint) -> None:
    """Raise ModelError if a checkpoint was trained on another base model than `model`.

    Another base model of the same sizes gives an `NPTWarning`.
    """
    sizes = {**base_sizes(model), "num_hidden_layers": len(decoder_layers(model))}
    checkpoint.check_sizes(sizes, own_widths(model))
    base = checkpoint.model_name, checkpoint.fingerprint
    note_other_base(checkpoint.given, *base, fingerprint(model))
