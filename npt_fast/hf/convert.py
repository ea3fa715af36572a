"""Convert decoder layers of a Hugging Face model into NP layers, and back.

A converted layer gets a submodule ``np_component`` and a forward of its own; its class and the base
weights stay as they are. A decoder layer can be converted if it has input_layernorm, self_attn,
post_attention_layernorm, and an mlp with gate_proj, up_proj and down_proj, like those of Llama,
Mistral, Qwen2 and Qwen3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from npt_fast.checkpoint.np_module import Architecture
from npt_fast.config import NPTConfig
from npt_fast.errors import ModelError
from npt_fast.functional import ACTIVATIONS, VectorNorms, vector_norms
from npt_fast.modules import NPComponent

Model = TypeVar("Model", bound=nn.Module)
_PARTS = (
    "input_layernorm",
    "self_attn",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True, slots=True)
class LayerStatus:
    """The status of one NP layer.

    Attributes:
        layer: index of the layer.
        architecture: modulation type, num_ranks, rank and widths.
        residual: ``"removed"`` or ``"kept"``.
        parameters: number of weights.
        enabled: whether the layer is on; otherwise it runs as in the base model.
    """

    layer: int
    architecture: Architecture
    residual: str
    parameters: int
    enabled: bool


class Scaffold(NamedTuple):
    """Options of a training step for one NP layer: other inputs than its own, and more outputs.

    A layer that is called with ``scaffold=`` returns `Parts`. All use of the layer's weights is
    within this one call, while FSDP has them gathered.

    Attributes:
        attention_input: hidden states for attention, ``(..., D)``; None for the layer's input.
        attention: attention output, ``(..., D)``, if it is already known; else None.
        norms: whether to compute norms of v_a and v_b.
    """

    attention_input: Tensor | None = None
    attention: Tensor | None = None
    norms: bool = False


class Parts(NamedTuple):
    """The parts of an NP layer's output.

    Attributes:
        attention: attention output, ``(..., D)``.
        mlp: output of the modulated MLP, ``(..., D)``.
        norms: norms of v_a and v_b; None unless asked for.
    """

    attention: Tensor
    mlp: Tensor
    norms: VectorNorms | None


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model.

    Raises:
        ModelError: the model's decoder has no list ``layers``.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"{type(model).__name__}: has no list of decoder layers; not supported")
    return layers


def components(model: nn.Module) -> dict[int, NPComponent]:
    """The model's NP components by layer index, ascending."""
    found = ((i, getattr(m, "np_component", None)) for i, m in enumerate(decoder_layers(model)))
    return {index: part for index, part in found if isinstance(part, NPComponent)}


def convert(model: Model, config: NPTConfig) -> Model:
    """Convert layers in place, and freeze the base model's parameters.

    Args:
        model: Hugging Face causal language model.
        config: layers to convert, and the architecture that they get.

    Returns:
        The same model.

    Raises:
        ModelError: a layer does not exist, is converted already, or cannot be converted; the model
            is unchanged then.
    """
    layers = decoder_layers(model)
    indices = []
    for given in config.layers:
        index = given + len(layers) if given < 0 else given
        if not 0 <= index < len(layers):
            raise ModelError(f"there is no layer {given}: the model has {len(layers)}")
        if hasattr(layers[index], "np_component"):
            raise ModelError(f"layer {index} is an NP layer already; unload the model first")
        indices.append(index)
    # all are made before the first is attached, so that an error changes nothing
    fresh = {index: _component(layers[index], index, model, config) for index in indices}
    if not components(model):  # otherwise it was frozen before, and some NP layers may be trained
        model.requires_grad_(False)
    for index, component in fresh.items():
        _attach(layers[index], component)
    return model


