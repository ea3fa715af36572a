"""The modulated MLP on a GPU: the algebra of `factored`, with Triton kernels for its steps.

Three paths compute the same (design.md#paths):

- ``gemm``: torch's GEMMs (cuBLAS, hipBLASLt), with `coefficients` and `swiglu` between them.
- ``fused``: `probe`, `modulated_gate_up` and `modulated_linear`, which keep intermediate results
  in registers. Torch still computes the products for u, dz and the gradients of weights.
- ``decode``: up to 64 tokens without gradients, by `decode`.

Without gradients nothing is saved, z overwrites p, inner overwrites gate, and more than `CHUNK`
tokens are processed in chunks.
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
from npt_fast.kernels.factored import Factors, MLPWeights, Steps
from npt_fast.kernels.int8 import Int8Matrix
from npt_fast.kernels.modulated_linear import modulated_gate_up, modulated_linear
from npt_fast.kernels.probe import MAX_RANK, probe
from npt_fast.kernels.sharded_change import is_shard
from npt_fast.kernels.swiglu import ACTIVATIONS, swiglu_bwd, swiglu_fwd, swiglu_fwd_into

Path = Literal["gemm", "fused", "decode"]

CHUNK = 16_384
"""Tokens per chunk if no gradients are needed; it bounds the memory of a long prefill."""


def choose_path(target: Target, tokens: int, rank: int, *, gradients: bool) -> Path:
    """The path for a call, by a table, so that every process and every run takes the same.

    ==================================  ======  ================================================
    sm_75                               gemm    no matrix instructions that Triton uses: decode
                                                would spill 2.2 KB per thread
    up to 64 tokens, no gradients       decode  time is that of reading the weights
    sm_86, sm_89, sm_12x; R up to 256   fused   little bandwidth for the FLOPs: a pass over (T, F)
                                                costs as much as a product with R
    all else                            gemm    time is that of the FLOPs, at which vendors' GEMMs
                                                are best
    ==================================  ======  ================================================

    The table follows from FLOPs and bytes (design.md#counts), and from measurements by others of
    SwiGLU in a GEMM's epilogue: 5 to 15 % faster on sm_120, about nothing on sm_90. We have not
    measured it.
    """
    if not multiplies(target):
        return "gemm"
    if tokens <= MAX_TOKENS and not gradients:
        return "decode"
    narrow = target.backend == "cuda" and int(target.arch) in (86, 89, 120, 121)
    return "fused" if narrow and rank <= 256 else "gemm"


def multiplies(target: Target) -> bool:
    """Whether Triton's products use matrix instructions on a target; those of sm_75 do not."""
    return target.backend != "cuda" or int(target.arch) >= 80


def supports(tensor: Tensor, activation: str) -> bool:
    """Whether kernels take a call: on a GPU or interpreted, of `DTYPES` and `ACTIVATIONS`."""
    device = tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")
    return device and activation in ACTIVATIONS and tensor.dtype in DTYPES


def modulated_mlp(
    x: Tensor,
    h: Tensor,
    weights: MLPWeights,
    factors: Factors,
    *,
    activation: str = "silu",
    save_probe: bool = True,
    path: Path | None = None,
    parameters: Factors | None = None,
    bottleneck: list[Tensor] | None = None,
) -> Tensor:
    """The modulated MLP of tensors that share one dtype and device.

    Args:
        x: attention output, ``(T, D)``.
        h: MLP input, ``(T, D)``.
        weights: the MLP's own weights; those that require gradients get them.
        factors: factors of the weight changes.
        activation: a name of `swiglu.ACTIVATIONS`.
        save_probe: whether to save the probes for backward instead of recomputing them.
        path: path to take; None leaves the choice to `choose_path`.
        parameters: what `factors` are detached copies of, as in `factored.modulated_mlp`.
        bottleneck: list that gets u, ``(T, c R)``, if there are gradients.

    Returns:
        ``(T, D)``.

    Raises:
        ValueError: there is no such path; decode is asked for with gradients or too many tokens; a
            tensor is a shard (DTensor).
    """
    tensors = (x, h, *weights, *factors[:-1])
    if any(map(is_shard, tensors)):
        raise ValueError(
            "Triton kernels take whole tensors, not shards (DTensor): FSDP2 gathers them for the "
            "module that holds them; for tensor parallelism take impl='factored'"
        )
    gradients = factored.needs_gradients(x, h, weights, factors, parameters)
    target = target_of(h)
    int8 = isinstance(factors.w_down, Int8Matrix)
    if path is None:
        path = choose_path(target, h.shape[0], factored.width_of(factors), gradients=gradients)
    if path not in get_args(Path):
        raise ValueError(f"path must be gemm, fused or decode, got {path!r}")
    if path != "gemm" and not multiplies(target):
        raise ValueError(f"path {path} needs matrix instructions, sm_80 or newer: take gemm")
    if path == "decode":
        if gradients or h.shape[0] > MAX_TOKENS:
            raise ValueError(f"decode takes {MAX_TOKENS} tokens at most, and no gradients")
        operands: list[Any] = [*weights, *factors, [], activation]
        if int8:
            numbers: Sequence[Any] = factors[:-1]
            operands[6:12] = [w and w.values for w in numbers]
            operands[13] = [w and w.scale.reshape(-1) for w in numbers]
        return decode_mlp(x, h, *operands)
    # torch's products take int8 factors one at a time; kernels of `fused` do not
    steps = GEMM_STEPS if path == "gemm" or int8 else FUSED_STEPS
    # with gradients chunks would save nothing: backward needs the tensors of all of them
    if gradients or h.shape[0] <= CHUNK:
        return factored.modulated_mlp(
            x, h, weights, factors, activation=activation, save_probe=save_probe, steps=steps,
            parameters=parameters, bottleneck=bottleneck,
        )  # fmt: skip
    # torch.cat would hold the parts and the result at once
    y = torch.empty(h.shape, device=h.device, dtype=h.dtype)
    for start in range(0, h.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        y[part] = factored.modulated_mlp(
            x[part], h[part], weights, factors, activation=activation, steps=steps
        )
    return y


def _probe_and_scale_gemm(
    a: Tensor, w_a: Tensor, u: Tensor, k: int, save: bool
) -> Sequence[Tensor]:
    p = a @ w_a.t()
    parts = p.unflatten(1, (u.shape[0], -1)).transpose(0, 1)
    # torch.compile must see registered operations only; `coefficients_fwd_into` is none
    if save or torch.compiler.is_compiling():
        return (*coefficients_fwd(u, parts, k), p)[: 3 if save else 2]
    s = torch.empty((*u.shape[:2], k), device=u.device, dtype=torch.float32)
    # z over p: a program has read all of a component before it writes
    coefficients_fwd_into(u, parts, s, parts)
    return s, parts


def _modulated_gate_up_gemm(
    h: Tensor, weights: MLPWeights, z: Tensor, factors: Factors, activation: str, save: bool
) -> Sequence[Tensor]:
    gate, up = factored.gate_up_before_activation(h, weights, z, factors)
    if save or torch.compiler.is_compiling():
        return (swiglu_fwd(gate, up, activation), gate, up)[: 3 if save else 1]
    # inner over gate: elementwise, and nobody else holds gate
    swiglu_fwd_into(gate, up, gate, activation)
    return (gate,)


def _probe_and_scale_fused(
    a: Tensor, w_a: Tensor, u: Tensor, k: int, save: bool
) -> Sequence[Tensor]:
    # no tile holds such a component, so p is written and read again
    if u.shape[2] > k * MAX_RANK:
        return _probe_and_scale_gemm(a, w_a, u, k, save)
    return probe(a, w_a, u, k, save)


def _modulated_gate_up_fused(
    h: Tensor, weights: MLPWeights, z: Tensor, factors: Factors, activation: str, save: bool
) -> Sequence[Tensor]:
    assert factors.w_b_gate is not None
    return modulated_gate_up(
        h,
        weights.gate,
        weights.up,
        z,
        factors.w_b_gate,
        factors.w_b_up,
        weights.gate_bias,
        weights.up_bias,
        save,
        activation,
    )


GEMM_STEPS = Steps(
    _probe_and_scale_gemm,
    _modulated_gate_up_gemm,
    factored.sum_of_products,
    swiglu_fwd,
    swiglu_bwd,
    coefficients_bwd,
)
FUSED_STEPS = GEMM_STEPS._replace(
    probe_and_scale=_probe_and_scale_fused,
    modulated_gate_up=_modulated_gate_up_fused,
    sum_of_products=modulated_linear,
)
