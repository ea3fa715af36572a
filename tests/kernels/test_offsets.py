"""Offsets beyond 2^31 elements, which overflow 32 bits silently."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from tempfile import TemporaryFile
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from npt_fast.kernels._launch import Tiles
from npt_fast.kernels._tuning import forced_tiles
from npt_fast.kernels.coefficients import (
    coefficients_bwd,
    coefficients_fwd,
    coefficients_fwd_into,
)
from npt_fast.kernels.decode import decode_mlp
from npt_fast.kernels.modulated_linear import modulated_gate_up, modulated_linear
from npt_fast.kernels.probe import probe
from npt_fast.kernels.swiglu import swiglu_bwd, swiglu_fwd, swiglu_fwd_into
from tests.kernels.conftest import Normal

DTYPE = torch.float16


@pytest.fixture(autouse=True)
def no_copies(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Stop the interpreter from copying arguments, which are gigabytes here, back to the CPU."""
    if device == "cpu":
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)


def far_apart(tensor: Tensor) -> Tensor:
    """The same values with rows far apart; on a CPU in a sparse file, to save memory."""
    *rows, width = tensor.shape
    stride = 2**31 // min(rows[-1] - 1, 15) + 64  # so that a step of 16 rows exceeds it too
    before = 2**31  # a wrong offset then reads zeros instead of crashing
    count = before + math.prod(rows) * stride
    if tensor.is_cuda:
        torch.cuda.empty_cache()  # free what the previous test left
        if torch.cuda.mem_get_info()[0] < count * tensor.itemsize:
            pytest.skip("not enough memory on this GPU")
        memory = torch.zeros(count, dtype=tensor.dtype, device=tensor.device)
    else:
        with TemporaryFile() as file:
            file.truncate(count * tensor.itemsize)
            pages = mmap.mmap(file.fileno(), count * tensor.itemsize)
        memory = torch.frombuffer(pages, dtype=tensor.dtype)
    far = memory[before:].view(*rows, stride)[..., :width]
    far.copy_(tensor)
    return far


def columns_far_apart(tensor: Tensor) -> Tensor:
    return far_apart(tensor.t()).t()


def linear(a: Tensor, a2: Tensor, b: Tensor, b2: Tensor) -> Tensor:
    return modulated_linear([a, a2], [b, b2], None)


def gate_up(h: Tensor, gate: Tensor, up: Tensor, z: Tensor, *heads: Tensor) -> list[Tensor]:
    return modulated_gate_up(h, gate, up, z, *heads, None, None, True)


def coefficients_gradients(dz: Tensor, u: Tensor, p: Tensor, s: Tensor) -> list[Tensor]:
    du = torch.empty_like(dz, memory_format=torch.contiguous_format)
    return [du, *coefficients_bwd(dz, u, p, s.float(), du)]


def probed(a: Tensor, w_a: Tensor, u: Tensor) -> list[Tensor]:
    return probe(a, w_a, u, 3, True)


def decoded(x: Tensor, h: Tensor, *weights: Tensor) -> Tensor:
    gate, up, down, *factors = weights
    return decode_mlp(x, h, gate, up, down, None, None, None, *factors, 3)


C_T_R, T_D, D_F, F_D, R_F = (2, 5, 15), (5, 40), (40, 24), (24, 40), (15, 24)
OPERATIONS: dict[str, tuple[Callable[..., Any], Sequence[tuple[int, ...]]]] = {
    "coefficients_fwd": (lambda u, p: coefficients_fwd(u, p, 3), [C_T_R, C_T_R]),
    "coefficients_bwd": (coefficients_gradients, [C_T_R, C_T_R, C_T_R, (2, 5, 3)]),
    "swiglu_fwd": (swiglu_fwd, [T_D, T_D]),
    "swiglu_bwd": (swiglu_bwd, [T_D, T_D, T_D]),
    "modulated_linear": (linear, [T_D, (5, 15), D_F, R_F]),
    "modulated_gate_up": (gate_up, [T_D, F_D, F_D, C_T_R, R_F, R_F]),
    "probe": (probed, [T_D, (30, 40), C_T_R]),
    "decode_mlp": (
        decoded,
        [T_D, T_D, F_D, F_D, D_F, (40, 45), (30, 40), R_F, R_F, R_F, (15, 40)],
    ),
}
"""Operation -> function, and shapes of its arguments."""


def assert_equal(found: Any, expected: Any) -> None:
    for ours, theirs in zip(
        *([r] if isinstance(r, Tensor) else r for r in (found, expected)), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows(normal: Normal, name: str) -> None:
    function, shapes = OPERATIONS[name]
    arguments = [normal(*shape, dtype=DTYPE, fan_in=shape[-1]) for shape in shapes]
    with forced_tiles(Tiles(16, 16, 16, 4, 2)):
        expected = function(*arguments)
        assert_equal(function(*map(far_apart, arguments)), expected)


@pytest.mark.parametrize("name", ["modulated_linear", "modulated_gate_up", "probe"])
def test_columns(normal: Normal, name: str) -> None:
    """Columns far apart, as of weights that backward transposes; copies of them are small."""
    function, shapes = OPERATIONS[name]
    arguments = [normal(*shape, dtype=DTYPE, fan_in=shape[-1]) for shape in shapes]
    with forced_tiles(Tiles(16, 16, 16, 4, 2)):
        expected = function(*arguments)
        far = [columns_far_apart(t) if t.ndim == 2 else t for t in arguments]
        assert_equal(function(*far), expected)


def test_outputs(normal: Normal) -> None:
    u, p = (normal(2, 5, 15, dtype=DTYPE) for _ in range(2))
    expected = coefficients_fwd(u, p, 3)
    found = [far_apart(torch.zeros_like(t)) for t in expected]
    coefficients_fwd_into(u, p, *found)
    assert_equal(found, expected)
    gate, up = (normal(5, 40, dtype=DTYPE) for _ in range(2))
    inner = far_apart(torch.zeros_like(gate))
    swiglu_fwd_into(gate, up, inner)
    assert_equal(inner, swiglu_fwd(gate, up))
