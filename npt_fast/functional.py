"""The modulated MLP as a function: checks its arguments, picks an implementation, calls it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from npt_fast.kernels import factored, reference
from npt_fast.kernels.factored import ACTIVATIONS as ACTIVATIONS
from npt_fast.kernels.factored import Base
from npt_fast.kernels.factored import Modulation as Modulation

_TRITON = find_spec("triton") is not None
Implementation = Literal["auto", "triton", "factored", "reference"]


def modulated_mlp(
    x: Tensor,
    h: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    modulation: Modulation,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    save_probe: bool = True,
    impl: Implementation = "auto",
) -> Tensor:
    """``down(activation(gate(h)) * up(h))``, its weights changed by `x`, anew for every token.

    Under autocast everything is computed in autocast's dtype; otherwise in that of `h`, to which
    the modulation is cast, so that its parameters may be kept in float32 for training.

    Args:
        x: attention output, ``(..., D)``.
        h: MLP input, ``(..., D)``.
        gate_weight: ``(F, D)``.
        up_weight: ``(F, D)``.
        down_weight: ``(D, F)``.
        modulation: factors of the weight changes.
        gate_bias: ``(F,)``.
        up_bias: ``(F,)``.
        down_bias: ``(D,)``.
        activation: one of `ACTIVATIONS`.
        save_probe: keep the probes for backward; without, a little less memory for more compute.
        impl: ``"triton"`` and ``"factored"`` never form v_a and v_b, the one with Triton kernels,
            the other in plain torch; ``"reference"`` does, for comparison. ``"auto"`` is triton on
            a GPU, for silu, with Triton installed and any dtype but float64, and else factored.

    Returns:
        ``(..., D)``.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
    """
    base = Base(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    _check(x, h, base, modulation, activation, impl)
    device = h.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else h.dtype
    x, shape = x.to(dtype), h.shape
    base = Base._make(t if t is None else t.to(dtype) for t in base)
    modulation = Modulation._make(t.to(dtype) if isinstance(t, Tensor) else t for t in modulation)
    x, h = x.flatten(0, -2), h.to(dtype).flatten(0, -2)
    if impl == "reference":
        with torch.autocast(device, enabled=False):
            y = _reference(x, h, base, modulation, activation)
    elif _takes_triton(impl, h, activation):
        from npt_fast.kernels import modulated_mlp as triton

        y = triton.modulated_mlp(x, h, base, modulation, save_probe=save_probe)
    else:
        y = factored.modulated_mlp(
            x, h, base, modulation, activation=activation, save_probe=save_probe
        )
    return y.view(shape)


def _takes_triton(impl: Implementation, h: Tensor, activation: str) -> bool:
    """Whether Triton's kernels compute a call: where they are asked for, or can on a GPU."""
    if impl == "factored" or (impl == "auto" and not h.is_cuda):
        return False
    if _TRITON:
        from npt_fast.kernels.modulated_mlp import supports

        if supports(h, activation):
            return True
    if impl == "triton":
        raise ValueError(
            "impl='triton' needs Triton, a GPU (or TRITON_INTERPRET=1 from the start), silu and "
            f"float32, float16 or bfloat16; got {h.dtype} on {h.device.type}, {activation}; "
            "impl='auto' takes what fits"
        )
    return False


class VectorNorms(NamedTuple):
    """Measures of the vectors v_a and v_b of one layer, which are not formed.

    Attributes:
        v_a: squared norms, ``(..., c, k)``, in float32 at least, as everything here.
        v_b: squared norms, ``(..., c, k)``.
        similarity: cosine of gate's v_a with the attention output, mean over k, ``(...)``.
        mean_square: sum over the 2 c vectors of the mean of their squares, ``(...)`` (SPEC 5.4).
    """

    v_a: Tensor
    v_b: Tensor
    similarity: Tensor
    mean_square: Tensor


