"""The pickle inside a ``.pt`` file, read without ever running it.

`pickle` and `torch.load` resolve names to live Python objects; here a name is looked up in a
closed table of the few symbols a checkpoint needs, and a REDUCE builds plain data from them. What
comes out holds only dict, Counter (the milestones of a MultiStepLR), list, tuple, str, int, float,
bool, None and `TensorRef`; keys are str, or int of 64 bits; nothing holds itself, or is nested
more than 64 deep.

Memory is metered, because nine bytes of pickle can ask for gigabytes: what is built may take
64 MiB, and 24 times the size of the pickle beyond that. What stands in several places counts as
often as it stands there: 40 tuples that each hold the one before twice are a trillion values for
whoever walks through them.

The opcodes accepted are those that ``torch.load(weights_only=True)`` accepts (protocol 2, what
``torch.save`` writes), so that whatever is readable here is readable there. The one addition is
the numpy scalar that a cosine schedule leaves in optimizer and scheduler state (SPEC 2.3).
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from npt_fast.checkpoint.dtypes import BY_STORAGE, BY_TORCH_NAME, DType
from npt_fast.errors import CheckpointError, printable

MAX_PICKLE_BYTES = 1 << 30
"""Of reader and writer: 13 million tensors, at the 80 bytes that torch.save takes for one."""
MAX_STRING = 1 << 20
"""Bytes of a string, likewise."""
MAX_DEPTH = 64
"""Containers inside each other, likewise."""

_SMALL_MEMORY = 64 << 20
_MEMORY_PER_BYTE = 24  # AdamW's state as torch.save writes it is charged 9
_MAX_RANK = 64
_MAX_KEY = 1 << 63  # integers beyond it can be chosen so that all have the same hash
_MAX_PATH = 160  # characters of keys in a message
_NUMPY_SCALARS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A record ``data/<key>`` of `numel` elements; `dtype` is None for an untyped storage."""

    dtype: DType | None
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A strided view of a storage; `offset` and `strides` count elements."""

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global:
    """A symbol that the table knows, not the object of that name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _OrderedDict(dict[Any, Any]):
    """A dict that BUILD may give attributes to; half the size of `collections.OrderedDict`."""

    __slots__ = ()


@dataclass(slots=True)
class _NumpyDType:
    code: str
    ready: bool = False


class _Marker:
    """Where a MARK opcode stands on the stack."""


_MARK = _Marker()
_DEVICE = re.compile(r"[a-z]{1,16}(:[0-9]{1,4})?")
_KNOWN = {
    name: _Global(name)
    for name in (
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch.storage.UntypedStorage",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "_codecs.encode",
        *(f"torch.{storage}" for storage in BY_STORAGE),
        *(f"torch.{name}" for name in BY_TORCH_NAME),
    )
}


def decode(
    data: bytes, where: str, check_storage: Callable[[StorageRef], None] = lambda storage: None
) -> Any:
    """Plain data and `TensorRef`s from a pickle, as the module's docstring says.

    Args:
        data: the whole pickle.
        where: file and member, for messages.
        check_storage: called once with each storage that the pickle names; may raise.

    Raises:
        CheckpointError: an opcode or symbol outside the table, a malformed stream, bytes after the
            end, more memory than a checkpoint can need, or a value of another kind than promised.
    """
    machine = _Machine(data, where, check_storage)
    try:
        value = machine.run()
        _check_content(value, machine)
        return value
    except (IndexError, ValueError, struct.error, RecursionError):
        at = machine.position
        cut = "truncated" if at >= len(data) else f"malformed at byte {at}"
        raise CheckpointError(f"{where}: the pickle is {cut}") from None


