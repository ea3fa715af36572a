"""Round the factors of a model's NP layers to int8."""

from __future__ import annotations

from npt_fast.arguments import check_arguments
from npt_fast.errors import ModelError
from npt_fast.functional import is_shard
from npt_fast.hf.convert import Model, chosen_components, components
from npt_fast.hf.description import record
from npt_fast.layer_names import LayerList
from npt_fast.modules import NPComponent


@check_arguments
def quantize(model: Model, layers: LayerList | None = None) -> Model:
    """Round the factors of NP layers to int8, in place; such layers cannot be trained.

    Each output channel of a factor gets a float32 scale (design.md#int8), so that a layer takes a
    little more than one byte for each number. The base model is not changed.

    Args:
        model: Hugging Face causal language model with NP layers.
        layers: NP layers, as for `npt_fast.disabled`; all if not given. Those that are int8 already
            stay as they are.

    Returns:
        The same model.

    Raises:
        ModelError: the model has no NP layers, or one of `layers` is none, or a factor has NaN or
            infinite numbers, or is a shard.
    """
    converted = components(model)
    if not converted:
        raise ModelError("the model has no NP layers to quantize")
    chosen = chosen_components(model, layers)
    # all before the first is changed, so that an error changes nothing
    for layer in chosen:
        try:
            _check(converted[layer])
        except ModelError as error:
            raise ModelError(f"layer {layer}: {error}") from None
    for layer in chosen:
        if not converted[layer].is_int8:
            converted[layer].quantize()
    record(model, converted)
    return model


def _check(component: NPComponent) -> None:
    """Raise ModelError if a factor has NaN or infinite numbers, or is a shard."""
    for name, tensor in component.joined.items():
        if tensor.is_meta:
            raise ModelError("factors on the meta device have no numbers to round")
        if is_shard(tensor):
            raise ModelError("factors that are shards (DTensor) cannot be quantized")
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{name}: NaN and infinite numbers cannot be rounded to int8")