def vector_norms(x: Tensor, modulation: Modulation) -> VectorNorms:
    """Norms of v_a and v_b from their Gram matrices: ``|u W|^2 = u (W W') u'`` (SPEC 1.5).

    Args:
        x: attention output, ``(..., D)``.
        modulation: factors of the weight changes.
    """
    m, k = modulation, modulation.num_ranks
    rank = m.w_b_gate.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        u = (x @ m.w_down.to(dtype)).unflatten(-1, (-1, k, rank // k))
        a_heads = [*torch.split(m.w_a_in, rank), m.w_a_mid]
        b_heads = [m.w_b_gate, m.w_b_up, m.w_b_down]

        def squares(heads: list[Tensor | None]) -> tuple[Tensor, Tensor]:
            """Squared norms, and their sum as means over components and entries."""
            norms, means = [], []
            for index in range(u.shape[-3]):
                head = heads[index]
                assert head is not None
                w = head.to(dtype).unflatten(0, (k, -1))
                part = u[..., index, :, :]
                gram = torch.einsum("...kr,krs->...ks", part, w @ w.mT)
                norms.append((gram * part).sum(-1))
                means.append(norms[-1].mean(-1) / w.shape[-1])
            return torch.stack(norms, -2), torch.stack(means, -1).sum(-1)

        v_a, mean_a = squares(a_heads)
        v_b, mean_b = squares(b_heads)
        dots = u[..., 0, :, :] * (x @ m.w_a_in[:rank].to(dtype).t()).unflatten(-1, (k, -1))
        lengths = v_a[..., 0, :].clamp_min(0).sqrt() * x.norm(dim=-1, keepdim=True)
        similarity = (dots.sum(-1) / lengths.clamp_min(1e-12)).mean(-1)
        return VectorNorms(v_a, v_b, similarity, mean_a + mean_b)


def _reference(x: Tensor, h: Tensor, base: Base, m: Modulation, activation: str) -> Tensor:
    """Take the joined factors apart again, and call the definition."""
    k, rank = m.num_ranks, m.w_b_gate.shape[0]
    downs = [w.unflatten(1, (k, -1)).movedim(1, 0) for w in torch.split(m.w_down, rank, dim=1)]
    heads = [*torch.split(m.w_a_in, rank), m.w_a_mid]

    def projection(
        index: int, w: Tensor, bias: Tensor | None, w_b: Tensor | None
    ) -> reference.Projection:
        if w_b is None:
            return reference.Projection(w, bias)
        w_a = heads[index]
        assert w_a is not None
        factors = (t.unflatten(0, (k, -1)) for t in (w_a, w_b))
        return reference.Projection(w, bias, reference.Modulation(downs[index], *factors))

    return reference.modulated_mlp(
        x,
        h,
        projection(0, base.gate, base.gate_bias, m.w_b_gate),
        projection(1, base.up, base.up_bias, m.w_b_up),
        projection(2, base.down, base.down_bias, m.w_b_down),
        ACTIVATIONS[activation][0],
    )


def _check(x: Tensor, h: Tensor, base: Base, m: Modulation, activation: str, impl: str) -> None:
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be auto, triton, factored or reference, got {impl!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if base.gate.ndim != 2:
        raise ValueError(f"gate_weight must be (F, D), got {tuple(base.gate.shape)}")
    f, d = base.gate.shape
    rank = m.w_b_gate.shape[0]
    if m.num_ranks < 1 or rank % m.num_ranks or not rank:
        raise ValueError(f"num_ranks must divide the {rank} rows of w_b_gate, got {m.num_ranks}")
    if (m.w_a_mid is None) != (m.w_b_down is None) or (m.w_b_down is not None and m.w_b_up is None):
        raise ValueError("modulation must be of gate, of gate and up, or of gate, up and down")
    inputs = 1 + (m.w_b_up is not None)
    projections = inputs + (m.w_b_down is not None)
    expected = {
        "up_weight": (base.up, (f, d)),
        "down_weight": (base.down, (d, f)),
        "gate_bias": (base.gate_bias, (f,)),
        "up_bias": (base.up_bias, (f,)),
        "down_bias": (base.down_bias, (d,)),
        "w_down": (m.w_down, (d, projections * rank)),
        "w_a_in": (m.w_a_in, (inputs * rank, d)),
        "w_a_mid": (m.w_a_mid, (rank, f)),
        "w_b_gate": (m.w_b_gate, (rank, f)),
        "w_b_up": (m.w_b_up, (rank, f)),
        "w_b_down": (m.w_b_down, (rank, d)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (("x", x), ("h", h)):
        if tensor.ndim < 2 or tensor.shape[-1] != d:
            raise ValueError(f"{name} must be (..., {d}), got {tuple(tensor.shape)}")
    if x.shape != h.shape:
        raise ValueError(f"x must be of the shape of h, {tuple(h.shape)}, got {tuple(x.shape)}")
