"""What torch and safetensors read from a file, against what the library says is in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from npt_fast.checkpoint.tensor_entry import TensorEntry


def content(entry: TensorEntry) -> bytes:
    """The tensor's elements, densely, from the raw bytes of the file."""
    if entry.strides is None:
        return entry.file.read(entry.offset, entry.nbytes)
    assert entry.record is not None
    record = entry.file.read(entry.record.offset, entry.record.nbytes)
    flat = torch.frombuffer(bytearray(record), dtype=getattr(torch, entry.dtype.torch_name))
    first = (entry.offset - entry.record.offset) // entry.dtype.itemsize
    return as_bytes(flat.as_strided(entry.shape, entry.strides, first))


def as_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(entries: Mapping[str, TensorEntry], expected: Mapping[str, torch.Tensor]) -> None:
    """`entries` have exactly the names, types, shapes and bytes of `expected`."""
    assert set(entries) == set(expected)
    for name, entry in entries.items():
        tensor = expected[name]
        assert f"torch.{entry.dtype.torch_name}" == str(tensor.dtype), name
        assert entry.shape == tuple(tensor.shape), name
        found = content(entry)
        assert found == as_bytes(tensor), name
