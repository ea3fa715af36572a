"""What a modulated MLP costs at least: FLOPs, bytes and a GPU's peaks, by arithmetic alone.

Nothing here is measured, except that `tests/kernels/test_roofline.py` counts the bytes that our
kernels and torch's operations move, and finds these formulas. They are per token, of one layer:
``D`` model width, ``F`` MLP width, ``k`` components of rank ``r``, ``R = k r``. Assumed throughout:
bfloat16 with float32 coefficients; gate, up and down modulated; no biases; the base frozen, so that
backward gives gradients of x, h and the modulation; a launch reads what it needs once and writes
its results once; nothing stays in a cache from one launch to the next. Needs neither torch nor
Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

ELEMENT = 2
"""Bytes of a bfloat16."""
FLOAT = 4
"""Bytes of a coefficient, and of sums that decode has not finished."""
DECODE_TOKENS = 64
"""`decode.MAX_TOKENS`."""
PROBE_RANK = 128
"""`probe.MAX_RANK`."""

Phase = Literal["forward", "backward", "decode"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one modulated MLP.

    Attributes:
        hidden: D.
        intermediate: F.
        num_ranks: k.
        rank: r.
    """

    hidden: int
    intermediate: int
    num_ranks: int = 8
    rank: int = 64

    @property
    def joined(self) -> int:
        """R."""
        return self.num_ranks * self.rank

    def linear(self, d: int, r: int, f: int) -> int:
        """``d D + r R + f F``."""
        return d * self.hidden + r * self.joined + f * self.intermediate


class GPU(NamedTuple):
    """A vendor's peak numbers, which no program reaches.

    Attributes:
        tflops: 10^12 FLOPs per second of dense bfloat16 products with float32 sums.
        bandwidth: 10^12 bytes per second of memory.
    """

    tflops: float
    bandwidth: float


MODELS = {
    "llama-3.2-1b": Shape(2048, 8192, rank=512),
    "llama-3.2-3b": Shape(3072, 8192),
    "llama-3.1-8b": Shape(4096, 14336),
    "llama-3.1-70b": Shape(8192, 28672),
    "qwen3-4b": Shape(2560, 9728),
    "smollm2-135m": Shape(576, 1536),
}
"""Widths, with k and r of KERNELS 2.2 for two of Llama's; the others have those of the second."""

GPUS = {
    "h100": GPU(990, 3.35),
    "h200": GPU(990, 4.8),
    "a100": GPU(312, 2.04),
    "b200": GPU(2250, 8.0),
    "rtx4090": GPU(165, 1.01),
    "mi300x": GPU(1307, 5.3),
}
"""By name: SXM modules with the most memory, where there are several of that name."""


class Traffic(NamedTuple):
    """Bytes of activations per token, read and written.

    Attributes:
        all: of every launch.
        exposed: of launches that multiply no matrices: time that no product hides.
    """

    all: int
    exposed: int


@dataclass(frozen=True, slots=True)
class Cost:
    """One pass of all tokens through one layer, in one form.

    Attributes:
        phase: which pass.
        form: how it is computed.
        tokens: how many.
        flops: of products of matrices.
        activations: bytes that depend on the tokens.
        weights: bytes of weights and of their gradients.
        exposed: those of `activations` that launches without such a product move.
    """

    phase: Phase
    form: str
    tokens: int
    flops: int
    activations: int
    weights: int
    exposed: int

    def compute_ms(self, gpu: GPU) -> float:
        """Time of the FLOPs at the peak."""
        return self.flops / gpu.tflops / 1e9

    def memory_ms(self, gpu: GPU) -> float:
        """Time of all bytes at the peak."""
        return (self.activations + self.weights) / gpu.bandwidth / 1e9

    def floor_ms(self, gpu: GPU) -> float:
        """No schedule is quicker: the larger of both."""
        return max(self.compute_ms(gpu), self.memory_ms(gpu))

    def in_turn_ms(self, gpu: GPU) -> float:
        """No quicker launch by launch: products at their larger time, then what is exposed."""
        exposed = self.exposed / gpu.bandwidth / 1e9
        return max(self.compute_ms(gpu), self.memory_ms(gpu) - exposed) + exposed


