"""The modulated MLP for up to 64 tokens, without gradients (design.md#paths).

With so few tokens the time is that of reading the weights from memory once. So seven launches
spread each product over the whole device, and split K where there are few columns::

    1  [u | gate | up | p] = x @ W_down, h @ [W_gate | W_up | W_a_in]'    one launch, float32
    2  s, z of gate and up                                                coefficients
    3  inner = silu(gate + z_gate @ B_gate) (up + z_up @ B_up)
    4  [y | p] = inner @ [W_down_proj | W_a_mid]'                         partial sums
    5  s, z of down                                                       coefficients
    6  z @ B_down                                                         partial sums
    7  y = the partial sums of 4 and 6, added in order

The split of K depends on the weights' shapes, never on the number of tokens or on timing. Partial
sums are float32 and added in a fixed order, so there are no atomics, no memory to zero, and the
result is the same every time. Nothing is saved for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from npt_fast.kernels._launch import (
    Target,
    Tiles,
    cdiv,
    contiguous_rows,
    dot_precision,
    launch,
    target_of,
)
from npt_fast.kernels._ops import define
from npt_fast.kernels._tiles import accumulate
from npt_fast.kernels._tuning import NARROW, rows_are_aligned
from npt_fast.kernels.coefficients import coefficient_outputs, coefficients_fwd_into
from npt_fast.kernels.swiglu import silu

# 64 FLOPs for each byte of bfloat16 weights, where an H100 does 296 in that time (design.md#counts)
MAX_TOKENS = 64
_PROGRAMS = 528
"""Programs that keep a large device busy: four for each of an H100's 132 multiprocessors. It is a
constant so that results do not depend on the device."""
_CHUNK_MULTIPLE = 128
"""Parts of K are multiples of this. It is a multiple of every tile's k, which depends on T."""


