"""The cases that are checked and timed: each op's inputs, and all the ways to compute it.

`bench`, `gpu_day` and ``bench_<op>.py`` share this table. The first provider of a case is its
baseline in plain torch: cuBLAS and eager operations. In float64 it is the truth for providers that
compute the same. Triton's providers exist where its kernels run: on a GPU, or in its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only

from npt_fast.benchmarks.device import COMPILER, DEVICE, ON_GPU, RUNS_TRITON
from npt_fast.benchmarks.workloads import Shapes, Workload
from npt_fast.functional import heads_of, modulated_mlp
from npt_fast.kernels import factored, reference
from npt_fast.kernels.factored import TORCH_STEPS, Factors, MLPWeights
from npt_fast.kernels.roofline import DECODE_TOKENS
from npt_fast.testing import make_inputs

if RUNS_TRITON:
    from npt_fast.kernels import coefficients, modulated_linear, probe, swiglu
    from npt_fast.kernels import modulated_mlp as paths
    from npt_fast.kernels._launch import target_of

Inputs = tuple[Any, ...]
Compute = Callable[..., Any]

# Liger 0.8.5's kernels do not run in the interpreter of Triton 3.9
LIGER = ON_GPU and find_spec("liger_kernel") is not None
OPS = ("coefficients", "swiglu", "modulated_linear", "probe", "decode", "modulated_mlp")

PROVIDERS = (
    "eager", "factored", "gemm", "fused", "decode", "gemm-again", "triton", "reference", "base",
    "compile", "compile-gemm", "compile-reference", "compile-base", "liger",
)  # fmt: skip
"""Names of all providers; docs/benchmarks.md explains each."""
OURS = ("gemm", "fused", "decode", "gemm-again", "triton")
"""Providers that launch our Triton kernels in eager mode."""


@dataclass(frozen=True, slots=True)
class Provider:
    """A way to compute a case.

    Attributes:
        run: function from the case's inputs to tensors, nested in any way.
        truth: function that computes the same in plain torch; None means the baseline.
        budget: function whose error sets the error budget; None means the truth.
        overwrites: whether a call changes its inputs.
        unread: positions of inputs that it does not read.
    """

    run: Compute
    truth: Compute | None = None
    budget: Compute | None = None
    overwrites: bool = False
    unread: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Case:
    """One op, one direction, one problem.

    Attributes:
        op: a name of `OPS`.
        what: part or direction of the op.
        shape: name of the problem.
        workload: sizes and dtype of the problem.
        inputs: function that makes the inputs.
        providers: name -> provider, the baseline first.
        chosen: path that `choose_path` takes; None if the op has no paths.
        graphs: whether to time it as a CUDA graph too.
    """

    op: str
    what: str
    shape: str
    workload: Workload
    inputs: Callable[[], Inputs]
    providers: dict[str, Provider]
    chosen: str | None = None
    graphs: bool = False

    @property
    def baseline(self) -> str:
        return next(iter(self.providers))

    def __str__(self) -> str:
        return f"{self.op}, {self.what}, {self.shape}"


def cases(op: str, shapes: Shapes) -> list[Case]:
    """All cases of an op; this makes no inputs."""
    if op == "decode":
        return [_mlp(op, "forward", *item) for item in shapes.decode.items()]
    if op == "modulated_mlp":
        return [
            build(op, what, *item)
            for item in shapes.training.items()
            for what, build in (("forward", _mlp), ("forward + backward", _training))
        ]
    problems = dict(shapes.training)
    if op in ("coefficients", "swiglu"):  # a few tokens as well: their tensors stay in the cache
        problems |= dict([list(shapes.decode.items())[-1]])
    builds = {
        "coefficients": (_coefficients_fwd, _coefficients_bwd),
        "swiglu": (_swiglu_fwd, _swiglu_bwd),
        "modulated_linear": (_linear, _linear_backward, _gate_up),
        "probe": (_probe,),
    }
    return [build(*item) for item in problems.items() for build in builds[op]]


def _compiled(function: Compute) -> Compute:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=COMPILER)


def _torch_providers(function: Compute) -> dict[str, Provider]:
    """Providers in eager torch and under `torch.compile`."""
    return {"eager": Provider(function), "compile": Provider(_compiled(function))}


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def _by_projection(problem: Workload, projections: int) -> Tensor:
    """Random ``(c, T, R)`` with the strides that one GEMM for all projections gives."""
    width = problem.num_ranks * problem.rank
    joined = _randn(problem.tokens, projections * width, dtype=problem.dtype)
    parts: Tensor = joined.unflatten(1, (projections, width))
    return parts.transpose(0, 1)


@lru_cache(maxsize=1)
def layer_inputs(problem: Workload) -> tuple[Tensor, Tensor, MLPWeights, Factors]:
    """Inputs of one layer, drawn on the device; a host takes minutes for 200 million numbers."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return make_inputs(
        problem, dtype=problem.dtype, device=str(DEVICE), requires_grad=False, generator=generator
    )


