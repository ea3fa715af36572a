"""Computed tensors, compared with torch: cast, divided, padded, gathered and new ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.checkpoint.dtypes import BY_NAME, BY_TORCH_NAME
from npt_fast.checkpoint.recipe import Recipe, check_castable
from npt_fast.checkpoint.source_file import WINDOW, SourceFile
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.checkpoint.tensor_source import open_tensors
from tests.checkpoints import raw

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
F32 = BY_NAME["F32"]


def entry_of(tmp_path: Path, tensor: Tensor) -> TensorEntry:
    torch.save({"x": tensor}, tmp_path / "x.pt")
    return open_tensors(tmp_path / "x.pt").tensors["x"]


def produce(recipe: Recipe) -> bytes:
    pieces = [bytes(window) for window in recipe.windows()]
    assert max(map(len, pieces)) <= WINDOW
    return b"".join(pieces)


def name_of(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def interesting(dtype: torch.dtype) -> Tensor:
    """Ordinary numbers, both zeros, infinities, subnormals, ties, and values near the limits."""
    generator = torch.Generator().manual_seed(5)
    ordinary = torch.randn(3000, generator=generator, dtype=torch.float64)
    scaled = ordinary * torch.logspace(-12, 4, 3000, dtype=torch.float64)
    ties = 1 + torch.arange(64, dtype=torch.float64) * 2.0**-12
    tiny = torch.arange(64, dtype=torch.float64) * 2.0**-26
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 60000.0, -60000.0])
    return torch.cat([ordinary, scaled, ties, -ties, tiny, -tiny, special]).to(dtype)


@pytest.mark.parametrize("target", FLOATS, ids=name_of)
@pytest.mark.parametrize("source", FLOATS, ids=name_of)
def test_casts_round_as_torch_does(
    tmp_path: Path, source: torch.dtype, target: torch.dtype
) -> None:
    tensor = interesting(source)
    tensor = tensor[(tensor.abs() < 6e4) | tensor.isinf()]
    recipe = Recipe(
        "y", BY_TORCH_NAME[name_of(target)], tuple(tensor.shape), entry_of(tmp_path, tensor)
    )
    assert recipe.is_copy == (source == target)
    assert produce(recipe) == raw(tensor.to(target))


@pytest.mark.parametrize("target", FLOATS, ids=name_of)
def test_nan_stays_nan(tmp_path: Path, target: torch.dtype) -> None:
    bits = torch.tensor([0x7FC00000, 0x7F800001, -1, 0x7FFFFFFF], dtype=torch.int32)
    recipe = Recipe(
        "y", BY_TORCH_NAME[name_of(target)], (4,), entry_of(tmp_path, bits.view(torch.float32))
    )
    made = torch.frombuffer(bytearray(produce(recipe)), dtype=target)
    assert made.isnan().all()


OVERFLOWS = [
    (torch.float64, 1e300, "float32"),
    (torch.float64, -1e39, "bfloat16"),
    (torch.float32, 65520.0, "float16"),
    (torch.float32, 3.4028235e38, "bfloat16"),
    (torch.bfloat16, -1e6, "float16"),
]


@pytest.mark.parametrize(("source", "value", "target"), OVERFLOWS, ids=str)
def test_a_value_that_does_not_fit(
    tmp_path: Path, source: torch.dtype, value: float, target: str
) -> None:
    tensor = torch.tensor([1.0, value], dtype=source)
    recipe = Recipe("y", BY_TORCH_NAME[target], (2,), entry_of(tmp_path, tensor))
    with pytest.raises(npt.MergeError, match="y: a value is too large for"):
        produce(recipe)


def test_the_largest_values_that_fit(tmp_path: Path) -> None:
    tensor = torch.tensor([65519.0, -65504.0, 65504.0])
    recipe = Recipe("y", BY_NAME["F16"], (3,), entry_of(tmp_path, tensor))
    assert produce(recipe) == raw(tensor.half())


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "I64", "C64"])
def test_types_without_arithmetic_are_named(tmp_path: Path, name: str) -> None:
    tensor = torch.zeros(2, 2, dtype=getattr(torch, BY_NAME[name].torch_name))
    entry = entry_of(tmp_path, tensor)
    check_castable("in.pt", Recipe("y", BY_NAME[name], (2, 2), entry))  # a copy needs no conversion
    changes = {
        "cast": Recipe("y", F32, (2, 2), entry),
        "divided": Recipe("y", BY_NAME[name], (2, 2), entry, divisor=2),
        "padded": Recipe("y", BY_NAME[name], (2, 3), entry),
        "new": Recipe("y", BY_NAME[name], (2, 2), None),
    }
    for change in changes.values():
        with pytest.raises(npt.MergeError, match=rf"^in\.pt: y: {name} cannot be converted"):
            check_castable("in.pt", change)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("divisor", [2, 3, 7])
def test_division_rounds_once(tmp_path: Path, dtype: torch.dtype, divisor: int) -> None:
    tensor = interesting(dtype)
    tensor = tensor[tensor.isfinite()]
    recipe = Recipe(
        "y",
        BY_TORCH_NAME[name_of(dtype)],
        tuple(tensor.shape),
        entry_of(tmp_path, tensor),
        divisor=divisor,
    )
    # float64 holds more than twice the digits of the others: dividing there cannot round twice
    assert produce(recipe) == raw((tensor.double() / divisor).to(dtype))


SHAPES = [
    pytest.param((3, 5), (3, 5), id="as-it-is"),
    pytest.param((3, 5), (3, 9), id="columns"),
    pytest.param((3, 5), (7, 5), id="rows"),
    pytest.param((3, 5), (7, 9), id="both"),
    pytest.param((2, 140_000), (3, 300_001), id="rows-longer-than-a-tile"),
    pytest.param((700, 300), (1000, 333), id="several-tiles"),
]


@pytest.mark.parametrize(("source", "target"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
def test_padding_with_zeros(
    tmp_path: Path, source: tuple[int, int], target: tuple[int, int], transposed: bool
) -> None:
    tensor = torch.randn(source, generator=torch.Generator().manual_seed(1))
    stored = tensor.T.contiguous().T if transposed else tensor
    recipe = Recipe("y", F32, target, entry_of(tmp_path, stored))
    expected = torch.zeros(target)
    expected[: source[0], : source[1]] = tensor
    assert produce(recipe) == raw(expected)


def test_padding_with_random_columns_keeps_the_source(tmp_path: Path) -> None:
    tensor = torch.randn(600, 300, generator=torch.Generator().manual_seed(1))
    recipe = Recipe("y", F32, (600, 400), entry_of(tmp_path, tensor), random=True)
    made = torch.frombuffer(bytearray(produce(recipe)), dtype=torch.float32).view(600, 400)
    assert torch.equal(made[:, :300], tensor)
    assert (made[:, 300:] != 0).float().mean() > 0.99


VIEWS = {
    "transposed": lambda t: t.T,
    "every-second-column": lambda t: t[:, ::2],
    "every-third-row": lambda t: t[1::3],
    "a-corner": lambda t: t[5:9, 2:7],
    "one-column": lambda t: t[:, 3:4],
    "transposed-corner": lambda t: t[10:200, 20:300].T,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=name_of)
def test_strided_views_are_gathered(tmp_path: Path, view: str, dtype: torch.dtype) -> None:
    whole = torch.randn(640, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    tensor = VIEWS[view](whole)
    entry = entry_of(tmp_path, tensor)
    recipe = Recipe("y", entry.dtype, tuple(tensor.shape), entry)
    assert not recipe.is_copy
    assert produce(recipe) == raw(tensor)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_small_tensor_with_steps_along_both_axes_maps_little(
    tmp_path: Path, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 kB that are spread over 2 GB, which a few bytes of pickle can describe."""
    shape, strides = (32, 64), (16_777_216, 200_003)
    path = tmp_path / "sparse"
    expected = torch.arange(2048, dtype=torch.float32).view(shape)
    with path.open("wb") as file:
        for i, row in enumerate(expected):
            for j, value in enumerate(row):
                file.seek(4 * (i * strides[0] + j * strides[1]))
                file.write(raw(value))
    if transposed:
        shape, strides, expected = shape[::-1], strides[::-1], expected.T
    entry = TensorEntry("x", F32, shape, SourceFile.of(path), 0, strides=strides)
    mapped = []
    read = SourceFile.windows

    def windows(file: SourceFile, offset: int, length: int, *size: int) -> Any:
        mapped.append(length)
        return read(file, offset, length, *size)

    monkeypatch.setattr(SourceFile, "windows", windows)
    assert produce(Recipe.unchanged(entry)) == raw(expected)
    assert max(mapped) <= WINDOW and sum(mapped) <= 2048 * WINDOW


def new_tensor(name: str, shape: tuple[int, int] = (900, 500)) -> Tensor:
    made = produce(Recipe(name, F32, shape, None, random=True))
    return torch.frombuffer(bytearray(made), dtype=torch.float32).view(shape)


def test_new_tensors_are_xavier_uniform() -> None:
    values = new_tensor("layer_3_np.W_down_up")
    bound = math.sqrt(6 / (900 + 500))
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.999 * bound
    assert abs(float(values.mean())) < 0.005 * bound
    assert float(values.var()) == pytest.approx(bound**2 / 3, rel=0.01)
    # tiles must not repeat each other: 450,000 draws of 2^24 numbers hardly ever collide
    assert values.unique().numel() > 0.97 * values.numel()


def test_new_tensors_depend_on_their_name_alone() -> None:
    first = new_tensor("layer_3_np.W_down_up")
    assert torch.equal(first, new_tensor("layer_3_np.W_down_up"))
    assert not torch.isclose(first, new_tensor("layer_3_np.W_down_gate")).float().mean() > 0.01


def test_a_zero_tensor() -> None:
    assert produce(Recipe("y", F32, (5, 7), None)) == bytes(4 * 35)
