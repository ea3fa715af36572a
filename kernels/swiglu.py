"""SwiGLU, and GeGLU and ReGLU in its place, forward and backward, elementwise over ``(T, F)``.

::

    inner = act(gate) up
    d_gate = d_inner up act'(gate)        d_up = d_inner act(gate)

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

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
"""Names of the activations that kernels compute, as in `factored.ACTIVATIONS`."""

_BLOCK = 1024  # elements of a program: 8 for each thread of 4 warps
# gelu_pytorch_tanh is x (1 + tanh(t / 2)) / 2 = x sigmoid(t), t = 2 sqrt(2 / pi) (x + 0.044715 x^3)
_LINEAR = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715 * 1.5957691216057308)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL_DENSITY = tl.constexpr(0.3989422804014327)  # at 0: 1 / sqrt(2 pi)


@triton.jit
def share(x, ACTIVATION: tl.constexpr):
    """What an activation keeps of a float32 tile, from 0 to 1: it is ``x share(x)``."""
    # where exp overflows the sigmoid is 0 or 1, so that no NaN arises (test_far_from_zero)
    if ACTIVATION == "gelu":
        kept = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
    elif ACTIVATION == "gelu_pytorch_tanh":
        kept = tl.sigmoid(x * (_LINEAR + _CUBIC * x * x))
    elif ACTIVATION == "relu":
        kept = (x > 0).to(tl.float32)
    else:
        tl.static_assert(ACTIVATION == "silu")
        kept = tl.sigmoid(x)
    return kept


@triton.jit
def _slope(x, kept, ACTIVATION: tl.constexpr):
    """Derivative of an activation, ``kept + x kept'``: one exp for forward and backward values."""
    if ACTIVATION == "gelu":
        slope = kept + x * _NORMAL_DENSITY * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_pytorch_tanh":
        slope = kept + x * kept * (1.0 - kept) * (_LINEAR + 3.0 * _CUBIC * x * x)
    elif ACTIVATION == "relu":
        slope = kept
    else:
        slope = kept + x * kept * (1.0 - kept)
    return slope


@triton.jit
def _offsets(T, F, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    return offs_t[:, None], offs_f[None, :], (offs_t < T)[:, None] & (offs_f < F)[None, :]


@triton.jit
def _swiglu_fwd_kernel(
    gate_ptr, up_ptr, inner_ptr, T, F, stride_gt, stride_ut, stride_it,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    offs_t, offs_f, mask = _offsets(T, F, BLOCK_T, BLOCK_F)
    gate = tl.load(gate_ptr + offs_t * stride_gt + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_t * stride_ut + offs_f, mask=mask, other=0.0).to(tl.float32)
    inner = (gate * share(gate, ACTIVATION) * up).to(inner_ptr.dtype.element_ty)
    tl.store(inner_ptr + offs_t * stride_it + offs_f, inner, mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    d_inner_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, inner_ptr, T, F,
    stride_dt, stride_gt, stride_ut, stride_ot,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    offs_t, offs_f, mask = _offsets(T, F, BLOCK_T, BLOCK_F)
    d_inner = tl.load(d_inner_ptr + offs_t * stride_dt + offs_f, mask=mask, other=0.0)
    d_inner = d_inner.to(tl.float32)
    gate = tl.load(gate_ptr + offs_t * stride_gt + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_t * stride_ut + offs_f, mask=mask, other=0.0).to(tl.float32)
    kept = share(gate, ACTIVATION)
    activated = gate * kept
    slope = _slope(gate, kept, ACTIVATION)
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


def swiglu_fwd_into(gate: Tensor, up: Tensor, inner: Tensor, activation: str = "silu") -> None:
    """Write ``act(gate) * up`` to `inner`, which may be `gate`; ``(T, F)``, rows contiguous."""
    grid, blocks = _grid_and_blocks(*gate.shape)
    launch(
        _swiglu_fwd_kernel, grid, gate, up, inner, *gate.shape,
        gate.stride(0), up.stride(0), inner.stride(0), ACTIVATION=activation, **blocks,
    )  # fmt: skip


@define(
    "swiglu_fwd(Tensor gate, Tensor up, str activation='silu') -> Tensor",
    lambda gate, up, activation="silu": _empty_rows(gate),
)
def swiglu_fwd(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """``act(gate) * up``, ``(T, F)``, of tensors of one dtype and any strides."""
    inner = _empty_rows(gate)
    swiglu_fwd_into(contiguous_rows(gate), contiguous_rows(up), inner, activation)
    return inner


@define(
    "swiglu_bwd(Tensor d_inner, Tensor gate, Tensor up, str activation='silu')"
    " -> (Tensor, Tensor, Tensor)",
    lambda d_inner, gate, up, activation="silu": (
        _empty_rows(gate),
        _empty_rows(gate),
        _empty_rows(gate),
    ),
)
def swiglu_bwd(
    d_inner: Tensor, gate: Tensor, up: Tensor, activation: str = "silu"
) -> tuple[Tensor, Tensor, Tensor]:
    """d_gate, d_up and inner, ``(T, F)`` each, of tensors of one dtype and any strides."""
    d_inner, gate, up = contiguous_rows(d_inner), contiguous_rows(gate), contiguous_rows(up)
    d_gate, d_up, inner = _empty_rows(gate), _empty_rows(gate), _empty_rows(gate)
    grid, blocks = _grid_and_blocks(*gate.shape)
    launch(
        _swiglu_bwd_kernel, grid, d_inner, gate, up, d_gate, d_up, inner, *gate.shape,
        d_inner.stride(0), gate.stride(0), up.stride(0), inner.stride(0), ACTIVATION=activation,
        **blocks,
    )  # fmt: skip
    return d_gate, d_up, inner
