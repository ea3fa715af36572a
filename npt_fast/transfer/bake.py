"""Make a modulation permanent: in the base weights, or as a LoRA adapter that needs no NPT code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from npt_fast.arguments import check_arguments
from npt_fast.called_mlp import has_plain_weight, is_plain_linear
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.publish import StagedDirectory, disk_errors
from npt_fast.errors import ModelError, TransferError
from npt_fast.hf.convert import decoder_layers
from npt_fast.hf.wrappers import unwrapped
from npt_fast.paths import exists, path_errors, user_path
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.modulation import Modulation


class Baked:
    """A modulation that was added to a model's base weights; `undo` restores them."""

    def __init__(self, originals: Mapping[tuple[int, str], Tensor], weights: Any) -> None:
        self._originals = originals
        self._weights = weights
        self._digests = {key: _digest(weight) for key, weight in weights.items()}

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the weights bit for bit, from the copy that `bake` made.

        Raises:
            TransferError: the weights have changed since; undo what was baked later first.
        """
        for (layer, name), weight in self._weights.items():
            if _digest(weight) != self._digests[layer, name]:
                raise TransferError(
                    f"layer {layer}, {name}_proj has changed since; undo what was baked later first"
                )
        for key, weight in self._weights.items():
            weight.copy_(self._originals[key])
        self._weights = {}


@check_arguments
@torch.no_grad()
def bake(model: nn.Module, modulation: Modulation, strength: float = 1.0) -> Baked:
    """Add ``strength * dW`` to the base weights, so that it acts on every token.

    Args:
        model: Base model, with or without NP layers.
        modulation: Modulation to add.
        strength: Factor of its dW.

    Returns:
        A handle that can undo it; it keeps a copy of the changed weights.

    Raises:
        ModelError: the modulation belongs to another base model, or one of its projections has no
            float weight of its own that decides its output: it is quantised, offloaded, wrapped in
            an adapter, hooked, or shared with another module.
    """
    modulation.check_base_model(model)
    layers = decoder_layers(model)
    weights: dict[tuple[int, str], Any] = {}
    for layer, name, _ in modulation.walk():
        mlp = unwrapped(getattr(unwrapped(layers[layer]), "mlp", None))
        module: Any = getattr(mlp, f"{name}_proj", None)
        if not is_plain_linear(module):
            raise ModelError(_obstacle(f"layer {layer}, {name}_proj", module))
        weights[layer, name] = weight = module.weight
        names = [
            key for key, other in model.named_parameters(remove_duplicate=False) if other is weight
        ]
        if len(names) > 1:
            raise ModelError(f"{names[0]} is also {names[1]}; its weight cannot be changed alone")
    # a copy: subtracting what was added would not give the same bits
    originals = {key: weight.clone() for key, weight in weights.items()}
    for layer, name, terms in modulation.walk():
        weight = weights[layer, name]
        wide = torch.promote_types(weight.dtype, torch.float32)  # bfloat16 weights round once
        v_a, v_b = (v.to(weight.device, wide) for v in terms)
        weight.copy_(torch.addmm(weight.to(wide), v_b.t(), v_a, alpha=strength))
    return Baked(originals, weights)


def _obstacle(where: str, module: Any) -> str:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        return f"{where} is offloaded; its weight cannot be changed"
    if module is None:
        return f"{where} does not exist in this model"
    if has_plain_weight(module):
        return f"{where} has hooks or a forward of its own; remove them, or inject the modulation"
    kind = type(module) if type(module) is not nn.Linear else type(weight)
    return (
        f"{where} is a {kind.__module__}.{kind.__name__}; only float weights of a plain linear "
        "layer can be changed exactly. Merge adapters, or load the model in a float dtype, or "
        "inject the modulation instead"
    )


def _digest(weight: Tensor) -> bytes:
    """SHA-256 of the contents; a version counter would grow even when a change is undone."""
    data = weight.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(data.numpy().data).digest()


@check_arguments
def export_lora(modulation: Modulation, model: nn.Module, output: str | Path) -> Path:
    """Write a modulation as a PEFT adapter: n rank-1 terms are exactly a LoRA of rank n.

    Args:
        modulation: Modulation to write.
        model: Base model; its name goes into the adapter.
        output: Folder to create.

    Returns:
        The folder.

    Raises:
        ModelError: the modulation belongs to another base model.
        TransferError: the folder exists already or cannot be written.
    """
    modulation.check_base_model(model)
    target = user_path(output)
    with path_errors(target, TransferError):
        if exists(target):
            raise TransferError(f"{target}: exists already; choose another folder")
    rank = modulation.terms
    tensors = {}
    inner, layers = unwrapped(model), decoder_layers(model)
    # multimodal models have their language model deeper inside; PEFT adds its prefix by itself
    path = next(name for name, part in inner.named_modules() if part is layers)
    path = path.removeprefix("base_model.model.")
    for layer, name, (v_a, v_b) in modulation.walk():
        missing = rank - len(v_a)  # zero terms to add: the adapter has one rank for all modules
        prefix = f"base_model.model.{path}.{layer}.mlp.{name}_proj"
        padded = (torch.cat([v, v.new_zeros(missing, v.shape[1])]).cpu() for v in (v_a, v_b))
        lora_a, lora_b = padded
        tensors[f"{prefix}.lora_A.weight"] = lora_a.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = lora_b.t().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BaseModel.of(model).name or None,
        "r": rank,
        "lora_alpha": rank,  # PEFT scales by alpha / r, which must be 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({f"{name}_proj" for _, name, _ in modulation.walk()}),
        "layers_to_transform": sorted(modulation.layers),
        "layers_pattern": "layers",
    }
    with disk_errors(target, TransferError), StagedDirectory(target, replace=False) as staged:
        with staged.file("adapter_model.safetensors") as file:
            file.write(save(tensors, {"format": "pt"}))
        with staged.file("adapter_config.json") as file:
            file.write(strict_json.dump(config))
        staged.publish()
    return target
