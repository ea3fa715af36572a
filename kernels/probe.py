"""Probes, coefficients and scaled bottlenecks in one kernel: a GEMM with `coefficients` behind it.

It computes ``p = a @ W_a_up'``, ``s_i = sum_j u_ij p_ij`` and ``z = s u`` for one projection, or
for gate and up together. A tile of the product holds whole components, each padded to a power of
two columns. So p is never read back, and written only if backward needs it. r is at most 128.
"""

from __future__ import annotations

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
)
from npt_fast.kernels._ops import define
from npt_fast.kernels._tiles import dot, tile_indices
from npt_fast.kernels._tuning import choose_tiles
from npt_fast.kernels.coefficients import coefficient_outputs

GROUP_M = 8
# the columns of every tile of `probe_tiles`: one tile must hold a whole component
MAX_RANK = 128


@triton.jit
def _probe_kernel(
    a_ptr, w_ptr, u_ptr, p_ptr, s_ptr, z_ptr, M, N, K, num_ranks,
    stride_am, stride_ak, stride_wn, stride_wk, stride_uc, stride_um, stride_pm,
    stride_sc, stride_sm, stride_zc, stride_zm,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # components of a tile, each of BLOCK_R columns: a power of two, as tl.reshape needs
    BLOCK_C: tl.constexpr = BLOCK_N // BLOCK_R
    pid_m, pid_c = tile_indices(M, N, BLOCK_M, BLOCK_C, GROUP_M)  # N components
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    component = pid_c * BLOCK_C + offs_n // BLOCK_R
    offs_r = offs_n % BLOCK_R
    column = component * RANK + offs_r
    mask_m = offs_m < M
    mask_n = (component < N) & (offs_r < RANK)

    step = tl.full((), BLOCK_K, tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    w_ptrs = w_ptr + column[None, :] * stride_wn + offs_k[:, None] * stride_wk
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        mask_k = tl.arange(0, BLOCK_K) < K - start
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        p = dot(a, w, p, PRECISION)
        a_ptrs += step * stride_ak
        w_ptrs += step * stride_wk

    projection = component // num_ranks
    inside = column - projection * num_ranks * RANK
    mask = mask_m[:, None] & mask_n[None, :]
    u_at = u_ptr + offs_m[:, None] * stride_um + (projection * stride_uc + inside)[None, :]
    u = tl.load(u_at, mask=mask, other=0.0).to(tl.float32)
    products = tl.reshape(u * p, (BLOCK_M, BLOCK_C, BLOCK_R))
    s = tl.sum(products, 2)
    # spread s over the columns of its component
    scale = tl.reshape(
        tl.broadcast_to(s[:, :, None], (BLOCK_M, BLOCK_C, BLOCK_R)), (BLOCK_M, BLOCK_N)
    )
    z_at = z_ptr + offs_m[:, None] * stride_zm + (projection * stride_zc + inside)[None, :]
    tl.store(z_at, (scale * u).to(z_ptr.dtype.element_ty), mask=mask)
    if p_ptr is not None:
        p_at = p_ptr + offs_m[:, None] * stride_pm + column[None, :]
        tl.store(p_at, p.to(p_ptr.dtype.element_ty), mask=mask)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    projection_c = offs_c // num_ranks
    s_columns = projection_c * stride_sc + offs_c - projection_c * num_ranks
    s_at = s_ptr + offs_m[:, None] * stride_sm + s_columns[None, :]
    tl.store(s_at, s, mask=mask_m[:, None] & (offs_c < N)[None, :])


def probe_tiles(target: Target, dtype: torch.dtype, tokens: int) -> list[Tiles]:
    """Candidate tiles of `probe`, the default first; each is as wide as the largest rank."""
    if dtype == torch.float32:
        return [Tiles(64, 128, 32, 8, 3)]
    # u, p and their products are live at once: 128 rows would take all registers
    stages = 2 if target.backend == "hip" else 3
    first = Tiles(64, 128, 64, 8, stages)
    if target.backend == "cuda" and int(target.arch) < 90:  # Triton 3.7 spills the other one there
        first = Tiles(64, 128, 32, 8, 4)
    return [first, Tiles(64, 128, 64, 4, stages)]


def _probe_outputs(a: Tensor, w_a: Tensor, u: Tensor, k: int, save: bool) -> list[Tensor]:
    s, z = coefficient_outputs(u, k, u.dtype)
    if not save:
        return [s, z]
    return [s, z, torch.empty((a.shape[0], w_a.shape[0]), device=a.device, dtype=a.dtype)]


@define(
    "probe(Tensor a, Tensor w_a, Tensor u, int k, bool save) -> Tensor[]",
    _probe_outputs,
)
def probe(a: Tensor, w_a: Tensor, u: Tensor, k: int, save: bool) -> list[Tensor]:
    """Probes ``p = a @ w_a'``, and coefficients and scaled bottlenecks from them.

    Args:
        a: input of the projections, ``(T, K)``.
        w_a: W_a_up of the projections, ``(c R, K)``.
        u: bottlenecks, ``(c, T, R)``; r at most 128.
        k: number of components.
        save: whether to return p too.

    Returns:
        s ``(c, T, k)`` in float32 and z ``(c, T, R)``; if `save`, also p ``(T, c R)``.
    """
    u = contiguous_rows(u)
    s, z, *saved = outputs = _probe_outputs(a, w_a, u, k, save)
    p = saved[0] if saved else None
    tokens, components, rank = a.shape[0], u.shape[0] * k, u.shape[2] // k
    block_r = triton.next_power_of_2(rank)

    def run(tiles: Tiles) -> None:
        # tiles that a test forces may be narrower than one component
        width = max(tiles.n, block_r)
        launch(
            _probe_kernel, (cdiv(tokens, tiles.m) * cdiv(components, width // block_r),),
            a, w_a, u, p, s, z, tokens, components, a.shape[1], k,
            *a.stride(), *w_a.stride(), *u.stride()[:2], 0 if p is None else p.stride(0),
            *s.stride()[:2], *z.stride()[:2], RANK=rank, BLOCK_R=block_r,
            BLOCK_M=tiles.m, BLOCK_N=width, BLOCK_K=tiles.k, GROUP_M=GROUP_M,
            PRECISION=dot_precision(a.dtype), warps=tiles.warps, stages=tiles.stages,
        )  # fmt: skip

    # rank is a constant of the kernel, of which Triton knows every divisor: a component's rows
    # must begin at multiples of 16 bytes, not of 16 elements
    begin = rank * z.element_size()
    sizes = begin, rank * components, a.shape[1]
    run(choose_tiles("probe", probe_tiles, run, z[0], (a, w_a, u), sizes))
    return outputs
