"""How the bytes of an output tensor are made: copied, or computed in bounded memory.

Most tensors are copied without entering user space (`Recipe.is_copy`). The others are cast,
divided, padded, gathered from a strided layout or initialized here, one tile at a time.
Verification follows the same recipe, so the output is compared with its source or with its
recomputation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from npt_fast.checkpoint.dtypes import CASTABLE, DType
from npt_fast.checkpoint.source_file import WINDOW, NearbyReader
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.checkpoint.torch_zip import dense_strides
from npt_fast.errors import MergeError

if TYPE_CHECKING:  # importing numpy takes 0.1 s and 17 MB; a merge that only copies needs no numpy
    import numpy as np
    from numpy.typing import NDArray

_TILE = WINDOW // 8  # elements of a tile: 1 MiB in float64
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One output tensor.

    Attributes:
        name: key in the output.
        dtype: element type of the output.
        shape: shape of the output; at least as large as the source along each axis.
        source: tensor that it is made from; None for a new tensor.
        divisor: number that every element is divided by (in float64, rounded once).
        random: whether elements without a source are Xavier-uniform instead of zero. The numbers
            depend on `name` and position only, so the same merge gives the same bytes.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    source: TensorEntry | None
    divisor: int = 1
    random: bool = False

    @classmethod
    def unchanged(cls, entry: TensorEntry) -> Recipe:
        """The recipe that copies a tensor, made contiguous if it is strided."""
        return cls(entry.name, entry.dtype, entry.shape, entry)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.bits // 8

    @property
    def is_copy(self) -> bool:
        """Whether the output bytes are the source's bytes."""
        source = self.source
        return (
            source is not None
            and source.strides is None
            and source.dtype == self.dtype
            and source.shape == self.shape
            and self.divisor == 1
        )

    @property
    def change(self) -> str:
        """Description of how the tensor changes, for messages; "" if it is only copied."""
        if self.source is None:
            return "new"
        steps = []
        if self.source.strides is not None:
            steps.append("made contiguous")
        if self.source.dtype != self.dtype:
            steps.append(f"{self.source.dtype.name} to {self.dtype.name}")
        if self.divisor != 1:
            steps.append(f"divided by {self.divisor}")
        if self.source.shape != self.shape:
            steps.append(f"padded from {list(self.source.shape)}")
        return ", ".join(steps)

    def windows(self, reader: NearbyReader | None = None) -> Iterator[memoryview | bytes]:
        """The output bytes in order, in pieces of bounded size; each is valid until the next.

        Args:
            reader: reader for tensors that are only copied; it saves time if many small tensors
                are read one after another.

        Raises:
            CheckpointError: the source changed.
            MergeError: a finite value becomes infinite in the output type.
        """
        if self.is_copy:
            assert self.source is not None
            source = self.source
            if reader is None:
                yield from source.file.windows(source.offset, source.nbytes)
            else:
                yield from reader.windows(source.file, source.offset, source.nbytes)
            return
        if len(self.shape) > 2 and self.source is not None and self.source.strides is not None:
            for index in range(self.shape[0]):
                yield from self._slice(self.source, index).windows()
            return
        rows, columns = self._as_matrix()[:2]
        for r0, r1, c0, c1 in _tiles(rows, columns):
            yield self._tile(r0, r1, c0, c1)

    def _slice(self, source: TensorEntry, index: int) -> Recipe:
        """The recipe of one index of the first axis."""
        step, *strides = source.strides or dense_strides(source.shape)
        offset = source.offset + index * step * source.dtype.itemsize
        shape = source.shape[1:]
        part = replace(source, shape=shape, offset=offset, strides=tuple(strides))
        return replace(self, shape=shape, source=part)

    def _as_matrix(self) -> tuple[int, int, int, int, tuple[int, int]]:
        """Rows and columns of the output, then of the source, and the source's strides."""
        source = self.source
        if source is None:
            rows, columns = self.shape
            return rows, columns, 0, 0, (0, 0)
        if source.strides is None and source.shape == self.shape:
            return 1, source.numel, 1, source.numel, (source.numel, 1)
        rows, columns = (1, 1, *self.shape)[-2:]
        source_rows, source_columns = (1, 1, *source.shape)[-2:]
        row_step, column_step = (0, 0, *(source.strides or dense_strides(source.shape)))[-2:]
        return rows, columns, source_rows, source_columns, (row_step, column_step)

    def _tile(self, r0: int, r1: int, c0: int, c1: int) -> bytes:
        import numpy as np

        source = self.source
        # as raw bytes: numpy has no bfloat16 or float8, and moving elements needs no arithmetic
        if source is not None and self.change == "made contiguous":  # for every element type
            raw = np.dtype((np.void, self.dtype.itemsize))
            return self._read(source, raw, r0, r1, c0, c1).tobytes()
        shape = (r1 - r0, c1 - c0)
        part = None
        if source is not None:
            _, _, rows, columns, _ = self._as_matrix()
            r_end, c_end = min(r1, rows), min(c1, columns)
            if r0 < r_end and c0 < c_end:
                raw = np.dtype(_NUMPY[source.dtype.name])
                part = _widen(self._read(source, raw, r0, r_end, c0, c_end), source.dtype)
                if self.divisor != 1:
                    # in float64, so that the only rounding is that to the output type
                    part = part.astype(np.float64) / self.divisor
        if part is not None and part.shape == shape:
            return _narrow(part, self.dtype, self.name)
        values = self._random(r0, c0, shape) if self.random else np.zeros(shape)
        if part is not None:
            values[: part.shape[0], : part.shape[1]] = part
        return _narrow(values, self.dtype, self.name)

    def _read(
        self, source: TensorEntry, raw: np.dtype[Any], r0: int, r1: int, c0: int, c1: int
    ) -> NDArray[Any]:
        """A tile of the source, unconverted, read through windows of bounded size."""
        import numpy as np

        row_step, column_step = self._as_matrix()[4]
        out = np.empty((r1 - r0, c1 - c0), raw)
        # walk along the axis with the longer steps, so that what is mapped stays small
        by_row = row_step >= column_step
        target = out if by_row else out.T
        long, short = max(row_step, column_step), min(row_step, column_step)
        origin = source.offset + (r0 * row_step + c0 * column_step) * raw.itemsize
        elements = WINDOW // raw.itemsize
        n_long, n_short = target.shape
        across = min(n_short, 1 + (elements - 1) // max(short, 1))
        along = 1 + max(elements - 1 - (across - 1) * short, 0) // max(long, 1)
        steps = (long * raw.itemsize, short * raw.itemsize)
        for i, j in product(range(0, n_long, along), range(0, n_short, across)):
            block = target[i : i + along, j : j + across]
            span = (block.shape[0] - 1) * long + (block.shape[1] - 1) * short + 1
            offset = origin + (i * long + j * short) * raw.itemsize
            (window,) = source.file.windows(offset, span * raw.itemsize)
            block[:] = np.ndarray(block.shape, raw, window, 0, steps)
        return out

    def _random(self, r0: int, c0: int, shape: tuple[int, int]) -> NDArray[Any]:
        """Xavier-uniform numbers, from PCG64's raw bits, which are the same in every numpy."""
        import numpy as np

        rows, columns = self.shape
        bound = math.sqrt(6 / (rows + columns))
        seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:16], "little")
        generator = np.random.PCG64(seed)
        generator.advance(r0 * columns + c0)  # a tile is a run of the row-major order
        # raw bits: numpy promises the stream of PCG64, not that of its distributions. 24 of them,
        # so that every number is exact in float32
        raw = generator.random_raw(shape[0] * shape[1]) >> np.uint64(40)
        return (bound * (raw * 2.0**-23 - 1)).reshape(shape)


