"""Modulated linear maps in one kernel: base and low-rank products share an accumulator.

`modulated_linear` computes a sum of up to three products, ``y = sum_i a_i @ b_i + bias``: forward
``a @ W' + z @ W_b_up`` (design.md#coefficients), backward ``dy @ W + dp @ W_a_up``, and for the
MLP's input ``d_gate @ W_gate + d_up @ W_up + dp @ W_a_in``. `modulated_gate_up` computes two such
sums that share their first operand, and SwiGLU, GeGLU or ReGLU of them.

Each product is a loop of its own, one after the other, over one float32 accumulator. That saves
writing and reading ``(T, out)`` for each product, and rounds once. Two products must not share a
loop: some Triton versions compile that wrongly for sm_100 (design.md#triton-bugs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from npt_fast.kernels._launch import (
    Target,
    Tiles,
    cdiv,
    contiguous_bias,
    contiguous_rows,
    dot_precision,
    launch,
)
from npt_fast.kernels._ops import define
from npt_fast.kernels._tiles import accumulate, dot, tile_indices
from npt_fast.kernels._tuning import choose_tiles
from npt_fast.kernels.swiglu import share

GROUP_M = 8


@triton.jit
def _modulated_linear_kernel(
    a_ptr, b_ptr, a2_ptr, b2_ptr, a3_ptr, b3_ptr, bias_ptr, y_ptr, M, N, K, K2, K3,
    stride_am, stride_ak, stride_bk, stride_bn,
    stride_a2m, stride_a2k, stride_b2k, stride_b2n,
    stride_a3m, stride_a3k, stride_b3k, stride_b3n, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_indices(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate(
        acc, a_ptr, b_ptr, offs_m, offs_n, mask_m, mask_n, 0, K,
        stride_am, stride_ak, stride_bk, stride_bn, BLOCK_K, PRECISION,
    )  # fmt: skip
    if a2_ptr is not None:
        acc = accumulate(
            acc, a2_ptr, b2_ptr, offs_m, offs_n, mask_m, mask_n, 0, K2,
            stride_a2m, stride_a2k, stride_b2k, stride_b2n, BLOCK_K, PRECISION,
        )  # fmt: skip
    if a3_ptr is not None:
        acc = accumulate(
            acc, a3_ptr, b3_ptr, offs_m, offs_n, mask_m, mask_n, 0, K3,
            stride_a3m, stride_a3k, stride_b3k, stride_b3n, BLOCK_K, PRECISION,
        )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _modulated_gate_up_kernel(
    h_ptr, wg_ptr, wu_ptr, zg_ptr, zu_ptr, bg_ptr, bu_ptr, bias_g_ptr, bias_u_ptr,
    gate_ptr, up_ptr, inner_ptr, M, N, K, R,
    stride_hm, stride_hk, stride_wgk, stride_wgn, stride_wuk, stride_wun,
    stride_zgm, stride_zum, stride_bgk, stride_buk, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_indices(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # as in `accumulate`, which is not used here because it would load h twice
    step = tl.full((), BLOCK_K, tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_k[None, :] * stride_hk
    wg_ptrs = wg_ptr + offs_k[:, None] * stride_wgk + offs_n[None, :] * stride_wgn
    wu_ptrs = wu_ptr + offs_k[:, None] * stride_wuk + offs_n[None, :] * stride_wun
    for start in range(0, K, BLOCK_K):  # h is loaded once for both
        mask_k = tl.arange(0, BLOCK_K) < K - start
        mask_w = mask_k[:, None] & mask_n[None, :]
        h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        # two products, but one accumulator each: the bug of sm_100 needs a shared one
        # (design.md#triton-bugs)
        gate = dot(h, tl.load(wg_ptrs, mask=mask_w, other=0.0), gate, PRECISION)
        up = dot(h, tl.load(wu_ptrs, mask=mask_w, other=0.0), up, PRECISION)
        h_ptrs += step * stride_hk
        wg_ptrs += step * stride_wgk
        wu_ptrs += step * stride_wuk
    gate = accumulate(
        gate, zg_ptr, bg_ptr, offs_m, offs_n, mask_m, mask_n, 0, R,
        stride_zgm, 1, stride_bgk, 1, BLOCK_K, PRECISION,
    )  # fmt: skip
    if zu_ptr is not None:
        up = accumulate(
            up, zu_ptr, bu_ptr, offs_m, offs_n, mask_m, mask_n, 0, R,
            stride_zum, 1, stride_buk, 1, BLOCK_K, PRECISION,
        )  # fmt: skip
    if bias_g_ptr is not None:
        gate += tl.load(bias_g_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if bias_u_ptr is not None:
        up += tl.load(bias_u_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    at = offs_m[:, None] * stride_ym + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    # backward needs them; a call without gradients writes inner alone
    if gate_ptr is not None:
        tl.store(gate_ptr + at, gate.to(gate_ptr.dtype.element_ty), mask=mask)
        tl.store(up_ptr + at, up.to(up_ptr.dtype.element_ty), mask=mask)
    inner = (gate * share(gate, ACTIVATION) * up).to(inner_ptr.dtype.element_ty)
    tl.store(inner_ptr + at, inner, mask=mask)


def linear_tiles(target: Target, dtype: torch.dtype, tokens: int) -> list[Tiles]:
    """Candidate tiles of `modulated_linear`, the default first."""
    if dtype == torch.float32:
        return [Tiles(64, 64, 16, 8, 3)]  # Triton 3.7 spills with 4 warps
    # 128 x 128 takes 32,768 bytes a stage: 3 fit into the 101,376 of sm_86 and sm_12x, 2 into
    # gfx942's 65,536
    stages = 2 if target.backend == "hip" else 3
    # of 128 rows, half would be masked
    if tokens <= 64:
        return [Tiles(64, 64, 64, 4, stages)]
    return [Tiles(128, 128, 64, 8, stages), Tiles(128, 64, 64, 4, stages)]


def gate_up_tiles(target: Target, dtype: torch.dtype, tokens: int) -> list[Tiles]:
    """Candidate tiles of `modulated_gate_up`, default first; two accumulators halve the width."""
    if dtype == torch.float32:
        # Triton 3.6 and 3.7 spill the first with k = 32
        return [Tiles(64, 32, 16, 4, 3), Tiles(64, 64, 32, 8, 3)]
    # 128 x 64 with two weights takes 32,768 bytes a stage, as in `linear_tiles`
    stages = 2 if target.backend == "hip" else 4 if target.shared_bytes > 200_000 else 3
    small = Tiles(64, 64, 64, 8, stages)
    return [small] if tokens <= 64 else [Tiles(128, 64, 64, 8, stages), small]


@define(
    "modulated_linear(Tensor[] a, Tensor[] b, Tensor? bias) -> Tensor",
    lambda a, b, bias: a[0].new_empty(a[0].shape[0], b[0].shape[1]),
)
def modulated_linear(a: Sequence[Tensor], b: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Sum of up to three products and a bias.

    Args:
        a: left operands, ``(T, K_i)`` each, of any strides.
        b: right operands, ``(K_i, N)`` each, of any strides.
        bias: bias, ``(N,)``, or None.

    Returns:
        ``(T, N)`` in the dtype of `a`.
    """
    tokens, width = a[0].shape[0], b[0].shape[1]
    y = torch.empty((tokens, width), device=a[0].device, dtype=a[0].dtype)
    pairs = list(zip(a, b, strict=True))
    absent = 3 - len(pairs)
    operands = [*(tensor for pair in pairs for tensor in pair), *(None, None) * absent]
    sizes = [*(left.shape[1] for left in a), *(0,) * absent]
    strides = [stride for pair in pairs for tensor in pair for stride in tensor.stride()]
    strides += (0, 0, 0, 0) * absent
    bias = contiguous_bias(bias)

    def run(tiles: Tiles) -> None:
        launch(
            _modulated_linear_kernel, (cdiv(tokens, tiles.m) * cdiv(width, tiles.n),),
            *operands, bias, y, tokens, width, *sizes, *strides, y.stride(0),
            BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, GROUP_M=GROUP_M,
            PRECISION=dot_precision(y.dtype), warps=tiles.warps, stages=tiles.stages,
        )  # fmt: skip

    run(choose_tiles("modulated_linear", linear_tiles, run, y, [*a, *b], (width, *sizes)))
    return y


