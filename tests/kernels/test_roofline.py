"""Bytes that calls move, counted in the interpreter, equal the formulas of `roofline`.

``pytest -s tests/kernels/test_roofline.py`` prints them beside the formulas. Shapes have the
proportions of Llama's 1B with R=4096 and 8B with R=512 (design.md#counts), at 1/32 of the width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from npt_fast.kernels import decode, probe, reference, roofline
from npt_fast.kernels._launch import INTERPRETED, Tiles
from npt_fast.kernels._tuning import forced_tiles
from npt_fast.kernels.factored import MLPWeights
from npt_fast.kernels.modulated_mlp import modulated_mlp
from npt_fast.kernels.roofline import Shape
from npt_fast.kernels.swiglu import swiglu_bwd, swiglu_fwd
from npt_fast.testing import Problem, make_inputs
from tests.kernels.traffic import Traffic, addresses_of

if not INTERPRETED:
    pytest.skip("what kernels touch is seen in the interpreter alone", allow_module_level=True)

TOKENS = 48
SHAPES = {"1B R=4096, /32": Shape(64, 256, 8, 16), "8B R=512, /32": Shape(128, 448, 8, 2)}
WIDE = Shape(64, 96, 2, 136)
"""A shape with a rank that no tile of `probe` holds."""
TILES = Tiles(32, 64, 64, 4, 1)

# elements per token, as (D, R, F), planned before the kernels were written (design.md#counts)
PLANNED = {
    ("gemm", "forward"): (7, 18, 11),
    ("gemm", "backward"): (14, 36, 16),
    ("fused", "forward"): (4, 15, 5),
    ("fused", "backward"): (8, 30, 12),
}
FORMULAS: dict[tuple[str, str], Callable[[Shape], roofline.Traffic]] = {
    ("gemm", "forward"): roofline.gemm_forward,
    ("gemm", "backward"): roofline.gemm_backward,
    ("fused", "forward"): roofline.fused_forward,
    ("fused", "backward"): roofline.fused_backward,
    ("decode", "forward"): lambda shape: roofline.decode(shape, TOKENS),
    ("reference", "forward"): roofline.reference_forward,
    ("reference", "backward"): roofline.reference_backward,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread; more would wait for each other in the reference's many small operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Call(NamedTuple):
    """A form of the modulated MLP with its inputs.

    Attributes:
        run: function that computes it.
        inputs: x and h.
        trained: weights that have gradients.
        frozen: weights that have none.
    """

    run: Callable[[], Tensor]
    inputs: list[Tensor]
    trained: list[Tensor]
    frozen: list[Tensor]


class Counted(NamedTuple):
    """Bytes that one pass moves.

    Attributes:
        activations: bytes of x, h and everything computed from them.
        exposed: part of `activations` that launches without a matrix product move.
        weights: bytes of weights and their gradients.
        requested: bytes of weights, counted as often as programs load them.
    """

    activations: int
    exposed: int
    weights: int
    requested: int


def call_of(form: str, shape: Shape, *, save_probe: bool = True) -> Call:
    return _reference(shape) if form == "reference" else _ours(form, shape, save_probe)


def _ours(form: str, shape: Shape, save_probe: bool) -> Call:
    problem = Problem(
        tokens=TOKENS, hidden=shape.hidden, intermediate=shape.intermediate,
        num_ranks=shape.num_ranks, rank=shape.rank,
    )  # fmt: skip
    x, h, weights, factors = make_inputs(
        problem, dtype=torch.bfloat16, requires_grad=form != "decode"
    )
    weights = MLPWeights._make(None if w is None else w.detach() for w in weights)

    def run() -> Tensor:
        with forced_tiles(TILES):
            return modulated_mlp(x, h, weights, factors, path=form, save_probe=save_probe)

    frozen = [w for w in weights if w is not None]
    return Call(run, [x, h], [w for w in factors if isinstance(w, Tensor)], frozen)


def _reference(shape: Shape) -> Call:
    """The reference with separate tensors per component, since splitting joined ones moves more."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*sizes: int, trained: bool = True) -> Tensor:
        values = torch.randn(sizes, generator=generator) / sizes[0] ** 0.5
        return values.to(torch.bfloat16).requires_grad_(trained)

    def projection(width: int, out: int) -> reference.Projection:
        sizes = (shape.hidden, shape.rank), (shape.rank, width), (shape.rank, out)
        factors: Any = ([tensor(*s) for _ in range(shape.num_ranks)] for s in sizes)
        weight = tensor(out, width, trained=False)
        return reference.Projection(weight, None, reference.ProjectionFactors(*factors))

    d, f = shape.hidden, shape.intermediate
    x, h = tensor(TOKENS, d), tensor(TOKENS, d)
    projections = projection(d, f), projection(d, f), projection(f, d)
    trained = [w for p in projections for factors in p.factors or () for w in factors]
    frozen = [p.weight for p in projections]
    return Call(lambda: reference.modulated_mlp(x, h, *projections, silu), [x, h], trained, frozen)


