"""The host code of all GPU paths, with a driver that launches nothing.

Triton is imported with its compiler, so these tests need a process of their own if others
interpret. Kernels are launched through Triton's own code, with CPU tensors that the stub presents
as a GPU's, and once with fake tensors on a GPU. That shows the launches, and that the tensors'
device is current at each. Values, `torch.cuda.device` itself, streams, CUDA graphs and the caching
allocator need a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.driver import driver as drivers

from npt_fast.benchmarks import host
from npt_fast.benchmarks.step_counts import counts_of_token
from npt_fast.benchmarks.stub_driver import Launched, StubDriver, stub_driver
from npt_fast.errors import NPTError
from npt_fast.functional import modulated_mlp as whole_call
from npt_fast.kernels import _tuning, coefficients, decode, swiglu
from npt_fast.kernels import modulated_mlp as paths
from npt_fast.kernels._launch import INTERPRETED, Target, Tiles, launch, recorded_launches
from npt_fast.kernels.factored import Factors, MLPWeights, ModulatedMLPFunction
from npt_fast.testing import Problem, make_inputs
from tests.fake_gpus import compile_without_code, use_fake_gpus
from tests.fork_server import ForkServer
from tests.hf.test_convert import converted
from tests.kernels.cases import Inputs, arranged, padded, transposed

compiler = pytest.mark.skipif(INTERPRETED, reason="is run by test_all_of_it_with_the_compiler")

LAUNCHES = {
    ("decode", False): {
        "decode_products": 2, "decode_inner": 1, "decode_low_rank": 1, "decode_sum": 1,
    },
    ("gemm", False): {"coefficients_fwd": 2, "swiglu_fwd": 1},
    ("fused", False): {"probe": 2, "modulated_gate_up": 1, "modulated_linear": 1},
    ("gemm", True): {
        "coefficients_fwd": 2, "swiglu_fwd": 1, "coefficients_bwd": 2, "swiglu_bwd": 1,
    },
    ("fused", True): {
        "probe": 2, "modulated_gate_up": 1, "modulated_linear": 3, "coefficients_bwd": 2,
        "swiglu_bwd": 1,
    },
}  # fmt: skip
"""(path, whether backward follows) -> launches by kernel. decode has the five that its docstring
lists; the other paths have one for each step that `modulated_mlp.GEMM_STEPS` and `FUSED_STEPS` give
to a kernel."""

SUPPORTS = paths.supports

directions = pytest.mark.parametrize(
    ("path", "gradients"),
    LAUNCHES,
    ids=[f"{path}-{'backward' if gradients else 'forward'}" for path, gradients in LAUNCHES],
)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
ODD = Problem(tokens=5, hidden=33, intermediate=43, num_ranks=3, rank=5, bias=True)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="these tests run in this process")
def test_all_of_it_with_the_compiler(fork_server: ForkServer, tmp_path: Path) -> None:
    compiling = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = fork_server.pytest(__file__, environment=compiling)
    print(result.out[-2000:])
    assert result.code == 0, result.out[-5000:] + result.err[-5000:]
    passed = re.search(r"(\d+) passed, 2 skipped", result.out)
    assert passed is not None and int(passed[1]) >= 30


@pytest.mark.skipif(not INTERPRETED, reason="there is a compiler")
def test_the_interpreter_has_no_host_times() -> None:
    with pytest.raises(NPTError, match=r"^TRITON_INTERPRET is set, .* unset it$"):
        host.measure()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    """A stub driver, with tiles that are quick to compile, to no code."""
    compile_without_code(monkeypatch)
    tiles = Tiles(16, 16, 16, 1, 1)
    monkeypatch.setattr(decode, "decode_tiles", lambda *sizes: [tiles])
    with _tuning.forced_tiles(tiles), stub_driver() as driver:
        yield driver


def run(inputs: Inputs, path: paths.Path, gradients: bool) -> None:
    x, h, weights, factors = inputs
    with torch.set_grad_enabled(gradients):
        y = paths.modulated_mlp(x, h, weights, factors, path=path)
        if gradients:
            y.backward(torch.empty_like(y))


def without_data(inputs: Inputs) -> Inputs:
    """Meta tensors of the same shapes, strides and dtypes."""

    def meta(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        form = {"dtype": value.dtype, "requires_grad": value.requires_grad, "device": "meta"}
        return torch.empty_strided(value.shape, value.stride(), **form)

    x, h, weights, factors = inputs
    return meta(x), meta(h), MLPWeights(*map(meta, weights)), Factors(*map(meta, factors))


class Form(NamedTuple):
    """Properties of a tensor that a kernel's code depends on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Form(tuple(value.shape), value.stride(), value.dtype)
    return value


