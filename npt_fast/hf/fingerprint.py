"""Tell base models of equal sizes apart by a few of their weights."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npt_fast.checkpoint.source_file import NearbyReader
from npt_fast.checkpoint.tensor_source import open_tensors
from npt_fast.errors import CheckpointError, NPTWarning
from npt_fast.functional import is_shard
from npt_fast.hf.model_folder import INDEXES, WEIGHTS
from npt_fast.hf.weights_file import read_tensor
from npt_fast.hf.wrappers import unwrapped
from npt_fast.paths import exists

_ROWS = 16
"""Rows of the embedding that count: the first ones, which a resized vocabulary keeps."""
_NORM = re.compile(r"norm|\bln_")


@torch.no_grad()
def fingerprint(model: nn.Module) -> str | None:
    """SHA-256 of a model's norms and first embeddings, rounded to bfloat16; None if not known.

    LoRA, quantization of linear layers and a resized vocabulary leave these weights as they are.
    bfloat16 is what float32 and bfloat16 loads of one file have in common. float16, which a file
    may have been cast to, has lost small values, so that nothing is known of such a model.
    """
    weights = _weights(unwrapped(model))
    if not weights or not all(map(_is_known, weights)):
        return None
    weights[0] = weights[0][:_ROWS]
    # one copy from each device
    parts = [weight.detach().flatten().to(torch.bfloat16) for weight in weights]
    devices = dict.fromkeys(part.device for part in parts)
    found = hashlib.sha256()
    for device in devices:
        own = torch.cat([part for part in parts if part.device == device]).cpu()
        found.update(own.view(torch.uint8).numpy().data)
    return found.hexdigest()


def stored_fingerprint(folder: Path) -> str | None:
    """The `fingerprint` of the model in a folder, of which only a few weights are read.

    Returns:
        The fingerprint; None if it is not known, as for pickles of an old kind.

    Raises:
        CheckpointError: the weights cannot be read.
        ModelError: the folder holds no model that transformers can build.
    """
    from npt_fast.hf.base_model import load_skeleton

    names = (folder / name for pair in zip(WEIGHTS, INDEXES, strict=True) for name in pair)
    stored = next((path for path in names if exists(path)), None)
    if stored is None:
        return None
    try:
        tensors = open_tensors(stored).tensors
    except CheckpointError:
        if stored.name in (WEIGHTS[0], INDEXES[0]):
            raise
        return None  # transformers may read it still
    model = load_skeleton(str(folder))
    needed, reader = _weights(model), NearbyReader()
    for name, parameter in list(model.named_parameters()):
        if any(parameter is weight for weight in needed):
            if name not in tensors or tensors[name].shape != tuple(parameter.shape):
                return None
            entry = tensors[name]
            if len(entry.shape) > 1:
                entry = replace(entry, shape=(min(_ROWS, entry.shape[0]), *entry.shape[1:]))
            owner = model.get_submodule(name.rpartition(".")[0])
            value = nn.Parameter(read_tensor(entry, reader), requires_grad=False)
            setattr(owner, name.rpartition(".")[2], value)
    return fingerprint(model)


def _is_known(weight: Tensor) -> bool:
    return not (weight.is_meta or weight.dtype == torch.float16 or is_shard(weight))


def _weights(model: Any) -> list[Tensor]:
    """The embedding and the norms."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
        return []
    norms = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and _NORM.search(name) and parameter.is_floating_point()
    ]
    return [embedding, *norms]


def note_other_base(what: str, name: str | None, recorded: str | None, own: str | None) -> None:
    """Warn if something belongs to another base model of the same sizes.

    Args:
        what: what belongs to it, for the message.
        name: name of its base model, if known.
        recorded: fingerprint of its base model, if known.
        own: fingerprint of the model that it is used with, if known.
    """
    if recorded and own and recorded != own:
        message = (
            f"{what} belongs to another base model of the same sizes ({name or 'unnamed'}): "
            "its weights are not this model's"
        )
        warnings.warn(NPTWarning(message), stacklevel=5)