@cache
def count(form: str, phase: str, shape: Shape) -> Counted:
    call = call_of(form, shape)
    weights = [*call.trained, *call.frozen]
    with Traffic() as traffic:
        y = call.run()
    if phase == "backward":
        dy = torch.ones_like(y)
        with forced_tiles(TILES), Traffic() as traffic:
            gradients = torch.autograd.grad(y, call.inputs + call.trained, dy)
        weights += gradients[len(call.inputs) :]
    addresses = addresses_of(weights)
    requested = sum(
        number
        for launch in traffic.launches
        for address, number in launch.requested.items()
        if address in addresses
    )
    return Counted(
        traffic.moved(but=addresses), traffic.exposed(but=addresses),
        traffic.moved(only=addresses), requested,
    )  # fmt: skip


class Row(NamedTuple):
    """One pass of a form: elements of activations per token, counted and by formulas."""

    shape: str
    form: str
    phase: str
    counted: float
    formula: float
    planned: int | None


def rows() -> Iterable[Row]:
    """All forms of both shapes; `planned` leaves out coefficients."""
    for (form, phase), formula in FORMULAS.items():
        for name, shape in SHAPES.items():
            found = count(form, phase, shape).activations / TOKENS / roofline.ELEMENT
            said = PLANNED.get((form, phase))
            yield Row(
                name, form, phase, found, formula(shape).all / roofline.ELEMENT,
                None if said is None else shape.elements(*said),
            )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("form", "phase"), FORMULAS)
def test_bytes_counted_are_the_formulas(form: str, phase: str, shape: Shape) -> None:
    _assert_equal(form, phase, shape)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_fused_with_a_rank_that_no_tile_holds(phase: str) -> None:
    _assert_equal("fused", phase, WIDE)


def _assert_equal(form: str, phase: str, shape: Shape) -> None:
    found, formula = count(form, phase, shape), FORMULAS[form, phase](shape)
    assert found.activations == TOKENS * formula.all
    assert found.exposed == TOKENS * formula.exposed
    weights = roofline.backward_weights if phase == "backward" else roofline.forward_weights
    assert found.weights == weights(shape)


