"""Launches of kernels: their device and precision, and their record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from npt_fast.kernels import decode, modulated_linear, probe
from npt_fast.kernels._launch import (
    Target,
    contiguous_rows,
    dot_precision,
    launch,
    recorded_launches,
)
from npt_fast.kernels.coefficients import coefficient_outputs
from npt_fast.kernels.modulated_mlp import Path, modulated_mlp
from npt_fast.testing import Problem, make_inputs


class Kernel:
    """A kernel that records its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


def test_new_memory_is_nan() -> None:
    """The NaN fixture works for every way to allocate memory."""
    some = torch.ones(1, 2, 3)
    made = [
        torch.empty(3),
        torch.empty_like(some),
        some.new_empty(3),
        torch.empty_strided((3,), (2,)),
    ]
    for tensor in (*made, *coefficient_outputs(some, 1, torch.float16)):
        assert tensor.isnan().all()


def test_the_device_of_the_tensors_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be on several devices, as with device_map="auto"."""
    current: list[torch.device] = []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.clear()

    class Asserting(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert current == [torch.device("cuda", 1)]
            return super().__getitem__(grid)

    monkeypatch.setattr(torch.cuda, "device", guard)
    kernel = Asserting()
    launch(kernel, (1,), SimpleNamespace(device=torch.device("cuda", 1)), warps=4)
    assert len(kernel.launches) == 1 and not current


def test_options_are_said() -> None:
    """Launch options are explicit; the default of fp fusion changes in Triton 3.10."""
    kernel, tensor = Kernel(), torch.ones(1)
    launch(kernel, (2, 3), tensor, 7, warps=8, stages=3, BLOCK=16)
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True, "BLOCK": 16}
    assert kernel.launches == [((2, 3), (tensor, 7), options)]


def test_an_empty_grid_is_not_launched() -> None:
    kernel = Kernel()
    launch(kernel, (2, 0), torch.ones(1), warps=4)
    assert not kernel.launches


@pytest.fixture
def tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    """Torch allows TF32, by one of the ways to say so."""
    where, name, value = request.param
    if callable(where):
        where(value)
    else:
        setattr(where, name, value)
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    "tf32",
    [
        pytest.param((torch.backends.cuda.matmul, "allow_tf32", True), id="allow_tf32"),
        pytest.param((torch.backends.cuda.matmul, "fp32_precision", "tf32"), id="of-matmul"),
        pytest.param((torch.backends, "fp32_precision", "tf32"), id="of-all"),
        pytest.param((torch.set_float32_matmul_precision, None, "high"), id="high"),
    ],
    indirect=True,
)
def test_tf32_as_torch_is_told(tf32: None) -> None:
    assert dot_precision(torch.float32) == "tf32"
    assert dot_precision(torch.float16) == dot_precision(torch.bfloat16) == "ieee"


def test_no_tf32_unless_torch_is_told() -> None:
    assert dot_precision(torch.float32) == "ieee"


@pytest.mark.parametrize("path", ["gemm", "fused", "decode"])
def test_every_product_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decode, modulated_linear, probe):
        monkeypatch.setattr(module, "dot_precision", "as told for {}".format)
    inputs = make_inputs(
        Problem(), dtype=torch.float32, device="meta", requires_grad=path != "decode"
    )
    with recorded_launches(Target("cuda", 90)) as launches:
        y = modulated_mlp(*inputs, path=path)
        if path != "decode":
            y.sum().backward()
    passed = [a["PRECISION"] for _, _, a, _ in launches if "PRECISION" in a]
    # fused: probe, gate and up, probe, sum; backward: of inner, of h. decode: see its docstring
    assert passed == ["as told for torch.float32"] * {"gemm": 0, "fused": 6, "decode": 4}[path]


def test_launches_on_record() -> None:
    """Launches are recorded in order and not run; after the context they run again."""
    x, h, weights, factors = make_inputs(Problem(), device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), recorded_launches(Target("cuda", 90)) as launches:
        modulated_mlp(x, h, weights, factors)
    names = [launch.kernel.__name__ for launch in launches]
    products = "_decode_products_kernel"
    assert names == [
        products, "_decode_inner_kernel", products, "_decode_low_rank_kernel", "_decode_sum_kernel"
    ]  # fmt: skip
    assert launches[0].arguments["x_ptr"] is x
    assert launches[0].arguments["M"] == 7
    kernel = Kernel()
    launch(kernel, (1,), torch.ones(1), warps=4)
    assert kernel.launches and len(launches) == 5


@pytest.mark.parametrize(
    ("name", "target", "shared"),
    [
        ("sm_80", Target("cuda", 80), 166_912),
        ("sm_89", Target("cuda", 89), 101_376),
        ("sm_90", Target("cuda", 90), 232_448),
        ("sm_121", Target("cuda", 121), 101_376),
        ("gfx942", Target("hip", "gfx942"), 65_536),
    ],
)
def test_targets(name: str, target: Target, shared: int) -> None:
    assert Target.parse(name) == target
    assert str(target) == name
    assert target.shared_bytes == shared


@pytest.mark.parametrize("name", ["90", "sm_", "sm_9x", "cuda"])
def test_no_such_target(name: str) -> None:
    with pytest.raises(ValueError, match=f"arch must be like sm_90 or gfx942, got '{name}'"):
        Target.parse(name)


def test_rows_are_copied_only_where_they_are_not_contiguous() -> None:
    tensor = torch.ones(4, 6)
    assert contiguous_rows(tensor[:, 1:4]).data_ptr() == tensor[:, 1:4].data_ptr()
    assert contiguous_rows(tensor.t()).is_contiguous()
