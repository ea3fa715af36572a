"""Read the pickle inside a ``.pt`` file without executing any of its code.

`pickle` and `torch.load` resolve names to Python objects. Here a name is looked up in a fixed table
of the symbols that a checkpoint needs, and REDUCE builds plain data from them. The result consists
of dict, Counter (the milestones of a MultiStepLR), list, tuple, str, int, float, bool, None and
`TensorRef`. Keys are str, or int of 64 bits. No container holds itself, and none is nested more
than 64 deep.

Memory is limited, because nine bytes of pickle can ask for gigabytes: the result may take 64 MiB
plus 24 times the size of the pickle. A value counts as often as it occurs: 40 tuples, each of which
holds the one before twice, are a trillion values for code that walks through them.

The accepted opcodes are those that ``torch.load(weights_only=True)`` accepts (of protocol 2, which
``torch.save`` writes), so that files readable here are readable there. The only addition is the
numpy scalar that a cosine schedule leaves in optimizer and scheduler state
(design.md#training-state).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from npt_fast.checkpoint.pickle_content import at, check_content
from npt_fast.checkpoint.torch_symbols import (
    KNOWN,
    REDUCERS,
    Builder,
    NumpyDType,
    OrderedDict,
    StorageRef,
    Symbol,
    is_plain_dtype_state,
)
from npt_fast.errors import CheckpointError

MAX_PICKLE_BYTES = 1 << 30
"""Limit of reader and writer; torch.save takes 80 bytes per tensor, so 13 million tensors fit."""
MAX_STRING = 1 << 20
"""Limit in bytes of a string, for reader and writer."""

# a limit of 128 MiB for all sizes refused what torch had written from 20,387 parameters on
_SMALL_MEMORY = 64 << 20
_MEMORY_PER_BYTE = 24  # AdamW's state as torch.save writes it needs 9
_MAX_KEY = 1 << 63  # a hostile file could choose larger integers that all have the same hash


class _Marker:
    """Type of `_MARK`, which opcode MARK puts on the stack."""


_MARK = _Marker()


def decode(
    data: bytes, where: str, check_storage: Callable[[StorageRef], None] = lambda storage: None
) -> Any:
    """Decode a pickle into plain data and `TensorRef`s, as the module's docstring says.

    Args:
        data: bytes of the pickle.
        where: file and member, for messages.
        check_storage: function that is called once with each storage that the pickle names; it
            may raise.

    Raises:
        CheckpointError: the pickle has an unknown opcode or symbol, is malformed, is followed by
            other bytes, needs more memory than a checkpoint can need, or holds other values.
    """
    machine = _Machine(data, where, check_storage)
    try:
        value = machine.run()
        check_content(value, machine.max_memory, machine.fail)
        return value
    except (IndexError, ValueError, struct.error, RecursionError):
        at = machine.position
        cut = "truncated" if at >= len(data) else f"malformed at byte {at}"
        raise CheckpointError(f"{where}: the pickle is {cut}") from None


class _Machine(Builder):
    """The pickle stack machine, reduced to plain data and tensors."""

    def __init__(
        self, data: bytes, where: str, check_storage: Callable[[StorageRef], None]
    ) -> None:
        super().__init__(check_storage)
        self.data = data
        self.where = where
        self.position = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []  # a tenth of a dict's memory; picklers number from zero
        self.far_memo: dict[int, Any] = {}
        self.memory = 0
        self.max_memory = _SMALL_MEMORY + _MEMORY_PER_BYTE * len(data)

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}")

    def refuse(self, problem: str) -> CheckpointError:
        keys: list[str] = []
        candidate: str | None = None
        in_list = False
        for before, item in zip([None, *self.stack], [*self.stack, _MARK], strict=True):
            if item is _MARK:  # the items after a mark belong to the value of the last key
                keys += [candidate] if candidate is not None else []
                candidate = None
                in_list = type(before) is list
            elif type(item) is str and not in_list:
                candidate = item
            elif not isinstance(item, (dict, list, Symbol)):
                candidate = None
        return self.fail(at(keys, problem))

    def run(self) -> Any:
        """Execute all opcodes up to STOP and return the one value left on the stack."""
        # torch.save writes protocol 2 unless it is told otherwise; later ones have more opcodes
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
        """Add `size` bytes, which an opcode builds beyond 24 for each of its own bytes."""
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
        # a module or a name; the longest in `KNOWN` has 22 characters
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
        # printing an integer of a megabyte would take quadratic time
        size = self.byte()
        # 16 bytes hold whatever a merge writes: integers below 2^127 (strict_json)
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
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise self.fail("malformed pickle: SETITEM on something that is not a dict")
        self.charge(50 * len(items))  # 100 for a key and its value
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.refuse(f"a dict key of type {type(key).__name__}; refused")
            if type(key) is int and not -_MAX_KEY <= key < _MAX_KEY:
                raise self.refuse("a dict key of more than 64 bits; refused")
            # Python keeps the last of equal keys; a file that has two was not written by torch.save
            if key in target:
                raise self.fail(f"duplicate key {key!r:.80}")
            target[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def find_global(self) -> None:
        module, name = self.line(), self.line()
        symbol = KNOWN.get(f"{module}.{name}")
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
        if isinstance(target, OrderedDict) and type(state) is dict:
            return  # attributes of a state dict (`_metadata`) are not kept
        if isinstance(target, NumpyDType) and is_plain_dtype_state(state):
            target.ready = True
            return
        raise self.refuse("BUILD on something that takes no state; refused")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Symbol) or type(arguments) is not tuple:
            raise self.refuse("REDUCE of something that is not a known function; refused")
        try:
            build = REDUCERS[function.name]
        except KeyError:
            raise self.refuse(f"calls {function.name}; refused") from None
        try:
            self.push(build(self, *arguments), 80)
        except TypeError:
            raise self.refuse(f"calls {function.name} with the wrong arguments") from None


_STOP = ord(".")
# sizes in CPython, with the collector's 16 bytes: 56 for a tuple, 72 for a list, 80 for a dict
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
