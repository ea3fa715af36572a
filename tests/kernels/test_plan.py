"""Plans of calls, on a driver that launches nothing: what a planned call asks of it.

Triton is imported with its compiler, so these tests need a process of their own if others
interpret.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from npt_fast.benchmarks.stub_driver import Launched, StubDriver, stub_driver
from npt_fast.kernels import _plan, decode
from npt_fast.kernels._launch import INTERPRETED
from npt_fast.testing import Problem, make_inputs
from tests.fake_gpus import compile_without_code, use_fake_gpus
from tests.fork_server import ForkServer

compiler = pytest.mark.skipif(INTERPRETED, reason="is run by test_all_of_it_with_the_compiler")
PROBLEM = Problem(tokens=3, hidden=32, intermediate=48, num_ranks=2, rank=16, bias=True)
Operands = tuple[Tensor | None, ...]


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="these tests run in this process")
def test_all_of_it_with_the_compiler(fork_server: ForkServer, tmp_path: Path) -> None:
    compiling = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = fork_server.pytest(__file__, environment=compiling)
    assert result.code == 0, result.out[-5000:] + result.err[-5000:]
    assert "1 skipped" in result.out


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    compile_without_code(monkeypatch)
    with stub_driver() as driver:
        yield driver


def operands_of(problem: Problem = PROBLEM, dtype: torch.dtype = torch.bfloat16) -> Operands:
    x, h, weights, factors = make_inputs(problem, dtype=dtype, requires_grad=False)
    return (x, h, *weights, *factors[:-1])


def with_scales(operands: Operands) -> Operands:
    """All operands of the planned function: float factors have no scales."""
    return (*operands, *(None,) * 6)


def call(stub: StubDriver, operands: Operands, k: int = 2) -> tuple[Tensor, list[Launched]]:
    with stub.recorded() as launches:
        y = decode.decode_mlp(*operands, k)
    return y, launches


def names_in(launches: list[Launched]) -> set[str]:
    return {value for one in launches for value in one.arguments if isinstance(value, str)}


def is_planned(launches: list[Launched]) -> bool:
    """Whether the launches got addresses; without a plan they get tensors."""
    return not any(isinstance(value, Tensor) for one in launches for value in one.arguments)


def addresses(launches: list[Launched], y: Tensor, operands: Operands) -> list[Any]:
    """Arguments of all launches: pointers to operands and the result by number, others as tags.

    A tag counts what else is pointed to, in the order of appearance, by address.
    """
    known = {t.data_ptr(): f"operand {i}" for i, t in enumerate((*operands, y)) if t is not None}
    found: list[Any] = []
    for one in launches:
        for kind, value in zip(one.source.signature.values(), one.arguments, strict=True):
            if kind.startswith("*"):
                at = value.data_ptr() if isinstance(value, Tensor) else value
                value = known.setdefault(at, f"between {len(known)}")
            found.append((one.kernel, one.grid, kind, value))
    return found


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projections", [1, 2, 3])
def test_a_planned_call_launches_the_same(
    stub: StubDriver, projections: int, dtype: torch.dtype
) -> None:
    problem = Problem(
        tokens=3, hidden=32, intermediate=48, num_ranks=2, rank=16, projections=projections,
        bias=projections != 2,
    )  # fmt: skip
    first, second = operands_of(problem, dtype), operands_of(problem, dtype)
    y, launches = call(stub, first)
    again, repeated = call(stub, second)
    assert not is_planned(launches) and is_planned(repeated)
    assert addresses(launches, y, first) == addresses(repeated, again, second)
    assert (again.shape, again.dtype, again.stride()) == (y.shape, y.dtype, y.stride())
    assert again.data_ptr() != y.data_ptr()


@compiler
def test_what_lies_between_does_not_overlap(stub: StubDriver) -> None:
    """Distinct tensors of the first call lie apart in the workspace by at least their bytes."""
    call(stub, operands_of())
    operands = with_scales(operands_of())
    (plan,) = _plan._plans.values()
    with _plan.observed_launches() as observed:
        result = decode._decode(*operands, 2, "silu")
    outside = {t.data_ptr() for t in (*operands, result) if t is not None}
    sizes: dict[int, int] = {}
    for one, step in zip(observed, plan.steps, strict=True):
        for position, index, offset in step.pointers:
            value = one.arguments[position]
            assert (value.data_ptr() in outside) == (index <= len(operands))
            if index > len(operands):
                storage = value.untyped_storage()
                begin = offset - (value.data_ptr() - storage.data_ptr())
                sizes[begin] = storage.nbytes()
    end = 0
    for begin, size in sorted(sizes.items()):
        assert begin >= end and begin % 256 == 0
        end = begin + size
    assert end <= plan.workspace


def misaligned(tensor: Tensor) -> Tensor:
    around = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return around[1:].view(tensor.shape).copy_(tensor)


CHANGES = {
    "alignment": misaligned,
    "strides": lambda tensor: tensor.mT.contiguous().mT,
    "offset rows": lambda tensor: torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]],
    "dtype": lambda tensor: tensor.float(),
}


@compiler
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("index", [0, 2, 8, 9, 11])
def test_another_form_is_another_plan(stub: StubDriver, index: int, change: str) -> None:
    operands = operands_of()
    call(stub, operands)
    assert is_planned(call(stub, operands)[1])
    tensor = operands[index]
    assert tensor is not None
    other = (*operands[:index], CHANGES[change](tensor), *operands[index + 1 :])
    try:
        _, launches = call(stub, other)
    except Exception:  # the dtypes do not go together: the compiler says so, no plan does
        assert change == "dtype"
        return
    assert not is_planned(launches)
    assert is_planned(call(stub, operands)[1])


@compiler
def test_a_change_of_the_precision_is_seen(stub: StubDriver) -> None:
    operands = operands_of(dtype=torch.float32)
    call(stub, operands)
    try:
        for told in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = told
            for _ in range(2):
                _, launches = call(stub, operands)
                assert names_in(launches) == {"tf32" if told else "ieee", "silu"}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@compiler
def test_a_change_of_the_activation_is_seen(stub: StubDriver) -> None:
    operands = operands_of()
    for activation in ("silu", "gelu", "silu"):
        with stub.recorded() as launches:
            decode.decode_mlp(*operands, 2, (), activation)
        assert names_in(launches) == {"ieee", activation}


@compiler
def test_one_tensor_in_two_places_is_not_planned(stub: StubDriver) -> None:
    """A plan knows operands by their addresses; later ones would get the wrong one."""
    x, _, *rest = operands_of()
    for _ in range(2):
        assert not is_planned(call(stub, (x, x, *rest))[1])


@compiler
def test_a_plan_keeps_no_tensor(stub: StubDriver) -> None:
    operands = operands_of()
    y = call(stub, operands)[0]
    alive = [weakref.ref(tensor) for tensor in (y, *operands) if tensor is not None]
    assert _plan._plans
    del operands, y
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


@compiler
def test_plans_do_not_pile_up(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "_MOST_PLANS", 3)
    for tokens in range(1, 9):
        problem = Problem(tokens=tokens, hidden=32, intermediate=48, num_ranks=2, rank=16)
        call(stub, operands_of(problem))
        assert 0 < len(_plan._plans) <= 3


@compiler
def test_the_device_and_its_stream_at_a_planned_call(
    stub: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of a device that is not current are launched on it, and on its current stream."""
    operands = operands_of()
    call(stub, operands)
    (plan,) = _plan._plans.values()
    streams: list[Any] = []

    use_fake_gpus(stub, monkeypatch)
    monkeypatch.setattr(stub, "get_current_stream", lambda device: streams.append(device) or 7)
    with FakeTensorMode(), stub.recorded() as launches:
        on_gpu = [torch.empty(1, device="cuda:1") for _ in with_scales(operands)]
        y = plan.run(on_gpu)
    assert {one.device for one in launches} == {"cuda:1"} and streams == [1]
    assert y.device == torch.device("cuda", 1)


@compiler
def test_machine_code_for_all_numbers_of_tokens(stub: StubDriver) -> None:
    """Each launch is compiled for two tiles of tokens at most, not for kinds of numbers."""
    problem = {"hidden": 64, "intermediate": 128, "num_ranks": 2, "rank": 16}
    for tokens in range(1, 65):
        call(stub, operands_of(Problem(tokens=tokens, **problem)))
    _, launches = call(stub, operands_of(Problem(tokens=64, **problem)))
    assert len(stub.loaded) <= 2 * len(launches)
