"""Counts of one decoded token of a model: casts of factors, operations of torch, launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from npt_fast.hf.convert import components
from npt_fast.testing import Operations, ParameterCasts, implementation


class Counts(NamedTuple):
    """Counts of one decoded token.

    Attributes:
        casts: casts of factors of NP layers to another dtype.
        cast_bytes: bytes that these casts read and write.
        operations: operations that reach torch's dispatcher, views included.
        launches: launches of our Triton kernels; None if they were not counted.
    """

    casts: int
    cast_bytes: int
    operations: int
    launches: int | None


def counts_of_token(model: Any, *, launches: bool = True) -> Counts:
    """Counts of the second token that a model decodes; the first one prepares what is kept.

    Args:
        model: causal language model on a CPU.
        launches: whether to count launches as well, which compiles the kernels for sm_90. Values
            of that pass are meaningless.
    """
    found = _counts(model)
    if not launches:
        return found
    from npt_fast.benchmarks.stub_driver import stub_driver  # needs Triton

    with stub_driver() as driver, implementation("decode"):
        step = _decoding(model)
        with driver.recorded() as recorded:
            step()
    return found._replace(launches=len(recorded))


def _decoding(model: Any) -> Any:
    """A function that decodes one token after a prompt and a first token."""
    with torch.no_grad():
        ids = torch.arange(1, 9).unsqueeze(0)
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    return torch.no_grad()(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True))


def _counts(model: Any) -> Counts:
    step = _decoding(model)
    parts = nn.ModuleList(components(model).values())
    with ParameterCasts(parts) as casts, Operations() as operations:
        step()
    return Counts(casts.count, casts.bytes, operations.count, None)
