"""Output files can be read by other programs, and are laid out so that blocks can be shared."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import npt_fast as npt
from npt_fast.checkpoint.layout import OutputFile, TorchZipLayout, lay_out_safetensors
from npt_fast.checkpoint.recipe import Recipe
from npt_fast.checkpoint.tensor_source import open_tensors
from tests.checkpoints import layer_weights, raw, write_checkpoint

PAGE = 4096
BIG = {"d": 96, "f": 160, "rank": 16}  # tensors larger than a page


def copies(path: Path) -> list[Recipe]:
    tensors = open_tensors(path).tensors.values()
    return [Recipe(entry.name, entry.dtype, entry.shape, entry) for entry in tensors]


def write(file: OutputFile, directory: Path) -> Path:
    """Write a file like a merge, but with plain writes."""
    path = directory / file.name
    with path.open("wb") as out:
        out.truncate(file.size)
        for piece in file.pieces:
            out.seek(piece.offset)
            for window in piece.recipe.windows():
                out.write(window)
        for offset, data in file.frame({}):
            out.seek(offset)
            out.write(data)
    assert path.stat().st_size == file.size
    return path


def test_records_of_a_pt_keep_their_phase(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", layer_weights(3, num_ranks=3, **BIG))
    recipes = copies(source)
    layout = TorchZipLayout.seal("npt_weights.pt", {recipe.name: recipe for recipe in recipes})
    for piece in layout.pieces:
        origin = piece.recipe.source
        assert origin is not None
        if piece.recipe.nbytes >= PAGE:
            assert piece.offset % PAGE == origin.offset % PAGE
        assert piece.offset % 64 == 0  # what torch.load(mmap=True) relies on for alignment


def test_a_pt_is_what_zipfile_and_torch_expect(tmp_path: Path) -> None:
    weights = layer_weights(3, num_ranks=3, **BIG)
    recipes = copies(write_checkpoint(tmp_path / "a", weights))
    layout = TorchZipLayout.seal("npt_weights.pt", {recipe.name: recipe for recipe in recipes})
    path = write(layout, tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        members = archive.infolist()
        assert {member.compress_type for member in members} == {zipfile.ZIP_STORED}
        assert all(member.CRC for member in members if member.filename.startswith("npt_weights/d"))
    for options in ({"mmap": True}, {"mmap": False}):
        loaded = torch.load(path, weights_only=True, **options)
        assert list(loaded) == list(weights)
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("gigabytes", [1, 5], ids=["32-bit", "zip64"])
def test_tensors_over_4_gb(tmp_path: Path, gigabytes: int) -> None:
    """The files are sparse: their sizes are real, their data are holes."""
    rows, columns = gigabytes << 10, 1 << 18
    header = {
        name: {"dtype": "F32", "shape": [rows, columns], "data_offsets": [n * size, (n + 1) * size]}
        for size in [rows * columns * 4]
        for n, name in enumerate(["a", "b"])
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = tmp_path / "source.safetensors"
    with source.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2 * rows * columns * 4)
    layout = TorchZipLayout.seal("big.pt", {recipe.name: recipe for recipe in copies(source)})
    pieces = list(layout.pieces)
    target = tmp_path / "big.pt"
    with target.open("wb") as out:
        out.truncate(layout.size)
        for offset, data in layout.frame({}):
            out.seek(offset)
            out.write(data)
    # a number at the very end of the second tensor must come out there, and nowhere else
    with target.open("r+b") as out:
        out.seek(pieces[1].offset + rows * columns * 4 - 4)
        out.write(struct.pack("<f", 2.5))
    with zipfile.ZipFile(target) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        assert sizes["big/data/0"] == sizes["big/data/1"] == rows * columns * 4
    loaded = torch.load(target, weights_only=True, mmap=True)
    assert loaded["b"].shape == (rows, columns)
    assert loaded["b"][-1, -1] == 2.5
    assert loaded["a"][-1, -1] == 0
    again = open_tensors(target).tensors
    assert [again[name].offset for name in "ab"] == [piece.offset for piece in pieces]
    os.truncate(target, 0)


def test_content_besides_tensors_is_kept(tmp_path: Path) -> None:
    content = {
        "a": [1, -1, 1 << 40, -(1 << 70), 0.1, float("inf"), True, False, None, "é\n", ""],
        "b": {"t": (1, (2, ())), 3: {}, 0: [[]]},
    }
    path = write(TorchZipLayout.seal("x.pt", content), tmp_path)
    assert torch.load(path, weights_only=True) == content


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.uint8, torch.bool, torch.uint16,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_every_type_survives_in_both_formats(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    values = torch.arange(60, dtype=torch.float32).reshape(6, 10).to(dtype)
    tensors = {"scalar": values[1, 3].clone(), "matrix": values, "empty": values[:0].clone()}
    torch.save(tensors, tmp_path / "in.pt")
    recipes = copies(tmp_path / "in.pt")
    if form == "pt":
        file: OutputFile = TorchZipLayout.seal("x.pt", {recipe.name: recipe for recipe in recipes})
        loaded = torch.load(write(file, tmp_path), weights_only=True)
    else:
        (file,) = lay_out_safetensors(recipes, {}, 1 << 30)
        with safe_open(write(file, tmp_path), "pt") as opened:
            loaded = {name: opened.get_tensor(name) for name in tensors}
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (dtype, tensor.shape)
        assert raw(loaded[name]) == raw(tensor)


def test_safetensors_data_keeps_the_phase_of_its_source(tmp_path: Path) -> None:
    save_file(layer_weights(3, **BIG), tmp_path / "a.safetensors")
    (file,) = lay_out_safetensors(copies(tmp_path / "a.safetensors"), {}, 1 << 30)
    for piece in file.pieces:
        assert piece.recipe.source is not None
        assert piece.offset % PAGE == piece.recipe.source.offset % PAGE


def test_wide_types_come_first_so_that_all_are_aligned(tmp_path: Path) -> None:
    tensors = {
        "half": torch.ones(3, 1, dtype=torch.float16),
        "byte": torch.ones(3, 1, dtype=torch.float8_e5m2),
        "double": torch.ones(3, 1, dtype=torch.float64),
        "float": torch.ones(3, 1, dtype=torch.float32),
    }
    torch.save(tensors, tmp_path / "in.pt")
    (file,) = lay_out_safetensors(copies(tmp_path / "in.pt"), {}, 1 << 30)
    assert [piece.recipe.name for piece in file.pieces] == ["double", "float", "half", "byte"]
    for piece in file.pieces:
        assert piece.offset % (piece.recipe.dtype.bits // 8) == 0


@pytest.mark.parametrize("limit", [1, 7000, 20_000, 10**9])
def test_shards_are_complete_disjoint_and_within_the_limit(tmp_path: Path, limit: int) -> None:
    weights = layer_weights(3, num_ranks=2, **BIG)
    source = write_checkpoint(tmp_path / "a", weights)
    options = npt.MergeOptions(format="safetensors", max_shard_size=limit)
    npt.merge([source], tmp_path / "out", verify=True, options=options)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    index = tmp_path / "out" / "npt_weights.safetensors.index.json"
    assert index.exists() == (limit < 10**9)
    where: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            names = list(opened.keys())
            tensors = {name: opened.get_tensor(name) for name in names}
        nbytes = sum(len(raw(tensor)) for tensor in tensors.values())
        assert nbytes <= limit or len(names) == 1
        assert not where.keys() & tensors.keys()
        where.update(dict.fromkeys(names, shard.name))
        assert all(torch.equal(tensors[name], weights[name]) for name in names)
    assert where.keys() == weights.keys()
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"] == where
        assert content["metadata"]["total_size"] == sum(len(raw(t)) for t in weights.values())


def test_shards_share_one_phase_each(tmp_path: Path) -> None:
    """Two safetensors inputs with different phases become shards that can be cloned entirely."""
    for name, extra in (("a", "x"), ("b", "x" * 900)):
        (tmp_path / name).mkdir()
        save_file(
            layer_weights(ord(name), **BIG),
            tmp_path / name / "npt_weights.safetensors",
            metadata={"note": extra},
        )
    recipes = copies(tmp_path / "a") + copies(tmp_path / "b")
    starts = {recipe.source.offset % PAGE for recipe in recipes[::9] if recipe.source}
    assert len(starts) == 2
    size = sum(recipe.nbytes for recipe in recipes)
    for file in lay_out_safetensors(recipes, {}, size - 1)[:-1]:
        for piece in file.pieces:
            assert piece.recipe.source is not None
            assert piece.offset % PAGE == piece.recipe.source.offset % PAGE