def shape_of(
    model: str | None,
    hidden: int | None,
    intermediate: int | None,
    num_ranks: int | None = None,
    rank: int | None = None,
) -> Shape:
    """The shape of a model of `MODELS`, or of widths; with other k and r if given.

    Raises:
        ValueError: an unknown model, or not one model or two widths.
    """
    if model is None:
        if hidden is None or intermediate is None:
            raise ValueError(f"give --model ({', '.join(MODELS)}), or --hidden and --intermediate")
        found = Shape(hidden, intermediate)
    elif hidden is not None or intermediate is not None:
        raise ValueError("give either --model, or --hidden and --intermediate")
    elif model in MODELS:
        found = MODELS[model]
    else:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
    return Shape(found.hidden, found.intermediate, num_ranks or found.num_ranks, rank or found.rank)


def gpu_of(name: str) -> GPU:
    """Peaks of a GPU of `GPUS`.

    Raises:
        ValueError: an unknown one.
    """
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}")
    return GPUS[name]


# FLOPs and weights (KERNELS 2.2), the same for all forms.


def base_parameters(shape: Shape) -> int:
    """``3 D F``."""
    return 3 * shape.hidden * shape.intermediate


def modulation_parameters(shape: Shape) -> int:
    """``R (6 D + 3 F)``: per projection, R times D, its input's width and its output's."""
    return shape.joined * (6 * shape.hidden + 3 * shape.intermediate)


def forward_flops(shape: Shape) -> int:
    """``6 D F + R (12 D + 6 F)``: 2 for each parameter.

    Elementwise work, which tensor cores do not do, is left out; v_a and v_b need
    ``6 k (D + F)`` of it, which is little.
    """
    return 2 * (base_parameters(shape) + modulation_parameters(shape))


def backward_flops(shape: Shape) -> int:
    """2 for each parameter of the frozen base, 4 for each of the modulation, which is trained."""
    return 2 * base_parameters(shape) + 4 * modulation_parameters(shape)


def forward_weights(shape: Shape) -> int:
    """Bytes: every weight is read once."""
    return ELEMENT * (base_parameters(shape) + modulation_parameters(shape))


def backward_weights(shape: Shape) -> int:
    """Bytes: every weight is read once, and every gradient of the modulation written once."""
    return ELEMENT * (base_parameters(shape) + 2 * modulation_parameters(shape))


# Activations, by form. Bytes per token.


def gemm_forward(shape: Shape) -> Traffic:
    """``7 D + 18 R + 11 F`` elements, v1 of KERNELS 2.2, and ``3 k`` coefficients.

    Exposed are the coefficients' launches, ``9 R``, and SwiGLU, ``3 F``.
    """
    coefficients = 3 * shape.num_ranks * FLOAT
    return Traffic(
        ELEMENT * shape.linear(7, 18, 11) + coefficients,
        ELEMENT * shape.linear(0, 9, 3) + coefficients,
    )


def gemm_backward(shape: Shape) -> Traffic:
    """``11 D + 36 R + 16 F`` elements, and ``3 k`` coefficients.

    3 D less than v1 of KERNELS 2.2: the gradients of gate's and up's probes are one matrix, so that
    the gradient of h is a sum of three products, not four, whose sum is read and written once less
    often (2 D), and one product that reads h once gives both of their gradients of W_a_up (D).
    """
    coefficients = 3 * shape.num_ranks * FLOAT
    return Traffic(
        ELEMENT * shape.linear(11, 36, 16) + coefficients,
        ELEMENT * shape.linear(0, 18, 6) + coefficients,
    )


def fused_forward(shape: Shape) -> Traffic:
    """``4 D + 15 R + 5 F`` elements, v2 of KERNELS 2.2, and ``3 k`` coefficients; nothing exposed.

    With r over 128, which no tile holds, probes come from torch's product and are read again: 3 R
    more, and the coefficients' launches are exposed.
    """
    coefficients = 3 * shape.num_ranks * FLOAT
    if shape.rank <= PROBE_RANK:
        return Traffic(ELEMENT * shape.linear(4, 15, 5) + coefficients, 0)
    exposed = ELEMENT * shape.linear(0, 9, 0) + coefficients
    return Traffic(ELEMENT * shape.linear(4, 18, 5) + coefficients, exposed)


