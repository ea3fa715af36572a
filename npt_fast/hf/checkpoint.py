"""Load NPT checkpoints into a Hugging Face model, and save them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.npt_config import NPT_CONFIG, Description, LayerDescription
from npt_fast.checkpoint.publish import StagedDirectory, disk_errors
from npt_fast.checkpoint.read_back import read_back
from npt_fast.checkpoint.source_file import NearbyReader
from npt_fast.config import FileFormat, NPTConfig
from npt_fast.errors import ModelError
from npt_fast.hf.convert import Model, components, convert, decoder_layers
from npt_fast.hf.weights_file import read_tensor, write_weights
from npt_fast.paths import exists, path_errors, user_path


def load(
    model: Model, path: str | Path | Checkpoint, *, layers: Sequence[int] | None = None
) -> Model:
    """Load a checkpoint's layers into a model; layers that are not converted yet are converted.

    The architecture of every layer is read from the checkpoint.

    Args:
        model: Hugging Face causal language model.
        path: checkpoint directory or weights file, or a checkpoint that is open already.
        layers: indices of the layers to load; all layers if not given.

    Returns:
        The same model.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ModelError: the checkpoint was trained on another base model or lacks one of `layers`, or a
            layer of the model is already converted with another architecture.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    check_base(model, checkpoint)
    chosen = list(checkpoint.modules) if layers is None else list(layers)
    for layer in chosen:
        if layer not in checkpoint.modules:
            raise ModelError(
                f"{checkpoint.given}: has no layer {layer}, only {list(checkpoint.modules)}"
            )
    present = components(model)
    # all are compared before the first is converted, so that an error changes nothing
    configs = {layer: _config(checkpoint, layer) for layer in chosen}
    for layer, config in configs.items():
        if layer in present:
            wanted = checkpoint.modules[layer].architecture, config.residual
            found = present[layer].architecture, present[layer].residual
            if found != wanted:
                raise ModelError(
                    f"{checkpoint.given}: layer {layer} is {wanted[0]}, residual {wanted[1]}; "
                    f"the model's is {found[0]}, residual {found[1]}"
                )
    reader = NearbyReader()
    for layer in chosen:
        module = checkpoint.modules[layer]
        if layer not in present:
            convert(model, configs[layer])
        prefix = f"layer_{layer}_np."
        tensors = {
            str(module.architecture.key(layer, slot)).removeprefix(prefix): read_tensor(
                entry, reader
            )
            for slot, entry in module.tensors.items()
        }
        components(model)[layer].load_state_dict(tensors)
    return model


def save(model: nn.Module, output: str | Path, *, format: FileFormat = "safetensors") -> Path:
    """Write the NP layers of a model as a checkpoint, which appears complete or not at all.

    Args:
        model: model with NP layers.
        output: directory to write; it must not exist.
        format: format of the weights file; the original reads ``"pt"`` only.

    Returns:
        Path of the checkpoint.

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
    weights = {
        f"layer_{layer}_np.{name}": tensor.cpu()
        for layer, component in converted.items()
        for name, tensor in component.state_dict().items()
    }
    with disk_errors(target, ModelError), StagedDirectory(target, replace=False) as staged:
        write_weights(staged, weights, format)
        with staged.file(NPT_CONFIG) as file:
            file.write(strict_json.dump(describe(model)))
        read_back(staged.path, target)
        staged.publish()
    return target


def _config(checkpoint: Checkpoint, layer: int) -> NPTConfig:
    architecture = checkpoint.modules[layer].architecture
    return NPTConfig(
        layers=[layer],
        rank=architecture.rank,
        num_ranks=architecture.num_ranks,
        modulation=architecture.modulation,  # type: ignore[arg-type]
        # taken for removed where nothing tells (design.md#layer)
        residual=checkpoint.record(layer).residual or "removed",  # type: ignore[arg-type]
    )


def check_base(model: Any, checkpoint: Checkpoint) -> None:
    """Raise ModelError if a checkpoint was trained on another base model than `model`."""
    layers = decoder_layers(model)
    config = model.config
    architecture = next(iter(checkpoint.modules.values())).architecture
    facts: Mapping[str, int | None] = {
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_hidden_layers": checkpoint.base_size("num_hidden_layers"),
        "vocab_size": checkpoint.base_size("vocab_size"),
    }
    for name, value in facts.items():
        own = getattr(config, name, None)
        if value is not None and own is not None and own != value:
            raise ModelError(
                f"{checkpoint.given}: was trained on another base model: "
                f"{name} {value}, the model has {own}"
            )
    last = max(checkpoint.modules)
    if last >= len(layers):
        raise ModelError(f"{checkpoint.given}: has layer {last}, the model has {len(layers)}")


def describe(
    model: Any,
    *,
    base_name: str | None = None,
    steps: Mapping[int, int] | None = None,
    fidelity: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """The content of ``npt_config.json`` for a model.

    Args:
        model: model with NP layers.
        base_name: name of the base model; if not given, the name that it was loaded by.
        steps: optimizer steps that each layer was trained for, by layer, if known.
        fidelity: measured error of each layer, by layer, if known.
    """
    config = model.config
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }
    layers = {
        layer: LayerDescription.of(
            component.architecture,
            component.residual,
            step=(steps or {}).get(layer),
            fidelity=(fidelity or {}).get(layer),
        )
        for layer, component in components(model).items()
    }
    name = base_name or getattr(config, "_name_or_path", "") or None
    return Description(name, sizes, layers).to_dict()
