"""Convert decoder layers of a Hugging Face model into NP layers, and back.

A converted layer gets a submodule ``np_component`` and a forward of its own; its class and the base
weights stay as they are. `families` says which decoder layers can be converted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch
from torch import nn

from npt_fast.arguments import check_arguments, kind_of
from npt_fast.checkpoint.np_module import Architecture
from npt_fast.config import NPTConfig
from npt_fast.errors import ModelError, NPTWarning, OptionError
from npt_fast.hf import patching
from npt_fast.hf.decoder import decoder_of, layers_of
from npt_fast.hf.description import record
from npt_fast.hf.families import mlp_of
from npt_fast.hf.np_layer import layer_forward, mlp_forward, mlp_module, mlp_parts
from npt_fast.hf.probe import OFFLOADED, Fit, device_of, fit, is_offloaded, kind
from npt_fast.hf.wrappers import unwrapped
from npt_fast.layer_names import LayerList, chosen_layers, resolve_layers
from npt_fast.modules import NPComponent

Model = TypeVar("Model", bound=nn.Module)
AnyModel = Annotated[Any, kind_of(nn.Module)]
"""A model whose attributes type checkers do not know."""


@dataclass(frozen=True, slots=True)
class LayerStatus:
    """The status of one NP layer.

    Attributes:
        layer: index of the layer.
        architecture: modulation type, num_ranks, rank and widths.
        residual: ``"removed"`` or ``"kept"``.
        parameters: number of weights.
        nbytes: bytes of the weights; of int8 weights with their scales.
        dtype: dtype of the weights, such as ``"float32"`` or ``"int8"``.
        enabled: whether the layer is on; otherwise it runs as in the base model.
    """

    layer: int
    architecture: Architecture
    residual: str
    parameters: int
    nbytes: int
    dtype: str
    enabled: bool


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model, as they are called: maybe in wrappers.

    Raises:
        ModelError: the model's decoder has no such list.
    """
    return layers_of(decoder_of(model))


def _inner_layers(model: Any) -> list[Any]:
    return [unwrapped(layer) for layer in decoder_layers(model)]


def components(model: nn.Module) -> dict[int, NPComponent]:
    """The model's NP components by layer index, ascending."""
    layers = enumerate(_inner_layers(model))
    found = ((index, unwrapped(getattr(layer, "np_component", None))) for index, layer in layers)
    return {index: part for index, part in found if isinstance(part, NPComponent)}


def chosen_components(model: nn.Module, layers: LayerList | None) -> list[int]:
    """Indices of the NP layers that are named, or of all.

    Raises:
        ModelError: one of them is not an NP layer.
    """
    converted = components(model)
    chosen = chosen_layers(layers, converted, len(decoder_layers(model)))
    for layer in chosen:
        if layer not in converted:
            raise ModelError(f"layer {layer} is no NP layer; converted are {list(converted)}")
    return chosen


