"""SwiGLU, forward and backward, elementwise over ``(T, F)``.

::

    inner = silu(gate) up
    d_gate = d_inner up silu'(gate)        d_up = d_inner silu(gate)

Backward returns inner too, because it is not saved and the gradients of down need it. Forward moves
3 F elements per token, backward 6 F. Arithmetic is float32. Nothing is overwritten, except by
`swiglu_fwd_into` on request.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from npt_fast.kernels._launch import cdiv, contiguous_rows, launch
from npt_fast.kernels._ops import define

_BLOCK = 1024  # elements of a program: 8 for each thread of 4 warps


@triton.jit
def silu(x):
    """``x sigmoid(x)`` of a float32 tile."""
    # where exp overflows the sigmoid is 0 or 1, so that no NaN arises (test_far_from_zero)
    return x * tl.sigmoid(x)


@triton.jit
def _offsets(T, F, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    return offs_t[:, None], offs_f[None, :], (offs_t < T)[:, None] & (offs_f < F)[None, :]


@triton.jit
def _swiglu_fwd_kernel(
    gate_ptr, up_ptr, inner_ptr, T, F, stride_gt, stride_ut, stride_it,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    offs_t, offs_f, mask = _offsets(T, F, BLOCK_T, BLOCK_F)
    gate = tl.load(gate_ptr + offs_t * stride_gt + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_t * stride_ut + offs_f, mask=mask, other=0.0).to(tl.float32)
    inner = (silu(gate) * up).to(inner_ptr.dtype.element_ty)
    tl.store(inner_ptr + offs_t * stride_it + offs_f, inner, mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    d_inner_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, inner_ptr, T, F,
    stride_dt, stride_gt, stride_ut, stride_ot,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    offs_t, offs_f, mask = _offsets(T, F, BLOCK_T, BLOCK_F)
    d_inner = tl.load(d_inner_ptr + offs_t * stride_dt + offs_f, mask=mask, other=0.0)
    d_inner = d_inner.to(tl.float32)
    gate = tl.load(gate_ptr + offs_t * stride_gt + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_t * stride_ut + offs_f, mask=mask, other=0.0).to(tl.float32)
    # silu' = sigmoid + silu (1 - sigmoid): one exp for forward and backward values
    sigmoid = tl.sigmoid(gate)
    activated = gate * sigmoid
    slope = sigmoid + activated * (1.0 - sigmoid)
    at = offs_t * stride_ot + offs_f
    tl.store(d_gate_ptr + at, (d_inner * up * slope).to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + at, (d_inner * activated).to(d_up_ptr.dtype.element_ty), mask=mask)
    tl.store(inner_ptr + at, (activated * up).to(inner_ptr.dtype.element_ty), mask=mask)


def _grid_and_blocks(tokens: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    # max: next_power_of_2(0) is 0, by which the next line would divide
    block_f = min(_BLOCK, triton.next_power_of_2(max(1, width)))
    block_t = _BLOCK // block_f
    grid = cdiv(tokens, block_t), cdiv(width, block_f)
    return grid, {"BLOCK_T": block_t, "BLOCK_F": block_f, "warps": 4}


def _empty_rows(gate: Tensor) -> Tensor:
    # empty_like would keep the strides of a transposed tensor
    return torch.empty(gate.shape, device=gate.device, dtype=gate.dtype)


def swiglu_fwd_into(gate: Tensor, up: Tensor, inner: Tensor) -> None:
    """Write ``silu(gate) * up`` to `inner`, which may be `gate`; ``(T, F)``, rows contiguous."""
    grid, blocks = _grid_and_blocks(*gate.shape)
    launch(
        _swiglu_fwd_kernel, grid, gate, up, inner, *gate.shape,
        gate.stride(0), up.stride(0), inner.stride(0), **blocks,
    )  # fmt: skip


@define("swiglu_fwd(Tensor gate, Tensor up) -> Tensor", lambda gate, up: _empty_rows(gate))
def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``(T, F)``, of tensors of one dtype and any strides."""
    inner = _empty_rows(gate)
    swiglu_fwd_into(contiguous_rows(gate), contiguous_rows(up), inner)
    return inner


@define(
    "swiglu_bwd(Tensor d_inner, Tensor gate, Tensor up) -> (Tensor, Tensor, Tensor)",
    lambda d_inner, gate, up: (
        _empty_rows(gate),
        _empty_rows(gate),
        _empty_rows(gate),
    ),
)
def swiglu_bwd(d_inner: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d_gate, d_up and inner, ``(T, F)`` each, of tensors of one dtype and any strides."""
    d_inner, gate, up = contiguous_rows(d_inner), contiguous_rows(gate), contiguous_rows(up)
    d_gate, d_up, inner = _empty_rows(gate), _empty_rows(gate), _empty_rows(gate)
    grid, blocks = _grid_and_blocks(*gate.shape)
    launch(
        _swiglu_bwd_kernel, grid, d_inner, gate, up, d_gate, d_up, inner, *gate.shape,
        d_inner.stride(0), gate.stride(0), up.stride(0), inner.stride(0), **blocks,
    )  # fmt: skip
    return d_gate, d_up, inner
