"""Timings of a whole model: decoding, one NP layer alone, and a training step.

The model is a Llama with the widths of Llama-3.2-1B and random weights, drawn on the device. Every
layer is an NP layer that a job switches on or off. Times are compared with the work that no
computation can avoid: reading the weights once, in their dtype, and multiplying the matrices.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import npt_fast as npt
from npt_fast.benchmarks.device import (
    DEVICE,
    DTYPE,
    ON_GPU,
    RUNS_TRITON,
    milliseconds,
    peak_bytes,
    synchronize,
)
from npt_fast.benchmarks.kernel_timing import Ceilings, captured, ceilings
from npt_fast.benchmarks.rows import Row
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.kernels import roofline
from npt_fast.modules import NPComponent
from npt_fast.testing import PATHS, implementation
from npt_fast.training.curriculum import Stage
from npt_fast.training.distillation import Distillation

_ROUNDS = 10
_BATCH_MS = 20.0
"""Approximate milliseconds of one timing, which covers many calls if they are short."""
_FACTORS = (torch.float32, torch.bfloat16)
_TEACHER = Stage("teacher", 1, 0.0, 0.0)


class Measurement(NamedTuple):
    """One row of the table: its name, and the function that measures it."""

    what: str
    run: Callable[[], Row]


class Work(NamedTuple):
    """A call to time, and the work that no computation of it can avoid.

    Attributes:
        call: function to time; it may run many times.
        tokens: number of tokens per call.
        flops: FLOPs of the matrix products.
        bytes: bytes of weights, keys and values, each read once, and all bytes that an optimizer
            moves. Other activations are left out; they are few where memory is the limit.
    """

    call: Callable[[], object]
    tokens: int
    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of the model and of its inputs.

    Attributes:
        shape: sizes of an NP layer.
        layers: number of layers.
        heads: number of attention heads.
        kv_heads: number of key and value heads.
        vocab: vocabulary size.
        context: number of tokens that a decoded token attends to, itself included.
        windows: number of texts per training step.
        length: number of tokens per text.
    """

    shape: roofline.Shape
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    windows: int
    length: int

    @property
    def middle(self) -> int:
        """The layer that is on if only one is."""
        return self.layers // 2


REAL = Size(roofline.MODELS["llama-3.2-1b"], 16, 32, 8, 128_256, 1024, 8, 1024)
TINY = Size(roofline.Shape(64, 128, num_ranks=2, rank=16), 4, 4, 2, 256, 12, 2, 16)


def measurements(*, tiny: bool) -> list[Measurement]:
    """All measurements, the most valuable first; nothing is built before one of them runs.

    Args:
        tiny: whether to use small widths, to try everything out.
    """
    size = TINY if tiny else REAL
    return [
        *_decode_jobs(size, graph=True),
        *_training_jobs(size),
        *_layer_jobs(size),
        *_decode_jobs(size, graph=False),
    ]


def _decode_jobs(size: Size, *, graph: bool) -> Iterator[Measurement]:
    ways: dict[str, dict[str, Any]] = {"base model": {"layers": (), "factors": torch.float32}}
    for layers in ((size.middle,), range(size.layers)):
        count = f"{len(layers)} NP layer{'s' if len(layers) > 1 else ''}"
        for factors in _FACTORS:
            ways[f"{count}, factors in {_name(factors)}"] = {"layers": layers, "factors": factors}
    for batch in (1, 16):
        what = f"decode, {'graph' if graph else 'eager'}, batch {batch}"
        for way, options in ways.items():
            work = partial(decode, batch=batch, **options)
            yield Measurement(f"{what}, {way}", partial(measure, size, work, graph=graph))


def _training_jobs(size: Size) -> Iterator[Measurement]:
    for autocast in (False, True):
        for name in ("gemm", "fused", "factored", "reference"):
            what = f"training step, {size.windows} x {size.length} tokens, {name}"
            run = partial(measure, size, partial(training, autocast=autocast), name=name)
            yield Measurement(f"{what}{', autocast' if autocast else ''}", run)


