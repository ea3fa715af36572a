"""Check the values of a case's providers against float64, within an error budget.

``python -m npt_fast.benchmarks.kernel_checks [op ...]`` checks every Triton provider on two small
problems, one of them of odd sizes. It is short so that compute-sanitizer can run it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from npt_fast.benchmarks.device import INTERPRETED, peak_bytes
from npt_fast.benchmarks.kernel_cases import OPS, OURS, Case, Compute, Inputs, cases
from npt_fast.benchmarks.workloads import ODD, TINY
from npt_fast.testing import assert_within_budget, longest_sum


def tensors(values: Any) -> list[Tensor]:
    """All tensors in nested inputs or outputs."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def copied(inputs: Inputs) -> Inputs:
    """Copies of all tensors; those that require gradients still do."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    copies: Inputs = tree_map_only(Tensor, copy, inputs)
    return copies


class Prepared:
    """A case with its inputs and the expected results."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        torch.compiler.reset()  # it gives up on a function after several shapes
        self.case = case
        self.inputs = case.inputs()
        self._exact: dict[Compute, tuple[list[Tensor], int]] = {}
        self._eager: dict[Compute, list[Tensor]] = {}

    def exact(self, name: str) -> tuple[list[Tensor], int]:
        """Expected results of a provider in float64, and FLOPs of the matrix products."""
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
        """Results of plain torch in the case's dtype, whose error sets the provider's budget."""
        budget = self.case.providers[name].budget or self._truth(name)
        if budget not in self._eager:
            self._eager[budget] = tensors(budget(*self.inputs))
        return self._eager[budget]

    def _truth(self, name: str) -> Compute:
        return self.case.providers[name].truth or self.case.providers[self.case.baseline].run

    def forget(self) -> None:
        """Free the expected results."""
        self._exact.clear()
        self._eager.clear()

    def bytes_moved(self, name: str) -> int:
        """Bytes of inputs and outputs, each counted once; no provider can move less."""
        unread = self.case.providers[name].unread
        read = [value for index, value in enumerate(self.inputs) if index not in unread]
        return sum(tensor.nbytes for tensor in tensors(read) + self.eager(name))

    def check(self, name: str) -> int:
        """Compare a provider's values with the truth.

        Returns:
            Peak bytes that the provider allocates.

        Raises:
            AssertionError: a value is over its error budget.
        """
        provider = self.case.providers[name]
        exact, _ = self.exact(name)
        inputs = copied(self.inputs) if provider.overwrites else self.inputs
        if not INTERPRETED:  # compiles, and lets libraries allocate their workspaces
            provider.run(*copied(inputs))
        actual: list[Tensor] = []
        peak = peak_bytes(lambda: actual.extend(tensors(provider.run(*inputs))))
        if len(actual) != len(exact):
            raise AssertionError(f"{len(actual)} results, not {len(exact)}")
        for index, values in enumerate(zip(actual, exact, self.eager(name), strict=True)):
            assert_within_budget(*values, f"result {index}", terms=longest_sum(inputs))
        return peak


def main(ops: Sequence[str]) -> None:
    """Check every Triton provider on the small problems."""
    for case in (case for shapes in (TINY, ODD) for op in ops for case in cases(op, shapes)):
        prepared = Prepared(case)
        for name in case.providers:
            if name in OURS:
                prepared.check(name)
                print(f"{case}, {name}: right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or OPS)