class _Machine:
    """The pickle stack machine, reduced to data."""

    def __init__(
        self, data: bytes, where: str, check_storage: Callable[[StorageRef], None]
    ) -> None:
        self.data = data
        self.where = where
        self.check_storage = check_storage
        self.position = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []  # picklers count from zero, and a list takes a tenth of a dict
        self.far_memo: dict[int, Any] = {}
        self.storages: dict[str, StorageRef] = {}
        self.sizes: dict[tuple[int, ...], tuple[int, ...]] = {}  # shapes repeat; each is kept once
        self.memory = 0
        self.max_memory = _SMALL_MEMORY + _MEMORY_PER_BYTE * len(data)

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}")

    def refuse(self, problem: str) -> CheckpointError:
        """As `fail`, with the keys that lead to the value which is being read."""
        keys: list[str] = []
        candidate: str | None = None
        in_list = False
        for before, item in zip([None, *self.stack], [*self.stack, _MARK], strict=True):
            if item is _MARK:  # what follows is inside the value of the last key
                keys += [candidate] if candidate is not None else []
                candidate = None
                in_list = type(before) is list
            elif type(item) is str and not in_list:
                candidate = item
            elif not isinstance(item, (dict, list, _Global)):
                candidate = None
        return self.fail(_at(keys, problem))

    def run(self) -> Any:
        """Execute up to STOP and return the one value left."""
        if self.data[:2] != b"\x80\x02":
            raise self.fail(
                "not a protocol-2 pickle; save it again with torch.save's default protocol"
            )
        self.position = 2
        while (opcode := self.byte()) != _STOP:
            handler = _HANDLERS[opcode]
            if handler is None:
                raise self.fail(f"unsafe or unknown pickle opcode 0x{opcode:02x}; refused")
            handler(self)
        if self.position != len(self.data):
            raise self.fail(f"{len(self.data) - self.position} bytes after the end of the pickle")
        value = self.pop()
        if self.stack:
            raise self.fail("malformed pickle: values left on the stack")
        return value

    def charge(self, size: int) -> None:
        """Count what an opcode builds beyond 24 bytes for each of its own."""
        self.memory += size
        if self.memory > self.max_memory:
            raise self.fail(
                f"its pickle of {len(self.data):,} bytes needs more than {self.max_memory:,} bytes "
                "of memory, which no checkpoint does; refused"
            )

    def byte(self) -> int:
        value = self.data[self.position]
        self.position += 1
        return value

    def take(self, count: int) -> bytes:
        chunk = self.data[self.position : self.position + count]
        if len(chunk) != count:
            raise IndexError("the pickle is truncated")
        self.position += count
        return chunk

    def index(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def line(self) -> str:
        end = self.data.index(b"\n", self.position, self.position + 256)
        text = self.data[self.position : end].decode("ascii")
        self.position = end + 1
        return text

    def push(self, value: Any, size: int = 0) -> None:
        if size:
            self.charge(size)
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise IndexError("a value was expected, found a mark")
        return value

    def top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            raise IndexError("a value was expected, found a mark")
        return value

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise IndexError("no mark")

    # opcodes ---------------------------------------------------------------------------------

    def put(self, index: int) -> None:
        value = self.top()
        if index == len(self.memo):
            self.memo.append(value)
        elif index < len(self.memo):
            self.memo[index] = value
        else:
            self.charge(100)
            self.far_memo[index] = value

    def get(self, index: int) -> None:
        if index < len(self.memo):
            self.stack.append(self.memo[index])
        elif index in self.far_memo:
            self.stack.append(self.far_memo[index])
        else:
            raise self.fail(f"malformed pickle: memo {index} was never written")

    def string(self) -> None:
        length = self.index()
        if length > MAX_STRING:
            raise self.fail(f"a string of {length:,} bytes; more than {MAX_STRING:,} are refused")
        self.stack.append(self.take(length).decode("utf-8", "surrogatepass"))

    def long(self) -> None:
        size = self.byte()
        if size > 16:
            raise self.refuse(f"an integer of {size} bytes is too long")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        items = tuple(self.pop() for _ in range(count))[::-1]
        self.push(items, 56 + 8 * count)

    def tuple_to_mark(self) -> None:
        items = tuple(self.pop_to_mark())
        self.push(items, 56 + 8 * len(items))

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise self.fail("malformed pickle: APPEND to something that is not a list")
        self.charge(8 * len(items))
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, _OrderedDict) or len(items) % 2:
            raise self.fail("malformed pickle: SETITEM on something that is not a dict")
        self.charge(50 * len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.refuse(f"a dict key of type {type(key).__name__}; refused")
            if type(key) is int and not -_MAX_KEY <= key < _MAX_KEY:
                raise self.refuse("a dict key of more than 64 bits; refused")
            if key in target:
                raise self.fail(f"duplicate key {key!r:.80}")
            target[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def find_global(self) -> None:
        module, name = self.line(), self.line()
        symbol = _KNOWN.get(f"{module}.{name}")
        if symbol is None:
            raise self.refuse(
                f"refers to {module:.40}.{name:.40}, but only plain data and tensors are read; "
                "refused"
            )
        self.stack.append(symbol)

    def persistent(self) -> None:
        self.stack.append(self.storage(self.pop()))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, _OrderedDict) and type(state) is dict:
            return  # attributes of a state dict (`_metadata`): nothing that we keep
        if isinstance(target, _NumpyDType) and _is_plain_dtype_state(state):
            target.ready = True
            return
        raise self.refuse("BUILD on something that takes no state; refused")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise self.refuse("REDUCE of something that is not a known function; refused")
        try:
            build = _REDUCERS[function.name]
        except KeyError:
            raise self.refuse(f"calls {function.name}; refused") from None
        try:
            self.push(build(self, *arguments), 80)
        except TypeError:
            raise self.refuse(f"calls {function.name} with the wrong arguments") from None

    # what the known functions build ------------------------------------------------------------

    def storage(self, pid: Any) -> StorageRef:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise self.fail("a persistent id that is not a storage; refused")
        _, kind, key, location, numel = pid
        name = kind.name.removeprefix("torch.") if isinstance(kind, _Global) else ""
        if name not in BY_STORAGE and name != "storage.UntypedStorage":
            raise self.fail("a storage of an unknown type; refused")
        plain = type(key) is str and type(location) is str and _is_count(numel)
        if not plain or not _DEVICE.fullmatch(location):
            raise self.fail("a malformed storage id; refused")
        dtype = BY_STORAGE.get(name)
        known = self.storages.get(key)
        if known is None:
            self.charge(150)
            known = self.storages[key] = StorageRef(dtype, key, numel)
            self.check_storage(known)
        elif known.dtype is not dtype or known.numel != numel:
            raise self.fail(f"storage {key!r:.40} is described in two different ways; refused")
        return known

    def tensor_v2(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any
    ) -> TensorRef:
        if not isinstance(storage, StorageRef) or storage.dtype is None:
            raise self.fail("a tensor without a typed storage; refused")
        return self.tensor(storage, storage.dtype, offset, shape, strides, requires_grad, hooks)

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
        name = dtype.name.removeprefix("torch.") if isinstance(dtype, _Global) else ""
        if not isinstance(storage, StorageRef) or storage.dtype or name not in BY_TORCH_NAME:
            raise self.fail("a tensor of an unknown type; refused")
        element = BY_TORCH_NAME[name]
        return self.tensor(storage, element, offset, shape, strides, requires_grad, hooks)

    def tensor(
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
        return TensorRef(storage, dtype, offset, self.once(shape), self.once(strides))

    def once(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The same sizes, kept once; longer ones can be chosen so that all have the same hash."""
        if len(sizes) > 2 or any(size >= 1 << 32 for size in sizes):
            return sizes
        return self.sizes.setdefault(sizes, sizes)

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

    def ordered_dict(self) -> _OrderedDict:
        return _OrderedDict()

    def size(self, sizes: Any) -> tuple[int, ...]:
        if type(sizes) is not tuple or not all(map(_is_count, sizes)):
            raise self.fail("a malformed torch.Size; refused")
        return sizes

    def numpy_dtype(self, code: Any, align: Any, copy: Any) -> _NumpyDType:
        if type(code) is not str or code not in _NUMPY_SCALARS:
            raise self.refuse("a numpy value of an unknown type; refused")
        return _NumpyDType(code)

    def numpy_scalar(self, dtype: Any, raw: Any) -> float | int | bool:
        if not isinstance(dtype, _NumpyDType) or not dtype.ready or type(raw) is not bytes:
            raise self.fail("a malformed numpy scalar; refused")
        value: float | int | bool = struct.unpack("<" + _NUMPY_SCALARS[dtype.code], raw)[0]
        return value

    def latin1(self, text: Any, encoding: Any) -> bytes:
        if type(text) is not str or encoding != "latin1" or len(text) > 16:
            raise self.fail("bytes that are not a numpy scalar's; refused")
        try:
            return text.encode("latin1")
        except UnicodeEncodeError:
            raise self.fail("bytes that are not a numpy scalar's; refused") from None


_LEAVES = frozenset((str, int, float, bool, type(None), TensorRef))
_CONTAINERS = frozenset((dict, Counter, _OrderedDict, list, tuple))


class _Level:
    """A container that is being looked through.

    Attributes:
        container: it.
        items: what of it has not been looked at.
        size: bytes of what has been, as if nothing were shared.
        height: containers inside each other below it.
    """

    __slots__ = ("container", "height", "items", "size")

    def __init__(self, container: Any) -> None:
        self.container = container
        self.items: Iterator[Any] = iter(container)
        if isinstance(container, dict):
            self.items = chain(container, container.values())
        self.size = 64
        self.height = 0


def _check_content(value: Any, machine: _Machine) -> None:
    """Raise CheckpointError unless `value` is what `decode` promises."""

    def fail(problem: str, *found: Any) -> CheckpointError:
        keys = []
        for outer, inner in pairwise([*(level.container for level in levels), *found]):
            items = outer.items() if isinstance(outer, dict) else ()
            keys += [key for key, item in items if item is inner][:1]
        return machine.fail(_at(keys, problem))

    measured: dict[int, tuple[int, int]] = {}  # of a container that was looked through
    unfinished: set[int] = set()
    levels = [_Level((value,))]
    while True:
        level = levels[-1]
        for item in level.items:
            kind = type(item)
            if kind in _LEAVES:
                level.size += 16 + len(item) if kind is str else 16
                continue
            if kind not in _CONTAINERS:
                name = item.name if kind is _Global else f"a value of type {kind.__name__}"
                raise fail(f"{name} is neither plain data nor a tensor; refused", item)
            if id(item) not in measured:
                if id(item) in unfinished:
                    raise fail("a container that holds itself; refused")
                unfinished.add(id(item))
                levels.append(_Level(item))
                break
            size, height = measured[id(item)]
            level.size += size
            level.height = max(level.height, height + 1)
        else:
            levels.pop()
            if not levels:
                return
            above = levels[-1]
            above.size += level.size
            above.height = max(above.height, level.height + 1)
            unfinished.discard(id(level.container))
            measured[id(level.container)] = level.size, level.height
        if len(levels) + level.height > MAX_DEPTH + 1:
            raise fail(f"nested more than {MAX_DEPTH} deep; refused")
        if level.size > machine.max_memory:
            raise fail(
                f"stands for more than {machine.max_memory:,} bytes, with what is shared counted "
                "wherever it stands; refused"
            )


def _at(keys: Sequence[str | int], problem: str) -> str:
    """A problem with the first keys that lead to it, which are anybody's."""
    path = printable(".".join(f"{key!s:.80}" for key in keys[:5]))[:_MAX_PATH]
    return f"{path}: {problem}" if path else problem


def _has_hooks(hooks: Any) -> bool:
    return type(hooks) not in (dict, _OrderedDict) or len(hooks) > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_plain_dtype_state(state: Any) -> bool:
    # (version, byte order, subtype, names, fields, itemsize, alignment, flags)
    return (
        type(state) is tuple
        and len(state) == 8
        and state[0] == 3
        and state[1] in ("<", "|")
        and state[2:5] == (None, None, None)
        and state[7] == 0
    )


_REDUCERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _Machine.tensor_v2,
    "torch._utils._rebuild_tensor_v3": _Machine.tensor_v3,
    "torch._utils._rebuild_parameter": _Machine.parameter,
    "collections.Counter": _Machine.counter,
    "collections.OrderedDict": _Machine.ordered_dict,
    "torch.Size": _Machine.size,
    "numpy.dtype": _Machine.numpy_dtype,
    "numpy._core.multiarray.scalar": _Machine.numpy_scalar,
    "numpy.core.multiarray.scalar": _Machine.numpy_scalar,
    "_codecs.encode": _Machine.latin1,
}

_STOP = ord(".")
_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"(": lambda m: m.stack.append(_MARK),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b")": lambda m: m.stack.append(()),
    b"]": lambda m: m.push([], 72),
    b"}": lambda m: m.push({}, 80),
    b"J": lambda m: m.stack.append(struct.unpack("<i", m.take(4))[0]),
    b"K": lambda m: m.stack.append(m.byte()),
    b"M": lambda m: m.stack.append(struct.unpack("<H", m.take(2))[0]),
    b"\x8a": _Machine.long,
    b"G": lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    b"X": _Machine.string,
    b"h": lambda m: m.get(m.byte()),
    b"j": lambda m: m.get(m.index()),
    b"q": lambda m: m.put(m.byte()),
    b"r": lambda m: m.put(m.index()),
    b"t": _Machine.tuple_to_mark,
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b"s": _Machine.set_item,
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"c": _Machine.find_global,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}
_HANDLERS = [_OPCODES.get(bytes([code])) for code in range(256)]
