"""Write the pickle of a ``.pt`` file: plain data and tensors, in protocol 2 like torch.save."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from npt_fast.checkpoint.pickle_content import MAX_DEPTH
from npt_fast.checkpoint.torch_pickle import MAX_PICKLE_BYTES, MAX_STRING
from npt_fast.checkpoint.torch_symbols import TensorRef
from npt_fast.errors import CheckpointError


def encode(value: Any, place: Callable[[Any], TensorRef | None]) -> bytes:
    """A pickle of plain data and tensors in protocol 2, which ``torch.load`` reads.

    A container that occurs several times is written once, so that the size is linear in the number
    of objects: a few bytes of a hostile pickle can stand for exponentially many occurrences.

    Args:
        value: nested dicts, Counters, lists, tuples, str, int, float, bool, None, and objects that
            `place` knows.
        place: function that is called with every other object and returns the tensor for it, or
            None.

    Raises:
        CheckpointError: the data are nested too deep, larger than our reader accepts, or of another
            type.
    """
    writer = _Writer(place)
    writer.put(value, 0)
    writer.out += b"."
    if len(writer.out) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"a pickle of {len(writer.out):,} bytes cannot be read again; "
            f"{MAX_PICKLE_BYTES:,} are the limit, merge fewer layers at once"
        )
    return bytes(writer.out)


class _Writer:
    """The pickle so far, and the memo indices by which its objects can be referred to.

    Attributes:
        out: bytes of the pickle.
        symbols: memo index of each symbol.
        strings: memo index of each string.
        containers: memo index of each container by its id, and the container to keep it alive.
        tuples: pickled bytes of each tuple of sizes, as a cache.
    """

    def __init__(self, place: Callable[[Any], TensorRef | None]) -> None:
        self.place = place
        self.out = bytearray(b"\x80\x02")
        self.symbols: dict[str, int] = {}
        self.strings: dict[str, int] = {}
        self.containers: dict[int, tuple[int, Any]] = {}
        self.tuples: dict[tuple[int, ...], bytes] = {}

    def put(self, item: Any, depth: int) -> None:
        out = self.out
        if depth >= MAX_DEPTH and isinstance(item, (tuple, list, Mapping)):
            raise CheckpointError(f"data nested more than {MAX_DEPTH} deep cannot be written")
        if item is None:
            out += b"N"
        elif isinstance(item, bool):
            out += b"\x88" if item else b"\x89"
        elif isinstance(item, int):
            out += _integer(item)
        elif isinstance(item, float):
            out += b"G" + struct.pack(">d", item)
        elif isinstance(item, str):
            self.string(item)
        elif id(item) in self.containers:
            out += _get(self.containers[id(item)][0])
        elif isinstance(item, tuple):
            out += b"("
            for element in item:
                self.put(element, depth + 1)
            out += b"t"
            # after its items: a tuple cannot be referred to before it exists, a list or dict can
            self.remember(item)
        elif isinstance(item, list):
            out += b"]"
            self.remember(item)
            out += b"("
            for element in item:
                self.put(element, depth + 1)
            out += b"e"
        elif isinstance(item, Counter):
            self.symbol("collections.Counter")
            self.put(dict(item), depth)
            out += b"\x85R"
            self.remember(item)
        elif isinstance(item, Mapping):
            out += b"}"
            self.remember(item)
            out += b"("
            for key, element in item.items():
                self.put(key, depth + 1)
                self.put(element, depth + 1)
            out += b"u"
        elif (ref := self.place(item)) is not None:
            self.tensor(ref)
        else:
            raise CheckpointError(f"cannot write a {type(item).__name__} into a .pt file")

    def tensor(self, ref: TensorRef) -> None:
        out = self.out
        typed = ref.dtype.storage is not None
        self.symbol("torch._utils._rebuild_tensor_v2" if typed else
                    "torch._utils._rebuild_tensor_v3")  # fmt: skip
        out += b"(("
        self.string("storage")
        self.symbol(f"torch.{ref.dtype.storage}" if typed else "torch.storage.UntypedStorage")
        out += _string(ref.storage.key)
        self.string("cpu")
        out += _integer(ref.storage.numel) + b"tQ" + _integer(ref.offset)
        # requires_grad False, and an empty OrderedDict for the hooks, as torch.save writes them
        out += self.sizes(ref.shape) + self.sizes(ref.strides) + b"\x89"
        self.symbol("collections.OrderedDict")
        out += b")R"
        if not typed:
            self.symbol(f"torch.{ref.dtype.torch_name}")
        out += b"tR"

    def symbol(self, name: str) -> None:
        self.once(name, self.symbols, _global)

    def string(self, text: str) -> None:
        self.once(text, self.strings, _string)

    def once(self, text: str, memo: dict[str, int], write: Callable[[str], bytes]) -> None:
        """Write `text` the first time, and a reference to it afterwards."""
        if text in memo:
            self.out += _get(memo[text])
        else:
            index = memo[text] = self.next_index()
            self.out += write(text) + _put(index)

    def remember(self, container: Any) -> None:
        index = self.next_index()
        self.containers[id(container)] = (index, container)
        self.out += _put(index)

    def next_index(self) -> int:
        return len(self.symbols) + len(self.strings) + len(self.containers)

    def sizes(self, values: tuple[int, ...]) -> bytes:
        if values not in self.tuples:
            self.tuples[values] = b"(" + b"".join(map(_integer, values)) + b"t"
        return self.tuples[values]


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K%c" % value
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _string(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    if len(raw) > MAX_STRING:
        raise CheckpointError(
            f"a string of {len(raw):,} bytes cannot be read again; {MAX_STRING:,} are the limit"
        )
    return b"X" + struct.pack("<I", len(raw)) + raw


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _put(index: int) -> bytes:
    return b"q%c" % index if index < 256 else b"r" + struct.pack("<I", index)


def _get(index: int) -> bytes:
    return b"h%c" % index if index < 256 else b"j" + struct.pack("<I", index)
