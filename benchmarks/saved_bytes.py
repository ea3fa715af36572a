"""What a modulated MLP keeps between forward and backward: counted, and by formula."""

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
    """A way to compute the modulated MLP, by the options of `modulated_mlp`."""

    name: str
    impl: str
    save_probe: bool = True


FACTORED = Form("factored", "factored")
REFERENCE = Form("reference", "reference")
FORMS = (FACTORED, Form("factored, save_probe=False", "factored", save_probe=False), REFERENCE)


def kept_bytes(inputs: Inputs, forward: Callable[[], Tensor]) -> int:
    """What autograd keeps for backward: x, h and all in between, not the weights.

    Every storage counts once and as a whole, since a view keeps all of it.
    """
    _, _, weights, factors = inputs
    parameters = {
        t.untyped_storage().data_ptr() for t in (*weights, *factors) if isinstance(t, Tensor)
    }
    storages: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages.values())


def formula_bytes(problem: Problem, form: Form, dtype: torch.dtype) -> int:
    """What a triple keeps for backward (design.md#saved-activations), in bytes.

    Both forms keep x and h, 2 D elements per token, and u, 3 R. The factored form adds the probes,
    3 R if saved, gate and up before the activation, 2 F, and 3 k coefficients of 4 bytes. The
    reference adds what plain autograd keeps of the MLP, 4 F (gate, its activation, up, their
    product), v_a and v_b of every component and projection, 3 k (D + F), and 3 k coefficients;
    it forms neither probes nor z.
    """
    d, f, k = problem.hidden, problem.intermediate, problem.num_ranks
    r = k * problem.rank
    if form is REFERENCE:
        per_token = dtype.itemsize * (2 * d + 3 * r + 4 * f + 3 * k * (d + f) + 3 * k)
    else:
        per_token = dtype.itemsize * (2 * d + (6 if form.save_probe else 3) * r + 2 * f) + 12 * k
    return problem.tokens * per_token