def _layer_jobs(size: Size) -> Iterator[Measurement]:
    for tokens in (1, 16, 64):
        what = f"layer alone, graph, T={tokens}"
        work = partial(layer, tokens=tokens, on=False, factors=torch.float32)
        yield Measurement(f"{what}, base MLP", partial(measure, size, work, graph=True))
        for name in ("decode", "gemm", "factored"):
            for factors in _FACTORS:
                work = partial(layer, tokens=tokens, on=True, factors=factors)
                run = partial(measure, size, work, graph=True, name=name)
                yield Measurement(f"{what}, {name}, factors in {_name(factors)}", run)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(
    size: Size,
    work: Callable[[Size], AbstractContextManager[Work]],
    *,
    graph: bool = False,
    name: str = "auto",
) -> Row:
    """Time a piece of work.

    Args:
        size: sizes of the model.
        work: context manager that prepares the work.
        graph: whether to launch it as a CUDA graph.
        name: implementation of NP layers, a name of `npt_fast.testing.IMPLEMENTATIONS`.

    Returns:
        ``ms`` (the median), ``p20`` and ``p80`` of a call; ``tokens/s``, ``GB/s`` and ``TFLOP/s``.
        On a GPU also ``of ceiling``, the least time divided by the measured one, and, without a
        graph, ``peak MB``, the memory of a call beyond weights and optimizer state. If the work
        cannot run here: a ``status``, and the reason as ``detail``.
    """
    if why := _obstacle(graph, name):
        return {"status": "skipped", "detail": why}
    with work(size) as given, implementation(name):
        times = _times(captured(given.call) if graph else given.call)
        peak = 0 if graph else peak_bytes(given.call)
    row = row_of(given, times, ceilings(DTYPE) if ON_GPU else None)
    return row | {"peak MB": peak / 1e6} if peak else row


def row_of(work: Work, times: Sequence[float], limits: Ceilings | None) -> Row:
    """The row of `measure` that follows from the milliseconds of several calls."""
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    ms = statistics.median(times)
    row = {"ms": ms, "p20": low, "p80": high, "tokens/s": 1e3 * work.tokens / ms}
    row |= {"GB/s": work.bytes / ms / 1e6, "TFLOP/s": work.flops / ms / 1e9}
    if limits is not None:
        row["of ceiling"] = limits.floor_ms(work.flops, work.bytes) / ms
    return row


def _obstacle(graph: bool, name: str) -> str:
    """The reason why work cannot run here; empty if it can."""
    if ON_GPU:
        return ""
    if graph:
        return "a CUDA graph needs a GPU"
    if name in PATHS and not RUNS_TRITON:
        return "Triton's kernels need a GPU, or TRITON_INTERPRET=1 from the start"
    return ""


def _times(call: Callable[[], object]) -> list[float]:
    """Milliseconds of a call, once per round."""
    call()
    synchronize()
    if not ON_GPU:  # only shows that it runs
        return [milliseconds(call) for _ in range(2)]
    count = math.ceil(_BATCH_MS / max(milliseconds(call), 1e-3))

    def batch() -> None:
        for _ in range(count):
            call()

    for _ in range(3):  # let the clocks rise
        batch()
    return [milliseconds(batch) / count for _ in range(_ROUNDS)]


