"""Jitted helpers that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, which computes bfloat16 wrongly."""


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; PRECISION matters only for float32 operands."""
    if INTERPRETED:  # exact: a product of two 16-bit floats fits a float32
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def accumulate(
    acc, a_ptr, b_ptr, offs_m, offs_n, mask_m, mask_n, begin, end,
    stride_am, stride_ak, stride_bk, stride_bn, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + A[:, begin:end] @ B[begin:end]`` for one tile; int8 B is converted in registers.

    Offsets are int64: a row number times a stride exceeds 2^31 in large tensors.
    """
    # a constexpr times an int32 stride would be int32
    step = tl.full((), BLOCK_K, tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64) + begin
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
    for start in range(begin, end, BLOCK_K):
        mask_k = tl.arange(0, BLOCK_K) < end - start
        # 0 adds nothing; what lies behind a row may be NaN, which times 0 would be NaN
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(a, b.to(a.dtype), acc, PRECISION)
        a_ptrs += step * stride_ak
        b_ptrs += step * stride_bk
    return acc


@triton.jit
def tile_indices(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column block of a program; neighbours share GROUP_M rows of blocks in L2."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    # the last group may have fewer rows of blocks
    rows = tl.minimum(blocks_m - first_m, GROUP_M)
    inside = pid % (GROUP_M * blocks_n)
    return first_m + inside % rows, inside // rows