def _coefficients_fwd(shape: str, problem: Workload) -> Case:
    k = problem.num_ranks

    def eager(u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return reference.coefficients(u, p, k)

    def inputs() -> Inputs:
        return _by_projection(problem, 2), _by_projection(problem, 2)

    providers = _torch_providers(eager)
    if RUNS_TRITON:
        providers["triton"] = Provider(lambda u, p: coefficients.coefficients_fwd(u, p, k))
    return Case("coefficients", "forward, gate and up", shape, problem, inputs, providers)


def _coefficients_bwd(shape: str, problem: Workload) -> Case:
    def inputs() -> Inputs:
        width = problem.num_ranks * problem.rank
        dz = _randn(2, problem.tokens, width, dtype=problem.dtype)
        s = _randn(2, problem.tokens, problem.num_ranks, dtype=torch.float32)
        return dz, _by_projection(problem, 2), _by_projection(problem, 2), s

    def into_new(backward: Compute) -> Compute:
        def run(dz: Tensor, u: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, ...]:
            du = torch.empty_like(u)
            return (*backward(dz, u, p, s, du), du)

        return run

    providers = _torch_providers(into_new(factored.coefficients_backward))
    if RUNS_TRITON:
        providers["triton"] = Provider(into_new(coefficients.coefficients_bwd))
    return Case("coefficients", "backward, gate and up", shape, problem, inputs, providers)


def _swiglu_fwd(shape: str, problem: Workload) -> Case:
    size = problem.tokens, problem.intermediate

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return TORCH_STEPS.gated_activation(gate, up, "silu")

    providers = _torch_providers(eager)
    if RUNS_TRITON:
        providers["triton"] = Provider(swiglu.swiglu_fwd)
    if LIGER:
        from liger_kernel.ops.swiglu import swiglu_forward

        providers["liger"] = Provider(lambda gate, up: swiglu_forward(gate, up)[2])

    def inputs() -> Inputs:
        return tuple(_randn(*size, dtype=problem.dtype) for _ in range(2))

    return Case("swiglu", "forward", shape, problem, inputs, providers)


def _swiglu_bwd(shape: str, problem: Workload) -> Case:
    size = problem.tokens, problem.intermediate

    def inputs() -> Inputs:
        return tuple(_randn(*size, dtype=problem.dtype) for _ in range(3))

    def eager(d_inner: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return TORCH_STEPS.gated_activation_backward(d_inner, gate, up, "silu")

    providers = _torch_providers(eager)
    if RUNS_TRITON:
        providers["triton"] = Provider(swiglu.swiglu_bwd)
    if LIGER:
        from liger_kernel.ops.swiglu import swiglu_backward

        def liger(d_inner: Tensor, gate: Tensor, up: Tensor) -> Any:
            return swiglu_backward(gate, up, d_inner)

        # computes d_gate and d_up, but not inner
        providers["liger"] = Provider(liger, truth=lambda *a: eager(*a)[:2], overwrites=True)
    return Case("swiglu", "backward", shape, problem, inputs, providers)


def _random_z(problem: Workload) -> Tensor:
    return _randn(2, problem.tokens, problem.num_ranks * problem.rank, dtype=problem.dtype)


def _products(
    what: str,
    shape: str,
    problem: Workload,
    inputs: Callable[[], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
) -> Case:
    def by(sum_of_products: Compute) -> Compute:
        return lambda left, right: sum_of_products(left, right, None)

    providers = _torch_providers(by(TORCH_STEPS.sum_of_products))
    if RUNS_TRITON:
        providers["triton"] = Provider(by(modulated_linear.modulated_linear))
    return Case("modulated_linear", what, shape, problem, inputs, providers)


def _linear(shape: str, problem: Workload) -> Case:
    def inputs() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        _, h, weights, factors = layer_inputs(problem)
        return (h, _random_z(problem)[0]), (weights.gate.t(), heads_of(factors)[0][1])

    return _products("forward, gate", shape, problem, inputs)


def _linear_backward(shape: str, problem: Workload) -> Case:
    def inputs() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        _, _, weights, factors = layer_inputs(problem)
        widths = problem.intermediate, problem.intermediate, len(factors.w_a_in)
        gradients = tuple(_randn(problem.tokens, n, dtype=problem.dtype) for n in widths)
        return gradients, (weights.gate, weights.up, factors.w_a_in)

    return _products("backward, to h", shape, problem, inputs)


def _gate_up(shape: str, problem: Workload) -> Case:
    def inputs() -> Inputs:
        _, h, weights, factors = layer_inputs(problem)
        return h, weights, _random_z(problem), factors

    def by(steps: factored.Steps) -> Compute:
        return lambda h, weights, z, factors: steps.modulated_gate_up(
            h, weights, z, factors, "silu", True
        )

    providers = _torch_providers(by(TORCH_STEPS))
    if RUNS_TRITON:
        providers |= {
            "fused": Provider(by(paths.FUSED_STEPS)),
            "gemm": Provider(by(paths.GEMM_STEPS)),
        }
    what = "forward, gate and up with SwiGLU"
    return Case("modulated_linear", what, shape, problem, inputs, providers)


def _probe(shape: str, problem: Workload) -> Case:
    k = problem.num_ranks

    def inputs() -> Inputs:
        _, h, _, factors = layer_inputs(problem)
        return h, factors.w_a_in, _by_projection(problem, 2)

    def by(step: Compute) -> Compute:
        return lambda a, w_a, u: step(a, w_a, u, k, True)

    providers = _torch_providers(by(TORCH_STEPS.probe_and_scale))
    if RUNS_TRITON:
        providers["gemm"] = Provider(by(paths.GEMM_STEPS.probe_and_scale))
        if problem.rank <= probe.MAX_RANK:
            providers["fused"] = Provider(by(probe.probe))
    return Case("probe", "gate and up", shape, problem, inputs, providers)


def _reference(x: Tensor, h: Tensor, weights: MLPWeights, factors: Factors) -> Tensor:
    return modulated_mlp(x, h, weights.gate, weights.up, weights.down, factors, impl="reference")


def _unmodulated(x: Tensor, h: Tensor, weights: MLPWeights, factors: Factors) -> Tensor:
    inner = functional.silu(h @ weights.gate.t()) * (h @ weights.up.t())
    return inner @ weights.down.t()


def _forwards(tokens: int | None) -> dict[str, Provider]:
    """All ways to compute the MLP; with `tokens`, those that need no gradients."""
    providers = {
        "factored": Provider(factored.modulated_mlp),
        "compile": Provider(_compiled(factored.modulated_mlp)),
    }
    if RUNS_TRITON:

        def by(path: paths.Path, **options: Any) -> Provider:
            return Provider(partial(paths.modulated_mlp, path=path, **options))

        providers |= {
            "gemm": by("gemm"),
            "fused": by("fused"),
            "compile-gemm": Provider(_compiled(by("gemm").run)),
        }
        if tokens is None:
            providers["gemm-again"] = by("gemm", save_probe=False)
        elif tokens <= DECODE_TOKENS:
            providers["decode"] = by("decode")
    # rounds after each of k additions: with 128 components four times the error in bfloat16
    definition = partial(Provider, budget=_reference)
    unmodulated = partial(Provider, truth=_unmodulated, unread=(0, 3))
    providers |= {
        "reference": definition(_reference),
        "compile-reference": definition(_compiled(_reference)),
        "base": unmodulated(_unmodulated),
        "compile-base": unmodulated(_compiled(_unmodulated)),
    }
    if LIGER:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def liger(x: Tensor, h: Tensor, weights: MLPWeights, factors: Factors) -> Any:
            inner = LigerSiLUMulFunction.apply(h @ weights.gate.t(), h @ weights.up.t())
            return inner @ weights.down.t()

        providers["liger"] = unmodulated(liger)
    return providers


def _chosen_path(problem: Workload, *, gradients: bool) -> str | None:
    if not RUNS_TRITON:
        return None
    target = target_of(torch.empty(0, device=DEVICE))
    rank = problem.num_ranks * problem.rank
    return paths.choose_path(target, problem.tokens, rank, gradients=gradients)


def _mlp(op: str, what: str, shape: str, problem: Workload) -> Case:
    return Case(
        op, what, shape, problem, lambda: layer_inputs(problem), _forwards(problem.tokens),
        chosen=_chosen_path(problem, gradients=False), graphs=op == "decode",
    )  # fmt: skip


def _training(op: str, what: str, shape: str, problem: Workload) -> Case:
    """Gradients of x, h and the factors; the MLP's weights are frozen."""

    def inputs() -> Inputs:
        x, h, weights, factors = layer_inputs(problem)
        x, h, factors = tree_map_only(
            Tensor, lambda t: t.detach().requires_grad_(), (x, h, factors)
        )
        return x, h, weights, factors, _randn(*h.shape, dtype=h.dtype)

    @cache  # providers with the same truth share its step
    def step_of(forward: Compute) -> Compute:
        def step(x: Tensor, h: Tensor, weights: MLPWeights, factors: Factors, dy: Tensor) -> Any:
            y = forward(x, h, weights, factors)
            trained = [t for t in tree_leaves((x, h, factors)) if isinstance(t, Tensor)]
            return y.detach(), torch.autograd.grad(y, trained, dy, allow_unused=True)

        return step

    providers = {
        name: replace(
            p,
            run=step_of(p.run),
            truth=p.truth and step_of(p.truth),
            budget=p.budget and step_of(p.budget),
        )
        for name, p in _forwards(None).items()
    }
    chosen = _chosen_path(problem, gradients=True)
    return Case(op, what, shape, problem, inputs, providers, chosen=chosen)