def _gate_up_outputs(h: Tensor, weight: Tensor, save: bool) -> list[Tensor]:
    shape = (h.shape[0], weight.shape[0])
    return [torch.empty(shape, device=h.device, dtype=h.dtype) for _ in range(3 if save else 1)]


@define(
    "modulated_gate_up(Tensor h, Tensor gate_weight, Tensor up_weight, Tensor z, Tensor w_b_gate,"
    " Tensor? w_b_up, Tensor? gate_bias, Tensor? up_bias, bool save,"
    " str activation='silu') -> Tensor[]",
    lambda h, gate_weight, up_weight, z, w_b_gate, w_b_up, gate_bias, up_bias, save, *_: (
        _gate_up_outputs(h, gate_weight, save)
    ),
)
def modulated_gate_up(
    h: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    z: Tensor,
    w_b_gate: Tensor,
    w_b_up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    save: bool,
    activation: str = "silu",
) -> list[Tensor]:
    """Modulated gate and up, and ``act(gate) * up`` of them.

    Args:
        h: MLP input, ``(T, D)``.
        gate_weight: weight of gate, ``(F, D)``.
        up_weight: weight of up, ``(F, D)``.
        z: scaled bottlenecks of gate, or of gate and up, ``(c, T, R)``.
        w_b_gate: W_b_up of gate, ``(R, F)``.
        w_b_up: W_b_up of up, ``(R, F)``, or None if up is not modulated.
        gate_bias: bias of gate, ``(F,)``, or None.
        up_bias: bias of up, ``(F,)``, or None.
        save: whether to return gate and up too.
        activation: a name of `swiglu.ACTIVATIONS`.

    Returns:
        inner ``(T, F)``; if `save`, also gate and up before the activation, ``(T, F)`` each.
    """
    outputs = _gate_up_outputs(h, gate_weight, save)
    inner, gate, up = outputs if save else (outputs[0], None, None)
    (tokens, width), (hidden, rank) = inner.shape, (h.shape[1], w_b_gate.shape[0])
    z = contiguous_rows(z)
    z_up = None if w_b_up is None else z[1]
    b_gate, b_up = contiguous_rows(w_b_gate), None if w_b_up is None else contiguous_rows(w_b_up)
    gate_bias, up_bias = contiguous_bias(gate_bias), contiguous_bias(up_bias)

    def run(tiles: Tiles) -> None:
        launch(
            _modulated_gate_up_kernel, (cdiv(tokens, tiles.m) * cdiv(width, tiles.n),),
            h, gate_weight, up_weight, z[0], z_up, b_gate, b_up, gate_bias, up_bias,
            gate, up, inner, tokens, width, hidden, rank,
            *h.stride(), *gate_weight.stride()[::-1], *up_weight.stride()[::-1],
            z.stride(1), z.stride(1), b_gate.stride(0), 0 if b_up is None else b_up.stride(0),
            inner.stride(0), BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, GROUP_M=GROUP_M,
            PRECISION=dot_precision(h.dtype), ACTIVATION=activation, warps=tiles.warps,
            stages=tiles.stages,
        )  # fmt: skip

    operands = h, gate_weight, up_weight, z, b_gate, b_up
    sizes = width, hidden, rank
    run(choose_tiles("modulated_gate_up", gate_up_tiles, run, inner, operands, sizes))
    return outputs
