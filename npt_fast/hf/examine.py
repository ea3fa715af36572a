"""What a model's config alone says of its layers: which of them can be converted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn

from npt_fast.hf.base_model import load_skeleton
from npt_fast.hf.convert import decoder_layers, supported_layers
from npt_fast.hf.families import mlp_of
from npt_fast.hf.probe import kind

_STEP = 64  # numbers between the beginnings of two experts' matrices; kernels want aligned ones


def examine(name: str, *, trust_remote_code: bool = False) -> dict[int, str | None]:
    """Which layers of a model can be converted; its weights are neither read nor downloaded.

    One layer of each kind gets random weights for as long as it is probed. Those of experts overlap
    in memory, so that a layer of hundreds takes as much as one.

    Args:
        name: Hub id, folder, path of a ``.gguf`` file, or ``"smollm2-135m"``.
        trust_remote_code: as for `load_base_model`.

    Returns:
        As `supported_layers`: None or what is in the way, by layer index.

    Raises:
        ModelError: the config cannot be read, needs code, or is of a model without such layers.
    """
    model = load_skeleton(name, trust_remote_code=trust_remote_code)
    found: dict[object, str | None] = {}
    kinds = [kind(layer) for layer in decoder_layers(model)]
    for index, layer in enumerate(decoder_layers(model)):
        if kinds[index] not in found:
            with _random_weights(layer):
                found[kinds[index]] = supported_layers(model, [index])[index]
    return {index: found[of] for index, of in enumerate(kinds)}


@contextmanager
def _random_weights(layer: nn.Module) -> Iterator[None]:
    """Context in which a layer on the meta device has weights, if it is worth a probe."""
    if mlp_of(layer) is None:
        yield
        return
    generator = torch.Generator().manual_seed(0)
    empty = [(part, dict(part._parameters)) for part in layer.modules()]
    try:
        for part, parameters in empty:
            for name, tensor in parameters.items():
                if tensor is not None:
                    part._parameters[name] = nn.Parameter(
                        _random(tensor, generator), requires_grad=False
                    )
        yield
    finally:
        for part, parameters in empty:
            part._parameters.update(parameters)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of a tensor's shape; matrices of experts each begin a little further on."""
    scale = like.shape[-1] ** -0.5 if like.ndim else 1.0
    if like.ndim < 3:
        return torch.empty_like(like, device="cpu").normal_(std=scale, generator=generator)
    count, *matrix = like.shape
    numbers = torch.empty(prod(matrix) + count * _STEP, dtype=like.dtype)
    numbers.normal_(std=scale, generator=generator)
    return numbers.as_strided(like.shape, (_STEP, *like.stride()[1:]))
