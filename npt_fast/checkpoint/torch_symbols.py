"""The symbols that the pickle of a checkpoint may name, and the plain data that they build.

A symbol is a name in a fixed table. No object of torch, numpy or collections is looked up by name.
"""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npt_fast.checkpoint.dtypes import BY_STORAGE, BY_TORCH_NAME, DType
from npt_fast.errors import CheckpointError

_MAX_RANK = 64
_NUMPY_SCALARS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}
_DEVICE = re.compile(r"[a-z]{1,16}(:[0-9]{1,4})?")


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A record ``data/<key>`` of `numel` elements; `dtype` is None if the storage is untyped."""

    dtype: DType | None
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A strided view of a storage; `offset` and `strides` are in elements."""

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Symbol:
    """A symbol of the table; it stands for the object of that name without being it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class OrderedDict(dict[Any, Any]):
    """A dict on which BUILD is allowed; half the size of a `collections.OrderedDict`."""

    __slots__ = ()


@dataclass(slots=True)
class NumpyDType:
    """A numpy type; `ready` once BUILD has set its state, which must be that of a plain type."""

    code: str
    ready: bool = False


KNOWN = {
    name: Symbol(name)
    for name in (
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch.storage.UntypedStorage",
        "numpy._core.multiarray.scalar",
        # the name before NumPy 2
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "_codecs.encode",
        *(f"torch.{storage}" for storage in BY_STORAGE),
        *(f"torch.{name}" for name in BY_TORCH_NAME),
    )
}


class Builder(ABC):
    """Builds the values that symbols stand for; their arguments are checked first.

    Args:
        check_storage: function that is called once with each storage that the pickle names; it
            may raise.
    """

    def __init__(self, check_storage: Callable[[StorageRef], None]) -> None:
        self._check_storage = check_storage
        self._storages: dict[str, StorageRef] = {}
        self._sizes: dict[tuple[int, ...], tuple[int, ...]] = {}  # shapes repeat; each is kept once

    @abstractmethod
    def fail(self, problem: str) -> CheckpointError:
        """The exception to raise for a problem."""

    @abstractmethod
    def refuse(self, problem: str) -> CheckpointError:
        """Like `fail`; the message begins with the keys that lead to the value being read."""

    @abstractmethod
    def charge(self, size: int) -> None:
        """Add to the bytes of memory in use; too many raise CheckpointError."""

    def storage(self, pid: Any) -> StorageRef:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise self.fail("a persistent id that is not a storage; refused")
        _, kind, key, location, numel = pid
        name = kind.name.removeprefix("torch.") if isinstance(kind, Symbol) else ""
        if name not in BY_STORAGE and name != "storage.UntypedStorage":
            raise self.fail("a storage of an unknown type; refused")
        plain = type(key) is str and type(location) is str and _is_count(numel)
        if not plain or not _DEVICE.fullmatch(location):
            raise self.fail("a malformed storage id; refused")
        dtype = BY_STORAGE.get(name)
        known = self._storages.get(key)
        if known is None:
            self.charge(150)
            known = self._storages[key] = StorageRef(dtype, key, numel)
            self._check_storage(known)
        elif known.dtype is not dtype or known.numel != numel:
            raise self.fail(f"storage {key!r:.40} is described in two different ways; refused")
        return known

    def tensor_v2(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any
    ) -> TensorRef:
        if not isinstance(storage, StorageRef) or storage.dtype is None:
            raise self.fail("a tensor without a typed storage; refused")
        return self._tensor(storage, storage.dtype, offset, shape, strides, requires_grad, hooks)

    def tensor_v3(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any,
        hooks: Any,
        dtype: Any,
    ) -> TensorRef:
        name = dtype.name.removeprefix("torch.") if isinstance(dtype, Symbol) else ""
        if not isinstance(storage, StorageRef) or storage.dtype or name not in BY_TORCH_NAME:
            raise self.fail("a tensor of an unknown type; refused")
        element = BY_TORCH_NAME[name]
        return self._tensor(storage, element, offset, shape, strides, requires_grad, hooks)

    def _tensor(
        self,
        storage: StorageRef,
        dtype: DType,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any,
        hooks: Any,
    ) -> TensorRef:
        sizes_are_plain = (
            type(shape) is tuple
            and type(strides) is tuple
            and len(shape) == len(strides) <= _MAX_RANK
            and all(map(_is_count, (offset, *shape, *strides)))
        )
        if not sizes_are_plain or type(requires_grad) is not bool or _has_hooks(hooks):
            raise self.fail("a tensor with malformed sizes, or with hooks; refused")
        if requires_grad and not dtype.is_differentiable:
            raise self.fail(f"a tensor of type {dtype.name} that requires a gradient; refused")
        return TensorRef(storage, dtype, offset, self._once(shape), self._once(strides))

    def _once(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """An equal tuple that was seen before, if any, to save memory.

        Only short tuples of small sizes are kept: a hostile file could choose others so that all
        have the same hash, which makes a dict slow.
        """
        if len(sizes) > 2 or any(size >= 1 << 32 for size in sizes):
            return sizes
        return self._sizes.setdefault(sizes, sizes)

    def parameter(self, tensor: Any, requires_grad: Any, hooks: Any) -> TensorRef:
        if (
            not isinstance(tensor, TensorRef)
            or type(requires_grad) is not bool
            or (requires_grad and not tensor.dtype.is_differentiable)
            or _has_hooks(hooks)
        ):
            raise self.fail("a malformed Parameter; refused")
        return tensor

    def counter(self, counts: Any) -> Counter[Any]:
        if type(counts) is not dict or not all(type(count) is int for count in counts.values()):
            raise self.refuse("a Counter of something that is not counts; refused")
        self.charge(100 * len(counts))
        return Counter(counts)

    def ordered_dict(self) -> OrderedDict:
        return OrderedDict()

    def size(self, sizes: Any) -> tuple[int, ...]:
        if type(sizes) is not tuple or not all(map(_is_count, sizes)):
            raise self.fail("a malformed torch.Size; refused")
        return sizes

    def numpy_dtype(self, code: Any, align: Any, copy: Any) -> NumpyDType:
        if type(code) is not str or code not in _NUMPY_SCALARS:
            raise self.refuse("a numpy value of an unknown type; refused")
        return NumpyDType(code)

    def numpy_scalar(self, dtype: Any, raw: Any) -> float | int | bool:
        if not isinstance(dtype, NumpyDType) or not dtype.ready or type(raw) is not bytes:
            raise self.fail("a malformed numpy scalar; refused")
        value: float | int | bool = struct.unpack("<" + _NUMPY_SCALARS[dtype.code], raw)[0]
        return value

    def latin1(self, text: Any, encoding: Any) -> bytes:
        # the bytes of a numpy scalar: protocol 2 has no bytes, so pickle writes them as text
        if type(text) is not str or encoding != "latin1" or len(text) > 16:
            raise self.fail("bytes that are not a numpy scalar's; refused")
        try:
            return text.encode("latin1")
        except UnicodeEncodeError:
            raise self.fail("bytes that are not a numpy scalar's; refused") from None


def _has_hooks(hooks: Any) -> bool:
    return type(hooks) not in (dict, OrderedDict) or len(hooks) > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def is_plain_dtype_state(state: Any) -> bool:
    # (version, byte order, subtype, names, fields, itemsize, alignment, flags)
    return (
        type(state) is tuple
        and len(state) == 8
        and state[0] == 3
        and state[1] in ("<", "|")
        and state[2:5] == (None, None, None)
        and state[7] == 0
    )


REDUCERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": Builder.tensor_v2,
    "torch._utils._rebuild_tensor_v3": Builder.tensor_v3,
    "torch._utils._rebuild_parameter": Builder.parameter,
    "collections.Counter": Builder.counter,
    "collections.OrderedDict": Builder.ordered_dict,
    "torch.Size": Builder.size,
    "numpy.dtype": Builder.numpy_dtype,
    "numpy._core.multiarray.scalar": Builder.numpy_scalar,
    "numpy.core.multiarray.scalar": Builder.numpy_scalar,
    "_codecs.encode": Builder.latin1,
}
"""Function that builds the result of a REDUCE, by symbol; called with builder and arguments."""
