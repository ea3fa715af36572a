"""A decoder's parts, whose names differ between models, and the calls of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from npt_fast.errors import ModelError
from npt_fast.hf.wrappers import unwrapped

Call = dict[str, Any]
"""Arguments of a layer's call, by name."""

_LAYERS = ("layers", "h")
_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


def decoder_of(model: Any) -> Any:
    """The decoder of a causal language model; anything else is taken for a decoder itself."""
    model = unwrapped(model)
    return unwrapped(model.get_decoder() if hasattr(model, "get_decoder") else model)


def token_reader(model: Any) -> Any:
    """The module that gets token ids: the decoder, or what embeds them together with images."""
    inner = unwrapped(model)
    decoder = inner.get_decoder()
    holders: list[Any] = [
        m for m in inner.modules() if isinstance(m, PreTrainedModel) and m is not decoder
    ]
    *_, holder = (m for m in holders if decoder in m.modules())  # the innermost comes last
    return decoder if holder.get_output_embeddings() is not None else holder


def layers_of(decoder: Any) -> nn.ModuleList:
    """A decoder's list of layers.

    Raises:
        ModelError: it has none of a known name.
    """
    return cast("nn.ModuleList", getattr(decoder, _name_of_layers(decoder)))


def _name_of_layers(decoder: Any) -> str:
    for name in _LAYERS:
        if isinstance(getattr(decoder, name, None), nn.ModuleList):
            return name
    raise ModelError(f"{type(decoder).__name__}: has no list of decoder layers; not supported")


@contextmanager
def with_layers(decoder: Any, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which a decoder has other layers."""
    name = _name_of_layers(decoder)
    own = getattr(decoder, name)
    try:
        setattr(decoder, name, nn.ModuleList(layers))
        yield
    finally:
        setattr(decoder, name, own)


def final_norm(model: Any) -> nn.Module:
    """The norm behind the last layer.

    Raises:
        ModelError: the model's decoder has none of a known name.
    """
    decoder = decoder_of(model)
    found = (getattr(decoder, name, None) for name in _FINAL_NORMS)
    norm: nn.Module | None = next((norm for norm in found if norm is not None), None)
    if norm is None:
        raise ModelError(f"{type(decoder).__name__}: has no norm behind its layers; not supported")
    return norm


def call_of(layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Call]:
    """A decoder layer's hidden states, and its other arguments by name.

    Args:
        layer: decoder layer.
        args: what it is called with by position: the hidden states; with GPT-2 others too.
        kwargs: what it is called with by name.
    """
    call = dict(kwargs)
    if not args:
        return call.pop("hidden_states", None), call
    if len(args) > 1:
        names = _arguments(type(unwrapped(layer)))  # type: ignore[arg-type] # mypy: not hashable
        call |= zip(names[1:], args[1:], strict=False)
    return args[0], call


@cache
def _arguments(kind: Any) -> tuple[str, ...]:
    """Names of the arguments that a class of layers takes, without ``self``."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
