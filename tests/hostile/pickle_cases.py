"""Checkpoints in ``.pt`` files whose pickle is malicious or broken."""

from __future__ import annotations

import struct

import numpy as np

from tests.hostile.pickles import (
    ARGUMENTS,
    COMMAND,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    FALSE,
    FLOATS,
    MARK,
    NONE,
    ORDERED_DICT,
    PAYLOADS,
    PROTO,
    REBUILD,
    REBUILD_V3,
    STOP,
    SYSTEM,
    TRUE,
    VALID,
    W_DOWN,
    Case,
    beside,
    call,
    dict_of,
    integer,
    integers,
    items,
    real,
    storage,
    storage_id,
    symbol,
    tensor,
    text,
    tuple_of,
    weights,
)
from tests.hostile.zips import ROOT, Member, pt_adder

CASES: list[Case] = []
pt = pt_adder(CASES)


def down(name: str, value: bytes) -> None:
    """Add a case whose first tensor is pickled wrongly."""
    pt(name, pickle=weights(value))


def _numbered(before: bytes, count: int, after: bytes = b"") -> bytes:
    """``before``, a number of four bytes and ``after``, for each number below a count."""
    rows = np.zeros(count, [("before", "S1"), ("number", "<u4"), ("after", f"S{len(after)}")])
    rows["before"], rows["number"], rows["after"] = before, np.arange(count), after
    return rows.tobytes()


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
pt("many-memos", pickle=PROTO + NONE + _numbered(b"r", 1_500_000) + STOP)
pt("many-dict-items", pickle=(
    PROTO + EMPTY_DICT + MARK + _numbered(b"J", 1_500_000, NONE) + b"u" + STOP
))  # fmt: skip
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