def fused_backward(shape: Shape) -> Traffic:
    """``7 D + 36 R + 14 F`` elements, and ``3 k`` coefficients.

    v2 of KERNELS 2.2, ``8 D + 30 R + 12 F``, has everything fused. Ours fuses sums of products, and
    leaves what would be the epilogue of one to a launch of its own: dz is written and read (6 R),
    and so is the gradient of inner (2 F), whose product spills registers with SwiGLU's backward
    behind it (KERNELS 3). D less: one product that reads h once gives both gradients of W_a_up of
    gate and up.
    """
    coefficients = 3 * shape.num_ranks * FLOAT
    return Traffic(
        ELEMENT * shape.linear(7, 36, 14) + coefficients,
        ELEMENT * shape.linear(0, 18, 6) + coefficients,
    )


def vectors_forward(shape: Shape) -> Traffic:
    """``7 D + 6 R + 11 F + 6 k (D + F)`` elements: v_a and v_b at their best, which nobody wrote.

    KERNELS 2.2: all v_a and v_b are written once and read once. Beside that: the bottlenecks, one
    product that gives both vectors from them, the base's products, and per modulated projection
    (gate and up together) one launch that reads its input, v_a, v_b and the base's result, and
    writes the latter. Those launches and SwiGLU are exposed.
    """
    vectors = 3 * shape.num_ranks * (shape.hidden + shape.intermediate)
    return Traffic(
        ELEMENT * (shape.linear(7, 6, 11) + 2 * vectors),
        ELEMENT * (shape.linear(3, 0, 8) + vectors),
    )


def vectors_backward(shape: Shape) -> Traffic:
    """``10 D + 12 R + 14 F + 12 k (D + F)`` elements: v_a and v_b at their best.

    KERNELS 2.2: the saved vectors are read once; their gradients are written once, read for the
    gradient of the bottlenecks, and read for those of W_a_up and W_b_up. The rest is as forward:
    per projection one launch, which adds to the gradient of its input.
    """
    vectors = 3 * shape.num_ranks * (shape.hidden + shape.intermediate)
    return Traffic(
        ELEMENT * (shape.linear(10, 12, 14) + 4 * vectors),
        ELEMENT * (shape.linear(4, 0, 11) + 2 * vectors),
    )


def reference_forward(shape: Shape) -> Traffic:
    """``3 D + 9 R + 8 F + k (19 D + 17 F + 6)`` elements: `reference`, as eager torch runs it.

    Per component and projection of widths ``in`` and ``out``: the bottleneck ``D + r``, v_a
    ``r + in``, v_b ``r + out``; their use, ``v_a * a`` 3 in, its sum in + 1, ``v_b * s``
    2 out + 1, adding it 3 out. The base's products 3 (D + F), SwiGLU 5 F.
    """
    k = shape.num_ranks
    d, f = k * shape.hidden, k * shape.intermediate
    return Traffic(
        ELEMENT * (shape.linear(3, 9, 8) + 19 * d + 17 * f + 6 * k),
        ELEMENT * (shape.linear(0, 0, 5) + 13 * d + 14 * f + 6 * k),
    )


def reference_backward(shape: Shape) -> Traffic:
    """``3 D + 27 R + 12 F + k (41 D + 25 F + 12)`` elements: `reference` under autograd.

    Per component and projection: the gradient of v_b 2 out + 1, of s 4 out + 1, of v_a and of the
    input 2 in + 1 each; of W_b_up and W_a_up and, from both, of the bottleneck
    2 (out + r) + 2 (in + r) + 3 r; of W_down and x 2 (D + r). Adding up what comes to a tensor from
    several uses is 3 of its width each time: 3 k - 1 times for x, 2 k + 1 for h, k for inner.
    The base's products 3 (D + F), SwiGLU 9 F.
    """
    k = shape.num_ranks
    d, f = k * shape.hidden, k * shape.intermediate
    return Traffic(
        ELEMENT * (shape.linear(3, 27, 12) + 41 * d + 25 * f + 12 * k),
        ELEMENT * (shape.linear(0, 9, 9) + 29 * d + 19 * f + 12 * k),
    )


