"""Random changes of files: at any byte, and at the boundaries that a format has.

An edit takes the bytes of a file, a source of random numbers and other files of the same kind, and
returns other bytes. If the bytes are not of the edit's format, it calls `damage`.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.hostile import pickles

Edit = Callable[[bytes, Random, Sequence[bytes]], bytes]

MAX_BYTES = 1 << 20
"""An input grows no further: every limit on time and memory holds for files of this size."""

_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 1 << 31, (1 << 32) - 1, (1 << 63) - 1,
            1 << 63, (1 << 64) - 1]  # fmt: skip


def damage(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change bytes at a random place."""
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice([1, 2, 4, 8, 16, 64, 512]))
    match random.randrange(9):
        case 0:
            flipped = bytearray(data)
            if at < len(data):
                flipped[at] ^= 1 << random.randrange(8)
            return bytes(flipped)
        case 1:
            return data[:at] + random.randbytes(end - at) + data[end:]
        case 2:
            return data[:at] + data[end:]
        case 3:
            return data[:end] + data[at:end] * random.choice([1, 1, 2, 50]) + data[end:]
        case 4:
            width = random.choice([1, 2, 4, 8])
            number = random.choice(_NUMBERS) % (1 << 8 * width)
            order = random.choice(["little", "big"])
            return data[:at] + number.to_bytes(width, order) + data[at + width :]
        case 5:
            return data[:at]
        case 6:
            return data[at:]
        case 7:
            other = random.choice(others)
            cut = random.randrange(len(other) + 1)
            return data[:at] + other[cut : cut + random.choice([4, 64, 4096])] + data[end:]
        case _:
            return data[:at] + bytes(end - at) + data[end:]


# --- text


