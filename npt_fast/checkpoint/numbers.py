"""Facts about element values, without torch: counts of NaN and infinity, sums of squares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npt_fast.checkpoint.dtypes import DType
from npt_fast.checkpoint.tensor_entry import TensorEntry

if TYPE_CHECKING:  # importing numpy takes 0.1 s, and headers need none
    import numpy as np
    from numpy.typing import NDArray

_NUMPY_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_NUMPY_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
# types that numpy lacks: integer type, mask of the bits to test, their value in NaN and infinity
_NON_FINITE_BITS = {
    "BF16": ("<u2", 0x7F80, 0x7F80),
    "F8_E5M2": ("u1", 0x7C, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E4M3FNUZ": ("u1", 0xFF, 0x80),
    "F8_E5M2FNUZ": ("u1", 0xFF, 0x80),
    "F8_E8M0": ("u1", 0xFF, 0xFF),
}


def count_non_finite(data: bytes | memoryview, dtype: DType) -> int:
    """The number of elements that are NaN or infinite; 0 for integer types."""
    import numpy as np

    if dtype.name in _NUMPY_FLOATS:
        values = np.frombuffer(data, _NUMPY_FLOATS[dtype.name])
        return int(values.size - np.count_nonzero(np.isfinite(values)))
    if dtype.name in _NON_FINITE_BITS:
        width, mask, special = _NON_FINITE_BITS[dtype.name]
        return int(np.count_nonzero(np.frombuffer(data, width) & mask == special))
    return 0


def as_float64(data: bytes | memoryview, dtype: DType) -> NDArray[np.float64] | None:
    """The elements in float64; None for 8-bit floats and integers."""
    import numpy as np

    if dtype.name == "BF16":
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype.name in _NUMPY_FLOATS:
        values = np.frombuffer(data, _NUMPY_FLOATS[dtype.name])
    else:
        return None
    with np.errstate(all="ignore"):  # numpy warns of NaN and infinity, which are expected here
        return values.astype(np.float64)


def sum_of_squares(data: bytes | memoryview, dtype: DType) -> float | None:
    """The sum of the squared elements, in float64; None for 8-bit floats and integers."""
    import numpy as np

    wide = as_float64(data, dtype)
    if wide is None:
        return None
    with np.errstate(all="ignore"):
        return float(wide @ wide)


def read_number(entry: TensorEntry) -> float | int | None:
    """The value of a tensor of one element, read from its file; None for other tensors."""
    import numpy as np

    kinds = _NUMPY_FLOATS | _NUMPY_INTEGERS
    if entry.numel != 1 or entry.dtype.name not in (*kinds, "BF16"):
        return None
    data = entry.file.read(entry.offset, entry.nbytes)
    if entry.dtype.name == "BF16":
        return float((np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)[0])
    number: float | int = np.frombuffer(data, kinds[entry.dtype.name])[0].item()
    return number
