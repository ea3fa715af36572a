"""The least that a modulated MLP costs on a GPU: FLOPs, bytes, and their time at peak rates.

Everything here is arithmetic; nothing is timed. `tests/kernels/test_roofline.py` counts the bytes
that our kernels and torch's operations move, and finds these formulas (design.md#counts). They are
per token and layer: ``D`` model width, ``F`` MLP width, ``k`` components of rank ``r``,
``R = k r``. They assume bfloat16 with float32 coefficients; gate, up and down modulated; no biases;
a frozen base model, so that backward gives gradients of x, h and the factors; that each launch
reads its operands once and writes its results once; and that no cache keeps anything between
launches. Needs neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

ELEMENT = 2
"""Bytes of one bfloat16 element."""
FLOAT = 4
"""Bytes of one coefficient, and of one partial sum of decode."""
DECODE_TOKENS = 64
"""`decode.MAX_TOKENS`, repeated here because decode needs torch and Triton to import."""
DECODE_COLUMNS = 64
"""Columns of a tile of `decode` in 16-bit dtypes, for the same reason."""
PROBE_RANK = 128
"""`probe.MAX_RANK`, for the same reason."""

Phase = Literal["forward", "backward", "decode"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one modulated MLP.

    Attributes:
        hidden: model width D.
        intermediate: MLP width F.
        num_ranks: number of components k.
        rank: rank r of each component.
    """

    hidden: int
    intermediate: int
    num_ranks: int = 8
    rank: int = 64

    @property
    def joined(self) -> int:
        """``R = k r``: columns of all components together."""
        return self.num_ranks * self.rank

    def elements(self, d: int, r: int, f: int) -> int:
        """``d D + r R + f F``, a number of elements per token."""
        return d * self.hidden + r * self.joined + f * self.intermediate


class GPU(NamedTuple):
    """Peak rates of a GPU as the vendor states them; no program reaches them.

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
"""Widths by model name. R is 4096 for llama-3.2-1b, and 512 (8 components of rank 64) elsewhere."""

GPUS = {
    "h100": GPU(990, 3.35),
    "h200": GPU(990, 4.8),
    "a100": GPU(312, 2.04),
    "b200": GPU(2250, 8.0),
    "rtx4090": GPU(165, 1.01),
    "mi300x": GPU(1307, 5.3),
}
"""Peak rates by GPU name; the SXM module with the most memory where several share a name."""


class Traffic(NamedTuple):
    """Bytes of activations per token, read and written.

    Attributes:
        all: bytes of every launch.
        exposed: bytes of launches without a matrix product, whose time no product can hide.
    """

    all: int
    exposed: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of passing all tokens through one layer once, in one form.

    Attributes:
        phase: forward, backward or decode.
        form: how the layer is computed, such as ``"gemm"``.
        tokens: number of tokens.
        flops: FLOPs of all matrix products.
        activations: bytes of activations, read and written.
        weights: bytes of weights and of their gradients, read and written.
        exposed: the part of `activations` that launches without a matrix product move.
    """

    phase: Phase
    form: str
    tokens: int
    flops: int
    activations: int
    weights: int
    exposed: int

    def compute_ms(self, gpu: GPU) -> float:
        """Milliseconds that the FLOPs take at the peak rate."""
        return self.flops / gpu.tflops / 1e9

    def memory_ms(self, gpu: GPU) -> float:
        """Milliseconds that all bytes take at the peak rate."""
        return (self.activations + self.weights) / gpu.bandwidth / 1e9

    def floor_ms(self, gpu: GPU) -> float:
        """Milliseconds that no schedule can beat: the larger of both times."""
        return max(self.compute_ms(gpu), self.memory_ms(gpu))

    def launch_by_launch_ms(self, gpu: GPU) -> float:
        """Least milliseconds of launches in sequence: the products, then the exposed bytes."""
        # TB/s are 1e9 bytes per millisecond
        exposed = self.exposed / gpu.bandwidth / 1e9
        return max(self.compute_ms(gpu), self.memory_ms(gpu) - exposed) + exposed


