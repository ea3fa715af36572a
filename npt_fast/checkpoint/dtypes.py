"""Element types: their names in safetensors and in torch, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        name: safetensors name, such as ``"BF16"``; npt_fast uses this name everywhere.
        bits: bits per element.
        torch_name: name in the ``torch`` module, such as ``"bfloat16"``; "" if torch has no such
            type.
        storage: name of the class in ``torch`` that stands for this type in a pickle; None for
            newer types, which torch pickles as an untyped storage and ``torch_name``.
        safetensors: whether the safetensors format has this type.
    """

    name: str
    bits: int
    torch_name: str
    storage: str | None = None
    safetensors: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes per element; 0 for types of less than a byte, which no ``.pt`` file holds."""
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        return self.name[0] in "FB" and self.name != "BOOL"

    @property
    def is_differentiable(self) -> bool:
        """Whether torch lets a tensor of this type require a gradient."""
        return self.is_float or self.name[0] == "C"


_ALL = [
    DType("BOOL", 8, "bool", "BoolStorage"),
    DType("U8", 8, "uint8", "ByteStorage"),
    DType("I8", 8, "int8", "CharStorage"),
    DType("I16", 16, "int16", "ShortStorage"),
    DType("I32", 32, "int32", "IntStorage"),
    DType("I64", 64, "int64", "LongStorage"),
    DType("F16", 16, "float16", "HalfStorage"),
    DType("BF16", 16, "bfloat16", "BFloat16Storage"),
    DType("F32", 32, "float32", "FloatStorage"),
    DType("F64", 64, "float64", "DoubleStorage"),
    DType("C64", 64, "complex64", "ComplexFloatStorage"),
    DType("C128", 128, "complex128", "ComplexDoubleStorage", safetensors=False),
    DType("U16", 16, "uint16"),
    DType("U32", 32, "uint32"),
    DType("U64", 64, "uint64"),
    DType("F8_E4M3", 8, "float8_e4m3fn"),
    DType("F8_E5M2", 8, "float8_e5m2"),
    DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    DType("F8_E8M0", 8, "float8_e8m0fnu"),
    DType("F4", 4, "float4_e2m1fn_x2"),
    DType("F6_E2M3", 6, ""),
    DType("F6_E3M2", 6, ""),
]
BY_NAME = {dtype.name: dtype for dtype in _ALL}
BY_STORAGE = {dtype.storage: dtype for dtype in _ALL if dtype.storage}
BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in _ALL if dtype.torch_name and dtype.bits >= 8}

CASTABLE = ("F64", "F32", "F16", "BF16")
"""Types that ``--dtype`` can convert from and to."""
