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
        file: the file that holds them.
        offset: byte offset of the first element in the file.
        crc32: CRC-32 of exactly this tensor's bytes as the file recorded it; 0 when it did not.
        strides: elements between neighbours along each dimension; None when contiguous.
        record: in a ``.pt``, the record of which the tensor is only a part, or another order; other
            tensors may share it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: SourceFile
    offset: int
    crc32: int = 0
    strides: tuple[int, ...] | None = None
    record: Record | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, laid out densely."""
        return self.numel * self.dtype.bits // 8