@lru_cache(maxsize=1)
def build(size: Size) -> Any:
    """The model, with every layer an NP layer with float32 factors; cached for the next job."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.shape.hidden,
        intermediate_size=size.shape.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab,
        max_position_embeddings=max(size.context, size.length),
        tie_word_embeddings=True,
    )
    auto: Any = AutoModelForCausalLM
    with DEVICE:
        model = auto.from_config(config, dtype=DTYPE).eval()
    options = npt.NPTConfig(
        layers=range(size.layers), rank=size.shape.rank, num_ranks=size.shape.num_ranks
    )
    npt.convert(model, options)
    for component in components(model).values():
        for name, parameter in component.named_parameters():
            if name.startswith("w_b"):  # zeros need less power than trained values
                nn.init.normal_(parameter, std=1e-3)
    return model


@contextmanager
def arranged(model: Any, layers: Sequence[int], factors: torch.dtype) -> Iterator[None]:
    """Switch on only `layers`, with factors of that dtype, inside the context.

    Afterwards all is as before, even if ``data`` and ``grad`` of the factors were changed.
    """
    parts = components(model)
    off = [index for index in parts if index not in layers]
    before = [(p, p.data) for index in layers for p in parts[index].parameters()]
    with npt.disabled(model, layers=off):
        try:
            for parameter, data in before:
                parameter.data = data.to(factors)
            yield
        finally:
            for parameter, data in before:
                parameter.data, parameter.grad = data, None


@contextmanager
def decode(
    size: Size, *, batch: int, layers: Sequence[int], factors: torch.dtype
) -> Iterator[Work]:
    """Decoding the last token that fits a static cache, without sampling the next one.

    Args:
        size: sizes of the model.
        batch: number of texts that are decoded together.
        layers: indices of the layers that are on.
        factors: dtype of their factors.
    """
    model = build(size)
    with arranged(model, layers, factors), torch.inference_mode():
        ids = torch.randint(size.vocab, (batch, size.context), device=DEVICE)
        cache: Any = StaticCache(config=model.config, max_cache_len=size.context)
        model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        last = ids[:, -1:].clone()
        lengths = [part.cumulative_length for part in cache.layers]

        def call() -> Tensor:
            logits: Tensor = model(last, past_key_values=cache, use_cache=True).logits
            # the cache counts tokens on the device, in graph replays too: reset it to the last one
            torch._foreach_sub_(lengths, 1)
            return logits

        weights = weights_of(model)
        held = sum(part.keys.nbytes + part.values.nbytes for part in cache.layers)
        pairs = size.layers * batch * size.context
        flops = batch * matrix_flops(weights) + attention_flops(size, pairs)
        yield Work(call, batch, flops, bytes_of(weights) + held)


@contextmanager
def layer(size: Size, *, tokens: int, on: bool, factors: torch.dtype) -> Iterator[Work]:
    """The MLP of the middle layer, without gradients.

    Args:
        size: sizes of the model.
        tokens: number of tokens T.
        on: whether the MLP is modulated.
        factors: dtype of its factors.
    """
    model, index = build(size), size.middle
    mlp, component = decoder_layers(model)[index].get_submodule("mlp"), components(model)[index]
    with arranged(model, [index], factors), torch.inference_mode():
        x, h = torch.randn(2, 1, tokens, size.shape.hidden, device=DEVICE, dtype=DTYPE)
        weights = weights_of(mlp, component) if on else weights_of(mlp)
        call = partial(component, x, h, mlp) if on else partial(mlp, h)
        yield Work(call, tokens, tokens * matrix_flops(weights), bytes_of(weights))


@contextmanager
def training(size: Size, *, autocast: bool) -> Iterator[Work]:
    """A training step of the middle layer in the teacher stage, with AdamW.

    Args:
        size: sizes of the model.
        autocast: whether to run under autocast to bfloat16.
    """
    model, index = build(size), size.middle
    decoder, component = decoder_layers(model), components(model)[index]
    with arranged(model, [index], torch.float32):
        for parameter in component.parameters():
            parameter.data = parameter.data.clone()  # training changes these
        ids = torch.randint(size.vocab, (size.windows, size.length), device=DEVICE)
        distillation = Distillation(model)
        optimizer = torch.optim.AdamW(component.parameters(), lr=1e-5, fused=True)

        def call() -> None:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
                loss = distillation(ids, stage=_TEACHER).total / ids.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        run = weights_of(*decoder[: index + 1])
        mlp = weights_of(decoder[index].get_submodule("mlp"))
        # the teacher pass needs all of `run` but the factors; the modulated MLP adds these, which
        # are in `run`, and its own weights a second time
        forward = matrix_flops(run) + matrix_flops(mlp)
        pairs = (index + 1) * size.windows * size.length * (size.length + 1) // 2
        flops = ids.numel() * (forward + backward_flops(size.shape)) + attention_flops(size, pairs)
        # gradients are written; AdamW reads them, and reads and writes weights and two moments
        moved = bytes_of(run) + 8 * bytes_of(list(component.parameters()))
        yield Work(call, ids.numel(), flops, moved)


def weights_of(*modules: nn.Module) -> list[nn.Parameter]:
    """Parameters that a call of the modules reads, each once; NP layers that are off read none."""
    parts = [part for module in modules for part in module.modules()]
    off = {
        id(parameter)
        for part in parts
        if isinstance(part, NPComponent) and not part.enabled
        for parameter in part.parameters()
    }
    found = {id(p): p for module in modules for p in module.parameters()}
    return [parameter for key, parameter in found.items() if key not in off]


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def matrix_flops(weights: Sequence[Tensor]) -> int:
    """FLOPs of a token's products with the parameters: 2 for each entry of a matrix."""
    return 2 * sum(weight.numel() for weight in weights if weight.ndim == 2)


def attention_flops(size: Size, pairs: int) -> int:
    """FLOPs of products with keys and values, for a number of pairs of tokens."""
    return 4 * size.shape.hidden * pairs


def backward_flops(shape: roofline.Shape) -> int:
    """FLOPs of a token if x and h need no gradients, as in the teacher stage."""
    d, r, f = shape.hidden, shape.joined, shape.intermediate
    return roofline.backward_flops(shape) - 2 * (2 * d * f + 5 * d * r)
