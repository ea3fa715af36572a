"""The modulated MLP as a function: it checks arguments, picks an implementation and calls it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from npt_fast.kernels import factored, reference
from npt_fast.kernels.factored import ACTIVATIONS as ACTIVATIONS
from npt_fast.kernels.factored import Factors as Factors
from npt_fast.kernels.factored import MLPWeights

# looked for, not imported: importing it takes long, and a CPU does without
_TRITON = find_spec("triton") is not None
Implementation = Literal["auto", "triton", "factored", "reference"]


def modulated_mlp(
    x: Tensor,
    h: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    factors: Factors,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    save_probe: bool = True,
    impl: Implementation = "auto",
) -> Tensor:
    """``down(activation(gate(h)) * up(h))`` with weights that `x` changes for every token.

    The arithmetic is in autocast's dtype, or without autocast in that of `h`. All tensors are cast
    to it, so the factors may stay in float32 for training.

    Args:
        x: attention output, ``(..., D)``.
        h: MLP input, ``(..., D)``.
        gate_weight: weight of gate, ``(F, D)``.
        up_weight: weight of up, ``(F, D)``.
        down_weight: weight of down, ``(D, F)``.
        factors: factors of the weight changes.
        gate_bias: bias of gate, ``(F,)``, or None.
        up_bias: bias of up, ``(F,)``, or None.
        down_bias: bias of down, ``(D,)``, or None.
        activation: a name of `ACTIVATIONS`.
        save_probe: whether to save the probes for backward. False recomputes them, which takes a
            little less memory and more time.
        impl: ``"triton"`` computes with Triton kernels and ``"factored"`` in plain torch, both
            without forming v_a and v_b. ``"reference"`` forms them, for comparison. ``"auto"`` is
            triton on a GPU with Triton installed, for silu and any dtype but float64, and factored
            otherwise.

    Returns:
        ``(..., D)``.

    Raises:
        ValueError: shapes, dtypes or options do not fit together.
    """
    weights = MLPWeights(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    _check(x, h, weights, factors, activation, impl)
    device = h.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else h.dtype
    # one dtype at the entry, since kernels have no mixed ones (design.md#triton-bugs)
    x, shape = x.to(dtype), h.shape
    weights = MLPWeights._make(t if t is None else t.to(dtype) for t in weights)
    factors = Factors._make(t.to(dtype) if isinstance(t, Tensor) else t for t in factors)
    x, h = x.flatten(0, -2), h.to(dtype).flatten(0, -2)
    if impl == "reference":
        with torch.autocast(device, enabled=False):
            y = _reference(x, h, weights, factors, activation)
    elif _takes_triton(impl, h, activation):
        from npt_fast.kernels import modulated_mlp as triton

        y = triton.modulated_mlp(x, h, weights, factors, save_probe=save_probe)
    else:
        y = factored.modulated_mlp(
            x, h, weights, factors, activation=activation, save_probe=save_probe
        )
    return y.view(shape)


def _takes_triton(impl: Implementation, h: Tensor, activation: str) -> bool:
    """Whether Triton's kernels compute a call: on request, or by default if they can on a GPU."""
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
    """Measures of one layer's vectors v_a and v_b, computed without forming the vectors.

    All values are float32 or wider; c is the number of modulated projections.

    Attributes:
        v_a: squared norms of v_a, ``(..., c, k)``.
        v_b: squared norms of v_b, ``(..., c, k)``.
        similarity: cosine of gate's v_a with the attention output, averaged over k, ``(...)``.
        mean_square: mean of the squared entries of a vector, summed over the 2 c vectors, ``(...)``
            (design.md#losses).
    """

    v_a: Tensor
    v_b: Tensor
    similarity: Tensor
    mean_square: Tensor


