"""The modulated MLP with kernels: forward, backward, prefill, and the choice of path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from npt_fast.kernels import factored
from npt_fast.kernels import modulated_mlp as kernels
from npt_fast.kernels._launch import Target, Tiles, recorded_launches
from npt_fast.kernels._tuning import forced_tiles
from npt_fast.kernels.factored import MLPWeights
from npt_fast.kernels.swiglu import ACTIVATIONS
from npt_fast.testing import Problem, assert_within_budget, longest_sum, make_inputs, named_tensors
from tests.kernels.cases import (
    DTYPES,
    Inputs,
    PackedProducts,
    arranged,
    assert_mlp_within_budget,
    cast,
    constant,
    dtypes,
    expanded,
    gradients,
    inputs_of,
    output_gradient,
    padded,
    reference_mlp,
    results,
    transposed,
    unchanged,
)

RAGGED = Problem(tokens=37, hidden=33, intermediate=43, num_ranks=3, rank=3, bias=True)
paths = pytest.mark.parametrize("path", ["gemm", "fused"])


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Small tiles, so that small problems have several."""
    with forced_tiles(Tiles(32, 32, 32, 4, 2)):
        yield


def kernel_mlp(path: kernels.Path, **options: Any) -> Callable[[Inputs], Tensor]:
    return lambda inputs: kernels.modulated_mlp(*inputs, path=path, **options)


@paths
@pytest.mark.parametrize(
    ("projections", "num_ranks", "rank"),
    [
        # all pairs of numbers, and all three at k=3, which ttsem runs
        pytest.param(c, k, r, marks=[pytest.mark.ttsem] if k == 3 else [], id=f"c{c}-k{k}-r{r}")
        for k, shift in ((1, 0), (3, None), (8, 1))
        for c in (1, 2, 3)
        for place, r in enumerate((3, 16, 64))
        if shift is None or place == (c + shift) % 3
    ],
)
def test_every_gradient(path: kernels.Path, projections: int, num_ranks: int, rank: int) -> None:
    problem = Problem(
        tokens=19,
        hidden=33,
        intermediate=43,
        num_ranks=num_ranks,
        rank=rank,
        projections=projections,
    )
    inputs = inputs_of(problem, DTYPES[0])
    dy = output_gradient(inputs)
    found = results(kernel_mlp(path), inputs, dy)
    assert_mlp_within_budget(found, inputs, dy, eager=lambda i: factored.modulated_mlp(*i))


@pytest.mark.ttsem
@dtypes
@paths
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(Problem(tokens=1, hidden=33, intermediate=43, num_ranks=8), id="T1"),
        pytest.param(RAGGED, id="T37-bias"),
        pytest.param(Problem(tokens=63, hidden=32, intermediate=64, rank=16), id="T63"),
    ],
)
def test_dtypes(path: kernels.Path, dtype: torch.dtype, problem: Problem) -> None:
    inputs = inputs_of(problem, dtype)
    dy = output_gradient(inputs)
    assert_mlp_within_budget(results(kernel_mlp(path), inputs, dy), inputs, dy)


@paths
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations(path: kernels.Path, activation: str) -> None:
    inputs = inputs_of(RAGGED, DTYPES[-1])
    dy = output_gradient(inputs)
    for save_probe in (True, False):
        function = kernel_mlp(path, activation=activation, save_probe=save_probe)
        found = results(function, inputs, dy)
        assert_mlp_within_budget(found, inputs, dy, activation=activation)


@pytest.mark.parametrize("path", get_args(kernels.Path))
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(Problem(hidden=32, intermediate=48), id="aligned"),
        pytest.param(RAGGED, marks=pytest.mark.ttsem, id="ragged"),  # not even up's first row is
    ],
)
def test_gate_and_up_of_one_matrix(path: kernels.Path, problem: Problem) -> None:
    """Some models have them as rows of one matrix, which kernels read in place."""
    x, h, weights, factors = inputs_of(problem, DTYPES[0], requires_grad=False)
    parts = weights._asdict()
    for names in (("gate", "up"), ("gate_bias", "up_bias")):
        if parts[names[0]] is not None:
            views = torch.cat([parts[name] for name in names]).chunk(2)
            parts |= zip(names, views, strict=True)
    y = kernel_mlp(path)((x, h, MLPWeights(**parts), factors))
    assert torch.equal(y, kernel_mlp(path)((x, h, weights, factors)))


