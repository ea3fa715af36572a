"""The modulated MLP, and the change of one projection, as functions.

They check arguments, pick an implementation and call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from npt_fast.errors import OptionError
from npt_fast.kernels import factored, mean_squares, reference
from npt_fast.kernels import weight_change as change
from npt_fast.kernels.factored import ACTIVATIONS as ACTIVATIONS
from npt_fast.kernels.factored import Factors as Factors
from npt_fast.kernels.factored import MLPWeights
from npt_fast.kernels.int8 import Int8Matrix as Int8Matrix
from npt_fast.kernels.int8 import quantize as quantize
from npt_fast.kernels.sharded_change import is_shard as is_shard
from npt_fast.kernels.sharded_change import like as like
from npt_fast.kernels.sharded_change import sharded_change as sharded_change
from npt_fast.kernels.sharded_change import whole as whole

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
    copies: Factors | None = None,
    bottleneck: list[Tensor] | None = None,
) -> Tensor:
    """``down(activation(gate(h)) * up(h))`` with weights that `x` changes for every token.

    The arithmetic is in autocast's dtype, or without autocast in that of `h`. All tensors are cast
    to it, so the factors may stay in float32 for training. They then get the float32 sums of the
    products as gradients, and where a gradient is there already, backward adds to it in place.

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
            triton on a GPU with Triton installed, for silu, both forms of gelu, and relu, in any
            dtype but float64, and factored otherwise.
        copies: the factors without gradients in the dtype of the arithmetic, if the caller keeps
            them; None casts the factors in every call.
        bottleneck: list that gets the bottlenecks ``x @ w_down``, ``(..., c R)``, if the call has a
            graph: what a loss makes of them costs no second product.

    Returns:
        ``(..., D)``.

    Raises:
        OptionError: shapes, dtypes or options do not fit together.
    """
    weights = MLPWeights(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    _check(x, h, weights, factors, activation, impl)
    device, dtype = h.device.type, compute_dtype(h)
    # one dtype at the entry, since kernels have no mixed ones (design.md#triton-bugs)
    shape = h.shape
    if any([t is not None and t.dtype != dtype for t in (x, h, *weights)]):
        x, h = x.to(dtype), h.to(dtype)
        weights = MLPWeights._make(t if t is None else t.to(dtype) for t in weights)
    x, h = x.flatten(0, -2), h.flatten(0, -2)
    if impl == "reference":
        with torch.autocast(device, enabled=False):
            factors = Factors._make(t.to(dtype) if isinstance(t, Tensor) else t for t in factors)
            y = _reference(x, h, weights, factors, activation)
        return y.view(shape)
    parameters = None
    if any([isinstance(t, Tensor) and t.dtype != dtype for t in factors]):
        parameters = factors
        factors = copies or _detached_all(factors, dtype)
    found: list[Tensor] = []
    if _takes_triton(impl, h, activation):
        from npt_fast.kernels import modulated_mlp as triton

        y = triton.modulated_mlp(
            x, h, weights, factors, activation=activation, save_probe=save_probe,
            parameters=parameters, bottleneck=found,
        )  # fmt: skip
    else:
        y = factored.modulated_mlp(
            x, h, weights, factors, activation=activation, save_probe=save_probe,
            parameters=parameters, bottleneck=found,
        )  # fmt: skip
    if bottleneck is not None:
        bottleneck.extend(u.unflatten(0, shape[:-1]) for u in found)
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
        raise OptionError(
            "impl='triton' needs Triton, a GPU (or TRITON_INTERPRET=1 from the start), silu, gelu, "
            "gelu_pytorch_tanh or relu, and float32, float16 or bfloat16; got "
            f"{h.dtype} on {h.device.type}, {activation}; "
            "impl='auto' takes what fits"
        )
    return False


def weight_change(
    a: Tensor,
    x: Tensor,
    w_down: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    *,
    num_ranks: int = 1,
) -> Tensor:
    """What `x` adds to the output of a projection: ``sum_i v_b_i (v_a_i . a)`` for every token.

    A modulated projection is ``projection(a) + weight_change(a, x, ...)``, whatever kind of module
    the projection is. Its backward is written by hand. The arithmetic is in autocast's dtype, or
    without autocast in that of `a`.

    Args:
        a: input of the projection, ``(..., in)``.
        x: attention output, ``(..., D)``.
        w_down: W_down of the projection's components, ``(D, R)``.
        w_a: W_a_up of the components, ``(R, in)``.
        w_b: W_b_up of the components, ``(R, out)``.
        num_ranks: number of components k; it divides R.

    Returns:
        ``(..., out)``.

    Raises:
        OptionError: shapes do not fit together.
    """
    rank = w_down.shape[-1]
    expected = {
        "x": (x, (*a.shape[:-1], w_down.shape[0])),
        "w_a": (w_a, (rank, a.shape[-1])),
        "w_b": (w_b, (rank, w_b.shape[-1])),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise OptionError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if num_ranks < 1 or rank % num_ranks or not rank:
        raise OptionError(f"num_ranks must divide the {rank} columns of w_down, got {num_ranks}")
    dtype = compute_dtype(a)
    u = bottleneck(x.to(dtype), w_down, _detached(w_down, dtype))
    return change_from_bottleneck(a, u, w_a, w_b, num_ranks=num_ranks)


def bottleneck(x: Tensor, w_down: Tensor, copy: Tensor) -> Tensor:
    """``x @ w_down``, ``(..., R)``, by a copy of it that has the dtype of `x`."""
    return change.bottleneck(x.flatten(0, -2), w_down, copy).view(*x.shape[:-1], copy.shape[1])


def change_from_bottleneck(
    a: Tensor,
    u: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    *,
    num_ranks: int,
    copies: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`weight_change` with the bottleneck ``u = x @ w_down``, ``(..., R)``, known already.

    One product gives the bottlenecks of all projections of a layer. `copies` are w_a and w_b
    without gradients in the dtype of the arithmetic, if the caller keeps them.
    """
    dtype = compute_dtype(a)
    steps = None
    if _takes_triton("auto", u, "silu"):
        from npt_fast.kernels.modulated_mlp import GEMM_STEPS

        steps = GEMM_STEPS
    y = change.weight_change(
        a.to(dtype).flatten(0, -2),
        u.to(dtype).flatten(0, -2),
        w_a,
        w_b,
        num_ranks,
        steps,
        copies or (_detached(w_a, dtype), _detached(w_b, dtype)),
    )
    return y.view(*a.shape[:-1], w_b.shape[-1])