def vector_norms(x: Tensor, factors: Factors) -> VectorNorms:
    """Norms of v_a and v_b from their Gram matrices: ``|u W|^2 = u (W W') u'`` (design.md#norms).

    Args:
        x: attention output, ``(..., D)``.
        factors: factors of the weight changes.

    Returns:
        The measures, differentiable in `x` and `factors`.
    """
    k = factors.num_ranks
    rank = factors.w_b_gate.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        # squares of 16-bit numbers lose or overflow: float16 ends at 65,504
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        u = (x @ factors.w_down.to(dtype)).unflatten(-1, (-1, k, rank // k))
        a_heads = [*torch.split(factors.w_a_in, rank), factors.w_a_mid]
        b_heads = [factors.w_b_gate, factors.w_b_up, factors.w_b_down]

        def squares(heads: list[Tensor | None]) -> tuple[Tensor, Tensor]:
            """Squared norms by projection, and the sum of their means per entry."""
            norms, means = [], []
            for index in range(u.shape[-3]):
                head = heads[index]
                assert head is not None
                w = head.to(dtype).unflatten(0, (k, -1))
                part = u[..., index, :, :]
                # u (W W') u': 2 r^2 FLOPs per token and component instead of 2 r times the width
                gram = torch.einsum("...kr,krs->...ks", part, w @ w.mT)
                norms.append((gram * part).sum(-1))
                means.append(norms[-1].mean(-1) / w.shape[-1])
            return torch.stack(norms, -2), torch.stack(means, -1).sum(-1)

        v_a, mean_a = squares(a_heads)
        v_b, mean_b = squares(b_heads)
        dots = u[..., 0, :, :] * (x @ factors.w_a_in[:rank].to(dtype).t()).unflatten(-1, (k, -1))
        # rounding may leave a squared norm a little below 0, whose root is NaN
        lengths = v_a[..., 0, :].clamp_min(0).sqrt() * x.norm(dim=-1, keepdim=True)
        similarity = (dots.sum(-1) / lengths.clamp_min(1e-12)).mean(-1)
        return VectorNorms(v_a, v_b, similarity, mean_a + mean_b)


def _reference(
    x: Tensor, h: Tensor, weights: MLPWeights, factors: Factors, activation: str
) -> Tensor:
    """Split the joined factors, and call the definition."""
    k, rank = factors.num_ranks, factors.w_b_gate.shape[0]
    downs = [
        w.unflatten(1, (k, -1)).movedim(1, 0) for w in torch.split(factors.w_down, rank, dim=1)
    ]
    heads = [*torch.split(factors.w_a_in, rank), factors.w_a_mid]

    def projection(
        index: int, w: Tensor, bias: Tensor | None, w_b: Tensor | None
    ) -> reference.Projection:
        if w_b is None:
            return reference.Projection(w, bias)
        w_a = heads[index]
        assert w_a is not None
        w_a, w_b = (t.unflatten(0, (k, -1)) for t in (w_a, w_b))
        return reference.Projection(w, bias, reference.ProjectionFactors(downs[index], w_a, w_b))

    return reference.modulated_mlp(
        x,
        h,
        projection(0, weights.gate, weights.gate_bias, factors.w_b_gate),
        projection(1, weights.up, weights.up_bias, factors.w_b_up),
        projection(2, weights.down, weights.down_bias, factors.w_b_down),
        ACTIVATIONS[activation][0],
    )


def _check(
    x: Tensor, h: Tensor, weights: MLPWeights, factors: Factors, activation: str, impl: str
) -> None:
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be auto, triton, factored or reference, got {impl!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if weights.gate.ndim != 2:
        raise ValueError(f"gate_weight must be (F, D), got {tuple(weights.gate.shape)}")
    f, d = weights.gate.shape
    rank = factors.w_b_gate.shape[0]
    if factors.num_ranks < 1 or rank % factors.num_ranks or not rank:
        raise ValueError(
            f"num_ranks must divide the {rank} rows of w_b_gate, got {factors.num_ranks}"
        )
    modulates_up, modulates_down = factors.w_b_up is not None, factors.w_b_down is not None
    if (factors.w_a_mid is not None) != modulates_down or (modulates_down and not modulates_up):
        raise ValueError("factors must be those of gate, of gate and up, or of gate, up and down")
    inputs = 1 + modulates_up
    projections = inputs + modulates_down
    expected = {
        "up_weight": (weights.up, (f, d)),
        "down_weight": (weights.down, (d, f)),
        "gate_bias": (weights.gate_bias, (f,)),
        "up_bias": (weights.up_bias, (f,)),
        "down_bias": (weights.down_bias, (d,)),
        "w_down": (factors.w_down, (d, projections * rank)),
        "w_a_in": (factors.w_a_in, (inputs * rank, d)),
        "w_a_mid": (factors.w_a_mid, (rank, f)),
        "w_b_gate": (factors.w_b_gate, (rank, f)),
        "w_b_up": (factors.w_b_up, (rank, f)),
        "w_b_down": (factors.w_b_down, (rank, d)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (("x", x), ("h", h)):
        if tensor.ndim < 2 or tensor.shape[-1] != d:
            raise ValueError(f"{name} must be (..., {d}), got {tuple(tensor.shape)}")
    if x.shape != h.shape:
        raise ValueError(f"x must be of the shape of h, {tuple(h.shape)}, got {tuple(x.shape)}")
