"""Bytes that a modulated MLP saves for backward, counted and by formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from npt_fast.kernels.factored import Factors, MLPWeights
from npt_fast.testing import Problem

Inputs = tuple[Tensor, Tensor, MLPWeights, Factors]


@dataclass(frozen=True, slots=True)
class Form:
    """A way to compute the modulated MLP, as options of `modulated_mlp`."""

    name: str
    impl: str
    save_probe: bool = True


FACTORED = Form("factored", "factored")
REFERENCE = Form("reference", "reference")
FORMS = (FACTORED, Form("factored, save_probe=False", "factored", save_probe=False), REFERENCE)


def kept_bytes(inputs: Inputs, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves for backward: x, h and intermediate results, but no weights.

    Every storage counts once and as a whole, because a view keeps all of it alive.
    """
    _, _, weights, factors = inputs
    parameters = {
        t.untyped_storage().data_ptr() for t in (*weights, *factors) if isinstance(t, Tensor)
    }
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address repeats

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    # hooks see what autograd really saves, on a CPU too; an allocator's numbers need a GPU
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages.values())


def formula_bytes(problem: Problem, form: Form, dtype: torch.dtype) -> int:
    """Bytes that triple modulation saves for backward (design.md#saved-activations).

    Per token, both forms save x and h (2 D elements) and u (3 R). The factored form adds the
    probes if saved (3 R), gate and up before the activation (2 F), and 3 k coefficients of 4 bytes.
    The reference adds what autograd saves of the MLP (4 F: gate, its activation, up and their
    product), v_a and v_b of every component and projection (3 k (D + F)), and 3 k coefficients.
    """
    d, f, k = problem.hidden, problem.intermediate, problem.num_ranks
    r = k * problem.rank
    if form is REFERENCE:
        per_token = dtype.itemsize * (2 * d + 3 * r + 4 * f + 3 * k * (d + f) + 3 * k)
    else:
        per_token = dtype.itemsize * (2 * d + (6 if form.save_probe else 3) * r + 2 * f) + 12 * k
    return problem.tokens * per_token
