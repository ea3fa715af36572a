"""A tensor in a file: type, shape and byte range, known from headers without reading its data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from npt_fast.checkpoint.dtypes import DType
from npt_fast.checkpoint.source_file import SourceFile


@dataclass(frozen=True, slots=True)
class Record:
    """A contiguous range of bytes in a file, with its recorded CRC-32 (0 if none was recorded)."""

    file: SourceFile
    offset: int
    nbytes: int
    crc32: int = 0


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor and the place of its elements in a file.

    Attributes:
        name: key in the checkpoint.
        dtype: element type.
        shape: size of each dimension; elements are stored row-major unless `strides` is given.
        file: file that holds the elements.
        offset: byte offset of the first element in the file.
        crc32: CRC-32 of exactly this tensor's bytes, as recorded in the file; 0 if not recorded.
        strides: elements between neighbours along each dimension; None if contiguous.
        record: record of a ``.pt`` file that holds more than this tensor's bytes, or holds them in
            another order; several tensors may share it. None otherwise.
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
        """Size of the tensor in bytes when it is stored contiguously."""
        return self.numel * self.dtype.bits // 8
