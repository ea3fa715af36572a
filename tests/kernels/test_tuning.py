"""Tiles that kernels run with: the rule's first or, measured once, its fastest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from npt_fast.kernels import _tuning
from npt_fast.kernels._launch import Target, Tiles
from npt_fast.kernels._tuning import NARROW, choose_tiles, forced_tiles, nth_candidate
from npt_fast.kernels.decode import decode_tiles
from npt_fast.kernels.modulated_linear import gate_up_tiles, linear_tiles
from npt_fast.kernels.modulated_mlp import modulated_mlp
from npt_fast.kernels.probe import probe_tiles
from npt_fast.testing import Problem, assert_within_budget, longest_sum
from tests.kernels.cases import cast, inputs_of, reference_mlp

SLOW, FAST, FASTER = (Tiles(size, 64, 32, 4, 3) for size in (16, 32, 64))
SIZES = (64, 128)


def rule(target: Target, dtype: torch.dtype, tokens: int) -> list[Tiles]:
    return [SLOW, FASTER, FAST]


def chosen(
    tokens: int = 100,
    sizes: tuple[int, ...] = SIZES,
    kernel: str = "kernel",
    operands: tuple[Tensor | None, ...] = (),
) -> Tiles:
    output = torch.empty(tokens, 64, dtype=torch.float16)
    return choose_tiles(kernel, rule, lambda tiles: None, output, operands, sizes)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tiles]]:
    """Tiles that were measured, with a fake clock; measuring is switched off afterwards."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    found: list[Tiles] = []

    def milliseconds(run: object, tiles: Tiles) -> float:
        found.append(tiles)
        return {SLOW: 3.0, FAST: 2.0, FASTER: 1.0}[tiles]

    monkeypatch.setattr(_tuning, "_milliseconds", milliseconds)
    yield found
    _tuning.disable_autotuning()


def test_nothing_is_measured_unless_asked_for(measured: list[Tiles]) -> None:
    assert chosen() == SLOW  # the rule's first
    assert not measured


def test_the_fastest_is_kept(measured: list[Tiles], tmp_path: Path) -> None:
    """The fastest is kept in memory and, for other processes, in a file."""
    path = tmp_path / "cache" / "tiles.json"
    _tuning.enable_autotuning(path)
    assert chosen() == FASTER
    assert measured == [SLOW, FASTER, FAST]
    assert chosen() == FASTER
    ((key, sizes),) = json.loads(path.read_text()).items()
    assert key.startswith("kernel sm_") and key.endswith(" float16 128 64 128")
    assert Tiles(*sizes) == FASTER
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]
    _tuning.enable_autotuning(path)
    assert chosen() == FASTER
    assert len(measured) == 3
    _tuning.disable_autotuning()
    assert chosen() == SLOW


def test_what_is_measured_apart(measured: list[Tiles], tmp_path: Path) -> None:
    """Each bucket of tokens, size and kernel is measured once, not each number of tokens."""
    _tuning.enable_autotuning(tmp_path / "tiles.json")
    for tokens in (65, 100, 128):
        chosen(tokens)
    assert len(measured) == 3
    chosen(129)
    chosen(sizes=(64, 64))
    chosen(kernel="another")
    assert len(measured) == 12
    assert len(json.loads((tmp_path / "tiles.json").read_text())) == 4


def test_measured_while_nothing_is_captured(
    measured: list[Tiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tuning.enable_autotuning(tmp_path / "tiles.json")
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert chosen() == SLOW
    assert not measured and not list(tmp_path.iterdir())
    capturing = False
    assert chosen() == FASTER
    capturing = True
    assert chosen() == FASTER  # it is known


def test_nothing_to_measure(measured: list[Tiles], tmp_path: Path) -> None:
    _tuning.enable_autotuning(tmp_path / "tiles.json")
    assert chosen(tokens=0) == SLOW
    assert not measured


@pytest.mark.parametrize("sizes", [(64, 7), (1, 16), (64, 24)], ids=str)
def test_rows_that_cannot_be_read_in_blocks(sizes: tuple[int, ...]) -> None:
    assert chosen(sizes=sizes) == NARROW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_addresses_and_strides_are_those_that_triton_takes_for_aligned(dtype: torch.dtype) -> None:
    whole = torch.zeros(32, 64, dtype=dtype)
    rows = torch.zeros(32, 72, dtype=dtype)  # a multiple of 8, which Triton is not told
    first = torch.zeros(65, dtype=dtype)[1:].view(2, 32)
    for aligned in (whole, whole.t(), whole[:1].expand(32, 64), whole[:, 16:], None):
        assert chosen(operands=(whole, aligned)) == SLOW
    for odd in (rows[:, :64], rows[:, :64].t(), first, whole[:, ::2]):
        assert chosen(operands=(whole, odd)) == NARROW


def test_triton_is_told_what_is_asked() -> None:
    """Triton's own words for arguments; D is that it compiles for a multiple of 16."""
    native = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    backend = pytest.importorskip("triton.backends.nvidia.compiler").CUDABackend
    told = {16: "D", 24: "", 8: ""}
    told |= {torch.zeros(17, dtype=torch.float16)[at:]: "" if at == 1 else "D" for at in (0, 1, 8)}
    for value, expected in told.items():
        assert (native(backend, value, False, True, True)[1] or "") == expected


def test_tests_may_choose() -> None:
    with nth_candidate(1):
        assert chosen() == FASTER
    with nth_candidate(9):
        assert chosen() == FAST  # the last
    with forced_tiles(NARROW):
        assert chosen() == NARROW
    assert chosen() == SLOW


def test_measuring_runs_the_kernels(
    measured: list[Tiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring runs each candidate, and then one of them for the result."""
    runs: list[Tiles] = []

    def milliseconds(run: Callable[[Tiles], None], tiles: Tiles) -> float:
        run(tiles)
        runs.append(tiles)
        return -len(runs)  # the last

    monkeypatch.setattr(_tuning, "_milliseconds", milliseconds)
    problem = Problem(tokens=70, hidden=32, intermediate=64, num_ranks=2, rank=8)
    inputs = inputs_of(problem, torch.float16, requires_grad=False)
    _tuning.enable_autotuning(tmp_path / "tiles.json")
    y = modulated_mlp(*inputs, path="fused")
    exact = reference_mlp(cast(inputs, torch.float64))
    assert_within_budget(y, exact, reference_mlp(inputs), terms=longest_sum(inputs))
    found = json.loads((tmp_path / "tiles.json").read_text())
    kernels = ["modulated_gate_up", "modulated_linear", "probe", "probe"]
    assert [key.split()[0] for key in found] == kernels
    assert {Tiles(*sizes) for sizes in found.values()} <= set(runs)


@pytest.mark.parametrize("tiles", [decode_tiles, gate_up_tiles, linear_tiles, probe_tiles])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_rules(arch: str, dtype: torch.dtype, tiles: _tuning.TileRule) -> None:
    """Rules give few powers of two that `tl.dot` accepts, equal within a bucket of tokens."""
    for bucket in (1, 16, 32, 64, 128, 8192):
        candidates = tiles(Target.parse(arch), dtype, bucket)
        assert 1 <= len(candidates) <= _tuning.MAX_CANDIDATES
        for sizes in candidates:
            assert min(sizes.m, sizes.n, sizes.k) >= 16
            assert all(size & (size - 1) == 0 for size in (sizes.m, sizes.n, sizes.k, sizes.warps))
        assert candidates == tiles(Target.parse(arch), dtype, bucket // 2 + 1)