def unload(model: Model) -> Model:
    """Turn all NP layers back into base layers, bit for bit; the parameters stay frozen.

    Returns:
        The same model.
    """
    for layer in decoder_layers(model):
        if hasattr(layer, "np_component"):
            name = "_old_forward" if hasattr(layer, "_old_forward") else "forward"
            setattr(layer, name, layer.__dict__["_base_forward"])
            del layer._base_forward, layer.np_component
            # setattr has left the class's own forward on the instance: as before, there is none
            if layer.__dict__.get("forward") == MethodType(type(layer).forward, layer):
                del layer.forward
    return model


@contextmanager
def disabled(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Context in which NP layers behave as in the base model, bit for bit.

    Args:
        model: model with NP layers.
        layers: indices of the layers to disable; all NP layers if not given.

    Raises:
        ModelError: one of `layers` is not an NP layer.
    """
    converted = components(model)
    chosen = list(converted) if layers is None else list(layers)
    for layer in chosen:
        if layer not in converted:
            raise ModelError(f"layer {layer} is no NP layer; converted are {list(converted)}")
    before = {layer: converted[layer].enabled for layer in chosen}
    try:
        for layer in chosen:
            converted[layer].enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            converted[layer].enabled = enabled


def status(model: nn.Module) -> list[LayerStatus]:
    """The status of every NP layer, ascending."""
    return [
        LayerStatus(
            layer=layer,
            architecture=component.architecture,
            residual=component.residual,
            parameters=sum(parameter.numel() for parameter in component.parameters()),
            enabled=component.enabled,
        )
        for layer, component in components(model).items()
    ]


def _component(layer: Any, index: int, model: Any, config: NPTConfig) -> NPComponent:
    for name in _PARTS:
        try:
            layer.get_submodule(name)
        except AttributeError:
            raise ModelError(
                f"layer {index} ({type(layer).__name__}) has no {name}; not supported"
            ) from None
    activation = getattr(model.config, "hidden_act", None)
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"the model's activation {activation!r} is not supported, "
            f"only {', '.join(ACTIVATIONS)} are"
        )
    weight = layer.get_submodule("mlp.gate_proj").weight
    if weight.is_meta:
        # accelerate loads offloaded weights when their module is called; we use them without that
        raise ModelError(f"layer {index} is offloaded; NP layers must be on a device")
    intermediate, hidden = weight.shape
    return NPComponent(
        hidden,
        intermediate,
        rank=config.rank,
        num_ranks=config.num_ranks,
        modulation=config.modulation,
        residual=config.residual,
        activation=activation,
        init=config.init,
        init_scale=config.init_scale,
        device=weight.device,
        # also on a bfloat16 base: there a step of 5e-5 rounds away on any weight above 0.016
        dtype=torch.float32,
    )


def _attach(layer: nn.Module, component: NPComponent) -> None:
    layer.np_component = component
    # with device_map, accelerate has replaced forward by a hook that calls _old_forward
    name = "_old_forward" if hasattr(layer, "_old_forward") else "forward"
    layer.__dict__["_base_forward"] = getattr(layer, name)
    setattr(layer, name, MethodType(_forward, layer))


def _forward(
    layer: Any, hidden_states: Tensor, *, scaffold: Scaffold | None = None, **options: Any
) -> Tensor | Parts:
    """The forward of an NP layer (design.md#layer)."""
    component: NPComponent = layer.np_component
    if not component.enabled:
        base: Tensor = layer._base_forward(hidden_states, **options)
        return base
    source, attention, norms = scaffold or Scaffold()
    if attention is None:
        source = layer.input_layernorm(hidden_states if source is None else source)
        attention, _ = layer.self_attn(hidden_states=source, **options)
    # the norm reads the layer's input: attention reaches the MLP through its weights alone
    mlp = component(attention, layer.post_attention_layernorm(hidden_states), layer.mlp)
    if scaffold is not None:
        return Parts(attention, mlp, vector_norms(attention, component.factors) if norms else None)
    out: Tensor = hidden_states + mlp
    return out + attention if component.residual == "kept" else out
