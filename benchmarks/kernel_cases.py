"""What is checked and timed: for every op its inputs, and all the ways to compute it.

One table for `gpu_day` and for ``bench_<op>.py``. The first provider of a case is its baseline,
plain torch: cuBLAS and eager operations; in float64 it is the truth for all that compute the same.

``python -m benchmarks.kernel_cases [op ...]`` checks every Triton provider on a tiny problem, and
nothing else: a short script for compute-sanitizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from npt_fast.benchmarks.device import COMPILER, DEVICE, DTYPE, ON_GPU, peak_bytes
from npt_fast.functional import modulated_mlp
from npt_fast.kernels import (
    coefficients,
    decode,
    factored,
    modulated_linear,
    probe,
    reference,
    swiglu,
)
from npt_fast.kernels import modulated_mlp as paths
from npt_fast.kernels._launch import target_of
from npt_fast.kernels.factored import TORCH, Base, Modulation
from npt_fast.testing import Problem, assert_within_budget, make_inputs

Inputs = tuple[Any, ...]
Compute = Callable[..., Any]

# its kernels do not run in Triton's interpreter (0.8.5 with 3.9)
LIGER = ON_GPU and find_spec("liger_kernel") is not None
OPS = ("coefficients", "swiglu", "modulated_linear", "probe", "decode", "modulated_mlp")

_1B = partial(Problem, hidden=2048, intermediate=8192)
_8B = partial(Problem, hidden=4096, intermediate=14336)


class Shapes(NamedTuple):
    """Problems by name: those of a training step, and of decoding."""

    training: dict[str, Problem]
    decode: dict[str, Problem]


REAL = Shapes(
    {
        # with 8192 tokens the reference form would keep 65 GB of the last
        "Llama-3.2-1B k=8 r=512 T=8192": _1B(tokens=8192, num_ranks=8, rank=512),
        "Llama-3.1-8B k=8 r=64 T=8192": _8B(tokens=8192, num_ranks=8, rank=64),
        "Llama-3.2-1B k=128 r=16 T=2048": _1B(tokens=2048, num_ranks=128, rank=16),
    },
    {
        f"{name} T={tokens}": model(tokens=tokens, num_ranks=8, rank=rank)
        for name, model, rank in (
            ("Llama-3.2-1B k=8 r=512", _1B, 512),
            ("Llama-3.1-8B k=8 r=64", _8B, 64),
        )
        for tokens in (1, 4, 16, 64)
    },
)
_tiny = partial(Problem, hidden=48, intermediate=80, num_ranks=2, rank=16)
TINY = Shapes({"tiny k=2 r=16 T=33": _tiny(tokens=33)}, {"tiny k=2 r=16 T=4": _tiny(tokens=4)})


@dataclass(frozen=True, slots=True)
class Provider:
    """A way to compute a case.

    Attributes:
        run: takes the case's inputs and gives tensors, nested in any way.
        truth: computes the same in plain torch, where the baseline does not.
        budget: what may be twice as wrong, where that is neither truth nor baseline.
        overwrites: whether inputs are other ones after a call.
        unread: positions of inputs that it has no use for.
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
        op: one of `OPS`.
        what: which part or direction of it.
        shape: name of the problem.
        inputs: makes them.
        providers: by name, the baseline first.
        chosen: what `choose_path` takes for it, where there are paths.
        graphs: whether it is also timed as a CUDA graph.
    """

    op: str
    what: str
    shape: str
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
    """All cases of an op, without having made any inputs."""
    if op == "decode":
        return [_mlp(op, "forward", *item) for item in shapes.decode.items()]
    if op == "modulated_mlp":
        return [
            build(op, what, *item)
            for item in shapes.training.items()
            for what, build in (("forward", _mlp), ("forward + backward", _training))
        ]
    problems = dict(shapes.training)
    if op in ("coefficients", "swiglu"):  # a few tokens too, whose tensors stay in the cache
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


def _with_torch(function: Compute, **triton: Compute) -> dict[str, Provider]:
    """In eager torch, by `torch.compile`, and by others."""
    providers = {"eager": function, "torch.compile": _compiled(function), **triton}
    return {name: Provider(run) for name, run in providers.items()}


def _randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def _by_projection(problem: Problem, projections: int) -> Tensor:
    """``(c, T, R)`` as a GEMM for all projections leaves it."""
    width = problem.num_ranks * problem.rank
    joined = _randn(problem.tokens, projections * width)
    return joined.unflatten(1, (projections, width)).transpose(0, 1)


@lru_cache(maxsize=1)
def _layer(problem: Problem) -> tuple[Tensor, Tensor, Base, Modulation]:
    return make_inputs(problem, dtype=DTYPE, device=str(DEVICE), requires_grad=False)


def _coefficients_fwd(shape: str, problem: Problem) -> Case:
    k = problem.num_ranks

    def eager(u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return reference.coefficients(u, p, k)

    def triton(u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return coefficients.coefficients_fwd(u, p, k)

    return Case(
        "coefficients", "forward, gate and up", shape,
        lambda: (_by_projection(problem, 2), _by_projection(problem, 2)),
        _with_torch(eager, triton=triton),
    )  # fmt: skip


def _coefficients_bwd(shape: str, problem: Problem) -> Case:
    def inputs() -> Inputs:
        dz = _randn(2, problem.tokens, problem.num_ranks * problem.rank)
        s = _randn(2, problem.tokens, problem.num_ranks, dtype=torch.float32)
        return dz, _by_projection(problem, 2), _by_projection(problem, 2), s

    def into_new(backward: Compute) -> Compute:
        def run(dz: Tensor, u: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, ...]:
            du = torch.empty_like(u)
            return (*backward(dz, u, p, s, du), du)

        return run

    return Case(
        "coefficients", "backward, gate and up", shape, inputs,
        _with_torch(
            into_new(factored.coefficients_backward),
            triton=into_new(coefficients.coefficients_bwd),
        ),
    )  # fmt: skip


def _swiglu_fwd(shape: str, problem: Problem) -> Case:
    size = problem.tokens, problem.intermediate
    providers = _with_torch(lambda *a: TORCH.gated(*a, "silu"), triton=swiglu.swiglu_fwd)
    if LIGER:
        from liger_kernel.ops.swiglu import swiglu_forward

        providers["liger"] = Provider(lambda gate, up: swiglu_forward(gate, up)[2])
    return Case("swiglu", "forward", shape, lambda: (_randn(*size), _randn(*size)), providers)


def _swiglu_bwd(shape: str, problem: Problem) -> Case:
    size = problem.tokens, problem.intermediate

    def eager(*tensors: Tensor) -> tuple[Tensor, ...]:
        return TORCH.gated_backward(*tensors, "silu")

    providers = _with_torch(eager, triton=swiglu.swiglu_bwd)
    if LIGER:
        from liger_kernel.ops.swiglu import swiglu_backward

        def liger(d_inner: Tensor, gate: Tensor, up: Tensor) -> Any:
            return swiglu_backward(gate, up, d_inner)

        # gives d_gate and d_up, but not inner
        providers["liger"] = Provider(liger, truth=lambda *a: eager(*a)[:2], overwrites=True)
    return Case(
        "swiglu", "backward", shape, lambda: tuple(_randn(*size) for _ in range(3)), providers
    )


def _z(problem: Problem) -> Tensor:
    return _randn(2, problem.tokens, problem.num_ranks * problem.rank)


def _products(
    what: str, shape: str, inputs: Callable[[], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
) -> Case:
    def by(sum_of_products: Compute) -> Compute:
        return lambda left, right: sum_of_products(left, right, None)

    providers = _with_torch(by(TORCH.sum_of_products), triton=by(modulated_linear.modulated_linear))
    return Case("modulated_linear", what, shape, inputs, providers)


def _linear(shape: str, problem: Problem) -> Case:
    def inputs() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        _, h, base, m = _layer(problem)
        return (h, _z(problem)[0]), (base.gate.t(), m.w_b_gate)

    return _products("forward, gate", shape, inputs)


def _linear_backward(shape: str, problem: Problem) -> Case:
    def inputs() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        _, _, base, m = _layer(problem)
        widths = problem.intermediate, problem.intermediate, len(m.w_a_in)
        gradients = tuple(_randn(problem.tokens, width) for width in widths)
        return gradients, (base.gate, base.up, m.w_a_in)

    return _products("backward, to h", shape, inputs)


def _gate_up(shape: str, problem: Problem) -> Case:
    def inputs() -> Inputs:
        _, h, base, m = _layer(problem)
        return h, base, _z(problem), m

    def by(steps: factored.Steps) -> Compute:
        return lambda *arguments: steps.gate_up(*arguments, "silu", True)

    providers = {"triton fused": by(paths.FUSED), "triton gemm": by(paths.GEMM)}
    return Case(
        "modulated_linear", "forward, gate and up with SwiGLU", shape, inputs,
        _with_torch(by(TORCH), **providers),
    )  # fmt: skip


def _probe(shape: str, problem: Problem) -> Case:
    k = problem.num_ranks

    def inputs() -> Inputs:
        _, h, _, m = _layer(problem)
        return h, m.w_a_in, _by_projection(problem, 2)

    def by(step: Compute) -> Compute:
        return lambda a, w_a, u: step(a, w_a, u, k, True)

    providers = {"triton gemm": by(paths.GEMM.probe)}
    if problem.rank <= probe.MAX_RANK:
        providers["triton fused"] = by(probe.probe)
    return Case("probe", "gate and up", shape, inputs, _with_torch(by(TORCH.probe), **providers))


def _reference(x: Tensor, h: Tensor, base: Base, m: Modulation) -> Tensor:
    return modulated_mlp(x, h, base.gate, base.up, base.down, m, impl="reference")


def _base(x: Tensor, h: Tensor, base: Base, m: Modulation) -> Tensor:
    inner = functional.silu(h @ base.gate.t()) * (h @ base.up.t())
    return inner @ base.down.t()


def _forwards(tokens: int | None) -> dict[str, Provider]:
    """All ways to compute the MLP; those without gradients where tokens are given."""

    def by(path: paths.Path) -> Provider:
        return Provider(partial(paths.modulated_mlp, path=path))

    providers = {
        "eager": Provider(factored.modulated_mlp),
        "torch.compile": Provider(_compiled(factored.modulated_mlp)),
        "triton gemm": by("gemm"),
        "triton fused": by("fused"),
        "torch.compile of triton gemm": Provider(_compiled(by("gemm").run)),
    }
    if tokens is None:
        again = partial(paths.modulated_mlp, path="gemm", save_probe=False)
        providers["triton gemm, probes again"] = Provider(again)
    elif tokens <= decode.MAX_TOKENS:
        providers["triton decode"] = by("decode")
    # adds k times to what it rounds: four times as wrong in bfloat16, with 128 components
    definition = partial(Provider, budget=_reference)
    base = partial(Provider, truth=_base, unread=(0, 3))
    providers |= {
        "reference": definition(_reference),
        "torch.compile of reference": definition(_compiled(_reference)),
        "base MLP": base(_base),
        "torch.compile of base MLP": base(_compiled(_base)),
    }
    if LIGER:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def liger(x: Tensor, h: Tensor, base: Base, m: Modulation) -> Tensor:
            inner = LigerSiLUMulFunction.apply(h @ base.gate.t(), h @ base.up.t())
            return inner @ base.down.t()

        providers["base MLP, liger"] = base(liger)
    return providers


def _chosen(problem: Problem, *, gradients: bool) -> str:
    target = target_of(torch.empty(0, device=DEVICE))
    rank = problem.num_ranks * problem.rank
    return paths.choose_path(target, problem.tokens, rank, gradients=gradients)


def _mlp(op: str, what: str, shape: str, problem: Problem) -> Case:
    return Case(
        op, what, shape, lambda: _layer(problem), _forwards(problem.tokens),
        chosen=_chosen(problem, gradients=False), graphs=op == "decode",
    )  # fmt: skip


def _training(op: str, what: str, shape: str, problem: Problem) -> Case:
    """Gradients of x, h and the modulation; the base is frozen."""

    def inputs() -> Inputs:
        x, h, base, m = _layer(problem)
        x, h, m = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), (x, h, m))
        return x, h, base, m, _randn(*h.shape)

    @cache  # providers that share a truth share its step
    def step_of(forward: Compute) -> Compute:
        def step(x: Tensor, h: Tensor, base: Base, m: Modulation, dy: Tensor) -> Any:
            y = forward(x, h, base, m)
            trained = [t for t in tree_leaves((x, h, m)) if isinstance(t, Tensor)]
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
    chosen = _chosen(problem, gradients=True)
    return Case(op, what, shape, inputs, providers, chosen=chosen)


def tensors(values: Any) -> list[Tensor]:
    """All tensors in nested inputs or outputs."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def copied(inputs: Inputs) -> Inputs:
    """The same values in other memory."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    copies: Inputs = tree_map_only(Tensor, copy, inputs)
    return copies


class Prepared:
    """A case with its inputs, and what comes out of them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        torch.compiler.reset()  # which gives up on a function after some shapes
        self.case = case
        self.inputs = case.inputs()
        self._exact: dict[Compute, tuple[list[Tensor], int]] = {}
        self._eager: dict[Compute, list[Tensor]] = {}

    def exact(self, name: str) -> tuple[list[Tensor], int]:
        """What a provider should give, in float64, and FLOPs of the products."""
        truth = self._truth(name)
        if truth not in self._exact:

            def double(tensor: Tensor) -> Tensor:
                return tensor.detach().double().requires_grad_(tensor.requires_grad)

            wide = tree_map_only(Tensor, double, self.inputs)
            with FlopCounterMode(display=False) as counter:
                values = tensors(truth(*wide))
            self._exact[truth] = values, int(counter.get_total_flops())
        return self._exact[truth]

    def eager(self, name: str) -> list[Tensor]:
        """What plain torch gives in the provider's place."""
        budget = self.case.providers[name].budget or self._truth(name)
        if budget not in self._eager:
            self._eager[budget] = tensors(budget(*self.inputs))
        return self._eager[budget]

    def _truth(self, name: str) -> Compute:
        return self.case.providers[name].truth or self.case.providers[self.case.baseline].run

    def forget(self) -> None:
        """Free what was to compare with."""
        self._exact.clear()
        self._eager.clear()

    def bytes_moved(self, name: str) -> int:
        """Inputs and outputs, each once: no way to compute it moves less."""
        unread = self.case.providers[name].unread
        read = [value for index, value in enumerate(self.inputs) if index not in unread]
        return sum(tensor.nbytes for tensor in tensors(read) + self.eager(name))

    def check(self, name: str) -> int:
        """Compare a provider's values with the truth; gives the bytes that it needs at its peak.

        Raises:
            AssertionError: over budget.
        """
        provider = self.case.providers[name]
        exact, _ = self.exact(name)
        inputs = copied(self.inputs) if provider.overwrites else self.inputs
        provider.run(*copied(inputs))  # compiles, and makes what libraries keep
        actual: list[Tensor] = []
        peak = peak_bytes(lambda: actual.extend(tensors(provider.run(*inputs))))
        if len(actual) != len(exact):
            raise AssertionError(f"{len(actual)} results, not {len(exact)}")
        for index, values in enumerate(zip(actual, exact, self.eager(name), strict=True)):
            assert_within_budget(*values, f"result {index}")
        return peak


def main(ops: Sequence[str]) -> None:
    """Every Triton provider on the tiny problem."""
    for op in ops:
        for case in cases(op, TINY):
            prepared = Prepared(case)
            for name in case.providers:
                if name.startswith("triton"):
                    prepared.check(name)
                    print(f"{case}, {name}: right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or OPS)
