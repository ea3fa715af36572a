"""A CPU whose GEMMs return float32 sums of 16-bit matrices, as those of CUDA do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from npt_fast.kernels import products, weight_gradients


@contextmanager
def float32_sums() -> Iterator[None]:
    """Give torch's CPU the overloads that it lacks, and let the library find them."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", _mm, "CPU")
    library.impl("addmm.dtype_out", _addmm_out, "CPU")
    library.impl("bmm.dtype", _mm, "CPU")
    devices = products.SUMS_IN_FLOAT32 | {"cpu"}
    try:
        with ExitStack() as stack:
            for module in (products, weight_gradients):
                stack.enter_context(mock.patch.object(module, "SUMS_IN_FLOAT32", devices))
            yield
    finally:
        library._destroy()


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.to(out_dtype) @ b.to(out_dtype)


def _addmm_out(y: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert out.dtype == out_dtype == y.dtype and a.dtype == b.dtype != out_dtype
    return torch.addmm(y, a.to(out_dtype), b.to(out_dtype), out=out)


class Additions(TorchDispatchMode):
    """Counts the products that are added to a gradient, and the gradients that autograd adds."""

    def __init__(self) -> None:
        super().__init__()
        self.by_gemm, self.by_autograd = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.by_gemm += func is torch.ops.npt_fast.add_product.default
        self.by_autograd += func is torch.ops.aten.add_.Tensor
        return func(*args, **kwargs or {})
