"""Malicious and broken checkpoints, assembled byte by byte.

This module imports neither torch nor pickle; the tests ask what those do with a file. Every case is
a tiny valid checkpoint (one layer, single modulation, d=8, f=12, r=2) with one fault. It is a pair
``(id, builder)``: the id names the fault, and ``builder(directory)`` writes the files into an empty
directory and returns the path to open. A payload that is run creates the file ``canary`` in the
working directory.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

Builder = Callable[[Path], Path]
Case = tuple[str, Builder]

W_DOWN, W_A_UP, W_B_UP = (f"layer_3_np.{stem}" for stem in ("W_down", "W_a_up", "W_b_up"))
SHAPES = {W_DOWN: (8, 2), W_A_UP: (2, 8), W_B_UP: (2, 12)}
DATA = b"".join(struct.pack("<f", number) for number in range(16 + 16 + 24))
PIECES = (DATA[:64], DATA[64:128], DATA[128:])

# --- pickle opcodes

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

# --- payloads

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


# --- a zip writer that lies on request

LOCAL = "<4sHHHHHIIIHH"
CENTRAL = "<4sHHHHHHIIIHHHHHII"


@dataclass(frozen=True)
class Member:
    """One zip member; `local` and `central` replace fields of its two headers.

    Attributes:
        hole: number of zero bytes after the data, which take no disk space.
        before: foreign bytes before the local header.
        embedded: whether the data of the previous member ends with the local header, so that it is
            not written again.
    """

    name: str
    data: bytes = b""
    hole: int = 0
    before: bytes = b""
    embedded: bool = False
    local: Mapping[str, Any] = field(default_factory=dict)
    central: Mapping[str, Any] = field(default_factory=dict)

    def fields(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        size = len(self.data) + self.hole
        true = {
            "magic": None, "name": self.name.encode(), "flags": 0, "method": 0, "extra": b"",
            "crc": 0 if self.hole else zlib.crc32(self.data), "packed": size, "size": size,
            "comment": b"", "disk": 0, "attributes": 0, "at": None,
        }  # fmt: skip
        assert changes.keys() <= true.keys()
        return {**true, **changes}

    def local_header(self) -> bytes:
        f = self.fields(self.local)
        numbers = (20, f["flags"], f["method"], 0, 0, f["crc"], f["packed"], f["size"])
        sizes = (len(f["name"]), len(f["extra"]))
        header = struct.pack(LOCAL, f["magic"] or b"PK\3\4", *numbers, *sizes)
        return header + f["name"] + f["extra"]

    def central_header(self, at: int) -> bytes:
        f = self.fields(self.central)
        numbers = (20, 20, f["flags"], f["method"], 0, 0, f["crc"], f["packed"], f["size"])
        sizes = (len(f["name"]), len(f["extra"]), len(f["comment"]))
        place = (f["disk"], 0, f["attributes"], at if f["at"] is None else f["at"])
        header = struct.pack(CENTRAL, f["magic"] or b"PK\1\2", *numbers, *sizes, *place)
        return header + f["name"] + f["extra"] + f["comment"]


def write_zip(
    path: Path,
    members: Iterable[Member],
    *,
    prefix: bytes = b"",
    shift: int = 0,
    between: bytes = b"",
    tail: bytes = b"",
    end: Mapping[str, Any] | None = None,
    wide: Mapping[str, Any] | None = None,
) -> None:
    """Write a zip; `end` and `wide` replace fields of its end records.

    Args:
        path: path of the file.
        members: members, in order.
        prefix: foreign bytes at the start.
        shift: number that is added to all recorded offsets.
        between: foreign bytes between the directory and the end records.
        tail: foreign bytes at the end.
        end: fields of the end record: disk, here, total, size, start, comment.
        wide: the same fields of the zip64 end record, and at and disks; None writes no such record.
    """
    directory = []
    with open(path, "wb") as file:
        file.write(prefix)
        for member in members:
            header = member.local_header()
            at = file.tell() - len(header)
            if not member.embedded:
                at = file.tell() + len(member.before)
                file.write(member.before + header)
            file.write(member.data)
            file.seek(member.hole, os.SEEK_CUR)
            directory.append(member.central_header(at + shift))
        start, size, total = file.tell(), sum(map(len, directory)), len(directory)
        file.write(b"".join(directory) + between)
        true = {
            "disk": 0, "here": total, "total": total, "size": size, "start": start + shift,
            "comment": b"", "at": file.tell() + shift, "disks": 1, "record_size": 44,
        }  # fmt: skip
        if wide is not None:
            w = {**true, **wide}
            places = (w["here"], w["total"], w["size"], w["start"])
            file.write(struct.pack("<4sQHHII", b"PK\6\6", w["record_size"], 45, 45, 0, w["disk"]))
            file.write(struct.pack("<QQQQ", *places))
            file.write(struct.pack("<4sIQI", b"PK\6\7", 0, w["at"], w["disks"]))
        e = {**true, **(end or {})}
        places = (e["disk"], 0, e["here"], e["total"], e["size"], e["start"], len(e["comment"]))
        file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", *places) + e["comment"] + tail)


ROOT = "archive"


def write_pt(
    directory: Path,
    *,
    pickle: bytes = VALID,
    change: Mapping[str, Mapping[str, Any]] | None = None,
    drop: str = "",
    first: Iterable[Member] = (),
    last: Iterable[Member] = (),
    edit: Callable[[bytes], bytes] | None = None,
    **lies: Any,
) -> Path:
    """Write a ``.pt`` file in the layout of `torch.save`, except for the given changes.

    Args:
        directory: directory to write to.
        pickle: content of data.pkl.
        change: attributes of `Member` to replace, by the member's name without the root.
        drop: name of a member to leave out.
        first: members before the ordinary ones.
        last: members after the ordinary ones.
        edit: function that changes the bytes of the finished file.
        lies: further arguments of `write_zip`.
    """
    contents = {"data.pkl": pickle, "byteorder": b"little"}
    contents |= {f"data/{number}": piece for number, piece in enumerate(PIECES)}
    contents |= {"version": b"3\n"}
    members = []
    for name, content in contents.items():
        fields: dict[str, Any] = {"name": f"{ROOT}/{name}", "data": content}
        if name != drop:
            members.append(Member(**{**fields, **(change or {}).get(name, {})}))
    path = directory / "npt_weights.pt"
    write_zip(path, [*first, *members, *last], **lies)
    if edit:
        path.write_bytes(edit(path.read_bytes()))
    return path


def extra(name: str, content: bytes = b"", **fields: Any) -> Member:
    """Another member under the root."""
    return Member(f"{ROOT}/{name}", content, **fields)


# --- .pt cases

PT_CASES: list[Case] = []


def pt(name: str, **how: Any) -> None:
    """Add a case that `write_pt` writes."""
    PT_CASES.append((name, partial(write_pt, **how)))


def down(name: str, value: bytes) -> None:
    """Add a case whose first tensor is pickled wrongly."""
    pt(name, pickle=weights(value))


def write_file(directory: Path, content: bytes, name: str = "npt_weights.pt") -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


for _name, _payload in PAYLOADS.items():
    pt(_name, pickle=beside(_payload))

# symbols that no checkpoint needs, even where nothing would run
_ARRAY = symbol("numpy", "ndarray")
_RECONSTRUCT = symbol("numpy.core.multiarray", "_reconstruct")
_DTYPE = symbol("numpy", "dtype")
_SCALAR = symbol("numpy.core.multiarray", "scalar")
pt("global-never-called", pickle=beside(SYSTEM))
pt("global-torch-load", pickle=beside(call(symbol("torch", "load"), text("other.pt"))))
pt("global-torch-jit-load", pickle=beside(call(symbol("torch.jit", "load"), text("other.pt"))))
pt("global-numpy-reconstruct", pickle=beside(call(_RECONSTRUCT, _ARRAY, integers(0), text("b"))))
pt("global-numpy-load", pickle=beside(call(symbol("numpy", "load"), text("x"), NONE, TRUE)))
pt("global-builtins-getattr", pickle=beside(symbol("builtins", "getattr")))
pt("global-dotted-into-globals", pickle=beside(symbol("torch._utils", "warnings.sys.modules")))
pt("global-with-terminal-escapes", pickle=beside(symbol("os\x1b[2J\rnice", "system\x1b]0;x\x07")))
pt("global-not-ascii", pickle=beside(symbol("os", "syst\u00e9m")))
pt("global-without-end", pickle=PROTO + b"c" + b"a" * 5000)
pt("numpy-object-dtype", pickle=beside(call(_DTYPE, text("O8"), FALSE, TRUE)))
pt("numpy-dtype-with-fields", pickle=beside(
    call(_DTYPE, text("f8"), FALSE, TRUE)
    + tuple_of(integer(3), text("<"), NONE, text("f0"), dict_of(), *[integer(-1)] * 2, integer(16))
    + b"b"
))  # fmt: skip
pt("numpy-scalar-too-short", pickle=beside(call(
    _SCALAR,
    call(_DTYPE, text("f8"), FALSE, TRUE)
    + tuple_of(integer(3), text("<"), NONE, NONE, NONE, *[integer(-1)] * 2, integer(0)) + b"b",
    call(symbol("_codecs", "encode"), text("abc"), text("latin1")),
)))  # fmt: skip
pt("codecs-encode-other", pickle=beside(call(
    symbol("_codecs", "encode"), text("abc"), text("rot13")
)))  # fmt: skip

# opcodes that build or change objects
pt("newobj", pickle=beside(symbol("subprocess", "Popen") + ARGUMENTS + b"\x85\x81"))
pt("newobj-ex", pickle=beside(symbol("subprocess", "Popen") + EMPTY_TUPLE + dict_of() + b"\x92"))
pt("newobj-of-ordered-dict", pickle=beside(symbol("collections", "OrderedDict") + b")\x81"))
pt("obj-of-ordered-dict", pickle=beside(MARK + symbol("collections", "OrderedDict") + b"o"))
pt("inst-of-ordered-dict", pickle=beside(MARK + b"icollections\nOrderedDict\n"))
pt("ext1", pickle=beside(b"\x82\x01"))
pt("ext2", pickle=beside(b"\x83\x01\x01"))
pt("ext4", pickle=beside(b"\x84\x01\x01\x01\x01"))
pt("build-on-symbol", pickle=beside(symbol("collections", "OrderedDict") + dict_of() + b"b"))
pt("build-on-list", pickle=beside(EMPTY_LIST + dict_of() + b"b"))
pt("build-on-dict", pickle=beside(dict_of() + dict_of((text("keys"), NONE)) + b"b"))
pt("build-on-tensor", pickle=beside(tensor() + dict_of((text("data"), NONE)) + b"b"))
pt("build-with-slot-state", pickle=beside(
    ORDERED_DICT + tuple_of(NONE, dict_of((text("items"), NONE))) + b"b"
))  # fmt: skip
pt("reduce-of-string", pickle=beside(call(text("os.system"), COMMAND)))
pt("reduce-of-tensor", pickle=beside(call(tensor())))
pt("reduce-without-tuple", pickle=beside(symbol("collections", "OrderedDict") + EMPTY_LIST + b"R"))
pt("reduce-of-storage-class", pickle=beside(call(FLOATS, integer(1 << 40))))
pt("reduce-of-dtype", pickle=beside(call(symbol("torch", "float32"))))
pt("reduce-ordered-dict-of-items", pickle=beside(
    call(symbol("collections", "OrderedDict"), EMPTY_LIST)
))  # fmt: skip
pt("rebuild-with-two-arguments", pickle=beside(call(REBUILD, storage(), integer(0))))
pt("rebuild-with-twenty-arguments", pickle=beside(call(REBUILD, *[NONE] * 20)))
pt("pop-opcode", pickle=beside(NONE + NONE + b"0"))
pt("dup-opcode", pickle=beside(NONE + b"20"))
pt("string-opcode", pickle=beside(b"S'os'\n"))
pt("text-integer-opcode", pickle=beside(b"I1\n"))
pt("proto-twice", pickle=PROTO + VALID)

# memory, time and depth
_NESTED = EMPTY_TUPLE + b"\x85" * 5000
_DOUBLED = EMPTY_TUPLE + b"q\xc8h\xc8\x86" * 25  # what hashes or prints it needs 2^25 steps
_DOUBLED_LIST = EMPTY_LIST + b"q\xc8](h\xc8h\xc8e" * 60
pt("memo-2-27-of-nothing", pickle=PROTO + b"r\0\0\0\x08" + STOP)
pt("memo-2-31-of-nothing", pickle=PROTO + b"r\0\0\0\x80" + STOP)
pt("memo-2-31-then-get-another", pickle=beside(NONE + b"r\0\0\0\x80j\1\0\0\x80"))
pt("memo-never-written", pickle=beside(b"h\xfe"))
pt("memo-of-a-mark", pickle=beside(MARK + b"q\xc8" + b"t"))
pt("billion-laughs-of-lists", pickle=weights(_DOUBLED_LIST))
pt("billion-laughs-of-tuples", pickle=weights(_DOUBLED))
pt("billion-laughs-as-dict-key", pickle=beside(dict_of((_DOUBLED, NONE))))
pt("billion-laughs-as-numpy-code", pickle=beside(call(_DTYPE, _DOUBLED, FALSE, TRUE)))
pt("billion-laughs-as-persistent-id", pickle=beside(_DOUBLED + b"Q"))
pt("billion-laughs-as-hooks", pickle=weights(tensor(hooks=_DOUBLED)))
pt("nested-tuple-as-numpy-code", pickle=beside(call(_DTYPE, _NESTED, FALSE, TRUE)))
pt("nested-tuple-as-numpy-code-deeper", pickle=beside(
    call(_DTYPE, EMPTY_TUPLE + b"\x85" * 200_000, FALSE, TRUE)
))  # fmt: skip
pt("nested-tuple-as-value", pickle=weights(EMPTY_TUPLE + b"\x85" * 1_000_000))
pt("nested-tuple-as-numpy-state", pickle=beside(
    call(_DTYPE, text("f8"), FALSE, TRUE)
    + tuple_of(integer(3), text("<"), *[_NESTED] * 6) + b"b"
))  # fmt: skip
# the message has the keys that lead to a value
_UNDER_KEYS = EMPTY_DICT + MARK + (text("x\x01" * 500) + EMPTY_DICT + MARK) * 60
pt("long-keys-to-a-symbol", pickle=PROTO + _UNDER_KEYS + text("a") + symbol("x" * 200, "y" * 200))
pt("long-keys-to-a-value", pickle=(
    PROTO + _UNDER_KEYS + text("a") + symbol("torch", "float32") + b"u" * 61 + STOP
))  # fmt: skip
pt("nested-marks", pickle=PROTO + MARK * 4_000_000 + STOP)
pt("nested-lists", pickle=PROTO + EMPTY_LIST * 1_000_000 + b"a" * 999_999 + STOP)
pt("many-lists", pickle=PROTO + EMPTY_LIST * 3_000_000 + STOP)
pt("many-dicts", pickle=PROTO + EMPTY_DICT * 3_000_000 + STOP)
pt("many-ordered-dicts", pickle=PROTO + symbol("collections", "OrderedDict") + b"q\0"
   + b"h\0)R" * 500_000 + STOP)  # fmt: skip
pt("many-memos", pickle=PROTO + NONE + b"".join(
    b"r" + struct.pack("<I", number) for number in range(1_500_000)
) + STOP)  # fmt: skip
pt("many-dict-items", pickle=PROTO + EMPTY_DICT + MARK + b"".join(
    b"J" + struct.pack("<i", number) + NONE for number in range(1_500_000)
) + b"u" + STOP)  # fmt: skip
pt("one-string-again-and-again", pickle=PROTO + (text("\u6f22" * 340_000) * 25) + STOP)
pt("string-of-4-gib", pickle=PROTO + b"X\xff\xff\xff\xffabc" + STOP)
pt("string-of-2-mib", pickle=beside(text("a" * (2 << 20))))
pt("string-not-utf8", pickle=beside(b"X\1\0\0\0\xff"))
pt("string-8-of-2-62", pickle=PROTO + b"\x8d" + struct.pack("<Q", 1 << 62) + STOP)
pt("bytes-8-of-2-62", pickle=PROTO + b"\x8e" + struct.pack("<Q", 1 << 62) + STOP)
pt("bytearray-8-of-2-62", pickle=PROTO + b"\x96" + struct.pack("<Q", 1 << 62) + STOP)
pt("long1-of-255-bytes", pickle=beside(b"\x8a\xff" + b"\x7f" * 255))
pt("long4-of-2-gib", pickle=PROTO + b"\x8b\xff\xff\xff\x7f" + STOP)
pt("long4-negative", pickle=PROTO + b"\x8b\xff\xff\xff\xff" + STOP)
pt("frame-of-2-62", pickle=PROTO + b"\x95" + struct.pack("<Q", 1 << 62) + STOP)
pt("data-pkl-of-33-mib", change={"data.pkl": {"hole": 33 << 20}})
pt("data-pkl-of-8-gib", last=[Member(
    f"{ROOT}/data.pkl", VALID, hole=8 << 30,
    local={"size": 0, "packed": 0},
    central={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF,
             "extra": struct.pack("<HHQQ", 1, 16, *[(8 << 30) + len(VALID)] * 2)},
)], drop="data.pkl", wide={}, end={"start": 0xFFFFFFFF})  # fmt: skip

# where the pickle ends
pt("empty-pickle", pickle=b"")
pt("only-stop", pickle=PROTO + STOP)
pt("no-stop", pickle=VALID[:-1])
pt("second-pickle-after-stop", pickle=VALID + PROTO + call(SYSTEM, COMMAND) + STOP)
pt("zeros-after-stop", pickle=VALID + b"\0" * 8)
pt("values-left-on-the-stack", pickle=PROTO + NONE + VALID[2:])
pt("stop-inside-a-mark", pickle=PROTO + MARK + VALID[2:])
pt("mark-as-result", pickle=PROTO + MARK + STOP)
for _cut in (1, 2, 3, 20, 60, 100, 200):
    pt(f"pickle-cut-at-{_cut}", pickle=VALID[:_cut])
pt("protocol-0", pickle=b"(dp0\nVx\np1\nI1\ns.")
pt("protocol-0-as-2", pickle=PROTO + b"(dp0\nVx\np1\nI1\ns.")
for _protocol in (1, 3, 4, 5, 255):
    pt(f"protocol-{_protocol}", pickle=b"\x80" + bytes([_protocol]) + VALID[2:])

# what a checkpoint may hold
pt("list-at-top", pickle=PROTO + EMPTY_LIST + tensor() + b"a" + STOP)
pt("tensor-at-top", pickle=PROTO + tensor() + STOP)
pt("none-at-top", pickle=PROTO + NONE + STOP)
pt("nested-dict", pickle=weights(None, (text("state_dict"), dict_of(*items()))))
pt("value-string", pickle=weights(None, (text("layer_4_np.W_down"), text("tensor"))))
pt("value-number", pickle=weights(None, (text("step"), integer(3))))
pt("value-storage", pickle=weights(None, (text("layer_4_np.W_down"), storage())))
pt("value-symbol", pickle=weights(None, (text("layer_4_np.W_down"), FLOATS)))
pt("value-size", pickle=weights(None, (text("s"), call(symbol("torch", "Size"), integers(1)))))
pt("value-nan", pickle=weights(None, (text("loss"), real(float("nan")))))
pt("key-integer", pickle=weights(None, (integer(3), tensor())))
pt("key-none", pickle=weights(None, (NONE, tensor())))
pt("key-boolean", pickle=weights(None, (TRUE, tensor())))
pt("key-tuple", pickle=weights(None, (tuple_of(text("a")), tensor())))
pt("key-list", pickle=weights(None, (EMPTY_LIST, tensor())))
pt("key-duplicate", pickle=weights(None, (text(W_DOWN), tensor(storage("1")))))
pt("key-duplicate-by-setitem", pickle=VALID[:-1] + text(W_DOWN) + tensor(storage("1")) + b"s.")
pt("key-with-newline", pickle=weights(None, (text("evil\nOK: fine"), tensor(storage("9")))))
pt("key-with-terminal-escape", pickle=weights(None, (text("\x1b[2J"), tensor(storage("9")))))
pt("key-lone-surrogate", pickle=weights(
    None, (b"X\3\0\0\0\xed\xa0\x80", tensor(storage("9")))
))  # fmt: skip
pt("setitems-odd", pickle=PROTO + EMPTY_DICT + MARK + text("a") + b"u" + STOP)
pt("setitems-on-tensor", pickle=PROTO + tensor() + MARK + text("a") + NONE + b"u" + STOP)
pt("append-to-dict", pickle=PROTO + dict_of(*items()) + NONE + b"a" + STOP)
pt("appends-without-mark", pickle=PROTO + EMPTY_LIST + b"e" + STOP)

# persistent ids
_PARTS = (text("storage"), FLOATS, text("0"), text("cpu"), integer(16))
down("pid-string", tensor(text("storage") + b"Q"))
down("pid-list", tensor(EMPTY_LIST + MARK + b"".join(_PARTS) + b"eQ"))
down("pid-of-four", tensor(tuple_of(*_PARTS[:4]) + b"Q"))
down("pid-of-six", tensor(tuple_of(*_PARTS, NONE) + b"Q"))
down("pid-not-storage", tensor(tuple_of(text("module"), *_PARTS[1:]) + b"Q"))
down("pid-type-string", tensor(storage(kind=text("FloatStorage"))))
down("pid-type-none", tensor(storage(kind=NONE)))
down("pid-type-function", tensor(storage(kind=REBUILD)))
down("pid-type-dtype", tensor(storage(kind=symbol("torch", "float32"))))
down("pid-type-quantized", tensor(storage(kind=symbol("torch", "QInt32Storage"))))
down("pid-type-invented", tensor(storage(kind=symbol("torch", "EvilStorage"))))
down("pid-key-integer", tensor(storage_id(integer(0), integer(16)) + b"Q"))
down("pid-key-path", tensor(storage("../../etc/passwd")))
down("pid-key-with-newline", tensor(storage("9\nOK: fine")))
down("pid-location-none", tensor(storage_id(text("0"), integer(16), location=NONE) + b"Q"))
down("pid-location-path", tensor(
    storage_id(text("0"), integer(16), location=text("../cpu")) + b"Q"
))  # fmt: skip
down("pid-ascii-opcode", tensor(b"Pstorage\n"))
down("storage-types-differ", tensor(
    storage("1", 8, kind=symbol("torch", "DoubleStorage")), shape=integers(8, 1)
))  # fmt: skip
down("storage-sizes-differ", tensor(storage("1", 15), shape=integers(1, 1)))
down("storage-untyped-in-v2", tensor(
    storage("0", 64, kind=symbol("torch.storage", "UntypedStorage"))
))  # fmt: skip
down("storage-typed-in-v3", tensor(rebuild=REBUILD_V3, more=symbol("torch", "float32")))
down("dtype-unknown-in-v3", tensor(
    storage("0", 64, kind=symbol("torch.storage", "UntypedStorage")),
    rebuild=REBUILD_V3, more=symbol("torch", "qint8"),
))  # fmt: skip
for _name, _numel in {
    "small": integer(15), "large": integer(17), "huge": integer(1 << 62), "negative": integer(-16),
    "2-63": integer(1 << 63), "2-64-wraps": integer((1 << 62) + 16), "true": TRUE,
    "real": real(16.0), "string": text("16"), "none": NONE,
}.items():  # fmt: skip
    down(f"numel-{_name}", tensor(storage("0", _numel)))

# sizes of tensors
for _name, _sizes in {
    "offset-outside": {"offset": integer(17)},
    "offset-too-far": {"offset": integer(1)},
    "offset-negative": {"offset": integer(-1)},
    "offset-wraps": {"offset": integer(1 << 62)},
    "offset-real": {"offset": real(0.0)},
    "offset-boolean": {"offset": FALSE},
    "shape-too-large": {"shape": integers(9, 2)},
    "shape-negative": {"shape": integers(-8, -2)},
    "shape-wraps": {"shape": integers(1 << 62, 8), "strides": integers(8, 1)},
    "shape-2-64": {"shape": integers(1 << 64, 2)},
    "shape-boolean": {"shape": tuple_of(integer(8), TRUE), "strides": integers(1, 1)},
    "shape-real": {"shape": tuple_of(real(8.0), integer(2))},
    "shape-list": {"shape": EMPTY_LIST + MARK + integer(8) + integer(2) + b"e"},
    "shape-nested": {"shape": tuple_of(integers(8), integer(2))},
    "rank-100": {"shape": integers(*[1] * 100), "strides": integers(*[1] * 100)},
    "rank-100000": {"shape": integers(*[1] * 100_000), "strides": integers(*[1] * 100_000)},
    "strides-too-few": {"strides": integers(1)},
    "strides-too-many": {"strides": integers(2, 1, 1)},
    "strides-missing": {"strides": EMPTY_TUPLE},
    "strides-negative": {"strides": integers(-2, 1)},
    "strides-zero": {"strides": integers(0, 0)},
    "strides-one-zero": {"strides": integers(0, 1)},
    "strides-zero-of-2-40": {"shape": integers(1 << 20, 1 << 20), "strides": integers(0, 0)},
    "strides-overlap": {"strides": integers(1, 1)},
    "strides-interleave": {"shape": integers(3, 3), "strides": integers(2, 3)},
    "strides-reach-outside": {"strides": integers(2, 2)},
    "strides-huge": {"strides": integers(1 << 61, 1)},
    "hooks": {"hooks": dict_of((integer(0), SYSTEM))},
    "hooks-none": {"hooks": NONE},
    "requires-grad-integer": {"requires_grad": integer(1)},
    "metadata-argument": {"more": dict_of((text("conj"), TRUE))},
}.items():
    down(f"tensor-{_name}", tensor(**_sizes))
down("parameter-of-a-number", call(
    symbol("torch._utils", "_rebuild_parameter"), integer(3), TRUE, ORDERED_DICT
))  # fmt: skip
_PARAMETER = symbol("torch._utils", "_rebuild_parameter")
_INTEGERS = tensor(storage("0", 8, kind=symbol("torch", "LongStorage")), shape=integers(4, 2))
down("parameter-requires-grad-number", call(_PARAMETER, tensor(), integer(1), ORDERED_DICT))
down("parameter-requires-grad-none", call(_PARAMETER, tensor(), NONE, ORDERED_DICT))
down("parameter-of-integers-requires-grad", call(_PARAMETER, _INTEGERS, TRUE, ORDERED_DICT))
down("tensor-of-integers-requires-grad", tensor(
    storage("0", 8, kind=symbol("torch", "LongStorage")), shape=integers(4, 2), requires_grad=TRUE
))  # fmt: skip
# torch reads storages that no tensor uses too
pt("unused-storage-without-a-record", pickle=beside(storage("7")))
pt("unused-storage-of-another-size", pickle=beside(storage("1", 15)))
pt("unused-tensor-without-a-record", pickle=beside(tensor(storage("7"))))


# the zip: compression, encryption, names
def _deflated(content: bytes) -> dict[str, Any]:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = compressor.compress(content) + compressor.flush()
    header = {"method": 8, "packed": len(packed), "size": len(content), "crc": zlib.crc32(content)}
    return {"data": packed, "local": header, "central": header}


_ENCRYPTED = {"flags": 1}
pt("deflated-data-pkl", change={"data.pkl": _deflated(VALID)})
pt("deflated-data", change={"data/0": _deflated(PIECES[0])})
pt("deflated-bomb", change={"data.pkl": _deflated(VALID + b"\0" * (64 << 20))})
pt("method-stored-in-local-only", change={"data/0": {"central": {"method": 8}}})
pt("method-stored-in-directory-only", change={"data/0": {"local": {"method": 8}}})
pt("encrypted", change={"data/0": {"local": _ENCRYPTED, "central": _ENCRYPTED}})
pt("encrypted-by-directory-only", change={"data/0": {"central": _ENCRYPTED}})
pt("encrypted-by-local-only", change={"data/0": {"local": _ENCRYPTED}})
pt("strongly-encrypted", change={"data/0": {"central": {"flags": 0x2041}}})
pt("two-roots", first=[Member("other/data.pkl", VALID)])
pt("two-roots-reversed", last=[Member("other/data.pkl", VALID)])
pt("member-duplicate-pickle", last=[extra("data.pkl", weights(tensor(storage("1"))))])
pt("member-duplicate-data", last=[extra("data/0", PIECES[1])])
pt("member-duplicate-by-case", last=[extra("DATA.PKL", VALID)])
pt("member-duplicate-data-by-case", last=[extra("Data/0", PIECES[1])])
for _name, _member in {
    "absolute": "/etc/passwd", "drive": "C:\\x", "parent": f"{ROOT}/../x",
    "backslash": f"{ROOT}\\x",
    "backslash-inside": f"{ROOT}/data\\7", "parent-first": "../x/y", "nul": f"{ROOT}/data/7\0",
    "newline": f"{ROOT}/data/7\nOK", "not-ascii": f"{ROOT}/data/\u00b7", "empty": "",
    "root-only": ROOT, "folder": f"{ROOT}/", "empty-part": f"{ROOT}//x", "long": "a/" + "x" * 300,
    "deep": f"{ROOT}/" + "a/" * 50 + "b", "escape": f"{ROOT}/\x1b[2J",
}.items():  # fmt: skip
    pt(f"member-name-{_name}", last=[Member(_member)])
pt("member-name-not-utf8", last=[extra("x", central={"name": b"archive/\xff"})])
pt("member-names-differ", change={"data/0": {"local": {"name": b"archive/data/7"}}})
pt("member-names-differ-in-length", change={"data/0": {"local": {"name": b"archive/data/00"}}})
pt("member-names-differ-in-case", change={"data/0": {"local": {"name": b"archive/Data/0"}}})
# with the MS-DOS attribute of a folder, torch 2.13 reads no data and returns uninitialized memory
pt("member-marked-as-a-folder", change={"data/0": {"central": {"attributes": 0x10}}})
pt("member-torchscript", last=[extra("constants.pkl", PROTO + EMPTY_TUPLE + STOP)])
pt("no-data-pkl", drop="data.pkl")
pt("no-data-record", drop="data/0")
pt("no-version", drop="version")
pt("version-0", change={"version": {"data": b"0\n"}})
pt("version-11", change={"version": {"data": b"11\n"}})
pt("version-text", change={"version": {"data": b"three\n"}})
pt("version-empty", change={"version": {"data": b""}})
pt("byteorder-big", change={"byteorder": {"data": b"big"}})
pt("byteorder-unknown", change={"byteorder": {"data": b"middle"}})
pt("byteorder-empty", change={"byteorder": {"data": b""}})

# the zip: places and sizes
pt("crc-of-data-pkl", change={"data.pkl": {"central": {"crc": 1}}})
pt("data-too-short", change={"data/0": {"data": DATA[:60]}})
pt("data-too-long", change={"data/0": {"data": DATA[:68]}})
pt("data-empty", change={"data/0": {"data": b""}})
pt("size-smaller-in-directory", change={"data/0": {"central": {"size": 60, "packed": 60}}})
pt("size-larger-in-directory", change={"data/0": {"central": {"size": 68, "packed": 68}}})
pt("size-differs-from-packed", change={"data/0": {"central": {"packed": 60}}})
pt("crc-differs-in-local", change={"data/0": {"local": {"crc": 1}}})
pt("size-differs-in-local", change={"data/0": {"local": {"size": 60, "packed": 60}}})
pt("size-beyond-the-file", change={"data/2": {"central": {"size": 1 << 30, "packed": 1 << 30}}})
pt("size-4-gib", change={"data/2": {"central": {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}}})
pt("size-into-the-directory", change={"version": {"central": {"size": 40, "packed": 40}}})
pt("pickle-size-zero", change={"data.pkl": {"central": {"size": 0, "packed": 0, "crc": 0}}})
_MAX = {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}
for _name, _wide_extra in {
    "2-63": struct.pack("<HHQQ", 1, 16, 1 << 63, 1 << 63),
    "2-64": struct.pack("<HHQQ", 1, 16, (1 << 64) - 1, (1 << 64) - 1),
    "sizes-differ": struct.pack("<HHQQ", 1, 16, 64, 60),
    "cut": struct.pack("<HHQ", 1, 16, 64),
    "empty": struct.pack("<HH", 1, 0),
    "missing": b"",
    "other-kind": struct.pack("<HHQQ", 2, 16, 64, 64),
}.items():
    pt(f"zip64-extra-{_name}", change={"data/0": {"central": {**_MAX, "extra": _wide_extra}}})
pt("zip64-extra-offset-beyond", change={"data/0": {"central": {
    "at": 0xFFFFFFFF, "extra": struct.pack("<HHQ", 1, 8, 1 << 62),
}}})  # fmt: skip
pt("header-beyond-the-file", change={"data/0": {"central": {"at": 1 << 30}}})
pt("header-in-the-directory", edit=lambda raw: raw.replace(
    struct.pack("<I", 0) + b"archive/data.pkl",
    struct.pack("<I", raw.index(b"PK\1\2")) + b"archive/data.pkl",
))  # fmt: skip
pt("header-not-a-header", change={"data/0": {"central": {"at": 7}}})
pt("header-without-magic", change={"data/0": {"local": {"magic": b"PK\3\5"}}})
pt("header-shared", change={"data/1": {"central": {"at": 0, "name": b"archive/data.pkl"}}})
pt("header-extra-outside", edit=lambda raw: raw.replace(
    b"\x0f\0\0\0archive/version", b"\x0f\0\xff\xffarchive/version"
))  # fmt: skip
_INNER = Member(f"{ROOT}/data/1", PIECES[1], embedded=True)


def _overlapping(directory: Path) -> Path:
    """The last bytes of data/0 are the header of data/1."""
    header = _INNER.local_header()
    outer = Member(f"{ROOT}/data/0", DATA[: 64 - len(header)] + header)
    rest = [extra("data/2", PIECES[2]), extra("version", b"3\n")]
    path = directory / "npt_weights.pt"
    write_zip(path, [extra("data.pkl", VALID), outer, _INNER, *rest])
    return path


PT_CASES.append(("members-overlap", _overlapping))
pt("prefix", prefix=b"MZ" + b"\0" * 62)
pt("prefix-not-counted", prefix=b"MZ" + b"\0" * 62, shift=-64)
pt("prefix-that-is-a-header", prefix=Member("x", b"hidden").local_header() + b"hidden")
pt("first-member-not-at-the-start", prefix=b"PK\3\4" + b"\0" * 60)
pt("offsets-shifted", shift=4)
pt("comment", end={"comment": b"hello"})
pt("comment-length-without-comment", edit=lambda raw: raw[:-2] + b"\5\0")
pt("tail-newline", tail=b"\n")
pt("tail-zeros", tail=b"\0" * 22)
pt("tail-second-zip", edit=lambda raw: raw + raw)
pt("foreign-bytes-after-the-directory", between=b"\0" * 8)
pt("disk-1", end={"disk": 1})
pt("disk-1-of-a-member", change={"data/0": {"central": {"disk": 1}}})
pt("directory-magic", change={"data/0": {"central": {"magic": b"PK\1\3"}}})
pt("directory-beyond-the-file", end={"start": 1 << 30})
pt("directory-at-0", end={"start": 0})
pt("directory-size-4-gib", end={"size": 0xFFFFFFFF})
pt("count-zero", end={"here": 0, "total": 0})
pt("count-too-small", end={"here": 5, "total": 5})
pt("count-too-large", end={"here": 7, "total": 7})
pt("count-65535", end={"here": 0xFFFF, "total": 0xFFFF})
pt("count-differs", end={"here": 5})
_SATURATED = {"here": 0xFFFF, "total": 0xFFFF, "size": 0xFFFFFFFF, "start": 0xFFFFFFFF}
for _name, _lie in {
    "count-2-40": {"here": 1 << 40, "total": 1 << 40}, "count-zero": {"here": 0, "total": 0},
    "count-differs": {"here": 5}, "size-2-63": {"size": 1 << 63}, "start-2-63": {"start": 1 << 63},
    "start-0": {"start": 0}, "record-elsewhere": {"at": 0}, "record-beyond": {"at": 1 << 62},
    "record-longer": {"record_size": 1 << 40}, "two-disks": {"disks": 2}, "disk-1": {"disk": 1},
}.items():  # fmt: skip
    pt(f"zip64-end-{_name}", wide=_lie, end=_SATURATED)
pt("zip64-end-contradicts-end", wide={}, end={"here": 5, "total": 5})
pt("zip64-end-missing", end=_SATURATED)


def _crowded(directory: Path) -> Path:
    """The largest number of directory entries that the limit allows, all for one member."""
    member = Member("a/b")
    count = (8 << 20) // len(member.central_header(0))
    raw = member.local_header() + member.central_header(0) * count
    places = (count, count, count * len(member.central_header(0)), len(member.local_header()))
    raw += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, *places)
    raw += struct.pack("<4sIQI", b"PK\6\7", 0, len(raw) - 56, 1)
    saturated = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    return write_file(directory, raw + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, *saturated, 0))


PT_CASES.append(("one-member-listed-170000-times", _crowded))
pt("directory-of-9-mib", last=[extra(f"x{n}", central={"comment": b"c" * 60_000})
                               for n in range(160)])  # fmt: skip

# not a zip, or not all of one
_LEGACY = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\0(X\x10\0\0\0"
    b"protocol_sizeq\1M\xe9\x03u." + VALID
)
_TAR = (b"storages".ljust(257, b"\0") + b"ustar  \0").ljust(512, b"\0") + b"\0" * 1024
for _name, _content in {
    "empty-file": b"", "one-byte": b"P", "only-an-end-record": b"PK\5\6" + b"\0" * 18,
    "legacy-pickle": _LEGACY, "bare-pickle": PROTO + call(SYSTEM, COMMAND) + STOP, "tar": _TAR,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 100, "zeros": b"\0" * 4096, "text": b"version https://git-lfs",
    "seven-zip": b"7z\xbc\xaf\x27\x1c" + b"\0" * 100,
}.items():  # fmt: skip
    PT_CASES.append((f"file-{_name}", partial(write_file, content=_content)))
for _cut in (4, 30, 100, -1, -22, -60, -400):
    pt(f"file-cut-at-{_cut}", edit=lambda raw, cut=_cut: raw[:cut])
pt("file-without-its-first-byte", edit=lambda raw: raw[1:])
pt("file-half-zeros", edit=lambda raw: raw[: len(raw) // 2].ljust(len(raw), b"\0"))


# --- safetensors

ST_CASES: list[Case] = []
Header = dict[str, dict[str, Any]]
HEADER: Header = {
    name: {"dtype": "F32", "shape": list(shape), "data_offsets": place}
    for (name, shape), place in zip(SHAPES.items(), ([0, 64], [64, 128], [128, 224]), strict=True)
}


def with_fields(name: str = W_DOWN, **fields: Any) -> Header:
    """The valid header with fields of one tensor replaced."""
    return {**HEADER, name: {**HEADER[name], **fields}}


def with_tensor(name: str, shape: list[int], begin: int, end: int, dtype: str = "F32") -> Header:
    """The valid header with another tensor added."""
    return {**HEADER, name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def moved(*starts_and_ends: int) -> Header:
    """The valid header with other data_offsets."""
    pairs = zip(starts_and_ends[::2], starts_and_ends[1::2], strict=True)
    return {
        name: {**fields, "data_offsets": list(pair)}
        for (name, fields), pair in zip(HEADER.items(), pairs, strict=True)
    }


def safetensors_bytes(
    header: Mapping[str, Any] | str | bytes = HEADER,
    data: bytes = DATA,
    *,
    length: int | None = None,
    padded: bool = True,
) -> bytes:
    """Write a safetensors file; a mapping becomes JSON, padded to a multiple of 8 bytes."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    raw = header if isinstance(header, bytes) else header.encode()
    if padded:
        raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def write_safetensors(directory: Path, *arguments: Any, **options: Any) -> Path:
    content = safetensors_bytes(*arguments, **options)
    return write_file(directory, content, "npt_weights.safetensors")


