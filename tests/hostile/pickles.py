"""Pickles of malicious and broken checkpoints, assembled opcode by opcode.

This folder imports neither torch nor pickle; the tests ask what those do with a file. Every case is
a tiny valid checkpoint (one layer, single modulation, d=8, f=12, r=2) with one fault. It is a pair
``(id, builder)``: the id names the fault, and ``builder(directory)`` writes the files into an empty
directory and returns the path to open. A payload that is run creates the file ``canary`` in the
working directory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

Builder = Callable[[Path], Path]
Case = tuple[str, Builder]

W_DOWN, W_A_UP, W_B_UP = (f"layer_3_np.{stem}" for stem in ("W_down", "W_a_up", "W_b_up"))
SHAPES = {W_DOWN: (8, 2), W_A_UP: (2, 8), W_B_UP: (2, 12)}
DATA = b"".join(struct.pack("<f", number) for number in range(16 + 16 + 24))
PIECES = (DATA[:64], DATA[64:128], DATA[128:])

PROTO, STOP, MARK, EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE = b"\x80\x02", b".", b"(", b"}", b"]", b")"
NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def real(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


def symbol(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def integers(*values: int) -> bytes:
    return tuple_of(*map(integer, values))


def dict_of(*pairs: tuple[bytes, bytes]) -> bytes:
    return EMPTY_DICT + MARK + b"".join(key + value for key, value in pairs) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


ORDERED_DICT = call(symbol("collections", "OrderedDict"))
REBUILD = symbol("torch._utils", "_rebuild_tensor_v2")
REBUILD_V3 = symbol("torch._utils", "_rebuild_tensor_v3")
FLOATS = symbol("torch", "FloatStorage")


def storage_id(
    key: bytes, numel: bytes, *, kind: bytes = FLOATS, location: bytes = text("cpu")
) -> bytes:
    return tuple_of(text("storage"), kind, key, location, numel)


def storage(key: str = "0", numel: int | bytes = 16, *, kind: bytes = FLOATS) -> bytes:
    count = numel if isinstance(numel, bytes) else integer(numel)
    return storage_id(text(key), count, kind=kind) + b"Q"


def tensor(
    stored: bytes | None = None,
    *,
    offset: bytes = integer(0),
    shape: bytes = integers(8, 2),
    strides: bytes = integers(2, 1),
    requires_grad: bytes = FALSE,
    hooks: bytes = ORDERED_DICT,
    rebuild: bytes = REBUILD,
    more: bytes = b"",
) -> bytes:
    """A tensor of 16 floats in ``data/0`` as torch pickles it, or with one part replaced."""
    parts = (stored or storage(), offset, shape, strides, requires_grad, hooks, more)
    return call(rebuild, *parts)


def items(down: bytes | None = None) -> list[tuple[bytes, bytes]]:
    """The three tensors of a valid checkpoint, the first of them replaced by `down`."""
    a_up = tensor(storage("1"), shape=integers(2, 8), strides=integers(8, 1))
    b_up = tensor(storage("2", 24), shape=integers(2, 12), strides=integers(12, 1))
    values = (tensor() if down is None else down, a_up, b_up)
    return [(text(name), value) for name, value in zip(SHAPES, values, strict=True)]


def weights(down: bytes | None = None, *more: tuple[bytes, bytes]) -> bytes:
    """A whole pickle: the checkpoint with its first tensor replaced, and more items."""
    return PROTO + dict_of(*items(down), *more) + STOP


def beside(value: bytes) -> bytes:
    """A valid checkpoint with a value in a place that readers do not use.

    The state that BUILD gives to an OrderedDict becomes its attributes (torch keeps ``_metadata``
    of a state dict there), so a reader can refuse the file only because of the value's opcodes.
    """
    content = ORDERED_DICT + MARK + b"".join(key + value for key, value in items()) + b"u"
    return PROTO + content + dict_of((text("_metadata"), value)) + b"b" + STOP


VALID = weights()

COMMAND = text("touch canary")
EXPRESSION = text("open('canary', 'w').close()")
SYSTEM = symbol("os", "system")
IMPORT_OS = call(symbol("importlib", "import_module"), text("os"))
ARGUMENTS = EMPTY_LIST + MARK + text("touch") + text("canary") + b"e"
PARTIAL = symbol("functools", "partial")
PARTIAL_STATE = tuple_of(SYSTEM, tuple_of(COMMAND), EMPTY_DICT, NONE)

PAYLOADS: dict[str, bytes] = {
    "global-os-system": call(SYSTEM, COMMAND),
    "global-posix-system": call(symbol("posix", "system"), COMMAND),
    "global-eval": call(symbol("builtins", "eval"), EXPRESSION),
    "global-exec": call(symbol("builtins", "exec"), EXPRESSION),
    "global-python2-eval": call(symbol("__builtin__", "eval"), EXPRESSION),
    "global-subprocess-call": call(symbol("subprocess", "call"), ARGUMENTS),
    "global-subprocess-getoutput": call(symbol("subprocess", "getoutput"), COMMAND),
    "global-timeit": call(
        symbol("timeit", "timeit"), EXPRESSION, text("pass"), symbol("time", "time"), integer(1)
    ),
    "global-functools-partial": call(call(PARTIAL, SYSTEM, COMMAND)),
    "global-operator-methodcaller": call(
        call(symbol("operator", "methodcaller"), text("system"), COMMAND), IMPORT_OS
    ),
    "global-operator-attrgetter": call(
        call(call(symbol("operator", "attrgetter"), text("system")), IMPORT_OS), COMMAND
    ),
    "global-getattr-of-import": call(
        call(symbol("builtins", "getattr"), IMPORT_OS, text("system")), COMMAND
    ),
    "stack-global": text("os") + text("system") + b"\x93" + tuple_of(COMMAND) + b"R",
    "inst": MARK + COMMAND + b"ios\nsystem\n",
    "obj": MARK + SYSTEM + COMMAND + b"o",
    "reduce-from-memo": SYSTEM + b"q\xc80" + COMMAND + b"\x85q\xc90h\xc8h\xc9R",
    "build-sets-state-of-partial": call(
        call(PARTIAL, symbol("os", "getcwd")) + PARTIAL_STATE + b"b"
    ),
}
"""Pieces of pickle that run something when they are loaded the ordinary way."""
