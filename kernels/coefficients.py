"""Coefficients and scaled bottlenecks: the elementwise part between a projection's GEMMs.

With bottleneck u and probe p of one token and component i (design.md#coefficients)::

    s_i = sum_j u_ij p_ij          z = s u
    ds_i = sum_j dz_ij u_ij        du = s dz + ds p        dp = ds u

The kernels work elementwise over ``(c, T, R)``, ``R = k r``; one launch serves c projections (gate
and up share their inputs). A program holds whole components, so it reads and writes everything
once: per token and projection 3 R elements forward and 6 R backward, and k coefficients of 4 bytes.
s and all sums are float32. Backward returns z too, because it is not saved and the gradient of
W_b_up needs it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from npt_fast.kernels._launch import cdiv, launch
from npt_fast.kernels._ops import define


@triton.jit
def _components(
    T, num_ranks, RANK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Offsets of a program's tokens, components and columns, and masks of those that exist."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    # a rank that is no power of two is padded to one, as arange needs, and masked
    offs_r = tl.arange(0, BLOCK_R)
    columns = offs_c[None, :, None] * RANK + offs_r[None, None, :]
    whole = (offs_t < T)[:, None] & (offs_c < num_ranks)[None, :]
    return offs_t, offs_c, columns, whole, whole[:, :, None] & (offs_r < RANK)[None, None, :]


@triton.jit
def _coefficients_fwd_kernel(
    u_ptr, p_ptr, s_ptr, z_ptr, T, num_ranks,
    stride_uc, stride_ut, stride_ur, stride_pc, stride_pt, stride_pr,
    stride_sc, stride_st, stride_sk, stride_zc, stride_zt, stride_zr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_t, offs_c, columns, whole, mask = _components(
        T, num_ranks, RANK, BLOCK_T, BLOCK_C, BLOCK_R
    )
    pid_c = tl.program_id(2).to(tl.int64)
    token = offs_t[:, None, None]
    u_at = u_ptr + pid_c * stride_uc + token * stride_ut + columns * stride_ur
    u = tl.load(u_at, mask=mask, other=0.0).to(tl.float32)
    p_at = p_ptr + pid_c * stride_pc + token * stride_pt + columns * stride_pr
    p = tl.load(p_at, mask=mask, other=0.0).to(tl.float32)
    s = tl.sum(u * p, 2)
    s_at = s_ptr + pid_c * stride_sc + offs_t[:, None] * stride_st + offs_c[None, :] * stride_sk
    tl.store(s_at, s, mask=whole)
    z_at = z_ptr + pid_c * stride_zc + token * stride_zt + columns * stride_zr
    tl.store(z_at, (s[:, :, None] * u).to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _coefficients_bwd_kernel(
    dz_ptr, u_ptr, p_ptr, s_ptr, du_ptr, dp_ptr, z_ptr, T, num_ranks,
    stride_dzc, stride_dzt, stride_dzr, stride_uc, stride_ut, stride_ur,
    stride_pc, stride_pt, stride_pr, stride_sc, stride_st, stride_sk,
    stride_duc, stride_dut, stride_dur, stride_dpc, stride_dpt, stride_zc, stride_zt,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_t, offs_c, columns, whole, mask = _components(
        T, num_ranks, RANK, BLOCK_T, BLOCK_C, BLOCK_R
    )
    pid_c = tl.program_id(2).to(tl.int64)
    token = offs_t[:, None, None]
    dz_at = dz_ptr + pid_c * stride_dzc + token * stride_dzt + columns * stride_dzr
    dz = tl.load(dz_at, mask=mask, other=0.0).to(tl.float32)
    u_at = u_ptr + pid_c * stride_uc + token * stride_ut + columns * stride_ur
    u = tl.load(u_at, mask=mask, other=0.0).to(tl.float32)
    p_at = p_ptr + pid_c * stride_pc + token * stride_pt + columns * stride_pr
    p = tl.load(p_at, mask=mask, other=0.0).to(tl.float32)
    s_at = s_ptr + pid_c * stride_sc + offs_t[:, None] * stride_st + offs_c[None, :] * stride_sk
    s = tl.load(s_at, mask=whole, other=0.0)[:, :, None]
    ds = tl.sum(dz * u, 2)[:, :, None]
    du_at = du_ptr + pid_c * stride_duc + token * stride_dut + columns * stride_dur
    tl.store(du_at, (s * dz + ds * p).to(du_ptr.dtype.element_ty), mask=mask)
    dp_at = dp_ptr + pid_c * stride_dpc + token * stride_dpt + columns
    tl.store(dp_at, (ds * u).to(dp_ptr.dtype.element_ty), mask=mask)
    z_at = z_ptr + pid_c * stride_zc + token * stride_zt + columns
    tl.store(z_at, (s * u).to(z_ptr.dtype.element_ty), mask=mask)


def _block_sizes(rank: int, num_ranks: int) -> dict[str, int]:
    """Blocks of about 2048 elements, at most 16 per thread, so that 4 operands do not spill."""
    block_r = triton.next_power_of_2(rank)
    block_c = min(triton.next_power_of_2(num_ranks), max(1, 64 // block_r))
    block_t = min(32, max(1, 2048 // (block_r * block_c)))
    # 512 elements for each warp of 32 threads
    warps = min(16, max(4, block_t * block_c * block_r // 512))
    return {"BLOCK_T": block_t, "BLOCK_C": block_c, "BLOCK_R": block_r, "warps": warps}


def _grid(u: Tensor, k: int, blocks: dict[str, int]) -> tuple[int, int, int]:
    return cdiv(u.shape[1], blocks["BLOCK_T"]), cdiv(k, blocks["BLOCK_C"]), u.shape[0]


def coefficients_fwd_into(u: Tensor, p: Tensor, s: Tensor, z: Tensor) -> None:
    """Write coefficients to `s` and scaled bottlenecks to `z`. `z` may be the same memory as `p`.

    Args:
        u: bottlenecks, ``(c, T, R)``.
        p: probes, ``(c, T, R)``.
        s: output, ``(c, T, k)``, float32.
        z: output, ``(c, T, R)``.
    """
    k = s.shape[2]
    blocks = _block_sizes(u.shape[2] // k, k)
    launch(
        _coefficients_fwd_kernel, _grid(u, k, blocks), u, p, s, z, u.shape[1], k,
        *u.stride(), *p.stride(), *s.stride(), *z.stride(),
        RANK=u.shape[2] // k, **blocks,
    )  # fmt: skip


def coefficient_outputs(u: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialized s ``(c, T, k)``, float32, and z ``(c, T, R)``."""
    s = torch.empty((*u.shape[:2], k), device=u.device, dtype=torch.float32)
    return s, torch.empty(u.shape, device=u.device, dtype=dtype)


