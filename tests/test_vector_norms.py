"""Norms of vectors that are never formed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npt_fast.functional import vector_norms
from npt_fast.kernels.factored import Factors
from npt_fast.testing import Problem, make_inputs
from tests.checkpoints import PROJECTIONS


def formed_vectors(x: Tensor, factors: Factors) -> tuple[list[Tensor], list[Tensor]]:
    """v_a and v_b of gate, up and down, each ``(..., k, width)`` (design.md#definition)."""
    k = factors.num_ranks
    writes = [w for w in (factors.w_b_gate, factors.w_b_up, factors.w_b_down) if w is not None]
    size = writes[0].shape[0]
    r = size // k
    reads = [factors.w_a_in[:size], factors.w_a_in[size:], factors.w_a_mid]
    reads = [w for w in reads if w is not None and len(w)]

    def vectors(heads: list[Tensor]) -> list[Tensor]:
        found = []
        for index, head in enumerate(heads):
            components = []
            for at in range(0, size, r):
                z = x @ factors.w_down[:, index * size + at : index * size + at + r]
                components.append(z @ head[at : at + r])
            found.append(torch.stack(components, -2))
        return found

    return vectors(reads), vectors(writes)


def inputs_of(modulation: str, **sizes: int) -> tuple[Tensor, Factors]:
    """Random attention outputs and factors of a modulation type, in float64."""
    plain = modulation == "plain"  # as triple, without the gate
    projections = 3 if plain else len(PROJECTIONS[modulation])
    x, _, _, factors = make_inputs(Problem(projections=projections, **sizes))
    if not plain:
        return x, factors
    size = len(factors.w_a_in) // 2
    parts = {"w_down": factors.w_down[:, size:], "w_a_in": factors.w_a_in[size:]}
    leaves = {name: part.detach().clone().requires_grad_() for name, part in parts.items()}
    return x, factors._replace(**leaves, w_b_gate=None)


@pytest.mark.parametrize("modulation", PROJECTIONS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_norms_of_vectors_that_are_not_formed(modulation: str, num_ranks: int) -> None:
    x, factors = inputs_of(modulation, num_ranks=num_ranks)
    projections = len(PROJECTIONS[modulation])
    x = x.detach().view(7, 1, -1).expand(7, 2, -1).clone().requires_grad_()  # leading dimensions
    found = vector_norms(x, factors)
    v_a, v_b = formed_vectors(x, factors)
    assert len(v_a) == len(v_b) == projections
    for squares, vectors in ((found.v_a, v_a), (found.v_b, v_b)):
        expected = torch.stack([v.square().sum(-1) for v in vectors], -2)
        assert squares.shape == (7, 2, projections, num_ranks)
        torch.testing.assert_close(squares, expected, rtol=1e-12, atol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(v_a[0], x.unsqueeze(-2), dim=-1).mean(-1)
    torch.testing.assert_close(found.similarity, cosine, rtol=1e-10, atol=1e-12)
    # mean over components and entries of each vector, summed over vectors (design.md#losses)
    mean_square = sum((v.square().mean((-1, -2)) for v in (*v_a, *v_b)), torch.zeros(()))
    torch.testing.assert_close(found.mean_square, mean_square, rtol=1e-12, atol=1e-12)
    leaf_tensors = [x, *(t for t in factors if isinstance(t, Tensor))]
    wanted = torch.autograd.grad(mean_square.sum(), leaf_tensors)
    for gradient, expected in zip(
        torch.autograd.grad(found.mean_square.sum(), leaf_tensors), wanted, strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_norms_are_measured_in_float32_at_least() -> None:
    """Squares of small numbers would underflow in the dtype of an attention output."""
    x, _, _, factors = make_inputs(Problem(num_ranks=3), dtype=torch.float32)
    low = (x * 1e-2).to(torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vector_norms(low, factors)
    assert all(value.dtype == torch.float32 for value in found)
    exact = Factors(*(t.double() if isinstance(t, Tensor) else t for t in factors))
    v_a, _ = formed_vectors(low.double(), exact)
    expected = torch.stack([v.square().sum(-1) for v in v_a], -2)
    torch.testing.assert_close(found.v_a.double(), expected, rtol=1e-4, atol=1e-12)


def test_no_vectors_have_no_norm_and_no_direction() -> None:
    """With W_b zero, norms and similarity are 0, not NaN."""
    x, _, _, factors = make_inputs(Problem(), dtype=torch.float32)
    zero = Factors(*(t * 0 if isinstance(t, Tensor) else t for t in factors))
    assert all(not value.any() for value in vector_norms(x, zero))
