"""The modulated MLP on a GPU: the algebra of `factored`, with Triton kernels for its steps.

Three paths compute the same:

- ``gemm``: torch's GEMMs (cuBLAS, hipBLASLt), and `coefficients` and `swiglu` between them.
- ``fused``: `probe`, `modulated_gate_up` and `modulated_linear` instead, which keep what they can
  in registers; the products that make gradients of weights, u and dz stay torch's.
- ``decode``: up to 64 tokens without gradients, `decode`.

Saved for backward: x, h, u, p, s, gate and up. z and inner are made again, by kernels that read
what they are made of anyway. Without gradients nothing is kept, z takes the place of p and inner
that of gate, and more than `CHUNK` tokens go through in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from npt_fast.kernels import factored
from npt_fast.kernels._launch import DTYPES, INTERPRETED, Target, target_of
from npt_fast.kernels.coefficients import (
    coefficients_bwd,
    coefficients_fwd,
    coefficients_fwd_into,
)
from npt_fast.kernels.decode import MAX_TOKENS, decode_mlp
from npt_fast.kernels.factored import Base, Modulation, Steps
from npt_fast.kernels.modulated_linear import modulated_gate_up, modulated_linear
from npt_fast.kernels.probe import MAX_RANK, probe
from npt_fast.kernels.swiglu import swiglu_bwd, swiglu_fwd, swiglu_fwd_into

Path = Literal["gemm", "fused", "decode"]

CHUNK = 16_384
"""Tokens that go through at a time where no gradients are asked for."""


def choose_path(target: Target, tokens: int, rank: int, *, gradients: bool) -> Path:
    """Which path computes a call; a table, so that every process and every run does alike.

    ==================================  ======  ================================================
    up to 64 tokens, no gradients       decode  bound by reading the weights
    sm_86, sm_89, sm_12x; R up to 256   fused   little bandwidth for the FLOPs: a pass over (T, F)
                                                costs as much as a product with R
    all else                            gemm    bound by FLOPs, where vendors' GEMMs are best
    ==================================  ======  ================================================

    Reasoned from FLOPs and bytes (KERNELS 2.2, 2.4) and from what others measured with SwiGLU in
    the epilogue, 5 to 15 % on sm_120 and about nothing on sm_90 (KERNELS 1); not measured by us.
    """
    if tokens <= MAX_TOKENS and not gradients:
        return "decode"
    narrow = target.backend == "cuda" and int(target.arch) in (86, 89, 120, 121)
    return "fused" if narrow and rank <= 256 else "gemm"


def supports(tensor: Tensor, activation: str) -> bool:
    """Whether the kernels take such a call: a GPU, or Triton's interpreter; SwiGLU; the dtype."""
    device = tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")
    return device and activation == "silu" and tensor.dtype in DTYPES


def modulated_mlp(
    x: Tensor,
    h: Tensor,
    base: Base,
    modulation: Modulation,
    *,
    save_probe: bool = True,
    path: Path | None = None,
) -> Tensor:
    """The modulated MLP with SwiGLU; all tensors of one dtype and device.

    Args:
        x: attention output, ``(T, D)``.
        h: MLP input, ``(T, D)``.
        base: the MLP's weights; gradients for those that require them.
        modulation: factors of the weight changes.
        save_probe: keep the probes for backward instead of computing them again.
        path: how; None leaves it to `choose_path`.

    Returns:
        ``(T, D)``.

    Raises:
        ValueError: `path` is none, or is decode with gradients or too many tokens; a tensor is
            one shard of several.
    """
    tensors = (x, h, *base, *modulation[:-1])
    if any(type(tensor).__name__ == "DTensor" for tensor in tensors):
        raise ValueError(
            "Triton kernels take whole tensors, not shards (DTensor): FSDP2 gathers them for the "
            "module that holds them; for tensor parallelism take impl='factored'"
        )
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if path is None:
        path = choose_path(
            target_of(h), h.shape[0], modulation.w_b_gate.shape[0], gradients=gradients
        )
    if path not in get_args(Path):
        raise ValueError(f"path must be gemm, fused or decode, got {path!r}")
    if path == "decode":
        if gradients or h.shape[0] > MAX_TOKENS:
            raise ValueError(f"decode takes {MAX_TOKENS} tokens at most, and no gradients")
        operands: tuple[Any, ...] = (*base, *modulation)
        return decode_mlp(x, h, *operands)
    steps = GEMM if path == "gemm" else FUSED
    if gradients or h.shape[0] <= CHUNK:
        return factored.modulated_mlp(x, h, base, modulation, save_probe=save_probe, steps=steps)
    y = torch.empty(h.shape, device=h.device, dtype=h.dtype)
    for start in range(0, h.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        y[part] = factored.modulated_mlp(x[part], h[part], base, modulation, steps=steps)
    return y


def _probe_gemm(a: Tensor, w_a: Tensor, u: Tensor, k: int, save: bool) -> Sequence[Tensor]:
    p = a @ w_a.t()
    parts = p.unflatten(1, (u.shape[0], -1)).transpose(0, 1)
    if save or torch.compiler.is_compiling():
        return (*coefficients_fwd(u, parts, k), p)[: 3 if save else 2]
    s = torch.empty((*u.shape[:2], k), device=u.device, dtype=torch.float32)
    coefficients_fwd_into(u, parts, s, parts)
    return s, parts


def _gate_up_gemm(
    h: Tensor, base: Base, z: Tensor, m: Modulation, activation: str, save: bool
) -> Sequence[Tensor]:
    gate, up = factored.gate_and_up(h, base, z, m)
    if save or torch.compiler.is_compiling():
        return (swiglu_fwd(gate, up), gate, up)[: 3 if save else 1]
    swiglu_fwd_into(gate, up, gate)
    return (gate,)


def _probe_fused(a: Tensor, w_a: Tensor, u: Tensor, k: int, save: bool) -> Sequence[Tensor]:
    if u.shape[2] > k * MAX_RANK:
        return _probe_gemm(a, w_a, u, k, save)
    return probe(a, w_a, u, k, save)


def _gate_up_fused(
    h: Tensor, base: Base, z: Tensor, m: Modulation, activation: str, save: bool
) -> Sequence[Tensor]:
    return modulated_gate_up(
        h, base.gate, base.up, z, m.w_b_gate, m.w_b_up, base.gate_bias, base.up_bias, save
    )


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return swiglu_fwd(gate, up)


def _gated_backward(
    d_inner: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return swiglu_bwd(d_inner, gate, up)


GEMM = Steps(
    _probe_gemm,
    _gate_up_gemm,
    factored.sum_of_products,
    _gated,
    _gated_backward,
    coefficients_bwd,
)
FUSED = GEMM._replace(probe=_probe_fused, gate_up=_gate_up_fused, sum_of_products=modulated_linear)
