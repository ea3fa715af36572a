"""Files without the faults of the cases."""

from __future__ import annotations

from functools import partial

from tests.hostile.index_cases import IN_METADATA, VALID_INDEX, write_index
from tests.hostile.pickles import DATA, NONE, W_A_UP, W_B_UP, Case, beside, dict_of, integer, text
from tests.hostile.safetensors_cases import (
    HEADER,
    TEXT,
    with_fields,
    with_tensor,
    write_safetensors,
)
from tests.hostile.zip_cases import SATURATED
from tests.hostile.zips import write_pt

CONTROLS: list[Case] = [
    ("pt", write_pt),
    ("pt-hidden-nothing", partial(write_pt, pickle=beside(dict_of((text("version"), integer(1)))))),
    ("pt-zip64", partial(write_pt, wide={}, end=SATURATED)),
    ("pt-old-without-byteorder", partial(write_pt, drop="byteorder")),
    ("pt-memo-2-31", partial(write_pt, pickle=beside(NONE + b"r\0\0\0\x80j\0\0\0\x80\x86"))),
    ("safetensors", write_safetensors),
    ("safetensors-padded-to-4096", lambda d: write_safetensors(d, TEXT + " " * (4088 - len(TEXT)))),
    ("safetensors-other-order", lambda d: write_safetensors(d, dict(reversed(HEADER.items())))),
    ("index", write_index),
    ("index-nan", partial(write_index, raw=IN_METADATA % "NaN")),
    ("index-infinity", partial(write_index, raw=IN_METADATA % "-Infinity")),
    ("index-byte-order-mark", partial(write_index, raw="\ufeff" + VALID_INDEX)),
    ("index-utf-16", partial(write_index, raw=VALID_INDEX.encode("utf-16"))),
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