def kernel_name(name: str) -> str:
    return name.strip("_").removesuffix("_kernel")


def assert_as_stated_and_on_record(
    stub: StubDriver, inputs: Inputs, path: paths.Path, gradients: bool
) -> list[Launched]:
    """Launches equal the stated ones and those recorded for meta tensors."""
    with stub.recorded() as launches:
        run(inputs, path, gradients)
    counts = Counter(kernel_name(launched.kernel) for launched in launches)
    assert counts == LAUNCHES[path, gradients]
    with recorded_launches(Target("cuda", 90)) as expected:
        run(without_data(inputs), path, gradients)
    for launched, record in zip(launches, expected, strict=True):
        assert launched.kernel == record.kernel.fn.__name__
        assert launched.grid == (*record.grid, 1, 1)[:3]
        names = record.kernel.arg_names
        found = dict(zip(names, map(form, launched.arguments), strict=True))
        assert found == {name: form(record.arguments[name]) for name in names}
    return launches


def misfits(launched: Launched) -> list[str]:
    """Arguments that do not fit the compiled code; a GPU would read them wrongly."""
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    limits = {"i32": 2**31, "i64": 2**63}
    source = launched.source
    constants = {index: value for (index,), value in source.constants.items()}
    aligned = {index for (index,), of in source.attrs.items() if ["tt.divisibility", 16] in of}
    found = []
    for index, (name, kind) in enumerate(source.signature.items()):
        value = launched.arguments[index]
        if kind == "constexpr":
            fits = constants[index] == value
        elif kind.startswith("*"):
            fits = isinstance(value, Tensor) and types[value.dtype] == kind
        else:
            fits = type(value) is int and -limits[kind] <= value < limits[kind]
        if index in aligned and fits:
            fits = (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0
        if not fits:
            found.append(f"{name}: {form(value)} for {kind}")
    return found


def inputs_of(problem: Problem, dtype: torch.dtype, gradients: bool, device: str = "cpu") -> Inputs:
    return make_inputs(problem, dtype=dtype, device=device, requires_grad=gradients)


@compiler
@dtypes
@directions
def test_launches(stub: StubDriver, path: paths.Path, gradients: bool, dtype: torch.dtype) -> None:
    inputs = inputs_of(host.PROBLEM, dtype, gradients)
    launches = assert_as_stated_and_on_record(stub, inputs, path, gradients)
    assert [misfits(launched) for launched in launches] == [[]] * len(launches)
    assert all("*" not in kind or kind[1:] in ("bf16", "fp32")
               for launched in launches for kind in launched.source.signature.values())  # fmt: skip


@compiler
@pytest.mark.parametrize("layout", [padded, transposed])
@directions
def test_odd_sizes_any_strides(
    stub: StubDriver, path: paths.Path, gradients: bool, layout: Callable[[Tensor], Tensor]
) -> None:
    inputs = arranged(inputs_of(ODD, torch.bfloat16, gradients), layout)
    launches = assert_as_stated_and_on_record(stub, inputs, path, gradients)
    assert [misfits(launched) for launched in launches] == [[]] * len(launches)


class Results(TorchDispatchMode):
    """Records every torch operation and the form of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found.append((str(func), [form(value) for value in tree_leaves(result)]))
        return result


@compiler
@directions
def test_a_second_call_compiles_nothing_and_allocates_the_same(
    stub: StubDriver, path: paths.Path, gradients: bool
) -> None:
    inputs = inputs_of(host.PROBLEM, torch.bfloat16, gradients)
    found, loaded = [], []
    run(as_new_leaves(inputs), path, gradients)  # a planned call allocates less from then on
    for _ in range(2):
        with Results() as results:
            # new leaves: `backward` would add to existing gradients
            run(as_new_leaves(inputs), path, gradients)
        found.append(results.found)
        loaded.append(len(stub.loaded))
    assert found[0] == found[1]
    assert any("empty" in name for name, _ in found[0])
    assert loaded[0] == loaded[1] > 0


def as_new_leaves(inputs: Inputs) -> Inputs:
    """Leaves on the same memory, without gradients."""
    return arranged(inputs, lambda tensor: tensor)


class WithoutCUDA(TorchFunctionMode):
    """Rewrites calls that a CPU build of torch refuses for fake GPU tensors.

    It can neither index them in Python nor copy a result to `out`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = {name: value for name, value in (kwargs or {}).items() if name != "out"}
        if func is not Tensor.__getitem__:
            return func(*args, **options)
        tensor, index = args
        if isinstance(index, int):
            return tensor.select(0, index)
        return torch.ops.aten.slice(tensor, 0, index.start, index.stop)


@pytest.fixture
def current(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> StubDriver:
    """Fake GPU tensors can be created, and the stub knows the current device."""
    use_fake_gpus(stub, monkeypatch)
    return stub


def assert_on_the_tensors_device(launches: list[Launched], device: str) -> None:
    for launched in launches:
        tensors = [value for value in launched.arguments if isinstance(value, Tensor)]
        assert {launched.device} == {str(tensor.device) for tensor in tensors} == {device}


@compiler
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@directions
def test_the_device_of_the_tensors_is_current_at_every_launch(
    current: StubDriver, path: paths.Path, gradients: bool
) -> None:
    """Tensors that wrappers allocate are on that device, too."""
    with torch.no_grad(), FakeTensorMode(), WithoutCUDA(), current.recorded() as launches:
        x, h, weights, m = inputs_of(host.PROBLEM, torch.bfloat16, False, "cuda:1")
        if gradients:  # by hand, because autograd queries the device
            saved: list[Tensor] = []
            context: Any = SimpleNamespace(save_for_backward=lambda *t: saved.extend(t))
            context.saved_tensors, context.needs_input_grad = saved, (True,) * 14 + (False,) * 6
            steps = paths.GEMM_STEPS if path == "gemm" else paths.FUSED_STEPS
            tensors = (*weights, *m[:-1], *[None] * 6)
            context.set_materialize_grads = lambda value: None
            y, _ = ModulatedMLPFunction.forward(context, x, h, *tensors, m[-1], "silu", True, steps)
            ModulatedMLPFunction.backward(context, y, None)
        else:
            paths.modulated_mlp(x, h, weights, m, path=path)
    assert Counter(kernel_name(one.kernel) for one in launches) == LAUNCHES[path, gradients]
    assert_on_the_tensors_device(launches, "cuda:1")


@compiler
def test_another_device_at_a_launch_is_seen(
    current: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with FakeTensorMode(), current.recorded() as launches:
        x = torch.empty(16, 16, device="cuda:1")
        swiglu.swiglu_fwd(x, x)
    with pytest.raises(AssertionError):
        assert_on_the_tensors_device(launches, "cuda:1")


@compiler
def test_the_whole_call_takes_triton_for_tensors_on_a_gpu(
    current: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "supports", SUPPORTS)  # the original, not the stub's version
    with torch.no_grad(), FakeTensorMode(), WithoutCUDA(), current.recorded() as launches:
        x, h, weights, m = inputs_of(host.PROBLEM, torch.bfloat16, False, "cuda:1")
        y = whole_call(x, h, weights.gate, weights.up, weights.down, m)
    assert Counter(kernel_name(one.kernel) for one in launches) == LAUNCHES["decode", False]
    assert_on_the_tensors_device(launches, "cuda:1")
    assert (y.device, y.dtype) == (torch.device("cuda", 1), torch.bfloat16)


@compiler
def test_what_is_measured(stub: StubDriver) -> None:
    rows = host.measure(rounds=2, number=1)
    kernels = {
        (path, "forward + backward" if gradients else "forward"): counts
        for (path, gradients), counts in LAUNCHES.items()
    }
    for what, path in (("forward", "decode"), ("forward + backward", "gemm")):
        for factors in ("float32", "bfloat16"):
            kernels[f"layer, factors {factors}", what] = kernels[path, what]
        for name in ("base MLP", "factored", "reference"):
            kernels[name, what] = {}
    assert {(row["path"], row["what"]) for row in rows} == set(kernels)
    for row in rows:
        counts = kernels[row["path"], row["what"]]
        assert row["launches"] == sum(counts.values())
        listed = row["kernels"].split(", ") if row["kernels"] else []
        assert sorted(listed) == sorted(f"{count} {name}" for name, count in counts.items())
        assert 0 < row["p20"] <= row["us"] <= row["p80"]
        parts = row["triton us"] + row["torch us"] + row["rest us"]
        assert parts == pytest.approx(row["us"], abs=0.3)  # each of them is rounded
    operations = {(row["path"], row["what"]): row["torch ops"] for row in rows}
    # three linear maps, their transposed weights, silu, and a product
    assert operations["base MLP", "forward"] == 8
    # no factor is cast; backward widens both operands of each of six gradients, on a CPU
    for what in ("forward", "forward + backward"):
        wide, same = (operations[f"layer, factors {d}", what] for d in ("float32", "bfloat16"))
        assert wide - same == (0 if what == "forward" else 12)


@compiler
def test_launches_of_a_decoded_token(stub: StubDriver) -> None:
    model = converted(layers=(1, 2))
    assert counts_of_token(model).launches == 2 * sum(LAUNCHES["decode", False].values())


@compiler
def test_a_launch_too_many_is_seen(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(host.PROBLEM, torch.bfloat16, False)
    right = decode._sum_of_partials

    def twice(*arguments: Any) -> Tensor:
        right(*arguments)
        return right(*arguments)

    monkeypatch.setattr(decode, "_sum_of_partials", twice)
    with pytest.raises(AssertionError):
        assert_as_stated_and_on_record(stub, inputs, "decode", False)


@compiler
def test_another_argument_than_on_record_is_seen(
    stub: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel whose launch depends on data is reported."""

    def other(kernel: Any, grid: Any, u: Tensor, *arguments: Any, **options: Any) -> None:
        u = u if u.is_meta else u.contiguous()
        launch(kernel, grid, u, *arguments, **options)

    inputs = inputs_of(host.PROBLEM, torch.bfloat16, False)
    assert_as_stated_and_on_record(stub, inputs, "gemm", False)
    monkeypatch.setattr(coefficients, "launch", other)
    with pytest.raises(AssertionError):
        assert_as_stated_and_on_record(stub, inputs, "gemm", False)


@compiler
def test_misfits_are_seen(stub: StubDriver) -> None:
    x = torch.empty(16, 16)
    with stub.recorded() as launches:
        swiglu.swiglu_fwd(x, x)
    (right,) = launches
    signature = list(right.source.signature)
    assert misfits(right) == []
    for name, wrong in {
        "gate_ptr": x.bfloat16(),  # of another type
        "up_ptr": torch.empty(17)[1:],  # not aligned
        "inner_ptr": 4096,  # a number
        "T": 17,  # not a multiple of 16
        "F": 2**31,  # too large
        "BLOCK_F": 8,  # another constant
    }.items():
        index = signature.index(name)
        arguments = (*right.arguments[:index], wrong, *right.arguments[index + 1 :])
        (found,) = misfits(right._replace(arguments=arguments))
        assert found.startswith(f"{name}: ")


@compiler
@pytest.mark.parametrize(
    ("target", "code"), [("sm_80", "cubin"), ("sm_120", "cubin"), ("gfx942", "hsaco")]
)
def test_the_stub_leaves_nothing_behind(target: str, code: str) -> None:
    """Afterwards neither the stub nor its kernels remain, even after an error."""
    kernel = swiglu._swiglu_fwd_kernel
    before, devices = drivers._active, set(kernel.device_caches)
    x = torch.empty(16, 16)
    with pytest.raises(KeyError), stub_driver(target) as driver:
        swiglu.swiglu_fwd(x, x)
        # a reference to a compiled kernel would keep it alive after the stub
        assert [code in one.asm for one in kernel.device_caches[driver.device][0].values()] == [
            True
        ]
        assert str(driver.target) == target
        raise KeyError
    assert drivers._active is before
    assert set(kernel.device_caches) == devices


@compiler
def test_no_such_gpu() -> None:
    with pytest.raises(ValueError, match="arch must be like sm_90 or gfx942"), stub_driver("h100"):
        pass
