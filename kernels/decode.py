"""The modulated MLP for up to 64 tokens, without gradients (design.md#paths).

With so few tokens the time is that of reading the weights from memory once. So five launches
spread each product over the whole device, and split K where there are few columns::

    1  u = x @ W_down; s of gate and up; [gate | up] = h @ [W_gate | W_up]'
    2  inner = act(gate + z_gate @ B_gate) (up + z_up @ B_up)
    3  y = inner @ W_down_proj'; s of down                                 partial sums
    4  z_down @ B_down                                                     partial sums
    5  y = the partial sums of 3 and 4, added in order

A program of 1 or 3 has the probes ``p = h @ W_a'`` of some columns of one component, and the
bottlenecks of the same columns. It writes what they add to the component's coefficient, so p is
not written. A program of 2 or 4 adds that up, and forms z = s u where it is multiplied.

The split of K depends on the weights' shapes, never on the number of tokens or on timing. Partial
sums are float32 and added in a fixed order, so there are no atomics, no memory to zero, and the
result is the same every time. Nothing is saved for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from npt_fast.kernels._decode_kernels import (
    _decode_inner_kernel,
    _decode_low_rank_kernel,
    _decode_products_kernel,
    _decode_sum_kernel,
)
from npt_fast.kernels._launch import (
    Target,
    Tiles,
    cdiv,
    dot_precision,
    launch,
    target_of,
)
from npt_fast.kernels._ops import define
from npt_fast.kernels._plan import planned
from npt_fast.kernels._tuning import NARROW, rows_are_aligned

# 64 FLOPs for each byte of bfloat16 weights, where an H100 does 296 in that time (design.md#counts)
MAX_TOKENS = 64
_PROGRAMS = 528
"""Programs that keep a large device busy: four for each of an H100's 132 multiprocessors. It is a
constant so that results do not depend on the device."""
_CHUNK_MULTIPLE = 128
"""Parts of K are multiples of this. It is a multiple of every tile's k, which depends on T."""


def decode_tiles(target: Target, dtype: torch.dtype, tokens: int) -> list[Tiles]:
    """Tiles of the decode kernels: all tokens in one tile, few columns, long steps of K."""
    # 4 stages take up to 81,920 bytes of shared memory; gfx942 has 65,536
    stages = 2 if target.backend == "hip" else 4
    if dtype == torch.float32:
        # a k of 64 spills on sm_80 in TF32, and for 64 tokens a third stage, on sm_90 too, with
        # Triton 3.6
        return [Tiles(16, 32, 32, 4, 4) if tokens <= 16 else Tiles(64, 32, 32, 8, 2)]
    return [Tiles(16, 64, 128, 4, stages) if tokens <= 16 else Tiles(64, 64, 64, 4, stages)]


def _tiles_for(operands: Sequence[Tensor | None], *sizes: int) -> Tiles:
    """Tiles of a product; the first operand has a row for each token."""
    a = operands[0]
    assert a is not None
    tiles = decode_tiles(target_of(a), a.dtype, a.shape[-2])[0]
    return tiles if rows_are_aligned(operands, sizes) else replace(NARROW, m=tiles.m)


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


class _Components(NamedTuple):
    """The components of one launch: how many, their rank, and their columns in whole steps."""

    number: int
    rank: int

    @property
    def piece(self) -> int:
        """Most columns of one step, the same for every tile: a power of two."""
        return min(_CHUNK_MULTIPLE, max(16, triton.next_power_of_2(self.rank)))

    @property
    def padded(self) -> int:
        """Columns of all components with those that steps mask."""
        return self.number * cdiv(self.rank, self.piece) * self.piece


def _partial_sums(a: Tensor, *shape: int) -> Tensor:
    # float32 also in 16-bit calls: rounded once, when all parts are added. Tokens come first, so
    # that no stride depends on their number, and one kernel serves all numbers
    return torch.empty((len(a), *shape), device=a.device, dtype=torch.float32)


def _strides(tensor: Tensor | None, dimensions: int = 2) -> tuple[int, ...]:
    return (0,) * dimensions if tensor is None else tensor.stride()