def check_castable(where: str, recipe: Recipe) -> None:
    """Raise MergeError if a recipe needs arithmetic on a type that cannot be converted."""
    if recipe.change in ("", "made contiguous"):
        return
    for dtype in {recipe.dtype, recipe.source.dtype if recipe.source else recipe.dtype}:
        if dtype.name not in CASTABLE:
            raise MergeError(
                f"{where}: {recipe.name}: {dtype.name} cannot be converted; "
                f"only {', '.join(CASTABLE)} can"
            )


def _tiles(rows: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Ranges of rows and columns that cover a matrix in row-major order, up to `_TILE` elements."""
    if columns >= _TILE:
        for row in range(rows):
            for column in range(0, columns, _TILE):
                yield row, row + 1, column, min(columns, column + _TILE)
        return
    step = _TILE // max(columns, 1)
    for row in range(0, rows, step):
        yield row, min(rows, row + step), 0, columns


def _widen(raw: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """The elements in a type that numpy can calculate with: float32 for bfloat16."""
    import numpy as np

    # a bfloat16 is the upper half of a float32
    return (raw.astype(np.uint32) << 16).view(np.float32) if dtype.name == "BF16" else raw


def _narrow(values: NDArray[Any], dtype: DType, name: str) -> bytes:
    """The bytes of `values`, rounded to nearest even (from float64 to bfloat16 via float32)."""
    import numpy as np

    # overflow is looked for below, and named with its tensor
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = values.astype(np.float32 if dtype.name == "BF16" else _NUMPY[dtype.name])
    if dtype.name == "BF16":
        bits = narrow.view(np.uint32)
        # to nearest even: add half of the last place, less one where the bit kept is even
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        # adding to a NaN's bits may give infinity or -0
        rounded[np.isnan(narrow)] = 0x7FC0
        infinite = (rounded & 0x7FFF) == 0x7F80
        narrow = rounded
    else:
        infinite = np.isinf(narrow)
    if infinite.any() and np.isfinite(values[infinite]).any():
        raise MergeError(f"{name}: a value is too large for {dtype.name}; choose another --dtype")
    return narrow.tobytes()
