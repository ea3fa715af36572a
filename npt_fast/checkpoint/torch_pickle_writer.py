"""Write the pickle of a ``.pt`` file: plain data and tensors, in protocol 2 as torch.save does."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from npt_fast.checkpoint.torch_pickle import TensorRef
from npt_fast.errors import CheckpointError

_MAX_DEPTH = 64
_MAX_NODES = 2_000_000  # a few bytes of hostile pickle can stand for exponentially many


def encode(value: Any, place: Callable[[Any], TensorRef | None]) -> bytes:
    """A protocol-2 pickle of plain data and tensors that ``torch.load`` reads.

    Args:
        value: nested dicts, lists, tuples, str, int, float, bool, None, and whatever `place` knows.
        place: called with every other object; gives the tensor that stands for it, or None.

    Raises:
        CheckpointError: data nested too deep, referring to itself, or of another type.
    """
    out = bytearray(b"\x80\x02")
    memo: dict[str, int] = {}
    nodes = 0

    def symbol(name: str) -> None:
        if name in memo:
            out.extend(b"j" + struct.pack("<I", memo[name]))
            return
        module, _, attribute = name.rpartition(".")
        memo[name] = len(memo)
        out.extend(f"c{module}\n{attribute}\n".encode() + b"r" + struct.pack("<I", memo[name]))

    def tensor(ref: TensorRef, depth: int) -> None:
        typed = ref.dtype.storage is not None
        symbol("torch._utils._rebuild_tensor_v2" if typed else "torch._utils._rebuild_tensor_v3")
        out.extend(b"((")
        put("storage", depth)
        symbol(f"torch.{ref.dtype.storage}" if typed else "torch.storage.UntypedStorage")
        put(ref.storage.key, depth)
        put("cpu", depth)
        put(ref.storage.numel, depth)
        out.extend(b"tQ")
        put(ref.offset, depth)
        put(ref.shape, depth)
        put(ref.strides, depth)
        out.extend(b"\x89")
        symbol("collections.OrderedDict")
        out.extend(b")R")
        if not typed:
            symbol(f"torch.{ref.dtype.torch_name}")
        out.extend(b"tR")

    def put(item: Any, depth: int) -> None:
        nonlocal nodes
        nodes += 1
        if depth > _MAX_DEPTH or nodes > _MAX_NODES:
            raise CheckpointError("data nested too deep, or too large, to be written")
        if item is None:
            out.extend(b"N")
        elif isinstance(item, bool):
            out.extend(b"\x88" if item else b"\x89")
        elif isinstance(item, int):
            if -(1 << 31) <= item < 1 << 31:
                out.extend(b"J" + struct.pack("<i", item))
            else:
                raw = item.to_bytes(item.bit_length() // 8 + 1, "little", signed=True)
                out.extend(b"\x8a" + bytes([len(raw)]) + raw)
        elif isinstance(item, float):
            out.extend(b"G" + struct.pack(">d", item))
        elif isinstance(item, str):
            raw = item.encode("utf-8", "surrogatepass")
            out.extend(b"X" + struct.pack("<I", len(raw)) + raw)
        elif isinstance(item, tuple):
            out.extend(b"(")
            for element in item:
                put(element, depth + 1)
            out.extend(b"t")
        elif isinstance(item, list):
            out.extend(b"](")
            for element in item:
                put(element, depth + 1)
            out.extend(b"e")
        elif isinstance(item, dict):
            out.extend(b"}(")
            for key, element in item.items():
                put(key, depth + 1)
                put(element, depth + 1)
            out.extend(b"u")
        elif (ref := place(item)) is not None:
            tensor(ref, depth + 1)
        else:
            raise CheckpointError(f"cannot write a {type(item).__name__} into a .pt file")

    put(value, 0)
    return bytes(out + b".")