def _products(
    a: Tensor,
    weights: Sequence[Tensor],
    w_a: Tensor | None,
    u: Tensor | None,
    components: _Components,
    x: Tensor | None = None,
    w_down: Tensor | None = None,
    scales: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    """Launch 1 or 3: products of `a`, and coefficients from its probes.

    Args:
        a: ``(T, K)``.
        weights: one or two weights, ``(N, K)``.
        w_a: W_a_up of the components, ``(R, K)``, or None.
        u: their bottlenecks, ``(T, R)``; with `x` they are written to it, and those of further
            projections behind them.
        components: the components.
        x: attention output, ``(T, K)``; None means that `u` is known, and that K is split.
        w_down: W_down of all projections.
        scales: scales of `w_a` and `w_down` if they are int8.

    Returns:
        The products side by side, ``(T, parts, N)``, and terms of the coefficients,
        ``(T, components, terms)``.
    """
    depth, width = a.shape[1], len(weights[0])
    count, rank = components if w_a is not None else (0, 1)
    tiles = _tiles_for((a, x, w_down, w_a, *weights), depth, width, rank * a.element_size())
    if scales[0] is not None:
        # a k of 128 spills 8 bytes on sm_80 in float16, 4 warps for 64 tokens 16 on sm_120
        tiles = replace(tiles, k=min(tiles.k, 64), warps=tiles.warps if tiles.m == 16 else 8)
    parts, chunk = (1, depth) if x is not None else split_k(width + count * rank, depth)
    out = _partial_sums(a, parts, len(weights) * width)
    blocks = cdiv(rank, tiles.n)
    s = None if w_a is None else _partial_sums(a, count, parts * blocks)
    rest = 0 if w_down is None else w_down.shape[1] - count * rank
    b0, b1 = (*weights, None)[:2]
    launch(
        _decode_products_kernel,
        (count * blocks + cdiv(rest, tiles.n) + len(weights) * cdiv(width, tiles.n), parts),
        a, w_a, x, w_down, b0, b1, u, s, out, *scales, len(a), depth, width, count, rest, chunk,
        *a.stride(), *_strides(w_a), *_strides(x), *_strides(w_down), *_strides(b0)[::-1],
        *_strides(b1)[::-1], *_strides(u)[:1], *_strides(s, 3)[:2], *out.stride()[:2], RANK=rank,
        BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, PRECISION=dot_precision(a.dtype),
        warps=tiles.warps, stages=tiles.stages,
    )  # fmt: skip
    return out, s


def _steps(tiles: Tiles, components: _Components, s: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Constants and options of the launch of a product with scaled bottlenecks."""
    step = min(tiles.k, components.piece)
    return {
        "RANK": components.rank,
        "STEPS": components.padded // components.number // step,
        "PARTS": s.shape[2],
        # 32 at a time: 64 rows of them take 16 registers of a thread
        "BLOCK_P": min(32, triton.next_power_of_2(s.shape[2])),
        "BLOCK_M": tiles.m,
        "BLOCK_N": tiles.n,
        "BLOCK_K": step,
        "PRECISION": dot_precision(dtype),
        "warps": tiles.warps,
        "stages": tiles.stages,
    }


def _modulated_inner(gate: Tensor, up: Tensor, u: Sequence[Tensor], s: Sequence[Tensor],
           heads: Sequence[Tensor | None], biases: Sequence[Tensor | None],
           scales: Sequence[Tensor | None], components: _Components,
           activation: str) -> Tensor:  # fmt: skip
    """Launch 2: inner ``(T, F)``; u, s, heads, biases, scales are those of gate and of up."""
    inner = torch.empty(gate.shape, device=gate.device, dtype=u[0].dtype)
    width = gate.shape[1]
    tiles = _tiles_for((*u, *heads), width, components.rank * _element_size(heads[0]))
    int8 = heads[0] is not None and heads[0].dtype == torch.int8
    if tiles.m > 16:
        # 4 spill 32 bytes on sm_90 while numbers are converted; otherwise 8 spill 8 bytes on sm_80
        # in float32
        tiles = replace(tiles, warps=8 if int8 else 4)
    elif activation == "gelu" or (int8 and inner.dtype == torch.float32):
        # more spill 8 bytes: on sm_89 in TF32, and on sm_80 and sm_89 with erf's polynomials
        tiles = replace(tiles, stages=2)
    options = _steps(tiles, components, s[0], inner.dtype)
    absent = [None] * (2 - len(u))
    launch(
        _decode_inner_kernel, (cdiv(width, tiles.n),), gate, up, *u, *absent, *s, *absent, *heads,
        *biases, inner, *scales, len(inner), width, components.number * options["STEPS"],
        gate.stride(0), u[0].stride(0), *s[0].stride()[:2], *_strides(heads[0]),
        *_strides(heads[1]), *_strides(biases[0], 1), *_strides(biases[1], 1), inner.stride(0),
        ACTIVATION=activation, **options,
    )  # fmt: skip
    return inner


def _element_size(tensor: Tensor | None) -> int:
    return 1 if tensor is None else tensor.element_size()


def _low_rank_product(
    u: Tensor, s: Tensor, head: Tensor, scale: Tensor | None, components: _Components
) -> Tensor:
    """Launch 4: partial sums of z @ head, ``(T, parts, N)``."""
    width = head.shape[1]
    tiles = _tiles_for((u, head), width, components.rank * head.element_size())
    options = _steps(tiles, components, s, u.dtype)
    parts, chunk = split_k(width, components.padded)
    steps = chunk // options["BLOCK_K"]
    # a part has two or four steps: more stages than that would only take shared memory
    options["stages"] = min(tiles.stages, max(2, steps))
    out = _partial_sums(u, parts, width)
    launch(
        _decode_low_rank_kernel, (cdiv(width, tiles.n), parts), u, s, head, scale, out, len(u),
        width, components.number * options["STEPS"], steps, u.stride(0),
        *s.stride()[:2], *head.stride(), *out.stride()[:2], **options,
    )  # fmt: skip
    return out


def _sum_of_partials(
    a: Tensor, b: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Sum of all parts of `a` and `b`, ``(T, parts, N)`` each, and the bias, as ``(T, N)``."""
    tokens, parts, width = a.shape
    y = torch.empty((tokens, width), device=a.device, dtype=dtype)
    block = min(256, triton.next_power_of_2(width))
    launch(
        _decode_sum_kernel, (tokens, cdiv(width, block)), a, b, bias, y, width,
        *a.stride()[:2], *_strides(b, 3)[:2], *_strides(bias, 1), y.stride(0), SPLITS_A=parts,
        SPLITS_B=1 if b is None else b.shape[1], BLOCK_N=block, warps=4,
    )  # fmt: skip
    return y


@define(
    "decode_mlp(Tensor x, Tensor h, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias,"
    " Tensor? up_bias, Tensor? down_bias, Tensor w_down, Tensor w_a_in, Tensor? w_a_mid,"
    " Tensor w_b_gate, Tensor? w_b_up, Tensor? w_b_down, int num_ranks,"
    " Tensor?[] scales, str activation='silu') -> Tensor",
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
    scales: Sequence[Tensor | None] = (),
    activation: str = "silu",
) -> Tensor:
    """The modulated MLP of at most 64 tokens; the tensors are those of `MLPWeights` and `Factors`.

    `scales` are those of the six factors if they are int8, ``(N,)`` and contiguous; else empty.
    Numbers are converted in registers, and the float32 sums of a channel scaled once.

    Returns:
        ``(T, D)``.
    """
    operands = (
        x, h, gate, up, down, gate_bias, up_bias, down_bias, w_down, w_a_in, w_a_mid, w_b_gate,
        w_b_up, w_b_down, *(scales or (None,) * 6),
    )  # fmt: skip
    return planned(_decode, operands, num_ranks, activation)


def _decode(
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
    w_down_scale: Tensor | None,
    w_a_in_scale: Tensor | None,
    w_a_mid_scale: Tensor | None,
    w_b_gate_scale: Tensor | None,
    w_b_up_scale: Tensor | None,
    w_b_down_scale: Tensor | None,
    num_ranks: int,
    activation: str,
) -> Tensor:
    if not len(h):
        return torch.empty_like(h)
    k, rank, width = num_ranks, len(w_b_gate), len(gate)
    inputs = len(w_a_in) // rank
    components = _Components(k, rank // k)
    # in 16-bit calls rounded as in every other path; coefficients of gate and up are not of these
    u = torch.empty((len(h), w_down.shape[1]), device=h.device, dtype=h.dtype)
    # not split: launch 2 reads gate and up whole. There are columns enough without it: 448 blocks
    # in Llama-3.2-1B with R 4096
    of_inputs = components._replace(number=inputs * k)
    products, s = _products(
        h, (gate, up), w_a_in, u, of_inputs, x, w_down, (w_a_in_scale, w_down_scale)
    )
    assert s is not None
    gates, ups = products.select(1, 0).split(width, 1)
    us = u.split(rank, 1)
    heads, biases = (w_b_gate, w_b_up), (gate_bias, up_bias)
    scales = (w_b_gate_scale, w_b_up_scale)
    inner = _modulated_inner(
        gates, ups, us[:inputs], s.split(k, 1), heads, biases, scales, components, activation
    )
    y, s = _products(inner, (down,), w_a_mid, us[-1], components, scales=(w_a_mid_scale, None))
    low_rank = None
    if s is not None and w_b_down is not None:
        low_rank = _low_rank_product(us[-1], s, w_b_down, w_b_down_scale, components)
    return _sum_of_partials(y, low_rank, down_bias, h.dtype)