def st(name: str, *arguments: Any, **options: Any) -> None:
    """Add a case that `write_safetensors` writes."""
    ST_CASES.append((name, lambda directory: write_safetensors(directory, *arguments, **options)))


def st_text(name: str, old: str, new: str) -> None:
    """Add a case with the valid header in which a text, which must occur once, is replaced."""
    assert TEXT.count(old) == 1, (name, old)
    st(name, TEXT.replace(old, new))


TEXT = json.dumps(HEADER)
_DOWN_TEXT = json.dumps({W_DOWN: HEADER[W_DOWN]})[1:-1]
_META = '"__metadata__": '

# rejected by safetensors 0.8 (design.md#file-readers)
st("hole-in-the-middle", moved(0, 64, 64, 128, 132, 228), DATA + b"\0" * 4)
st("hole-at-the-start", moved(8, 72, 72, 136, 136, 232), b"\0" * 8 + DATA)
st("overlap", moved(0, 64, 60, 124, 124, 220), DATA[:220])
st("aliasing", moved(0, 64, 0, 64, 64, 160), DATA[:160])
st("trailing-byte", HEADER, DATA + b"\0")
st("trailing-second-file", HEADER, DATA + safetensors_bytes())
st("data-cut", HEADER, DATA[:-1])
st("data-missing", HEADER, b"")
st("header-cut", TEXT[:-9] + " " * 9, DATA)
st("offsets-reversed", with_fields(data_offsets=[64, 0]))
st("offsets-negative", with_fields(data_offsets=[-64, 0]))
st("offsets-beyond-the-end", moved(0, 64, 64, 128, 1 << 40, (1 << 40) + 96))
st("offsets-2-64", moved(0, 64, 64, 128, (1 << 64) + 128, (1 << 64) + 224))
st("offsets-three", with_fields(data_offsets=[0, 64, 128]))
st("offsets-one", with_fields(data_offsets=[64]))
st("offsets-object", with_fields(data_offsets={"0": 0, "1": 64}))
st("offsets-null", with_fields(data_offsets=None))
st("shape-larger-than-data", with_fields(shape=[8, 3]))
st("shape-smaller-than-data", with_fields(shape=[8, 1]))
st("shape-wraps-in-64-bits", with_fields(shape=[8, (1 << 61) + 2]))
st("shape-product-overflows", with_fields(shape=[1 << 32, 1 << 32]))
st("shape-negative", with_fields(shape=[-8, -2]))
st("shape-with-fraction", with_fields(shape=[8, 2.5]))
st_text("shape-16.0", "[8, 2]", "[8.0, 2]")
st_text("shape-exponent", "[8, 2]", "[8e0, 2]")
st("shape-string", with_fields(shape=["8", 2]))
st("shape-true", with_fields(shape=[16, True]))
st("shape-null", with_fields(shape=None))
st("shape-nested", with_fields(shape=[[8, 2]]))
st_text("shape-nan", "[8, 2]", "[NaN, 2]")
st_text("shape-infinity", "[8, 2]", "[Infinity, 2]")
st_text("shape-of-5000-digits", "[8, 2]", f"[{'9' * 5000}, 2]")
st_text("shape-leading-zero", "[8, 2]", "[08, 2]")
st("offsets-string", with_fields(data_offsets=["0", "64"]))
st("offsets-true", with_fields(data_offsets=[False, 64]))
st("dtype-unknown", with_fields(dtype="F33"))
st("dtype-lower-case", with_fields(dtype="f32"))
st("dtype-empty", with_fields(dtype=""))
st("dtype-number", with_fields(dtype=32))
st("dtype-list", with_fields(dtype=["F32"]))
st("dtype-c128", with_fields(dtype="C128", shape=[4]))
st("dtype-f4-odd", with_tensor("odd", [1], 224, 225, "F4"), DATA + b"\0")
st("dtype-f6-not-whole-bytes", with_tensor("odd", [2], 224, 226, "F6_E2M3"), DATA + b"\0\0")
st("duplicate-tensor-leaves-a-hole", TEXT[:-1] + ", " + _DOWN_TEXT.replace("0, 64", "8, 72") + "}")
st("duplicate-metadata", f"{{{_META}{{}}, {_META}{{}}, {TEXT[1:]}")
st_text("duplicate-field", '"shape": [8, 2]', '"shape": [4, 4], "shape": [8, 2]')
st("metadata-number", {"__metadata__": {"format": 1}, **HEADER})
st("metadata-nested", {"__metadata__": {"format": {"a": "b"}}, **HEADER})
st("metadata-value-null", {"__metadata__": {"format": None}, **HEADER})
st("metadata-list", {"__metadata__": ["format"], **HEADER})
st("metadata-duplicate-key", f'{{{_META}{{"a": "b", "a": "c"}}, {TEXT[1:]}')
st("metadata-half-a-character", {"__metadata__": {"format": "\ud800"}, **HEADER})
st("metadata-key-of-half-a-character", {"__metadata__": {"\udfff": "pt"}, **HEADER})
st_text("offset-minus-zero", "[0, 64]", "[-0, 64]")
st_text(
    "shape-minus-zero",
    '"shape": [8, 2], "data_offsets": [0, 64]',
    '"shape": [-0, 2], "data_offsets": [0, 0]',
)
st("header-length-beyond-the-file", length=10_000)
st("header-length-2-63", length=1 << 63)
st("header-length-2-64-wraps", length=(1 << 64) - 8)
st("header-length-0", length=0)
st("header-length-short", length=len(TEXT) // 2)
st("no-tensors-but-data", "{}")
st("header-list", "[]", b"")
st("header-list-of-header", f"[{TEXT}]")
st("header-string", '"abcdef"', b"")
st("header-null", "null", b"")
st("header-empty", "        ", b"")
st("padding-nul", TEXT + "\0" * (-len(TEXT) % 8 + 8))
st("padding-newline", TEXT + "\n" * (-len(TEXT) % 8 + 8))
st("garbage-after-the-object", TEXT + "x" * (-len(TEXT) % 8 + 8))
st("second-object", TEXT + TEXT)
st("byte-order-mark", b"\xef\xbb\xbf" + TEXT.encode())
st("utf-16", TEXT.encode("utf-16-le"))
st("not-utf8", TEXT.encode().replace(b"W_down", b"W_d\xff\xfen"))
st("name-lone-surrogate", TEXT.replace("W_down", "W_\\ud800"))
st("name-raw-control-character", TEXT.replace("W_down", "W_\n"))
st("single-quotes", TEXT.replace('"', "'"))
st("comment-in-json", TEXT[:-1] + "/* */}")
st("trailing-comma", TEXT[:-1] + ",}")
st("missing-dtype", {**HEADER, W_DOWN: {"shape": [8, 2], "data_offsets": [0, 64]}})
st("missing-shape", {**HEADER, W_DOWN: {"dtype": "F32", "data_offsets": [0, 64]}})
st("missing-offsets", {**HEADER, W_DOWN: {"dtype": "F32", "shape": [8, 2]}})
st("tensor-null", {**HEADER, "x": None})
st("tensor-number", {**HEADER, "x": 3})
st("tensor-list", {**HEADER, "x": ["F32", [0], [224, 224]]})
st("nested-lists", f'{{"x": {"[" * 100_000}{"]" * 100_000}, {TEXT[1:]}')
st("nested-objects", '{"x": ' + '{"x": ' * 100_000 + "1" + "}" * 100_000 + ", " + TEXT[1:])
st_text("nested-dtype", f'"{W_DOWN}": {{"dtype": "F32"',
        f'"{W_DOWN}": {{"dtype": {"[" * 900}{"]" * 900}')  # fmt: skip
st("empty-tensor-inside-another", with_tensor("empty", [0], 32, 32))
st("empty-tensor-beyond-the-end", with_tensor("empty", [0], 1 << 40, 1 << 40))

# accepted by safetensors 0.8, but refused here
st("duplicate-tensor", TEXT[:-1] + ", " + _DOWN_TEXT.replace("[8, 2]", "[2, 8]") + "}")
st("shape-0-2-63-4", with_tensor("empty", [0, 1 << 63, 4], 224, 224))
st("shape-2-64-less-1-and-0", with_tensor("empty", [(1 << 64) - 1, 0], 224, 224))
st("unknown-field", with_fields(comment="hello"))
st("metadata-null", {"__metadata__": None, **HEADER})
st("name-empty", with_tensor("", [0], 224, 224))
st("name-nul", with_tensor("a\0b", [0], 224, 224))
st("name-parent", with_tensor("../../etc/passwd", [0], 224, 224))
st("name-parent-by-backslash", with_tensor("x\\..\\y", [0], 224, 224))
st("name-escape", with_tensor("\x1b[2J", [0], 224, 224))
st("name-newline", with_tensor("a\nOK: fine", [0], 224, 224))
st("name-of-5000-bytes", with_tensor("x" * 5000, [0], 224, 224))
st("name-with-line-separator-and-wrong-size", with_tensor("a\u2028OK: fine", [9], 224, 224))
st("leading-space", " " + TEXT)
st("leading-newline", "\n" + TEXT)
st("data-start-misaligned", TEXT + " " * ((4 - len(TEXT)) % 8), padded=False)
st("data-start-odd", TEXT + " " * ((1 - len(TEXT)) % 8), padded=False)
st("f32-at-odd-offset", {
    "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    **moved(1, 65, 65, 129, 129, 225),
}, b"\0" + DATA)  # fmt: skip
st("rank-100000", with_fields(shape=[8, 2, *[1] * 100_000]))
st("rank-65", with_fields(shape=[8, 2, *[1] * 63]))

# memory and time
st("header-over-the-limit", " " * 100_000_000 + TEXT)
st("header-of-empty-objects", f'{{"x": [{"{}," * 2_700_000}{{}}], {TEXT[1:]}')
st("header-of-empty-lists", f'{{"x": [{"[]," * 2_700_000}[]], {TEXT[1:]}')
st("header-of-numbers", f'{{"x": [{"999," * 2_000_000}1], {TEXT[1:]}')
st("header-of-names", "{" + "".join(f'"{n}":0,' for n in range(700_000)) + TEXT[1:])
st("duplicate-after-40000-names", "{" + "".join(f'"{n}":0,' for n in range(40_000))
   + '"last":0,"last":0}')  # fmt: skip


def _header_of_100_mb(directory: Path) -> Path:
    """A header just over the limit of safetensors, in a file that is long enough."""
    path = write_safetensors(directory, length=100_000_001)
    os.truncate(path, 100_001_000)
    return path


ST_CASES.append(("header-length-100-000-001", _header_of_100_mb))

# not safetensors at all
for _name, _content in {
    "empty-file": b"", "seven-bytes": b"\0" * 7, "only-a-length": struct.pack("<Q", 0),
    "zeros": b"\0" * 4096, "text": b"version https://git-lfs.github.com/spec/v1\n",
    "gguf": b"GGUF\3\0\0\0" + b"\0" * 100, "pickle": VALID, "html": b"<!doctype html>" + b" " * 99,
}.items():  # fmt: skip
    ST_CASES.append((f"file-{_name}", partial(
        write_file, content=_content, name="npt_weights.safetensors"
    )))  # fmt: skip


# --- indexes of shards

INDEX = "npt_weights.safetensors.index.json"
ONE, TWO = "one.safetensors", "two.safetensors"
WHERE = {W_DOWN: ONE, W_A_UP: ONE, W_B_UP: TWO}


def shard_bytes(*names: str) -> bytes:
    """A valid safetensors file of some of the tensors."""
    header: Header = {}
    data = b""
    for name in names:
        begin, end = HEADER[name]["data_offsets"]
        place = [len(data), len(data) + end - begin]
        header[name] = {**HEADER[name], "data_offsets": place}
        data += DATA[begin:end]
    return safetensors_bytes(header, data)


def write_index(
    directory: Path,
    weight_map: Any = WHERE,
    *,
    raw: bytes | str | None = None,
    prepare: Callable[[Path], object] = lambda directory: None,
    **shards: bytes,
) -> Path:
    """Write an index of two shards, except for the given changes.

    Args:
        directory: directory to write to; its folder ``outside`` gets complete copies of the shards,
            which a reader must not open.
        weight_map: mapping in the index.
        raw: bytes of the index, in place of `weight_map`.
        prepare: function that is called on `directory` at the end.
        shards: contents of the shards ``one`` and ``two``.
    """
    content = {"one": shard_bytes(W_DOWN, W_A_UP), "two": shard_bytes(W_B_UP), **shards}
    inside, outside = directory / "checkpoint", directory / "outside"
    (inside / "folder").mkdir(parents=True)
    outside.mkdir()
    for name, piece in content.items():
        for place in (inside, inside / "folder", outside):
            (place / f"{name}.safetensors").write_bytes(piece)
    if raw is None:
        raw = json.dumps({"metadata": {"total_size": 224}, "weight_map": weight_map})
    path = inside / INDEX
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    prepare(inside)
    return path


def index(name: str, weight_map: Any = WHERE, **options: Any) -> None:
    """Add a case that `write_index` writes."""
    ST_CASES.append((f"index-{name}", partial(write_index, weight_map=weight_map, **options)))


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Replace the second shard by what `make` makes at its path."""

    def prepare(directory: Path) -> None:
        (directory / TWO).unlink()
        make(directory / TWO)

    return prepare


for _name, _shard in {
    "parent": "../outside/two.safetensors", "sub-directory": "folder/two.safetensors",
    "dot": "./two.safetensors", "absolute": "/tmp/two.safetensors", "drive": "C:two.safetensors",
    "drive-root": "C:\\two.safetensors", "backslash": "folder\\two.safetensors",
    "backslash-parent": "..\\outside\\two.safetensors", "other-suffix": "two.bin", "pickle": "a.pt",
    "empty": "", "only-suffix": ".safetensors", "hidden": ".two.safetensors", "url": "http://a/b",
    "nul": "two.safetensors\0", "newline": "two.safetensors\n", "home": "~/two.safetensors",
    "option": "-two.safetensors", "long": "a" * 300 + ".safetensors", "parent-alone": "..",
    "not-ascii": "tw\u043e.safetensors", "missing": "absent.safetensors", "list": [TWO],
    "number": 2, "null": None, "true": True, "object": {"file": TWO},
}.items():  # fmt: skip
    index(f"shard-{_name}", {**WHERE, W_B_UP: _shard})
index("tensor-not-in-its-shard", {**WHERE, "layer_4_np.W_down": ONE})
index("tensor-not-in-its-shard-newline", {**WHERE, "a\nOK: fine": ONE})
index("tensor-not-in-its-shard-surrogate", {**WHERE, "a\ud800": ONE})
index("newline-in-the-name-of-a-tensor-elsewhere", {**WHERE, "a\nOK: fine": "../x"})
index("tensor-in-the-other-shard", {**WHERE, W_A_UP: TWO})
index("tensor-in-two-shards", two=shard_bytes(W_B_UP, W_A_UP))
index("tensor-in-two-shards-wrong-one-last", {**WHERE, W_A_UP: ONE}, two=shard_bytes(*HEADER))
index("tensor-not-in-the-index", {W_DOWN: ONE, W_B_UP: TWO})
index("shard-broken", two=shard_bytes(W_B_UP)[:-1])
index("shard-empty-file", two=b"")
index("shard-is-a-zip", two=b"PK\3\4" + b"\0" * 100)
index("shard-link-outside", prepare=_replaced(lambda path: path.symlink_to("../outside/" + TWO)))
index("shard-link-absolute", prepare=_replaced(
    lambda path: path.symlink_to(path.parent.parent / "outside" / TWO)
))  # fmt: skip
index("shard-link-inside", prepare=_replaced(lambda path: path.symlink_to("folder/" + TWO)))
index("shard-link-broken", prepare=_replaced(lambda path: path.symlink_to("absent")))
index("shard-link-to-itself", prepare=_replaced(lambda path: path.symlink_to(TWO)))
index("shard-directory", prepare=_replaced(Path.mkdir))
index("shard-pipe", prepare=_replaced(os.mkfifo))
for _name, _map in {
    "list": [ONE, TWO], "string": ONE, "null": None, "number": 3, "empty": {}, "true": True,
}.items():  # fmt: skip
    index(f"map-{_name}", _map)
_VALID_INDEX = json.dumps({"weight_map": WHERE})
_IN_METADATA = '{"metadata": {"total_size": %s}, ' + _VALID_INDEX[1:]
for _name, _raw in {
    "no-map": "{}",
    "list": "[]",
    "empty-file": "",
    "number-too-large": _IN_METADATA % "1e400",
    "number-too-small": _IN_METADATA % "1e-400",
    "number-of-5000-digits": _IN_METADATA % ("9" * 5000),
    "nested-101-deep": _IN_METADATA % ("[" * 100 + "]" * 100),
    "cut": _VALID_INDEX[:-5],
    "garbage-after": _VALID_INDEX + "x",
    "duplicate-tensor": _VALID_INDEX[:-2] + f', "{W_DOWN}": "{TWO}"}}}}',
    "duplicate-map": _VALID_INDEX[:-1] + ', "weight_map": {}}',
    "nested": '{"metadata": ' + "[" * 200_000 + "]" * 200_000 + ", " + _VALID_INDEX[1:],
    "nested-shard": f'{{"weight_map": {{"{W_DOWN}": {"[" * 900}{"]" * 900}}}}}',
    "over-100-mb": " " * 100_000_000 + _VALID_INDEX,
    "of-empty-objects": '{"weight_map": [' + "{}," * 3_490_000 + "{}]}",
}.items():  # fmt: skip
    index(_name, raw=_raw)
index("utf-16-cut", raw=_VALID_INDEX.encode("utf-16")[:-1])
index("utf-16-without-its-mark-cut", raw=_VALID_INDEX.encode("utf-16-be")[:-2])
index(
    "utf-16-duplicate-tensor", raw=_IN_METADATA.replace("metadata", "weight_map").encode("utf-16")
)
index("not-utf8", raw=_VALID_INDEX.encode().replace(b"W_down", b"W_\xff\xfe"))


# --- valid files

CONTROLS: list[Case] = [
    ("pt", write_pt),
    ("pt-hidden-nothing", partial(write_pt, pickle=beside(dict_of((text("version"), integer(1)))))),
    ("pt-zip64", partial(write_pt, wide={}, end=_SATURATED)),
    ("pt-old-without-byteorder", partial(write_pt, drop="byteorder")),
    ("pt-memo-2-31", partial(write_pt, pickle=beside(NONE + b"r\0\0\0\x80j\0\0\0\x80\x86"))),
    ("safetensors", write_safetensors),
    ("safetensors-padded-to-4096", lambda d: write_safetensors(d, TEXT + " " * (4088 - len(TEXT)))),
    ("safetensors-other-order", lambda d: write_safetensors(d, dict(reversed(HEADER.items())))),
    ("index", write_index),
    ("index-nan", partial(write_index, raw=_IN_METADATA % "NaN")),
    ("index-infinity", partial(write_index, raw=_IN_METADATA % "-Infinity")),
    ("index-byte-order-mark", partial(write_index, raw="\ufeff" + _VALID_INDEX)),
    ("index-utf-16", partial(write_index, raw=_VALID_INDEX.encode("utf-16"))),
]
"""The same files without anything wrong: proves that the cases fail for what is wrong in them."""

NO_WEIGHTS: list[Case] = [
    ("f6", lambda d: write_safetensors(
        d, with_fields(dtype="F6_E2M3", shape=[8, 8], data_offsets=[0, 48])
        | {W_A_UP: {**HEADER[W_A_UP], "data_offsets": [48, 112]},
           W_B_UP: {**HEADER[W_B_UP], "data_offsets": [112, 208]}}, DATA[:208])),
    ("bool-of-2", lambda d: write_safetensors(
        d, with_fields(dtype="BOOL", shape=[8, 8]), b"\2" * 64 + DATA[64:])),
    ("empty", lambda d: write_safetensors(d, "{}", b"")),
    ("empty-tensor", lambda d: write_safetensors(d, with_tensor("layer_3_np.x", [0], 224, 224))),
    ("scalar", lambda d: write_safetensors(
        d, with_tensor("layer_3_np.W_down_up", [], 224, 228), DATA + b"\0" * 4)),
]  # fmt: skip
"""Well-formed files whose tensors are no weights of an NP component: the next layer refuses."""
