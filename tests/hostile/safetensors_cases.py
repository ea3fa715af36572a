"""Checkpoints in safetensors files that are malicious or broken."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.pickles import DATA, SHAPES, VALID, W_DOWN, Case
from tests.hostile.zips import write_file

CASES: list[Case] = []
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
    CASES.append((name, lambda directory: write_safetensors(directory, *arguments, **options)))


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


CASES.append(("header-length-100-000-001", _header_of_100_mb))

# not safetensors at all
for _name, _content in {
    "empty-file": b"", "seven-bytes": b"\0" * 7, "only-a-length": struct.pack("<Q", 0),
    "zeros": b"\0" * 4096, "text": b"version https://git-lfs.github.com/spec/v1\n",
    "gguf": b"GGUF\3\0\0\0" + b"\0" * 100, "pickle": VALID, "html": b"<!doctype html>" + b" " * 99,
}.items():  # fmt: skip
    CASES.append((f"file-{_name}", partial(
        write_file, content=_content, name="npt_weights.safetensors"
    )))  # fmt: skip
