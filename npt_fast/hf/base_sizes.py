"""The sizes of a base model, which checkpoints and modulations record."""

from __future__ import annotations

from typing import Any

from npt_fast.checkpoint.npt_config import SIZES
from npt_fast.hf.decoder import decoder_of, layers_of
from npt_fast.hf.families import mlp_of
from npt_fast.hf.wrappers import unwrapped


def base_sizes(model: Any) -> dict[str, int]:
    """The sizes `SIZES` of a model, as far as they are known.

    GPT-2's config does not tell the width of its MLPs, but they do.
    """
    text = unwrapped(model).config.get_text_config()  # a multimodal model's own has no sizes
    sizes = {name: size for name in SIZES if (size := getattr(text, name, None)) is not None}
    if "intermediate_size" not in sizes and (widths := _widths(model)):
        sizes["intermediate_size"] = next(iter(widths.values()))
    return sizes


def own_widths(model: Any) -> dict[int, int]:
    """Width F of what changes in an MLP, by layer, where it is not the model's `intermediate_size`.

    Mixtures of experts have another one, and so have the layers of Gemma 4 that share keys.
    """
    size = base_sizes(model).get("intermediate_size")
    return {layer: width for layer, width in _widths(model).items() if width != size}


def _widths(model: Any) -> dict[int, int]:
    parts = enumerate(mlp_of(unwrapped(layer)) for layer in layers_of(decoder_of(model)))
    return {layer: part.sizes[1] for layer, part in parts if part is not None}