def shape_of(
    model: str | None,
    hidden: int | None,
    intermediate: int | None,
    num_ranks: int | None = None,
    rank: int | None = None,
) -> Shape:
    """The shape of a model of `MODELS`, or one with the given widths.

    Args:
        model: a name of `MODELS`, or None if widths are given.
        hidden: D, or None if a model is given.
        intermediate: F, or None if a model is given.
        num_ranks: k; None takes the model's.
        rank: r; None takes the model's.

    Raises:
        ValueError: the model is unknown, or neither exactly one model nor both widths are given.
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
    """Peak rates of a GPU of `GPUS`.

    Raises:
        ValueError: the GPU is unknown.
    """
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}")
    return GPUS[name]


# FLOPs and weights (design.md#counts), the same for all forms.


def base_parameters(shape: Shape) -> int:
    """``3 D F``."""
    return 3 * shape.hidden * shape.intermediate


def factor_parameters(shape: Shape) -> int:
    """``R (6 D + 3 F)``: for each projection, R times (D + input width + output width)."""
    return shape.joined * (6 * shape.hidden + 3 * shape.intermediate)


def forward_flops(shape: Shape) -> int:
    """``6 D F + R (12 D + 6 F)``: 2 for each parameter.

    Elementwise FLOPs are left out. Forming v_a and v_b adds ``6 k (D + F)``,
    which is little.
    """
    return 2 * (base_parameters(shape) + factor_parameters(shape))


def backward_flops(shape: Shape) -> int:
    """2 for each parameter of the frozen base MLP, and 4 for each entry of the trained factors."""
    return 2 * base_parameters(shape) + 4 * factor_parameters(shape)


def forward_weights(shape: Shape) -> int:
    """Bytes: every weight is read once."""
    return ELEMENT * (base_parameters(shape) + factor_parameters(shape))


def backward_weights(shape: Shape) -> int:
    """Bytes: every weight is read once, and every gradient of the factors is written once."""
    return ELEMENT * (base_parameters(shape) + 2 * factor_parameters(shape))


# Activations, by form. Bytes per token.


def gemm_forward(shape: Shape) -> Traffic:
    """``7 D + 18 R + 11 F`` elements and ``3 k`` coefficients (design.md#counts).

    The coefficients' launches, ``9 R``, and SwiGLU, ``3 F``, are exposed.
    """
    coefficients = 3 * shape.num_ranks * FLOAT
    return Traffic(
        ELEMENT * shape.elements(7, 18, 11) + coefficients,
        ELEMENT * shape.elements(0, 9, 3) + coefficients,
    )


def gemm_backward(shape: Shape) -> Traffic:
    """``11 D + 36 R + 16 F`` elements and ``3 k`` coefficients.

    The gradients of gate's and up's probes are one matrix. So the gradient of h is a sum of three
    products instead of four, which saves one read and one write of the sum (2 D), and one product
    that reads h once gives the gradients of W_a_up for both (D).
    """
    coefficients = 3 * shape.num_ranks * FLOAT
    return Traffic(
        ELEMENT * shape.elements(11, 36, 16) + coefficients,
        ELEMENT * shape.elements(0, 18, 6) + coefficients,
    )


def fused_forward(shape: Shape) -> Traffic:
    """``4 D + 15 R + 5 F`` elements and ``3 k`` coefficients; nothing is exposed.

    No tile holds a rank above 128. Then torch computes the probes, and reading them again adds 3 R
    and exposes the coefficients' launches.
    """
    coefficients = 3 * shape.num_ranks * FLOAT
    if shape.rank <= PROBE_RANK:
        return Traffic(ELEMENT * shape.elements(4, 15, 5) + coefficients, 0)
    exposed = ELEMENT * shape.elements(0, 9, 0) + coefficients
    return Traffic(ELEMENT * shape.elements(4, 18, 5) + coefficients, exposed)


def fused_backward(shape: Shape) -> Traffic:
    """``7 D + 36 R + 14 F`` elements and ``3 k`` coefficients.

    Fusing everything would move ``8 D + 30 R + 12 F``. Ours fuses sums of products only, and leaves
    the epilogues to launches of their own: dz is written and read (6 R), and so is the gradient of
    inner (2 F), because SwiGLU's backward behind that product spills registers
    (design.md#triton). It moves D less because one product that reads h once gives the gradients
    of W_a_up for gate and up.
    """
    coefficients = 3 * shape.num_ranks * FLOAT
    return Traffic(
        ELEMENT * shape.elements(7, 36, 14) + coefficients,
        ELEMENT * shape.elements(0, 18, 6) + coefficients,
    )


def vectors_forward(shape: Shape) -> Traffic:
    """``7 D + 6 R + 11 F + 6 k (D + F)`` elements: the least that forming v_a and v_b can move.

    No such code exists; it is a lower bound. Every v_a and v_b is written once and read once. The
    rest: the bottlenecks, one product that gives both vectors from them, the base MLP's products,
    and per modulated projection (gate and up together) one launch that reads its input, v_a, v_b
    and the base result, and writes that result. Those launches and SwiGLU are exposed.
    """
    vectors = 3 * shape.num_ranks * (shape.hidden + shape.intermediate)
    return Traffic(
        ELEMENT * (shape.elements(7, 6, 11) + 2 * vectors),
        ELEMENT * (shape.elements(3, 0, 8) + vectors),
    )


def vectors_backward(shape: Shape) -> Traffic:
    """``10 D + 12 R + 14 F + 12 k (D + F)`` elements: the lower bound for v_a and v_b.

    The saved vectors are read once. Their gradients are written once, read for the gradient of the
    bottlenecks, and read for those of W_a_up and W_b_up. The rest is as in `vectors_forward`: one
    launch per projection, which adds to the gradient of its input.
    """
    vectors = 3 * shape.num_ranks * (shape.hidden + shape.intermediate)
    return Traffic(
        ELEMENT * (shape.elements(10, 12, 14) + 4 * vectors),
        ELEMENT * (shape.elements(4, 0, 11) + 2 * vectors),
    )


def reference_forward(shape: Shape) -> Traffic:
    """``3 D + 9 R + 8 F + k (19 D + 17 F + 6)`` elements: `reference` in eager torch.

    Per component and projection of widths ``in`` and ``out``: the bottleneck ``D + r``, v_a
    ``r + in``, v_b ``r + out``; their use, ``v_a * a`` 3 in, its sum in + 1, ``v_b * s``
    2 out + 1, adding it 3 out. The base MLP's products 3 (D + F), SwiGLU 5 F.
    """
    k = shape.num_ranks
    d, f = k * shape.hidden, k * shape.intermediate
    return Traffic(
        ELEMENT * (shape.elements(3, 9, 8) + 19 * d + 17 * f + 6 * k),
        ELEMENT * (shape.elements(0, 0, 5) + 13 * d + 14 * f + 6 * k),
    )


def reference_backward(shape: Shape) -> Traffic:
    """``3 D + 27 R + 12 F + k (41 D + 25 F + 12)`` elements: `reference` under autograd.

    Per component and projection: the gradient of v_b 2 out + 1, of s 4 out + 1, of v_a and of the
    input 2 in + 1 each; of W_b_up and W_a_up and, from both, of the bottleneck
    2 (out + r) + 2 (in + r) + 3 r; of W_down and x 2 (D + r). Where a tensor has several uses, each
    addition of gradients moves 3 of its width: 3 k - 1 times for x, 2 k + 1 for h, k for inner.
    The base MLP's products 3 (D + F), SwiGLU 9 F.
    """
    k = shape.num_ranks
    d, f = k * shape.hidden, k * shape.intermediate
    return Traffic(
        ELEMENT * (shape.elements(3, 27, 12) + 41 * d + 25 * f + 12 * k),
        ELEMENT * (shape.elements(0, 9, 9) + 29 * d + 19 * f + 12 * k),
    )


def decode(shape: Shape, tokens: int) -> Traffic:
    """The five launches of `decode`; its products stay float32 until they are complete.

    ``6 D + 14 R + 20 F`` bytes, and 8 for each partial sum (4 written, 4 read): of the down
    projection and of its low-rank product (D), and of the coefficients, one for every component,
    block of its columns and part of K. The last launch, which adds the former, is exposed.
    """
    down = partial_sums(shape.hidden + shape.joined, shape.intermediate)
    piece = min(128, max(16, 1 << (shape.rank - 1).bit_length()))
    head = partial_sums(shape.hidden, shape.num_ranks * -(-shape.rank // piece) * piece)
    sums = FLOAT * (down + head) * shape.hidden
    blocks = shape.num_ranks * -(-shape.rank // DECODE_COLUMNS)
    coefficients = FLOAT * (2 + down) * blocks
    return Traffic(
        shape.elements(6, 14, 20) + 2 * (sums + coefficients), shape.elements(2, 0, 0) + sums
    )


def partial_sums(columns: int, depth: int) -> int:
    """The number of parts into which `decode.split_k` splits a product of that shape."""
    # repeated from decode for the same reason as DECODE_TOKENS; a test compares the two
    parts = max(1, min(16, 528 // -(-columns // 64), -(-depth // 128)))
    return -(-depth // (-(-depth // parts // 128) * 128))


# What is saved for backward (design.md#saved-activations). Bytes per token.


def saved_bytes(shape: Shape, *, probes: bool = True) -> int:
    """x, h, u, gate, up and, if `probes`, p: ``2 D + 6 R + 2 F`` elements and ``3 k`` coefficients.

    Leaving out the probes saves 3 R elements and costs ``2 R (2 D + F)`` more FLOPs in backward.
    """
    saved = shape.elements(2, 6 if probes else 3, 2)
    return ELEMENT * saved + 3 * shape.num_ranks * FLOAT


def checkpoint_saved_bytes(shape: Shape) -> int:
    """x and h, ``2 D`` elements; backward computes forward again."""
    return ELEMENT * shape.elements(2, 0, 0)


def reference_saved_bytes(shape: Shape) -> int:
    """``2 D + 3 R + 4 F + 3 k (D + F) + 3 k`` elements: all v_a and v_b, and what autograd saves.

    The reference forms neither probes nor z, so it saves neither.
    """
    k = shape.num_ranks
    vectors = 3 * k * (shape.hidden + shape.intermediate)
    return ELEMENT * (shape.elements(2, 3, 4) + vectors + 3 * k)


def saved_bytes_by_form(shape: Shape, tokens: int) -> dict[str, int]:
    """Bytes that one layer saves for backward, by form."""
    return {
        "ours": tokens * saved_bytes(shape),
        "ours, save_probe=False": tokens * saved_bytes(shape, probes=False),
        "checkpoint of the layer": tokens * checkpoint_saved_bytes(shape),
        "v_a/v_b": tokens * reference_saved_bytes(shape),
    }


BEST_VECTORS = "v_a/v_b at best"
EAGER_VECTORS = "v_a/v_b, eager"


def costs(shape: Shape, tokens: int) -> Iterator[Cost]:
    """All passes in all forms; decode is for one token if `tokens` are too many for it."""
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
    # `decode` takes no more
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
