"""Kernels of `decode`, in the order in which it launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from npt_fast.kernels._tiles import accumulate, dot
from npt_fast.kernels.swiglu import share


@triton.jit
def _product(
    a_ptr, b_ptr, scale_ptr, offs_m, columns, mask_m, mask_n, begin, end,
    stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of a product over ``K[begin:end]``, times their scales if B is int8."""
    # 16 rows at least, masked where there are fewer tokens (design.md#triton)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate(
        acc, a_ptr, b_ptr, offs_m, columns, mask_m, mask_n, begin, end,
        stride_am, stride_ak, stride_bk, stride_bn, BLOCK_K, PRECISION,
    )  # fmt: skip
    return _scaled(acc, scale_ptr, columns, mask_n)


@triton.jit
def _scaled(acc, scale_ptr, columns, mask_n):
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + columns, mask=mask_n, other=0.0)[None, :]
    return acc


@triton.jit(do_not_specialize=["M"])
def _decode_products_kernel(
    a_ptr, w_a_ptr, x_ptr, w_down_ptr, b0_ptr, b1_ptr, u_ptr, s_ptr, out_ptr,
    w_a_scale_ptr, w_down_scale_ptr,
    M, K, N, num_components, REST, chunk,
    stride_am, stride_ak, stride_wan, stride_wak, stride_xm, stride_xk, stride_wk, stride_wn,
    stride_b0k, stride_b0n, stride_b1k, stride_b1n, stride_um, stride_sm, stride_sc,
    stride_om, stride_os,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probes ``a @ w_a'`` with bottlenecks, and up to two products of `a`, in one grid.

    Bottlenecks are computed from x, REST further columns too, or read where x is None.
    """
    pid = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1).to(tl.int64)
    begin = pid_s * chunk
    end = tl.minimum(begin + chunk, K)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = offs_m < M
    u_at = u_ptr + offs_m[:, None] * stride_um
    out_at = out_ptr + offs_m[:, None] * stride_om + pid_s * stride_os
    # None is a constexpr: what is absent leaves no code
    if w_a_ptr is not None:
        BLOCKS: tl.constexpr = (RANK + BLOCK_N - 1) // BLOCK_N
        probes = num_components * BLOCKS
        if pid < probes:
            component = pid // BLOCKS
            inside = (pid % BLOCKS) * BLOCK_N + offs_n
            columns = component * RANK + inside
            mask_n = inside < RANK
            mask = mask_m[:, None] & mask_n[None, :]
            p = _product(
                a_ptr, w_a_ptr, w_a_scale_ptr, offs_m, columns, mask_m, mask_n, begin, end,
                stride_am, stride_ak, stride_wak, stride_wan, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            if x_ptr is None:
                u = tl.load(u_at + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            else:
                u = _product(
                    x_ptr, w_down_ptr, w_down_scale_ptr, offs_m, columns, mask_m, mask_n,
                    begin, end, stride_xm, stride_xk, stride_wk, stride_wn,
                    BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                )  # fmt: skip
                tl.store(u_at + columns[None, :], u.to(u_ptr.dtype.element_ty), mask=mask)
            s_at = s_ptr + offs_m * stride_sm + component * stride_sc + pid_s * BLOCKS
            tl.store(s_at + pid % BLOCKS, tl.sum(u * p, 1), mask=mask_m)
        pid -= probes
    if x_ptr is not None:
        rest = tl.cdiv(REST, BLOCK_N)
        if (pid >= 0) & (pid < rest):
            columns = pid * BLOCK_N + offs_n
            mask_n = columns < REST
            columns += num_components * RANK
            u = _product(
                x_ptr, w_down_ptr, w_down_scale_ptr, offs_m, columns, mask_m, mask_n, begin, end,
                stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            mask = mask_m[:, None] & mask_n[None, :]
            tl.store(u_at + columns[None, :], u.to(u_ptr.dtype.element_ty), mask=mask)
        pid -= rest
    blocks = tl.cdiv(N, BLOCK_N)
    if (pid >= 0) & (pid < blocks):
        columns = pid * BLOCK_N + offs_n
        mask_n = columns < N
        y = _product(
            a_ptr, b0_ptr, None, offs_m, columns, mask_m, mask_n, begin, end,
            stride_am, stride_ak, stride_b0k, stride_b0n, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        tl.store(out_at + columns[None, :], y, mask=mask_m[:, None] & mask_n[None, :])
    if b1_ptr is not None:
        if pid >= blocks:
            columns = (pid - blocks) * BLOCK_N + offs_n
            mask_n = columns < N
            y = _product(
                a_ptr, b1_ptr, None, offs_m, columns, mask_m, mask_n, begin, end,
                stride_am, stride_ak, stride_b1k, stride_b1n,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            mask = mask_m[:, None] & mask_n[None, :]
            tl.store(out_at + (N + columns)[None, :], y, mask=mask)


@triton.jit
def _low_rank(
    u_ptr, s_ptr, b_ptr, scale_ptr, offs_m, offs_n, mask_m, mask_n, begin, end,
    stride_um, stride_sm, stride_sc, stride_bk, stride_bn,
    RANK: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of ``z @ B``, in STEPS steps for each component.

    A coefficient is a sum of PARTS numbers, BLOCK_P at a time.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    for step in range(begin, end):
        component = step // STEPS
        inside = (step % STEPS) * BLOCK_K + offs_k
        mask_k = inside < RANK
        row = component * RANK + inside
        s_at = s_ptr + offs_m[:, None] * stride_sm + component * stride_sc + offs_p[None, :]
        parts = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        for first in tl.static_range(0, PARTS, BLOCK_P):
            mask = mask_m[:, None] & (first + offs_p < PARTS)[None, :]
            parts += tl.load(s_at + first, mask=mask, other=0.0)
        u_at = u_ptr + offs_m[:, None] * stride_um + row[None, :]
        u = tl.load(u_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        z = (tl.sum(parts, 1)[:, None] * u.to(tl.float32)).to(u_ptr.dtype.element_ty)
        b_at = b_ptr + row[:, None] * stride_bk + offs_n[None, :] * stride_bn
        b = tl.load(b_at, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(z, b.to(z.dtype), acc, PRECISION)
    return _scaled(acc, scale_ptr, offs_n, mask_n)


@triton.jit(do_not_specialize=["M"])
def _decode_inner_kernel(
    gate_ptr, up_ptr, u_gate_ptr, u_up_ptr, s_gate_ptr, s_up_ptr, b_gate_ptr, b_up_ptr,
    bias_gate_ptr, bias_up_ptr, inner_ptr, b_gate_scale_ptr, b_up_scale_ptr,
    M, N, steps, stride_gm, stride_um, stride_sm, stride_sc,
    stride_bgk, stride_bgn, stride_buk, stride_bun, stride_bias_g, stride_bias_u, stride_im,
    RANK: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    at = offs_m[:, None] * stride_gm + offs_n[None, :]
    begin = tl.full((), 0, tl.int64)
    gate = _low_rank(
        u_gate_ptr, s_gate_ptr, b_gate_ptr, b_gate_scale_ptr, offs_m, offs_n, mask_m, mask_n,
        begin, steps,
        stride_um, stride_sm, stride_sc, stride_bgk, stride_bgn,
        RANK, STEPS, PARTS, BLOCK_P, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    gate += tl.load(gate_ptr + at, mask=mask, other=0.0)
    up = tl.load(up_ptr + at, mask=mask, other=0.0)
    if b_up_ptr is not None:
        up += _low_rank(
            u_up_ptr, s_up_ptr, b_up_ptr, b_up_scale_ptr, offs_m, offs_n, mask_m, mask_n,
            begin, steps,
            stride_um, stride_sm, stride_sc, stride_buk, stride_bun,
            RANK, STEPS, PARTS, BLOCK_P, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    if bias_gate_ptr is not None:
        bias = tl.load(bias_gate_ptr + offs_n * stride_bias_g, mask=mask_n, other=0.0)
        gate += bias.to(tl.float32)[None, :]
    if bias_up_ptr is not None:
        bias = tl.load(bias_up_ptr + offs_n * stride_bias_u, mask=mask_n, other=0.0)
        up += bias.to(tl.float32)[None, :]
    inner = (gate * share(gate, ACTIVATION) * up).to(inner_ptr.dtype.element_ty)
    tl.store(inner_ptr + offs_m[:, None] * stride_im + offs_n[None, :], inner, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _decode_low_rank_kernel(
    u_ptr, s_ptr, b_ptr, scale_ptr, out_ptr, M, N, steps, chunk,
    stride_um, stride_sm, stride_sc, stride_bk, stride_bn, stride_om, stride_os,
    RANK: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_s = tl.program_id(1).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    begin = pid_s * chunk
    y = _low_rank(
        u_ptr, s_ptr, b_ptr, scale_ptr, offs_m, offs_n, mask_m, mask_n, begin,
        tl.minimum(begin + chunk, steps), stride_um, stride_sm, stride_sc, stride_bk, stride_bn,
        RANK, STEPS, PARTS, BLOCK_P, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    at = out_ptr + offs_m[:, None] * stride_om + pid_s * stride_os + offs_n[None, :]
    tl.store(at, y, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _decode_sum_kernel(
    a_ptr, b_ptr, bias_ptr, y_ptr, N,
    stride_am, stride_as, stride_bm, stride_bs, stride_bias, stride_ym,
    SPLITS_A: tl.constexpr, SPLITS_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    one = tl.full((), 1, tl.int64)
    y = tl.zeros((BLOCK_N,), tl.float32)
    at = a_ptr + pid_m * stride_am + offs_n
    for _ in range(SPLITS_A):
        y += tl.load(at, mask=mask, other=0.0)
        at += one * stride_as
    if b_ptr is not None:
        at = b_ptr + pid_m * stride_bm + offs_n
        for _ in range(SPLITS_B):
            y += tl.load(at, mask=mask, other=0.0)
            at += one * stride_bs
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n * stride_bias, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + pid_m * stride_ym + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask)