def scaled_bottlenecks(u: Tensor, p: Tensor, *, num_ranks: int) -> Tensor:
    """Bottlenecks times their coefficients, for inference where a probe is a sum over devices.

    Args:
        u: bottlenecks of c projections, ``(c, T, R)``.
        p: their probes, ``(c, T, R)``.
        num_ranks: number of components k.

    Returns:
        ``(c, T, R)`` in the dtype of `u`; the coefficients are float32 or wider in between.
    """
    if _takes_triton("auto", u, "silu"):
        from npt_fast.kernels.coefficients import coefficients_fwd

        return coefficients_fwd(u, p, num_ranks)[1]
    wide = torch.promote_types(u.dtype, torch.float32)
    heads = u.unflatten(-1, (num_ranks, -1))
    s = (heads.to(wide) * p.unflatten(-1, (num_ranks, -1)).to(wide)).sum(-1, keepdim=True)
    z: Tensor = (heads * s).to(u.dtype).flatten(-2)
    return z


def _detached(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as products in `dtype` read it: itself, or cast without a graph.

    Backward gives the parameter its gradient, in the parameter's own dtype.
    """
    return tensor if tensor.dtype == dtype else tensor.detach().to(dtype)


def _detached_all(factors: Factors, dtype: torch.dtype) -> Factors:
    return Factors._make(_detached(t, dtype) if isinstance(t, Tensor) else t for t in factors)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of products with `tensor`: autocast's, or without autocast its own."""
    if tensor.is_meta:  # has no autocast
        return tensor.dtype
    device = tensor.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else tensor.dtype


def heads_of(factors: Factors) -> list[tuple[Tensor, Tensor]]:
    """W_a_up ``(R, in)`` and W_b_up ``(R, out)`` of each modulated projection, in order."""
    size, w_in = factored.width_of(factors), factors.w_a_in
    w_a = [*(w_in.narrow(0, n, size) for n in range(0, w_in.shape[0], size)), factors.w_a_mid]
    w_b = [w for w in (factors.w_b_gate, factors.w_b_up, factors.w_b_down) if w is not None]
    return [(a, b) for a, b in zip(w_a, w_b, strict=False) if a is not None]


class VectorNorms(NamedTuple):
    """Measures of one layer's vectors v_a and v_b, computed without forming the vectors.

    All values are float32 or wider; c is the number of modulated projections.

    Attributes:
        v_a: squared norms of v_a, ``(..., c, k)``.
        v_b: squared norms of v_b, ``(..., c, k)``.
        similarity: cosine of the first projection's v_a with the attention output, averaged over k,
            ``(...)``.
        mean_square: mean of the squared entries of a vector, summed over the 2 c vectors, ``(...)``
            (design.md#losses).
    """

    v_a: Tensor
    v_b: Tensor
    similarity: Tensor
    mean_square: Tensor


def vector_norms(x: Tensor, factors: Factors, u: Tensor | None = None) -> VectorNorms:
    """Norms of v_a and v_b from their Gram matrices: ``|u W|^2 = u (W W') u'`` (design.md#norms).

    Args:
        x: attention output, ``(..., D)``.
        factors: factors of the weight changes.
        u: bottlenecks ``x @ w_down``, ``(..., c R)``, if known.

    Returns:
        The measures, differentiable in `x` and `factors`.
    """
    k, heads = factors.num_ranks, heads_of(factors)
    with factored.without_autocast(x):
        # squares of 16-bit numbers lose or overflow: float16 ends at 65,504
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        u = x @ factors.w_down.to(dtype) if u is None else u.to(dtype)
        u = u.unflatten(-1, (len(heads), k, -1))

        def squares(heads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            """Squared norms by projection, and the sum of their means per entry."""
            norms, means = [], []
            for index, head in enumerate(heads):
                w = head.to(dtype).unflatten(0, (k, -1))
                part = u[..., index, :, :]
                # u (W W') u': 2 r^2 FLOPs per token and component instead of 2 r times the width
                gram = torch.einsum("...kr,krs->...ks", part, w @ w.mT)
                norms.append((gram * part).sum(-1))
                means.append(norms[-1].mean(-1) / w.shape[-1])
            return torch.stack(norms, -2), torch.stack(means, -1).sum(-1)

        (v_a, mean_a), (v_b, mean_b) = map(squares, zip(*heads, strict=True))
        dots = u[..., 0, :, :] * (x @ heads[0][0].to(dtype).t()).unflatten(-1, (k, -1))
        # rounding may leave a squared norm a little below 0, whose root is NaN
        lengths = v_a[..., 0, :].clamp_min(0).sqrt() * x.norm(dim=-1, keepdim=True)
        similarity = (dots.sum(-1) / lengths.clamp_min(1e-12)).mean(-1)
        return VectorNorms(v_a, v_b, similarity, mean_a + mean_b)


def sum_of_mean_squares(
    u: Tensor, weights: Tensor, factors: Factors, *, copies: Factors | None = None
) -> Tensor:
    """Sum over tokens of `VectorNorms.mean_square`, at a fraction of the FLOPs (design.md#norms).

    The products read the dtype of `u` and sum in float32.

    Args:
        u: bottlenecks ``x @ w_down``, ``(..., c R)``; `modulated_mlp` gives them.
        weights: weight of each token, ``(...)``.
        factors: factors of the weight changes.
        copies: the factors without gradients in the dtype of `u`, if the caller keeps them.

    Returns:
        A scalar in float32 at least, differentiable once in `u` and in all factors but W_down,
        whose gradient comes through `u`.
    """
    used = copies or _detached_all(factors, u.dtype)
    return mean_squares.sum_of_mean_squares(u.flatten(0, -2), weights.flatten(), used, factors)


def _reference(
    x: Tensor, h: Tensor, weights: MLPWeights, factors: Factors, activation: str
) -> Tensor:
    """Split the joined factors, and call the definition."""
    k, rank = factors.num_ranks, factored.width_of(factors)
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
        raise OptionError(f"impl must be auto, triton, factored or reference, got {impl!r}")
    if activation not in ACTIVATIONS:
        raise OptionError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if weights.gate.ndim != 2:
        raise OptionError(f"gate_weight must be (F, D), got {tuple(weights.gate.shape)}")
    f, d = weights.gate.shape
    if factors.w_b_gate is None:
        raise OptionError("factors must have w_b_gate: this function is for MLPs with a gate")
    rank = factors.w_b_gate.shape[0]
    if factors.num_ranks < 1 or rank % factors.num_ranks or not rank:
        raise OptionError(
            f"num_ranks must divide the {rank} rows of w_b_gate, got {factors.num_ranks}"
        )
    modulates_up, modulates_down = factors.w_b_up is not None, factors.w_b_down is not None
    if (factors.w_a_mid is not None) != modulates_down or (modulates_down and not modulates_up):
        raise OptionError("factors must be those of gate, of gate and up, or of gate, up and down")
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
        if tensor is not None and tensor.shape != shape:
            raise OptionError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (("x", x), ("h", h)):
        if tensor.ndim < 2 or tensor.shape[-1] != d:
            raise OptionError(f"{name} must be (..., {d}), got {tuple(tensor.shape)}")
    if x.shape != h.shape:
        raise OptionError(f"x must be of the shape of h, {tuple(h.shape)}, got {tuple(x.shape)}")