def tokens(pattern: str, odd: Sequence[str]) -> Edit:
    """Change a text between its tokens; an inserted token may be one of `odd`."""
    split = re.compile(pattern, re.DOTALL)

    def edit(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
        parts = split.findall(data.decode("utf-8", "surrogateescape"))
        if not parts:
            return damage(data, random, others)
        at = random.randrange(len(parts))
        end = min(len(parts), at + random.choice([1, 1, 2, 4, 16]))
        match random.randrange(6):
            case 0 | 1:
                parts[at] = random.choice(odd)
            case 2:
                parts[at:at] = [random.choice(odd)]
            case 3:
                del parts[at:end]
            case 4:
                parts[at:at] = parts[at:end] * random.choice([1, 1, 3, 300])
            case _:
                other = random.randrange(len(parts))
                parts[at], parts[other] = parts[other], parts[at]
        return "".join(parts).encode("utf-8", "surrogateescape")

    return edit


def other_encoding(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Write the same text in another encoding, like another program."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return damage(data, random, others)
    encoding = random.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7", "latin1"])
    return text.encode(encoding, "surrogatepass" if "16" in encoding else "replace")


_ODD_TEXTS = [
    "", "\0", "\n", "\x1b[2J", "\u2028", "\u202e", "é", "漢", "\U0001f600", "../../etc/passwd",
    "/dev/zero", "~", "~root", "0", "-1", "1e5", "nan", "x" * 300, "x" * 70_000, "%s{}", "a\tb",
    "None", "true", "null", "os.system",
]  # fmt: skip
_ODD_JSON = [
    "null", "true", "0", "-0", "-1", "1.5", "1e999", "1e-999", "-1E400", "NaN", "-Infinity", "01",
    "9" * 40, "9" * 5000, str(1 << 63), "[]", "{}", '""', '"\\ud800"', '"\\u0000"', '"\\udc80"',
    "[" * 90 + "]" * 90, '{"":' * 90 + "0" + "}" * 90, "[" * 3000 + "]" * 3000, "[" * 100_000,
    "[" + "0," * 100_000 + "0]", "[" + "[]," * 100_000 + "[]]", ",", ":", "[", "]", "{", "}", "//",
    "'", '"', *(json.dumps(text) for text in _ODD_TEXTS),
]  # fmt: skip
json_tokens = tokens(r'"(?:[^"\\]|\\.){0,200}+"|[-+.\w]+|\s+|.', _ODD_JSON)


def _odd_value(random: Random) -> Any:
    deep: Any = 0
    for _ in range(random.choice([5, 70, 110, 900])):
        deep = [deep] if random.random() < 0.5 else {"a": deep}
    return random.choice([
        None, True, False, 0, 1, -1, 2, 5, 1.5, -0.0, 1e308, float("nan"), float("inf"), 1 << 31,
        (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 127, 10**400, "", [], {}, [[]], {"": 0}, [None], [0],
        ["a"], {"0": {}}, "\ud800", deep, random.choice(_ODD_TEXTS),
    ])  # fmt: skip


def json_value(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change a value, key or container in a JSON document, which stays valid JSON.

    A text that is itself JSON counts as part of the document.
    """
    try:
        document = json.loads(data)
        changed = _changed(document, random)
        text = json.dumps(changed, ensure_ascii=random.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return damage(data, random, others)


def _changed(value: Any, random: Random) -> Any:
    if isinstance(value, str) and value.startswith("{") and random.random() < 0.9:
        return json.dumps(_changed(json.loads(value), random))
    if not value or not isinstance(value, (dict, list)) or random.random() < 0.1:
        return _odd_value(random)
    if isinstance(value, list):
        items = list(value)
        at = random.randrange(len(items))
        match random.randrange(8):
            case 0:
                del items[at]
            case 1:
                items.insert(at, items[at])
            case 2:
                items.insert(at, _odd_value(random))
            case 3:
                random.shuffle(items)
            case _:
                items[at] = _changed(items[at], random)
        return items
    found = dict(value)
    key = random.choice(list(found))
    match random.randrange(8):
        case 0:
            del found[key]
        case 1:
            found[random.choice([*found, *_ODD_TEXTS])] = found.pop(key)
        case 2:
            found[random.choice([*_ODD_TEXTS, "7", "07", "-3"])] = found[key]
        case 3:
            found[key] = _odd_value(random)
        case _:
            found[key] = _changed(found[key], random)
    return found


def in_line(edit: Edit) -> Edit:
    """An edit that changes one line of a text."""

    def edited(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
        lines = data.split(b"\n")
        at = random.randrange(len(lines))
        lines[at] = edit(lines[at], random, others)
        return b"\n".join(lines)

    return edited


yaml_tokens = tokens(
    r"[-\w.]+|\n *|.",
    [
        "&a ", "*a ", "<<: *a", "!!python/object/apply:os.system [true] ", "!!binary ", "!!set ",
        "!!timestamp ", "!!omap ", "!x ", "? ", ": ", "- ", "| ", ">-", "[", "]", "{", "}", ", ",
        "#", "---\n", "...\n", "%YAML 1.2\n", "%TAG ! a\n", "\t", "\r", "\0", "\x85", "\u2028",
        "\ufeff", "'", '"', "\\", "~", "null", "yes", ".nan", "-.inf", "1e400", "0o7", "0x1F",
        "1_000", "190:20:30", "2001-01-01", "2001-99-99", "9" * 5000, "[" * 3000, "- " * 3000,
        "&a [*a, *a]", "&b [" + "*a," * 9 + "]", "\n  ", "\n      ", *_ODD_TEXTS,
    ],
)  # fmt: skip
plain_tokens = tokens(
    r"[-\w.]+|\s|.",
    ["\t", "\n", "\r", "\r\n", "\0", "\x0b", "\x1c", "\x85", "\ufeff", '"', "'", "\\", "#", "/",
     "!", "=", "-", *_ODD_TEXTS],
)  # fmt: skip


# --- safetensors


def safetensors_header(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change the header, and the prefix to its length."""
    if len(data) < 8:
        return damage(data, random, others)
    end = 8 + int.from_bytes(data[:8], "little")
    header = random.choice([json_value, json_value, json_tokens])(data[8:end], random, others)
    header += b" " * (-len(header) % random.choice([8, 8, 8, 1]))
    return struct.pack("<Q", len(header)) + header + data[end:]


# --- zip and pickle


def zip_member(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change the list of members, or the content of one; the zip stays valid."""
    members = _members(data)
    if not members:
        return damage(data, random, others)
    at = random.randrange(len(members))
    name, content = members[at]
    match random.randrange(8):
        case 0:
            del members[at]
        case 1:
            members.insert(random.randrange(len(members)), members[at])
        case 2:
            odd = [name.upper(), name + "/", "../" + name, "x/" + name, name[:-1], name + "0"]
            members[at] = (random.choice([*odd, name.replace("0", "1"), "é/data.pkl"]), content)
        case 3:
            other = random.randrange(len(members))
            members[at], members[other] = (name, members[other][1]), (members[other][0], content)
        case 4:
            random.shuffle(members)
        case 5:
            members.append((random.choice(["a/constants.pkl", "a/data/9", "a/code/x"]), content))
        case _:
            members[at] = (name, damage(content, random, [content for _, content in members]))
    return _zip(members, zipfile.ZIP_DEFLATED if random.random() < 0.05 else zipfile.ZIP_STORED)


def zip_pickle(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change ``data.pkl`` between its opcodes."""
    members = _members(data)
    found = [n for n, (name, _) in enumerate(members) if name.endswith("/data.pkl")]
    if not found:
        return damage(data, random, others)
    name, content = members[found[0]]
    members[found[0]] = (name, pickle_opcodes(content, random))
    return _zip(members, zipfile.ZIP_STORED)


def zip_field(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change a number in one of the zip's own records."""
    places = [match.start() for match in re.finditer(rb"PK[\x01-\x07][\x02-\x08]", data)]
    if not places:
        return damage(data, random, others)
    at = random.choice(places) + random.randrange(4, 46)
    width = random.choice([2, 4])
    number = random.choice([*_NUMBERS, int.from_bytes(data[at : at + width], "little") + 1])
    return data[:at] + (number % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]


def _members(data: bytes) -> list[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(info.file_size for info in archive.infolist()) > MAX_BYTES:
                return []
            return [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # zipfile fails on broken files in many ways
        return []


def _zip(members: Sequence[tuple[str, bytes]], compression: int) -> bytes:
    file = io.BytesIO()
    with (
        warnings.catch_warnings(action="ignore"),
        zipfile.ZipFile(file, "w", compression) as zipped,
    ):
        for name, content in members:
            zipped.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


_FRAGMENTS = [
    *(bytes([code]) for code in b"(N\x88\x89)]}tu012asebRQ.lo\x85\x86\x87\x93\x94\x90\x91\x8f"),
    b"}q\x63", b"]q\x63", b"h\x63", b"h\x00", b"j\xff\xff\xff\xff", b"r\xff\xff\xff\x7f",
    pickles.integer(-1), pickles.integer(1 << 40), pickles.integer((1 << 63) - 1),
    b"\x8a\x10" + b"\xff" * 16, b"\x8b\xff\xff\xff\x7f", b"K\x00", b"M\xff\xff",
    pickles.real(float("nan")), pickles.real(1e300), pickles.text(""), pickles.text("\0"),
    pickles.text("x" * 300), pickles.text("0"),
    b"X\x03\x00\x00\x00\xed\xa0\x80", b"X\xff\xff\xff\xff", b"C\x02ab", b"\x8c\x01a",
    pickles.symbol("posix", "system"), pickles.symbol("builtins", "eval"),
    pickles.symbol("torch", "FloatStorage"), pickles.symbol("torch", "float32"),
    pickles.symbol("torch", "Size"), pickles.symbol("collections", "OrderedDict") + b")R",
    pickles.symbol("collections", "OrderedDict"), pickles.symbol("_codecs", "encode"),
    pickles.symbol("torch._utils", "_rebuild_tensor_v2"), pickles.symbol("numpy", "dtype"),
    pickles.symbol("torch._utils", "_rebuild_parameter"),
    pickles.call(pickles.symbol("posix", "system"), pickles.text("touch canary")),
    pickles.call(pickles.symbol("_codecs", "encode"), pickles.text("a"), pickles.text("latin1")),
    pickles.call(pickles.symbol("torch", "Size"), pickles.integers(1, 2)),
    pickles.tensor(), pickles.storage(), b"\x85" * 70, b"]q\x63h\x63a", b"h\x01h\x01\x86q\x01" * 40,
]  # fmt: skip


def pickle_opcodes(data: bytes, random: Random) -> bytes:
    """Remove, repeat or exchange opcodes of a pickle, or insert others."""
    try:
        starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    except Exception:  # it is broken already
        starts = []
    if len(starts) < 3:
        return data + random.choice(_FRAGMENTS)
    codes = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    at = random.randrange(1, len(codes))
    end = min(len(codes), at + random.choice([1, 1, 1, 2, 4, 16]))
    match random.randrange(7):
        case 0:
            del codes[at:end]
        case 1:
            codes[at:at] = codes[at:end] * random.choice([1, 1, 2, 200])
        case 2 | 3:
            codes.insert(at, random.choice(_FRAGMENTS))
        case 4:
            codes[at] = random.choice(_FRAGMENTS)
        case 5:
            other = random.randrange(1, len(codes))
            codes[at], codes[other] = codes[other], codes[at]
        case _:
            codes[at] = damage(codes[at], random, codes)
    return b"".join(codes)


TEXT: list[Edit] = [damage, plain_tokens, plain_tokens, other_encoding]
JSON: list[Edit] = [damage, json_value, json_value, json_value, json_tokens, other_encoding]
JSON_LINES: list[Edit] = [
    damage, *(in_line(edit) for edit in (damage, json_value, json_value, json_tokens)), json_tokens,
    other_encoding,
]  # fmt: skip
YAML: list[Edit] = [damage, yaml_tokens, yaml_tokens, yaml_tokens, other_encoding]
SAFETENSORS: list[Edit] = [damage, safetensors_header, safetensors_header]
TORCH: list[Edit] = [damage, zip_field, zip_member, zip_pickle, zip_pickle, zip_pickle]
BINARY: list[Edit] = [damage]
