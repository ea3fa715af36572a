"""Checkpoints in shards whose index, or a shard, is malicious or broken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.pickles import DATA, W_A_UP, W_B_UP, W_DOWN, Case
from tests.hostile.safetensors_cases import HEADER, Header, safetensors_bytes

CASES: list[Case] = []
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
    CASES.append((f"index-{name}", partial(write_index, weight_map=weight_map, **options)))


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
VALID_INDEX = json.dumps({"weight_map": WHERE})
IN_METADATA = '{"metadata": {"total_size": %s}, ' + VALID_INDEX[1:]
for _name, _raw in {
    "no-map": "{}",
    "list": "[]",
    "empty-file": "",
    "number-too-large": IN_METADATA % "1e400",
    "number-too-small": IN_METADATA % "1e-400",
    "number-of-5000-digits": IN_METADATA % ("9" * 5000),
    "nested-101-deep": IN_METADATA % ("[" * 100 + "]" * 100),
    "cut": VALID_INDEX[:-5],
    "garbage-after": VALID_INDEX + "x",
    "duplicate-tensor": VALID_INDEX[:-2] + f', "{W_DOWN}": "{TWO}"}}}}',
    "duplicate-map": VALID_INDEX[:-1] + ', "weight_map": {}}',
    "nested": '{"metadata": ' + "[" * 200_000 + "]" * 200_000 + ", " + VALID_INDEX[1:],
    "nested-shard": f'{{"weight_map": {{"{W_DOWN}": {"[" * 900}{"]" * 900}}}}}',
    "over-100-mb": " " * 100_000_000 + VALID_INDEX,
    "of-empty-objects": '{"weight_map": [' + "{}," * 3_490_000 + "{}]}",
}.items():  # fmt: skip
    index(_name, raw=_raw)
index("utf-16-cut", raw=VALID_INDEX.encode("utf-16")[:-1])
index("utf-16-without-its-mark-cut", raw=VALID_INDEX.encode("utf-16-be")[:-2])
index("utf-16-duplicate-tensor", raw=IN_METADATA.replace("metadata", "weight_map").encode("utf-16"))
index("not-utf8", raw=VALID_INDEX.encode().replace(b"W_down", b"W_\xff\xfe"))
