"""One tensor in a file: its type, shape and byte range, known without reading its data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from npt_fast.checkpoint.dtypes import DType
from npt_fast.checkpoint.source_file import SourceFile


@dataclass(frozen=True, slots=True)
class Record:
    """A contiguous run of bytes that carries its own CRC-32 (0: none was recorded)."""

    file: SourceFile
    offset: int
    nbytes: int
    crc32: int = 0


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor's elements are.

    Attributes:
        name: key in the checkpoint.
        dtype: element type.
        shape: sizes, row-major.
        record: bytes that hold the tensor: the whole record of a ``.pt`` (which other tensors may
            share), or exactly the tensor's bytes in a safetensors file.
        offset: byte offset of the first element in the file.
        strides: elements between neighbours along each dimension; None when contiguous.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    record: Record
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def file(self) -> SourceFile:
        return self.record.file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, laid out densely."""
        return self.numel * self.dtype.bits // 8

    @property
    def crc32(self) -> int:
        """CRC-32 of exactly this tensor's bytes as its file recorded it; 0 when it did not."""
        whole = self.offset == self.record.offset and self.nbytes == self.record.nbytes
        return self.record.crc32 if whole and self.strides is None else 0