@check_arguments
def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of NP layers that require gradients, for an optimizer of one's own.

    A list, so that an optimizer and the clipping of gradients can both read it:
    ``torch.optim.AdamW(npt.trainable_parameters(model))``. `npt.RelativeAdamW` takes the model.

    Args:
        model: Hugging Face causal language model with NP layers.

    Raises:
        ModelError: there are none, which an optimizer would refuse.
    """
    found = [
        parameter
        for component in components(model).values()
        for parameter in component.parameters()
        if parameter.requires_grad
    ]
    if not found:
        raise ModelError(
            "the model has no NP layers that require gradients; npt.convert adds some, and "
            "npt.load(..., trainable=True) reads some"
        )
    return found


@check_arguments
def supported_layers(model: nn.Module, layers: LayerList | None = None) -> dict[int, str | None]:
    """Which decoder layers can be converted: what is in the way of each, None if nothing.

    A few random tokens are run through one layer of each kind. NP layers have been converted, so
    they can be.

    Args:
        model: Hugging Face causal language model; its layers must be on a device.
        layers: layers to look at, as for `NPTConfig`; all if not given.

    Returns:
        None or one line without the layer's number, by layer index.

    Raises:
        ModelError: the model's decoder has no list of layers.
    """
    count = len(decoder_layers(model))
    chosen = chosen_layers(layers, range(count), count)
    converted = components(model)
    found = _fits(model, [index for index in chosen if index not in converted])
    return {
        index: str(result) if isinstance(result := found.get(index), ModelError) else None
        for index in chosen
    }


@check_arguments
def convert(model: Model, config: NPTConfig, *, probe: bool = True) -> Model:
    """Convert layers in place, and freeze the base model's parameters.

    A layer is refused if it computes something else than `npt_fast.hf.families` says, because
    the NP layer would be wrong. A few random tokens are run through one layer of each kind to find
    out; the model is not changed by that.

    Args:
        model: Hugging Face causal language model.
        config: layers to convert, and the architecture that they get.
        probe: whether to do so. Without it, the names of a layer's parts and the function of its
            MLP must do.

    Returns:
        The same model.

    Raises:
        ModelError: a layer is converted already, or cannot be converted; the message says what
            differs, and which layers can be converted. The model is unchanged then.
        OptionError: the model lacks one of the layers, or its MLP is not of the kind that the
            modulation type is for.
    """
    add_layers(model, config, probe=probe)
    return model


def add_layers(
    model: Any,
    config: NPTConfig,
    *,
    probe: bool,
    trainable: bool = True,
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """`convert`, with parameters for inference too.

    Args:
        model: Hugging Face causal language model.
        config: layers to convert, and the architecture that they get.
        probe: as for `convert`.
        trainable: whether the parameters require gradients.
        dtype: dtype of the parameters; None means `inference_dtype`. Training needs float32 also
            on a bfloat16 base: there a step of 5e-5 rounds away on any weight above 0.016.

    Raises:
        ModelError: as for `convert`.
    """
    layers = _inner_layers(model)
    indices = resolve_layers(config.layers, len(layers))
    for index in indices:
        if hasattr(layers[index], "np_component"):
            raise ModelError(f"layer {index} is an NP layer already; unload the model first")
        if is_offloaded(layers[index]):
            raise ModelError(f"layer {index} {OFFLOADED}")
    # all are made before the first is attached, so that an error changes nothing
    fits: dict[int, Fit] = {}
    for index, found in _fits(model, indices, probe=probe).items():
        if isinstance(found, ModelError):
            raise _refusal(model, index, found)
        try:
            found.layout.check(found.layout.modulation(config.modulation))
        except OptionError as error:
            raise OptionError(f"layer {index} ({type(layers[index]).__name__}): {error}") from None
        fits[index] = found
    fresh = {
        index: _component(
            found, layers[index], config, dtype or inference_dtype(model, index)
        ).requires_grad_(trainable)
        for index, found in fits.items()
    }
    if not components(model):  # otherwise it was frozen before, and some NP layers may be trained
        model.requires_grad_(False)
    for index, component in fresh.items():
        layer = layers[index]
        layer.np_component = component
        layer.__dict__["np_block"] = fits[index].block
        patching.attach(layer, layer_forward)
        for part in mlp_parts(layer):
            patching.attach(part, mlp_forward)
            # on the MLP and not registered, so that copies of the MLP alone have their own
            part.__dict__["np_act_fn"] = getattr(part, component.layout.activation, None)
    record(model, components(model))
    parallel = [index for index, found in fits.items() if found.block.parallel]
    if trainable and config.residual == "kept" and parallel:
        message = (
            f"layers {parallel} run attention and MLP side by side, so with residual kept the base "
            "MLP is the target: there is nothing to learn; residual removed has a target"
        )
        warnings.warn(NPTWarning(message), stacklevel=4)


def inference_dtype(model: Any, index: int) -> torch.dtype:
    """The dtype in which a layer's NP component needs no cast: that of its MLP's float weights.

    Where the MLP has none, as in many quantised models, it is the model's own dtype.
    """
    found = mlp_of(_inner_layers(model)[index])
    projections = [getattr(found.module, name) for name in found.layout.names] if found else []
    for holder in (*(getattr(p, "weight", None) for p in projections), unwrapped(model)):
        dtype = getattr(holder, "dtype", None)
        if isinstance(dtype, torch.dtype) and computes_in(dtype):
            return dtype
    return torch.float32


def computes_in(dtype: torch.dtype) -> bool:
    """Whether NP layers compute in a dtype: a float of 16 bits or more."""
    return dtype.is_floating_point and dtype.itemsize > 1


@check_arguments
def unload(model: Model) -> Model:
    """Turn all NP layers back into base layers, bit for bit; the parameters stay frozen.

    Returns:
        The same model.

    Raises:
        ModelError: another library has replaced a layer's forward since it was converted; the model
            is unchanged then.
    """
    remove_layers(model, list(components(model)))
    return model


def remove_layers(model: Any, indices: Sequence[int]) -> None:
    """`unload`, of some NP layers."""
    inner = _inner_layers(model)
    layers = [inner[index] for index in indices]
    for layer in layers:  # before the first is changed
        patching.check_detachable(layer, layer_forward)
        for part in mlp_parts(layer):
            patching.check_detachable(part, mlp_forward)
    for layer in layers:
        patching.detach(layer, layer_forward)
        for mlp in mlp_module(layer).modules():  # in wrappers there may be copies
            if patching.is_attached(mlp, mlp_forward):
                patching.detach(mlp, mlp_forward)
                del mlp.np_act_fn
        del layer.np_component, layer.np_block
    record(model, components(model))


@check_arguments
@contextmanager
def disabled(model: nn.Module, layers: LayerList | None = None) -> Iterator[None]:
    """Context in which NP layers behave as in the base model, bit for bit.

    Args:
        model: model with NP layers.
        layers: NP layers to disable, as for `NPTConfig`; all if not given.

    Raises:
        ModelError: one of `layers` is not an NP layer.
    """
    converted = components(model)
    chosen = [converted[layer] for layer in chosen_components(model, layers)]
    before = [component.enabled for component in chosen]
    try:
        for component in chosen:
            component.enabled = False
        yield
    finally:
        for component, enabled in zip(chosen, before, strict=True):
            component.enabled = enabled


@check_arguments
def status(model: nn.Module) -> list[LayerStatus]:
    """The status of every NP layer, ascending."""
    return [
        LayerStatus(
            layer=layer,
            architecture=component.architecture,
            residual=component.residual,
            parameters=sum(tensor.numel() for tensor in component.joined.values()),
            nbytes=component.nbytes,
            dtype=str(component.w_down.dtype).removeprefix("torch."),
            enabled=component.enabled,
        )
        for layer, component in components(model).items()
    ]


def _fits(model: Any, indices: Sequence[int], *, probe: bool = True) -> dict[int, Fit | ModelError]:
    """What NP components must know about layers, or why they cannot be converted.

    Of layers of one kind, the first is probed for all.
    """
    layers = _inner_layers(model)
    kinds: dict[object, Fit | ModelError] = {}
    found: dict[int, Fit | ModelError] = {}
    for index in indices:
        of = kind(layers[index]), is_offloaded(layers[index])
        if of not in kinds:
            try:
                kinds[of] = fit(decoder_of(model), index, probe=probe)
            except ModelError as error:
                kinds[of] = error
        found[index] = kinds[of]
    return found


def _refusal(model: Any, index: int, problem: ModelError) -> ModelError:
    name = type(_inner_layers(model)[index]).__name__
    others = [layer for layer, obstacle in supported_layers(model).items() if obstacle is None]
    can = f"layers that can be converted: {others}" if others else "no layer can be converted"
    return ModelError(f"layer {index} ({name}) {problem}; {can}")


def _component(found: Fit, layer: nn.Module, config: NPTConfig, dtype: torch.dtype) -> NPComponent:
    return NPComponent(
        found.hidden_size,
        found.intermediate_size,
        rank=config.rank,
        num_ranks=config.num_ranks,
        modulation=found.layout.modulation(config.modulation),
        residual=config.residual,
        activation=found.activation,
        layout=found.layout,
        mixture=found.mixture,
        init=config.init,
        init_scale=config.init_scale,
        device=device_of(layer),
        dtype=dtype,
    )