def test_the_formulas_are_near_the_planned_counts() -> None:
    """Counts are within 5 % of the plan, except fused backward; see `roofline.fused_backward`."""
    print("\n| shape | form | pass | counted | formula | planned | counted / planned |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows():
        said = ratio = "-"
        if row.planned is not None:
            said, ratio = str(row.planned), f"{row.counted / row.planned:.3f}"
            if (row.form, row.phase) != ("fused", "backward"):
                assert row.counted == pytest.approx(row.planned, rel=0.05)
        print(f"| {row.shape} | {row.form} | {row.phase} | {row.counted:.0f} | "
              f"{row.formula:.0f} | {said} | {ratio} |")  # fmt: skip
    for shape in SHAPES.values():
        coefficients = 3 * shape.num_ranks * roofline.FLOAT
        more = roofline.fused_backward(shape).all - coefficients
        more -= roofline.ELEMENT * shape.elements(*PLANNED["fused", "backward"])
        assert more == roofline.ELEMENT * shape.elements(-1, 6, 2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_reads_every_weight_once(shape: Shape) -> None:
    """No two programs load the same weight, so not even a cache hit is needed."""
    found = count("decode", "forward", shape)
    assert found.requested == found.weights == roofline.forward_weights(shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_vectors_at_best_are_less_than_any_code_of_theirs_moves(phase: str, shape: Shape) -> None:
    best = {"forward": roofline.vectors_forward, "backward": roofline.vectors_backward}[phase]
    found = count("reference", phase, shape)
    assert found.activations > TOKENS * best(shape).all
    assert found.exposed > TOKENS * best(shape).exposed
    assert best(shape).all > FORMULAS["gemm", phase](shape).all


@pytest.mark.parametrize("form", ["gemm", "reference"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_flops(form: str, shape: Shape) -> None:
    """FLOPs as torch counts them; it does not see inside kernels."""
    call = call_of(form, shape)
    with FlopCounterMode(display=False) as forward:
        y = call.run()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y, call.inputs + call.trained, torch.ones_like(y))
    assert forward.get_total_flops() == TOKENS * roofline.forward_flops(shape)
    assert backward.get_total_flops() == TOKENS * roofline.backward_flops(shape)


KEPT = {
    "gemm": ("gemm", True, roofline.saved_bytes),
    "fused": ("fused", True, roofline.saved_bytes),
    "gemm, no probes": ("gemm", False, lambda shape: roofline.saved_bytes(shape, probes=False)),
    "fused, no probes": ("fused", False, lambda shape: roofline.saved_bytes(shape, probes=False)),
    "reference": ("reference", True, roofline.reference_saved_bytes),
}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bytes_saved_bytes_by_form(case: str, shape: Shape) -> None:
    form, save_probe, formula = KEPT[case]
    call = call_of(form, shape, save_probe=save_probe)
    weights = addresses_of([*call.trained, *call.frozen])
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call.run()
    kept = sum(s.nbytes() for address, s in storages.items() if address not in weights)
    assert kept == TOKENS * formula(shape)


@pytest.mark.parametrize(
    ("columns", "depth"), [(2048, 4096), (6144, 8192), (4608, 14336), (4096, 512), (576, 40)]
)
def test_partial_sums_are_those_of_decode(columns: int, depth: int) -> None:
    assert roofline.partial_sums(columns, depth) == decode.split_k(columns, depth)[0]


def test_limits_are_those_of_the_kernels() -> None:
    assert roofline.DECODE_TOKENS == decode.MAX_TOKENS
    assert roofline.PROBE_RANK == probe.MAX_RANK


# Tests of the counter itself.


def bytes_of(function: Callable[[], object]) -> int:
    with Traffic() as traffic:
        function()
    return traffic.moved()


def test_kernels_are_counted_by_element() -> None:
    """Only touched elements count, even inside wider, unaligned rows."""
    gate, up, d_inner = torch.zeros(3, 5, 100, dtype=torch.bfloat16)[:, :, 3:74]
    assert bytes_of(lambda: swiglu_fwd(gate, up)) == 3 * 5 * 71 * 2
    assert bytes_of(lambda: swiglu_bwd(d_inner, gate, up)) == 6 * 5 * 71 * 2
    assert bytes_of(lambda: swiglu_fwd(gate, gate)) == 2 * 5 * 71 * 2


def test_operations_of_torch_are_counted_by_tensor() -> None:
    a, b, y = torch.zeros(4, 6), torch.zeros(6, 8), torch.zeros(4, 8)
    product = 4 * (4 * 6 + 6 * 8 + 4 * 8)
    out = torch.empty(4, 8)
    assert bytes_of(lambda: a @ b) == product
    assert bytes_of(lambda: torch.mm(a, b, out=out)) == product
    assert bytes_of(lambda: b.t().unflatten(0, (2, 4)).transpose(0, 1)[1]) == 0
    assert bytes_of(lambda: torch.empty_like(a)) == 0
    assert bytes_of(lambda: y.mul_(2)) == 2 * 4 * 4 * 8
    assert bytes_of(lambda: y.copy_(out)) == 2 * 4 * 4 * 8
    assert bytes_of(lambda: y.zero_()) == 4 * 4 * 8
    assert bytes_of(lambda: y.t().contiguous()) == 2 * 4 * 4 * 8
    assert bytes_of(lambda: torch.cat([a, a])) == 4 * 3 * 4 * 6  # a is read once
    assert bytes_of(lambda: y[:1].expand(4, 8) + y) == 4 * 8 * (1 + 4 + 4)


def test_a_sum_in_another_place_is_copied_there_first() -> None:
    a, b, y = torch.zeros(4, 6), torch.zeros(6, 8), torch.zeros(4, 8)
    in_place = 4 * (4 * 6 + 6 * 8 + 2 * 4 * 8)
    assert bytes_of(lambda: torch.addmm(y, a, b, out=y)) == in_place
    assert bytes_of(lambda: y.addmm_(a, b)) == in_place
    assert bytes_of(lambda: torch.addmm(y, a, b)) == in_place + 4 * 2 * 4 * 8
