"""Write and read torch tensors in the weights file of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from npt_fast.checkpoint.byte_mover import PAGE
from npt_fast.checkpoint.dtypes import BY_TORCH_NAME
from npt_fast.checkpoint.publish import StagedDirectory
from npt_fast.checkpoint.recipe import Recipe
from npt_fast.checkpoint.safetensors_file import build_header
from npt_fast.checkpoint.source_file import NearbyReader
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.checkpoint.tensor_source import PT_WEIGHTS, SAFETENSORS_WEIGHTS
from npt_fast.config import FileFormat


def write_weights(
    staged: StagedDirectory, weights: Mapping[str, Tensor], format: FileFormat
) -> None:
    """Write and sync the weights file of a checkpoint.

    Args:
        staged: directory of the checkpoint.
        weights: CPU tensors by their full names.
        format: format of the file.
    """
    with staged.file(PT_WEIGHTS if format == "pt" else SAFETENSORS_WEIGHTS) as file:
        if format == "pt":
            save_pt(dict(weights), file)
        else:
            _write_safetensors(weights, file)


def save_pt(value: object, file: BinaryIO) -> None:
    """Call `torch.save`; a full disk raises its OSError instead of torch's RuntimeError."""
    try:
        torch.save(value, file)
    except RuntimeError as error:  # torch only says "unexpected pos"; the context has the cause
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_tensor(entry: TensorEntry, reader: NearbyReader) -> Tensor:
    """Read one tensor of a checkpoint, window by window; nothing is unpickled."""
    dtype = getattr(torch, entry.dtype.torch_name)
    # a bytearray: torch.frombuffer warns of memory that may not be written
    data = bytearray(entry.nbytes)
    position = 0
    for window in Recipe.unchanged(entry).windows(reader):
        data[position : position + len(window)] = window
        position += len(window)
    return torch.frombuffer(data, dtype=dtype).view(entry.shape)


def _write_safetensors(weights: Mapping[str, Tensor], file: BinaryIO) -> None:
    """Write tensors so that the data begin at a page boundary, where a merge can clone them."""
    placed = []
    end = 0
    for name, tensor in weights.items():
        dtype = BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
        placed.append((name, dtype, tuple(tensor.shape), end, end + tensor.nbytes))
        end += tensor.nbytes
    file.write(build_header(placed, {"format": "pt"}, PAGE, 0))
    for tensor in weights.values():
        # as bytes: numpy has no bfloat16
        file.write(tensor.contiguous().view(torch.uint8).numpy().data)