@paths
@pytest.mark.parametrize("projections", [1, 2, 3], ids=["single", "dual", "triple"])
def test_probes_computed_again(path: kernels.Path, projections: int) -> None:
    problem = Problem(tokens=37, projections=projections, bias=True)
    inputs = inputs_of(problem, DTYPES[0])
    dy = output_gradient(inputs)
    found = results(kernel_mlp(path, save_probe=False), inputs, dy)
    assert_mlp_within_budget(found, inputs, dy)


def test_a_rank_that_no_tile_holds() -> None:
    """The fused path uses torch's GEMM for probes of such a rank."""
    inputs = inputs_of(Problem(tokens=5, num_ranks=2, rank=130), DTYPES[0])
    dy = output_gradient(inputs)
    assert_mlp_within_budget(results(kernel_mlp("fused"), inputs, dy), inputs, dy)


@pytest.mark.ttsem
@paths
@pytest.mark.parametrize("layout", [padded, transposed, expanded, constant])
def test_gradients_of_any_strides(path: kernels.Path, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = inputs_of(RAGGED, DTYPES[0])
    dy = layout(output_gradient(inputs))
    with PackedProducts():
        assert_mlp_within_budget(results(kernel_mlp(path), inputs, dy), inputs, dy)


@paths
@pytest.mark.parametrize("layout", [padded, transposed])
def test_inputs_of_any_strides(path: kernels.Path, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = arranged(inputs_of(RAGGED, DTYPES[0]), layout)
    dy = output_gradient(inputs)
    assert_mlp_within_budget(results(kernel_mlp(path), inputs, dy), inputs, dy)


@paths
def test_no_tokens(path: kernels.Path) -> None:
    inputs = inputs_of(Problem(tokens=0, bias=True), DTYPES[0])
    y = kernel_mlp(path)(inputs)
    assert y.shape == (0, 24)
    for name, gradient in gradients(inputs, y, y.detach()).items():
        assert not gradient.any(), name


@pytest.mark.ttsem
@paths
@pytest.mark.parametrize("save_probe", [True, False], ids=["saved", "recomputed"])
def test_backward_twice(path: kernels.Path, save_probe: bool) -> None:
    """Backward overwrites neither its own saved tensors nor those of other operations."""
    leaf_inputs = inputs_of(RAGGED, DTYPES[0])
    x, h, *weights = leaf_inputs
    saved_by_exp = h.exp()
    inputs = (x, saved_by_exp, *weights)
    dy = output_gradient(inputs)
    with unchanged(dy, *named_tensors(*inputs).values()):
        y = kernel_mlp(path, save_probe=save_probe)(inputs)
        first, second = (gradients(leaf_inputs, y, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = kernel_mlp(path, save_probe=save_probe)(inputs)
    assert torch.equal(again, y)


@paths
@pytest.mark.parametrize(
    "trained",
    [
        pytest.param({"w_down", "w_a_in", "w_a_mid", "w_b_gate", "w_b_up", "w_b_down"}, id="npt"),
        pytest.param({"x"}, id="attention"),
        pytest.param({"h", "gate"}, id="h-and-gate"),
        pytest.param({"w_b_down"}, id="one-factor"),
        pytest.param({"up_bias", "down"}, id="bias-and-down"),
    ],
)
def test_only_what_is_trained_gets_gradients(path: kernels.Path, trained: set[str]) -> None:
    inputs = inputs_of(RAGGED, DTYPES[0])
    function, dy = kernel_mlp(path), output_gradient(inputs)
    wanted = gradients(inputs, function(inputs), dy)
    for name, tensor in named_tensors(*inputs).items():
        tensor.requires_grad_(name in trained)
    function(inputs).backward(dy)
    for name, tensor in named_tensors(*inputs).items():
        assert (tensor.grad is not None) == (name in trained), name
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, wanted[name]), name


@pytest.mark.ttsem
@paths
def test_prefill(path: kernels.Path) -> None:
    """Without gradients buffers are reused, nothing is saved, and the result is the same."""
    inputs = inputs_of(RAGGED, DTYPES[0])
    expected = kernel_mlp(path)(inputs)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept)
    with torch.no_grad(), hooks, unchanged(*named_tensors(*inputs).values()):
        y = kernel_mlp(path)(inputs)
    assert torch.equal(y, expected.detach())
    assert not y.requires_grad and not kept


@paths
@pytest.mark.parametrize("chunk", [16, 36, 37])
def test_prefill_in_turn(path: kernels.Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    inputs = inputs_of(RAGGED, DTYPES[0], requires_grad=False)
    y = kernel_mlp(path, activation="gelu")(inputs)
    exact, low = (reference_mlp(i, "gelu") for i in (cast(inputs, torch.float64), inputs))
    assert_within_budget(y, exact, low, terms=longest_sum(inputs))


def test_buffers_of_prefill() -> None:
    """gemm writes z over p and inner over gate; fused writes neither p, gate nor up."""
    inputs = make_inputs(RAGGED, dtype=torch.float16, device="meta", requires_grad=False)
    with recorded_launches(Target("cuda", 90)) as launches:
        kernel_mlp("gemm")(inputs)
    coefficients, swiglu, _ = (launch.arguments for launch in launches)
    assert coefficients["z_ptr"] is coefficients["p_ptr"]
    assert swiglu["inner_ptr"] is swiglu["gate_ptr"]
    with recorded_launches(Target("cuda", 90)) as launches:
        kernel_mlp("fused")(inputs)
    probe, gate_up, *_ = (launch.arguments for launch in launches)
    assert probe["p_ptr"] is None
    assert gate_up["gate_ptr"] is None and gate_up["up_ptr"] is None


@pytest.mark.parametrize(
    ("arch", "tokens", "rank", "gradients", "path"),
    [
        ("sm_90", 1, 64, False, "decode"),
        ("sm_120", 64, 64, False, "decode"),
        ("gfx942", 64, 8192, False, "decode"),
        ("sm_75", 1, 64, False, "gemm"),
        ("sm_75", 8192, 64, True, "gemm"),
        ("sm_90", 65, 64, False, "gemm"),
        ("sm_90", 1, 64, True, "gemm"),
        ("sm_80", 8192, 64, True, "gemm"),
        ("sm_100", 8192, 64, True, "gemm"),
        ("gfx942", 8192, 64, True, "gemm"),
        ("sm_86", 8192, 64, True, "fused"),
        ("sm_89", 8192, 256, True, "fused"),
        ("sm_120", 65, 256, False, "fused"),
        ("sm_121", 8192, 16, True, "fused"),
        ("sm_120", 8192, 257, True, "gemm"),
    ],
)
def test_the_path_by_default(
    arch: str, tokens: int, rank: int, gradients: bool, path: kernels.Path
) -> None:
    target = Target.parse(arch)
    assert kernels.choose_path(target, tokens, rank, gradients=gradients) == path


@pytest.mark.parametrize(
    ("tokens", "requires_grad", "path", "message"),
    [
        pytest.param(5, False, "fast", "path must be gemm, fused or decode", id="no-such-path"),
        pytest.param(5, True, "decode", "decode takes 64 tokens at most", id="gradients"),
        pytest.param(65, False, "decode", "decode takes 64 tokens at most", id="many-tokens"),
    ],
)
def test_what_a_path_cannot_do(tokens: int, requires_grad: bool, path: Any, message: str) -> None:
    inputs = inputs_of(Problem(tokens=tokens), DTYPES[0], requires_grad=requires_grad)
    with pytest.raises(ValueError, match=message):
        kernel_mlp(path)(inputs)