@define(
    "coefficients_fwd(Tensor u, Tensor p, int k) -> (Tensor, Tensor)",
    lambda u, p, k: coefficient_outputs(u, k, u.dtype),
)
def coefficients_fwd(u: Tensor, p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Coefficients and scaled bottlenecks.

    Args:
        u: bottlenecks, ``(c, T, R)``; tensors may have any strides.
        p: probes, ``(c, T, R)``.
        k: number of components.

    Returns:
        s ``(c, T, k)`` in float32, and z ``(c, T, R)`` in the dtype of `u`.
    """
    s, z = coefficient_outputs(u, k, u.dtype)
    coefficients_fwd_into(u, p, s, z)
    return s, z


def _gradient_outputs(u: Tensor) -> tuple[Tensor, Tensor]:
    c, tokens, width = u.shape
    # (T, c R), unlike the other outputs: gate's and up's side by side are one operand of the GEMMs
    # for the gradients of h and W_a_up, which saves 3 D per token (design.md#counts)
    dp = torch.empty((tokens, c * width), device=u.device, dtype=u.dtype)
    return dp, torch.empty(u.shape, device=u.device, dtype=u.dtype)


@define(
    "coefficients_bwd(Tensor dz, Tensor u, Tensor p, Tensor s, Tensor(a!) du) -> (Tensor, Tensor)",
    lambda dz, u, p, s, du: _gradient_outputs(u),
)
def coefficients_bwd(
    dz: Tensor, u: Tensor, p: Tensor, s: Tensor, du: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the bottlenecks to `du`, and return that of the probes.

    Args:
        dz: gradient of z, ``(c, T, R)``.
        u: bottlenecks, ``(c, T, R)``.
        p: probes, ``(c, T, R)``.
        s: coefficients, ``(c, T, k)``, float32.
        du: output, ``(c, T, R)``: a slice of the matrix that one GEMM reads for all projections.

    Returns:
        dp ``(T, c R)``, and z ``(c, T, R)`` again.
    """
    dp, z = _gradient_outputs(u)
    width, k = u.shape[2], s.shape[2]
    blocks = _block_sizes(width // k, k)
    launch(
        _coefficients_bwd_kernel, _grid(u, k, blocks), dz, u, p, s, du, dp, z, u.shape[1], k,
        *dz.stride(), *u.stride(), *p.stride(), *s.stride(), *du.stride(),
        # dp's strides as (c, T, R): projections lie `width` columns apart
        width, dp.stride(0), *z.stride()[:2], RANK=width // k, **blocks,
    )  # fmt: skip
    return dp, z
