"""A file with a wrong name is refused with its true kind and advice."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import npt_fast as npt
from npt_fast.checkpoint import file_kind
from tests.checkpoints import layer_weights, trained_checkpoint, write_checkpoint, write_shards

WEIGHTS = layer_weights(11, modulation="dual")


def torch_bytes(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, **options)
    return buffer.getvalue()


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("checkpoint-8/npt_weights.pt"))
    return buffer.getvalue()


def zip_bytes(compression: int, *members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for member in members:
            archive.writestr(member, torch_bytes())
    return buffer.getvalue()


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


PT, SAFETENSORS = torch_bytes(), save(WEIGHTS)
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
# what the file is and what to do: for both kinds of weights
KINDS: dict[str, tuple[bytes, str]] = {
    "git-lfs": (POINTER, "it is a Git LFS pointer, .*git lfs pull"),
    "git-lfs-of-windows": (POINTER.replace(b"\n", b"\r\n"), "a Git LFS pointer, .*git lfs pull"),
    "git-annex": (b"/annex/objects/SHA256E-s5--0a.pt\n", "git-annex pointer.*git annex get"),
    "web-page": (b"\n<!DOCTYPE html>\n<html lang=en>", "a web page .*download it again"),
    "web-page-without-doctype": (b"<HTML><head>404", "a web page .*download it again"),
    "xml-error": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "error message .*download"),
    "text-error": (b"Entry not found", "text that begins with 'Entry not found'; .*download"),
    "json-error": (b'{"error": "Unauthorized"}', r"text that begins with '\{\"error\": .*download"),
    "long-text-cut-in-a-character": ("é".encode() * 400, "text that begins with 'éé.*download"),
    "powershell": (PT.decode("latin-1").encode("utf-16"), "UTF-16 text, .*PowerShell"),
    "empty": (b"", "it is empty; copy or download it again"),
    "zeros": (b"\0" * 70_000, "zero bytes .*never reached the disk; copy or download"),
    "few-zeros": (b"\0" * 20, "zero bytes .*never reached the disk; copy or download"),
    "gzip": (gzip.compress(PT), r"compressed with gzip; decompress it \(gunzip\)"),
    "bzip2": (bz2.compress(PT), "compressed with bzip2; decompress"),
    "xz": (lzma.compress(PT), "compressed with xz; decompress"),
    "zstd": (b"\x28\xb5\x2f\xfd" + PT, "compressed with zstd; decompress"),
    "tar": (tar_bytes(), "a tar archive; unpack it"),
    "tar-gz": (gzip.compress(tar_bytes()), "compressed with gzip"),
    "gguf": (b"GGUF\3\0\0\0" + b"\0" * 99, "a GGUF file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "an HDF5 file, as Keras writes"),
    "npy": (npy_bytes(), "a NumPy array"),
    "before-1.6": (
        torch_bytes(_use_new_zipfile_serialization=False),
        r"from torch before 1\.6; load it with torch\.load\(weights_only=True\) and save it again",
    ),
    "pickle": (pickle.dumps({"a": 1}), "a plain pickle, which can run code and is not read"),
    "noise": (b"\xff\xfd\xfc" + bytes(range(99)), "of an unknown kind: .* ff fd fc 00 01 02 03 04"),
}
PT_KINDS = KINDS | {
    "safetensors": (SAFETENSORS, r"a safetensors file; .* rename it so that it ends in \.safetens"),
    "zip-of-a-checkpoint": (zip_bytes(8, "run/npt_weights.pt", "run/config.json"), "zip archive.*"),
    "zip-without-folder": (zip_bytes(0, "npt_weights.pt"), "a zip archive .*unpack it"),
    "npz": (npz_bytes(), r"a NumPy archive \(\.npz\)"),
    "keras": (zip_bytes(0, "metadata.json", "config.json", "model.weights.h5"), "a Keras model"),
    "cut": (PT[:-1], "truncated, .* copy or download it again"),
    "cut-early": (PT[:21], "truncated, .* copy or download it again"),
    "half-zeros": (PT[: len(PT) // 2].ljust(len(PT), b"\0"), "truncated, .* copy or download"),
    "empty-zip": (zip_bytes(0), "an empty zip archive"),
}
SAFETENSORS_KINDS = KINDS | {
    "pt": (PT, r"what torch\.save writes; .* rename it so that it ends in \.pt"),
    "npz": (npz_bytes(), "a zip archive; unpack it"),
    "zip-of-a-checkpoint": (zip_bytes(8, "run/npt_weights.pt"), "a zip archive; unpack it"),
    "cut": (SAFETENSORS[:-1], "truncated or extended: copy or download it again"),
    "cut-in-the-header": (SAFETENSORS[:200], "truncated: copy or download it again"),
    "cut-early": (SAFETENSORS[:9], "truncated: copy or download it again"),
}


def assert_safetensors(length: int) -> None:
    """The first bytes of a safetensors file with a header of this length are recognised."""
    for rest in (b"", b'"__metadata__":{}}' + b" " * file_kind.HEAD):
        head = struct.pack("<Q", length) + b"{" + rest
        assert file_kind.may_be_safetensors(head) and not file_kind.is_pickle(head), length
        assert file_kind.recognise(head).startswith("a safetensors file"), length


def test_no_length_of_a_header_makes_it_another_file() -> None:
    for length in range(0, (1 << 20) + 1, 8):
        assert_safetensors(length)


# lengths of headers whose bytes are the first bytes of other kinds of files
@example(int.from_bytes(b"\x1f\x8b\x08\0", "little"))
@example(int.from_bytes(b"BZh9", "little"))
@example(int.from_bytes(b"PK\3\4", "little"))
@example(int.from_bytes(b"GGUF", "little"))
@example(int.from_bytes(b"\x80\x02}q", "little"))
@example(int.from_bytes(b"\x28\xb5\x2f\xfd", "little"))
@given(st.integers(0, (1 << 32) - 1))
@settings(deadline=None, derandomize=True)
def test_nor_does_any_larger_one(length: int) -> None:
    assert_safetensors(length)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [{}, {"a": [1]}, ["a"], OSError], ids=repr)
def test_pickles_of_every_protocol(value: object, protocol: int) -> None:
    head = pickle.dumps(value, protocol)
    assert file_kind.is_pickle(head) and "pickle" in file_kind.recognise(head)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_a_pickle(zipped: bool) -> None:
    content = torch_bytes(_use_new_zipfile_serialization=zipped)
    assert file_kind.is_pickle(content[: file_kind.HEAD])


@pytest.mark.parametrize("content", [b"", POINTER, SAFETENSORS, npz_bytes(), b"(draft)", b"cat\n"])
def test_what_is_no_pickle(content: bytes) -> None:
    assert not file_kind.is_pickle(content[: file_kind.HEAD])


def refusal(path: Path) -> str:
    """The message with which `inspect` refuses a path; the other verbs open it in the same way."""
    with pytest.raises(npt.CheckpointError) as caught:
        npt.inspect(path)
    return str(caught.value)


def check(line: str, file: Path, says: str) -> None:
    assert line.startswith(f"{file}: ") and line.isprintable()
    assert re.search(says, line), line
    assert ("before 1.6" in line) == ("before 1" in says)


@pytest.mark.parametrize("kind", PT_KINDS)
def test_in_the_place_of_pt_weights(tmp_path: Path, kind: str) -> None:
    content, says = PT_KINDS[kind]
    (tmp_path / "npt_weights.pt").write_bytes(content)
    check(refusal(tmp_path), tmp_path / "npt_weights.pt", says)
    check(refusal(tmp_path / "npt_weights.pt"), tmp_path / "npt_weights.pt", says)


@pytest.mark.parametrize("kind", SAFETENSORS_KINDS)
def test_in_the_place_of_safetensors(tmp_path: Path, kind: str) -> None:
    content, says = SAFETENSORS_KINDS[kind]
    (tmp_path / "npt_weights.safetensors").write_bytes(content)
    check(refusal(tmp_path), tmp_path / "npt_weights.safetensors", says)


@pytest.mark.parametrize("kind", ["git-lfs", "empty", "pt", "web-page"])
def test_in_the_place_of_a_shard(tmp_path: Path, kind: str) -> None:
    content, says = SAFETENSORS_KINDS[kind]
    path = write_shards(tmp_path / "c", [layer_weights(1), layer_weights(2)])
    shard = path / "npt_weights-00002-of-00002.safetensors"
    shard.write_bytes(content)
    check(refusal(path), shard, says)


@pytest.mark.parametrize("kind", ["git-lfs", "empty", "web-page", "gzip", "zeros"])
def test_in_the_place_of_an_index(tmp_path: Path, kind: str) -> None:
    content, says = KINDS[kind]
    path = write_shards(tmp_path / "c", [layer_weights(1), layer_weights(2)])
    index = path / "npt_weights.safetensors.index.json"
    index.write_bytes(content)
    check(refusal(path), index, says.removeprefix("it "))


@pytest.mark.parametrize("name", ["training_state.pt", "multi_layer_state.pt"])
@pytest.mark.parametrize("kind", ["git-lfs", "empty", "web-page", "gzip", "before-1.6", "cut"])
def test_in_the_place_of_a_state(tmp_path: Path, name: str, kind: str) -> None:
    content, says = PT_KINDS[kind]
    path = trained_checkpoint(tmp_path / "c", 11)
    (path / name).write_bytes(content)
    (problem,) = npt.inspect(path).problems
    check(problem, path / name, says)
    with pytest.raises(npt.CheckpointError) as caught:
        npt.merge([path], tmp_path / "out")
    check(str(caught.value), path / name, says)


@pytest.mark.parametrize(("old", "new"), [("pt", "safetensors"), ("safetensors", "pt")])
def test_the_advice_to_rename_works(tmp_path: Path, old: str, new: str) -> None:
    """A file of one format under a name of the other."""
    wrong = tmp_path / f"npt_weights.{old}"
    wrong.write_bytes(PT if new == "pt" else SAFETENSORS)
    assert f"rename it so that it ends in .{new}" in refusal(tmp_path)
    wrong.rename(tmp_path / f"npt_weights.{new}")
    assert [info.layer for info in npt.inspect(tmp_path).layers] == [11]


def test_the_advice_for_old_files_works(tmp_path: Path) -> None:
    path = tmp_path / "npt_weights.pt"
    path.write_bytes(torch_bytes(_use_new_zipfile_serialization=False))
    torch.save(torch.load(path, weights_only=True), path)
    assert [info.layer for info in npt.inspect(tmp_path).layers] == [11]


def test_the_advice_to_unpack_works(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", WEIGHTS)
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "run")
    packed = (tmp_path / "packed.zip").rename(tmp_path / "packed.pt")
    assert "unpack it" in refusal(packed)
    shutil.unpack_archive(packed, tmp_path / "unpacked", "zip")
    assert [info.layer for info in npt.inspect(tmp_path / "unpacked" / "run").layers] == [11]


def test_a_good_file_may_begin_like_another_kind(tmp_path: Path) -> None:
    """640, the length of its header, has the first bytes of a pickle."""
    (size,) = struct.unpack("<Q", SAFETENSORS[:8])
    header = json.dumps(json.loads(SAFETENSORS[8 : 8 + size]), separators=(",", ":")).encode()
    content = struct.pack("<Q", 640) + header.ljust(640) + SAFETENSORS[8 + size :]
    assert len(header) <= 640 and file_kind.recognise(content[:8] + b"}").startswith("a plain pick")
    path = tmp_path / "npt_weights.safetensors"
    path.write_bytes(content)
    assert [info.layer for info in npt.inspect(path).layers] == [11]
    path.write_bytes(content[:-1])
    check(refusal(path), path, "truncated or extended")