@triton.jit
def _columns(
    a_ptr, b_ptr, out_ptr, M, N, K, begin, end, pid_n, pid_s, first,
    stride_am, stride_ak, stride_bk, stride_bn, stride_os, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one block of columns of a product over ``K[begin:end]``, from column `first` on."""
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    # 16 rows at least, masked where there are fewer tokens (design.md#triton)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate(
        acc, a_ptr, b_ptr, offs_m, offs_n, mask_m, mask_n, begin, end,
        stride_am, stride_ak, stride_bk, stride_bn, BLOCK_K, PRECISION,
    )  # fmt: skip
    at = out_ptr + pid_s * stride_os + offs_m[:, None] * stride_om + (first + offs_n)[None, :]
    tl.store(at, acc, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _decode_products_kernel(
    a0_ptr, b0_ptr, a1_ptr, b1_ptr, a2_ptr, b2_ptr, a3_ptr, b3_ptr, out_ptr,
    M, K, N0, N1, N2, N3, chunk,
    stride_a0m, stride_a0k, stride_b0k, stride_b0n, stride_a1m, stride_a1k, stride_b1k, stride_b1n,
    stride_a2m, stride_a2k, stride_b2k, stride_b2n, stride_a3m, stride_a3k, stride_b3k, stride_b3n,
    stride_os, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to four products of equal K, side by side, in one grid of column blocks."""
    pid = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1).to(tl.int64)
    begin = pid_s * chunk
    end = tl.minimum(begin + chunk, K)
    blocks0 = tl.cdiv(N0, BLOCK_N)
    blocks1 = blocks0 + tl.cdiv(N1, BLOCK_N)
    blocks2 = blocks1 + tl.cdiv(N2, BLOCK_N)
    if pid < blocks0:
        _columns(
            a0_ptr, b0_ptr, out_ptr, M, N0, K, begin, end, pid, pid_s, 0,
            stride_a0m, stride_a0k, stride_b0k, stride_b0n, stride_os, stride_om,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    # None is a constexpr: products that are absent leave no code
    if a1_ptr is not None:
        if (pid >= blocks0) & (pid < blocks1):
            _columns(
                a1_ptr, b1_ptr, out_ptr, M, N1, K, begin, end, pid - blocks0, pid_s, N0,
                stride_a1m, stride_a1k, stride_b1k, stride_b1n, stride_os, stride_om,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
    if a2_ptr is not None:
        if (pid >= blocks1) & (pid < blocks2):
            _columns(
                a2_ptr, b2_ptr, out_ptr, M, N2, K, begin, end, pid - blocks1, pid_s, N0 + N1,
                stride_a2m, stride_a2k, stride_b2k, stride_b2n, stride_os, stride_om,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
    if a3_ptr is not None:
        if pid >= blocks2:
            _columns(
                a3_ptr, b3_ptr, out_ptr, M, N3, K, begin, end, pid - blocks2, pid_s, N0 + N1 + N2,
                stride_a3m, stride_a3k, stride_b3k, stride_b3n, stride_os, stride_om,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip


@triton.jit
def _decode_inner_kernel(
    gate_ptr, up_ptr, zg_ptr, zu_ptr, bg_ptr, bu_ptr, bias_g_ptr, bias_u_ptr, inner_ptr,
    M, N, R, stride_gm, stride_zm, stride_bgk, stride_buk, stride_im,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    at = offs_m[:, None] * stride_gm + offs_n[None, :]
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0)
    gate = accumulate(
        gate, zg_ptr, bg_ptr, offs_m, offs_n, mask_m, mask_n, 0, R,
        stride_zm, 1, stride_bgk, 1, BLOCK_K, PRECISION,
    )  # fmt: skip
    up = tl.load(up_ptr + at, mask=mask, other=0.0)
    if zu_ptr is not None:
        up = accumulate(
            up, zu_ptr, bu_ptr, offs_m, offs_n, mask_m, mask_n, 0, R,
            stride_zm, 1, stride_buk, 1, BLOCK_K, PRECISION,
        )  # fmt: skip
    if bias_g_ptr is not None:
        gate += tl.load(bias_g_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if bias_u_ptr is not None:
        up += tl.load(bias_u_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    inner = (silu(gate) * up).to(inner_ptr.dtype.element_ty)
    tl.store(inner_ptr + offs_m[:, None] * stride_im + offs_n[None, :], inner, mask=mask)


@triton.jit
def _decode_sum_kernel(
    a_ptr, b_ptr, bias_ptr, y_ptr, N, stride_as, stride_am, stride_bs, stride_bm, stride_ym,
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
        y += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + pid_m * stride_ym + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask)


def decode_tiles(target: Target, dtype: torch.dtype, tokens: int) -> list[Tiles]:
    """Tiles of the decode kernels: all tokens in one tile, few columns, long steps of K."""
    # 4 stages take up to 81,920 bytes of shared memory; gfx942 has 65,536
    stages = 2 if target.backend == "hip" else 4
    if (
        dtype == torch.float32
    ):  # a third stage spills for 64 tokens on sm_80 and sm_90 with Triton 3.6
        return [Tiles(16, 32, 64, 4, 3) if tokens <= 16 else Tiles(64, 32, 32, 8, 2)]
    return [Tiles(16, 64, 128, 4, stages) if tokens <= 16 else Tiles(64, 64, 64, 4, stages)]


def _tiles_for(tensor: Tensor, *sizes: int) -> Tiles:
    tiles = decode_tiles(target_of(tensor), tensor.dtype, tensor.shape[0])[0]
    return tiles if rows_are_aligned(sizes) else replace(NARROW, m=tiles.m)


def split_k(columns: int, depth: int) -> tuple[int, int]:
    """Number of parts that K of a product is split into, and the length of a part.

    It ignores tokens, dtype and device, so that sums are always added in the same order. There are
    at most 16 parts, since each writes and reads ``columns`` float32 sums per token.
    """
    # 64 columns are the tile of 16-bit dtypes; it stays 64 in float32, whose tile has 32, so that
    # dtypes do not differ in how they split
    parts = max(1, min(16, _PROGRAMS // cdiv(columns, 64), cdiv(depth, _CHUNK_MULTIPLE)))
    chunk = cdiv(cdiv(depth, parts), _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE
    return cdiv(depth, chunk), chunk


def _joined_products(products: Sequence[tuple[Tensor, Tensor]], *, splits: bool) -> Tensor:
    """Products side by side, ``(parts, T, N_0 + N_1 + ...)``; one part unless `splits`."""
    a = products[0][0]
    tokens, depth = a.shape
    widths = [b.shape[1] for _, b in products]
    operands = [tensor for pair in products for tensor in pair]
    strides = [stride for tensor in operands for stride in tensor.stride()]
    absent = 4 - len(products)
    tiles = _tiles_for(a, depth, *widths)
    parts, chunk = split_k(sum(widths), depth) if splits else (1, depth)
    # float32 also in 16-bit calls: rounded once, when all parts are added
    out = torch.empty((parts, tokens, sum(widths)), device=a.device, dtype=torch.float32)
    launch(
        _decode_products_kernel, (sum(cdiv(width, tiles.n) for width in widths), parts),
        *operands, *(None, None) * absent, out, tokens, depth, *widths, *(0,) * absent, chunk,
        *strides, *(0, 0, 0, 0) * absent, *out.stride()[:2], BLOCK_M=tiles.m, BLOCK_N=tiles.n,
        BLOCK_K=tiles.k, PRECISION=dot_precision(a.dtype), warps=tiles.warps, stages=tiles.stages,
    )  # fmt: skip
    return out


def _by_projection(joined: Tensor, count: int) -> Tensor:
    """``(..., T, c R)`` as ``(..., c, T, R)``."""
    return joined.unflatten(-1, (count, -1)).movedim(-2, -3)


def _scaled_bottlenecks(u: Tensor, p: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    s, z = coefficient_outputs(u, k, dtype)
    coefficients_fwd_into(u, p, s, z)
    return z


def _modulated_inner(gate: Tensor, up: Tensor, z: Tensor, heads: Sequence[Tensor | None],
           biases: Sequence[Tensor | None]) -> Tensor:  # fmt: skip
    tokens, width = gate.shape
    inner = torch.empty((tokens, width), device=z.device, dtype=z.dtype)
    tiles = _tiles_for(inner, width, z.shape[2])
    b_gate, b_up = (head if head is None else contiguous_rows(head) for head in heads)
    assert b_gate is not None
    launch(
        _decode_inner_kernel, (cdiv(width, tiles.n),), gate, up, z[0],
        None if b_up is None else z[1], b_gate, b_up, *biases, inner, tokens, width, z.shape[2],
        gate.stride(0), z.stride(1), b_gate.stride(0), 0 if b_up is None else b_up.stride(0),
        inner.stride(0), BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k,
        PRECISION=dot_precision(z.dtype), warps=tiles.warps, stages=tiles.stages,
    )  # fmt: skip
    return inner


def _sum_of_partials(
    a: Tensor, b: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Sum of all parts of `a` and `b`, ``(parts, T, N)`` each, and the bias, as ``(T, N)``."""
    _, tokens, width = a.shape
    y = torch.empty((tokens, width), device=a.device, dtype=dtype)
    block = min(256, triton.next_power_of_2(width))
    launch(
        _decode_sum_kernel, (tokens, cdiv(width, block)), a, b, bias, y, width, *a.stride()[:2],
        *((0, 0) if b is None else b.stride()[:2]), y.stride(0), SPLITS_A=a.shape[0],
        SPLITS_B=1 if b is None else b.shape[0], BLOCK_N=block, warps=4,
    )  # fmt: skip
    return y


@define(
    "decode_mlp(Tensor x, Tensor h, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias,"
    " Tensor? up_bias, Tensor? down_bias, Tensor w_down, Tensor w_a_in, Tensor? w_a_mid,"
    " Tensor w_b_gate, Tensor? w_b_up, Tensor? w_b_down, int num_ranks) -> Tensor",
    lambda x, h, *rest: torch.empty(h.shape, device=h.device, dtype=h.dtype),
)
def decode_mlp(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    w_down: Tensor,
    w_a_in: Tensor,
    w_a_mid: Tensor | None,
    w_b_gate: Tensor,
    w_b_up: Tensor | None,
    w_b_down: Tensor | None,
    num_ranks: int,
) -> Tensor:
    """The modulated MLP of at most 64 tokens; the tensors are those of `MLPWeights` and `Factors`.

    Returns:
        ``(T, D)``.
    """
    k, rank, width, dtype = num_ranks, len(w_b_gate), len(gate), h.dtype
    projections, inputs = w_down.shape[1] // rank, len(w_a_in) // rank
    products = [(x, w_down), (h, gate.t()), (h, up.t()), (h, w_a_in.t())]
    # not split: launch 3 reads gate and up whole. There are columns enough without it: 576 blocks
    # in Llama-3.2-1B with R 4096
    first = _joined_products(products, splits=False)[0]
    u, gates, ups, p = first.split([projections * rank, width, width, inputs * rank], 1)
    u = _by_projection(u, projections)
    z = _scaled_bottlenecks(u[:inputs], _by_projection(p, inputs), k, dtype)
    inner = _modulated_inner(gates, ups, z, (w_b_gate, w_b_up), (gate_bias, up_bias))
    if w_a_mid is None or w_b_down is None:
        y = _joined_products([(inner, down.t())], splits=True)
        return _sum_of_partials(y, None, down_bias, dtype)
    second = _joined_products([(inner, down.t()), (inner, w_a_mid.t())], splits=True)
    y, p = second.split([len(down), rank], 2)
    z = _scaled_bottlenecks(u[inputs:], _by_projection(p, 1), k, dtype)
    low_rank = _joined_products([(z[0], w_b_down)], splits=True)
    return _sum_of_partials(y, low_rank, down_bias, dtype)