def decode(shape: Shape, tokens: int) -> Traffic:
    """The seven launches of `decode`, whose products are float32 until they are complete.

    ``6 D + 52 R + 20 F + 12 k`` bytes, and 8 for every partial sum: of the down projection (D) and
    its probe (R), which are split alike, and of its modulation (D). Exposed are the coefficients'
    launches and the last, which adds up.
    """
    down = partial_sums(shape.hidden + shape.joined, shape.intermediate)
    head = partial_sums(shape.hidden, shape.joined)
    sums = FLOAT * (down * (shape.hidden + shape.joined) + head * shape.hidden)
    coefficients = 3 * shape.num_ranks * FLOAT
    return Traffic(
        shape.linear(6, 52, 20) + coefficients + 2 * sums,
        shape.linear(2, 26, 0) + coefficients + sums,
    )


def partial_sums(columns: int, depth: int) -> int:
    """Into how many parts decode splits a product of that shape, as `decode.split` does."""
    parts = max(1, min(16, 528 // -(-columns // 64), -(-depth // 128)))
    return -(-depth // (-(-depth // parts // 128) * 128))


# What is kept for backward (KERNELS 2.3). Bytes per token.


def kept(shape: Shape, *, probes: bool = True) -> int:
    """x, h, u, gate and up, and p if `probes`: ``2 D + 6 R + 2 F`` elements, ``3 k`` coefficients.

    Without probes 3 R less, for ``2 R (2 D + F)`` more FLOPs.
    """
    saved = shape.linear(2, 6 if probes else 3, 2)
    return ELEMENT * saved + 3 * shape.num_ranks * FLOAT


def kept_by_checkpoint(shape: Shape) -> int:
    """x and h, ``2 D`` elements; forward is computed again."""
    return ELEMENT * shape.linear(2, 0, 0)


def kept_by_reference(shape: Shape) -> int:
    """``2 D + 3 R + 4 F + 3 k (D + F) + 3 k`` elements: all v_a and v_b, and what autograd keeps.

    6 R less than KERNELS 2.3 has for its naive form: this one forms neither probes nor z.
    """
    k = shape.num_ranks
    vectors = 3 * k * (shape.hidden + shape.intermediate)
    return ELEMENT * (shape.linear(2, 3, 4) + vectors + 3 * k)


def kept_for_backward(shape: Shape, tokens: int) -> dict[str, int]:
    """Bytes of one layer, by form."""
    return {
        "ours": tokens * kept(shape),
        "ours, save_probe=False": tokens * kept(shape, probes=False),
        "checkpoint of the layer": tokens * kept_by_checkpoint(shape),
        "v_a/v_b": tokens * kept_by_reference(shape),
    }


BEST_VECTORS = "v_a/v_b at best"
EAGER_VECTORS = "v_a/v_b, eager"


def costs(shape: Shape, tokens: int) -> Iterator[Cost]:
    """All passes in all forms; decode with one token if there are too many for it."""
    for form, traffic in {
        "gemm": gemm_forward(shape),
        "fused": fused_forward(shape),
        BEST_VECTORS: vectors_forward(shape),
        EAGER_VECTORS: reference_forward(shape),
    }.items():
        yield _cost("forward", form, shape, tokens, traffic)
    for form, traffic in {
        "gemm": gemm_backward(shape),
        "fused": fused_backward(shape),
        BEST_VECTORS: vectors_backward(shape),
        EAGER_VECTORS: reference_backward(shape),
    }.items():
        yield _cost("backward", form, shape, tokens, traffic)
    few = tokens if tokens <= DECODE_TOKENS else 1
    for form, traffic in {
        "decode": decode(shape, few),
        BEST_VECTORS: vectors_forward(shape),
        EAGER_VECTORS: reference_forward(shape),
    }.items():
        yield _cost("decode", form, shape, few, traffic)


def _cost(phase: Phase, form: str, shape: Shape, tokens: int, traffic: Traffic) -> Cost:
    backward = phase == "backward"
    flops = backward_flops(shape) if backward else forward_flops(shape)
    weights = backward_weights(shape) if backward else forward_weights(shape)
    return Cost(
        phase, form, tokens, tokens * flops, tokens * traffic.all, weights,
        tokens * traffic.exposed,
    )  # fmt: skip
