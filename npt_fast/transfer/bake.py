"""Make a modulation permanent: in the base weights, or as a LoRA adapter that needs no NPT code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from npt_fast.arguments import check_arguments
from npt_fast.called_mlp import has_no_hooks, has_plain_weight, is_plain_linear
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.publish import StagedDirectory, disk_errors
from npt_fast.errors import ModelError, TransferError
from npt_fast.hf.convert import decoder_layers
from npt_fast.hf.families import MLPPart, mlp_of, obstacle
from npt_fast.hf.wrappers import unwrapped
from npt_fast.moe_mlp import expert_matrices, obstacle_of_experts
from npt_fast.paths import exists, path_errors, user_path
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.terms import Terms


class Baked:
    """A modulation that was added to a model's base weights; `undo` restores them."""

    def __init__(self, originals: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        self._originals = originals
        self._weights = weights
        self._digests = {name: _digest(weight) for name, weight in weights.items()}

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the weights bit for bit, from the copy that `bake` made.

        Raises:
            TransferError: the weights have changed since; undo what was baked later first.
        """
        for name, weight in self._weights.items():
            if _digest(weight) != self._digests[name]:
                raise TransferError(f"{name} has changed since; undo what was baked later first")
        for name, weight in self._weights.items():
            weight.copy_(self._originals[name])
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
    weights: dict[str, Any] = {}
    for layer, projection, _ in modulation.walk():
        mlp = _mlp(model, layer)
        module = getattr(mlp.module, _name(mlp, layer, projection))
        label = _label(mlp, layer, projection)
        if mlp.is_routed:
            _check_experts(layer, mlp.module)
            weight, matrix = module, expert_matrices(mlp.module, projection)
        else:
            whole = _matrix(module)
            if whole is None:
                raise ModelError(_obstacle(label, module))
            weight, matrix = module.weight, mlp.layout.rows(projection, whole)
        names = [
            key for key, other in model.named_parameters(remove_duplicate=False) if other is weight
        ]
        if len(names) > 1:
            raise ModelError(f"{names[0]} is also {names[1]}; its weight cannot be changed alone")
        weights[label] = matrix
    # a copy: subtracting what was added would not give the same bits
    originals = {name: weight.clone() for name, weight in weights.items()}
    for weight, (_, _, terms) in zip(weights.values(), modulation.walk(), strict=True):
        wide = torch.promote_types(weight.dtype, torch.float32)  # bfloat16 weights round once
        v_a, v_b = (v.to(weight.device, wide) for v in terms)
        for matrix in weight if weight.ndim == 3 else [weight]:  # of each expert
            matrix.copy_(torch.addmm(matrix.to(wide), v_b.t(), v_a, alpha=strength))
    return Baked(originals, weights)


def _mlp(model: Any, index: int) -> MLPPart:
    layer = unwrapped(decoder_layers(model)[index])
    found = mlp_of(layer)
    if found is None:
        raise ModelError(f"layer {index} {obstacle(layer)}")
    return found


def _label(mlp: MLPPart, layer: int, projection: str) -> str:
    """A projection, for messages."""
    rows = f" ({projection})" if mlp.layout.joined and projection != "down" else ""
    return f"layer {layer}, {_name(mlp, layer, projection)}{rows}"


def _name(mlp: MLPPart, layer: int, projection: str) -> str:
    """Name of the module of a projection."""
    name: str | None = getattr(mlp.layout, projection)
    if name is None:
        raise ModelError(f"layer {layer} has no {projection}, which the modulation changes")
    return name


def _matrix(module: Any) -> Tensor | None:
    """The float weight that alone decides a projection's output, ``(out, in)``; None if none does.

    Of GPT-2's Conv1D it is a view of the weight.
    """
    if not isinstance(module, (nn.Linear, Conv1D)) or not is_plain_linear(module, type(module)):
        return None
    weight: Tensor = module.weight.t() if isinstance(module, Conv1D) else module.weight
    if type(module) is nn.Linear:
        return weight
    x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    expected = nn.functional.linear(x, weight, module.bias).double()
    error = (module(x).double() - expected).norm()
    return weight if error <= 8 * torch.finfo(weight.dtype).eps * expected.norm() else None


def _check_experts(layer: int, experts: Any) -> None:
    problem = obstacle_of_experts(experts)
    if problem is None and not has_no_hooks(experts):
        problem = "has hooks on its experts"
    if problem:
        raise ModelError(f"layer {layer} {problem}; inject the modulation instead")


def _obstacle(where: str, module: Any) -> str:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        return f"{where} is offloaded; its weight cannot be changed"
    if has_plain_weight(module, type(module)):
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
        ModelError: the modulation belongs to another base model, or the model has mixtures of
            experts.
        TransferError: the folder exists already or cannot be written.
    """
    modulation.check_base_model(model)
    parts = (mlp_of(unwrapped(layer)) for layer in decoder_layers(model))
    if mixtures := [index for index, part in enumerate(parts) if part and part.mixture]:
        raise ModelError(
            f"layers {mixtures} are mixtures of experts, and PEFT would take an adapter of any "
            "layer's MLP for one of their experts; bake or inject the modulation instead"
        )
    target = user_path(output)
    with path_errors(target, TransferError):
        if exists(target):
            raise TransferError(f"{target}: exists already; choose another folder")
    inner, layers = unwrapped(model), decoder_layers(model)
    # multimodal models have their language model deeper inside; PEFT adds its prefix by itself
    path = next(name for name, part in inner.named_modules() if part is layers)
    path = path.removeprefix("base_model.model.")
    found: dict[str, list[Terms]] = {}
    targets, transposed = set(), False
    for layer, projection, (v_a, v_b) in modulation.walk():
        mlp = _mlp(model, layer)
        if mlp.layout.joined and projection != "down":  # the other's rows of the matrix stay
            zeros = torch.zeros_like(v_b)
            v_b = torch.cat([v_b, zeros] if projection == "gate" else [zeros, v_b], -1)
        name = _name(mlp, layer, projection)
        alike = [part for part, _ in layers[layer].named_modules() if part.endswith(f".{name}")]
        # GPT-2's attention has a c_proj too
        targets.add(name if len(alike) == 1 else f"{mlp.name}.{name}")
        transposed |= isinstance(getattr(mlp.module, name), Conv1D)
        module = f"{path}.{layer}.{mlp.name}.{name}"
        found.setdefault(module, []).append(Terms(v_a, v_b))
    rank = max(sum(len(terms.v_a) for terms in of) for of in found.values())
    tensors = {}
    for module, of in found.items():
        # zero terms to add: the adapter has one rank for all modules
        v_a, v_b = (torch.cat(vectors).cpu() for vectors in zip(*of, strict=True))
        missing = rank - len(v_a)
        lora_a, lora_b = (torch.cat([v, v.new_zeros(missing, v.shape[1])]) for v in (v_a, v_b))
        tensors[f"base_model.model.{module}.lora_A.weight"] = lora_a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_b.t().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BaseModel.of(model).name or None,
        "r": rank,
        "lora_alpha": rank,  # PEFT scales by alpha / r, which must be 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "target_modules": sorted(targets),
        "layers_to_transform": sorted(modulation.layers),
        "layers_pattern": path.rpartition(".")[2],
    }
    with disk_errors(target, TransferError), StagedDirectory(target, replace=False) as staged:
        with staged.file("adapter_model.safetensors") as file:
            file.write(save(tensors, {"format": "pt"}))
        with staged.file("adapter_config.json") as file:
            file.write(strict_json.dump(config))
        staged.publish()
    return target
