"""Named problems that kernels are checked and timed on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from npt_fast.benchmarks.device import DTYPE
from npt_fast.kernels.roofline import shape_of
from npt_fast.testing import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload(Problem):
    """A problem and the dtype of its tensors."""

    dtype: torch.dtype = DTYPE


class Shapes(NamedTuple):
    """Workloads by name, for training steps and for decoding."""

    training: dict[str, Workload]
    decode: dict[str, Workload]


def workload(
    model: str,
    tokens: int,
    num_ranks: int | None = None,
    rank: int | None = None,
    dtype: torch.dtype = DTYPE,
) -> tuple[str, Workload]:
    """Name and workload of one layer.

    Args:
        model: a name of `roofline.MODELS`, or widths as ``D,F``.
        tokens: number of tokens T.
        num_ranks: number of components k; None takes the model's.
        rank: rank r; None takes the model's.
        dtype: dtype of all tensors.

    Raises:
        ValueError: the model is unknown.
    """
    if re.fullmatch(r"[1-9]\d*,[1-9]\d*", model):
        hidden, intermediate = map(int, model.split(","))
        shape = shape_of(None, hidden, intermediate, num_ranks, rank)
    else:
        shape = shape_of(model, None, None, num_ranks, rank)
    sizes = Workload(
        tokens=tokens, hidden=shape.hidden, intermediate=shape.intermediate,
        num_ranks=shape.num_ranks, rank=shape.rank, dtype=dtype,
    )  # fmt: skip
    return f"{model} k={shape.num_ranks} r={shape.rank} T={tokens}", sizes


REAL = Shapes(
    dict(
        workload(*sizes)
        for sizes in (
            # with 8192 tokens the reference form would save 65 GB for the last
            ("llama-3.2-1b", 8192, 8, 512),
            ("llama-3.1-8b", 8192, 8, 64),
            ("llama-3.2-1b", 2048, 128, 16),
            (
                "llama-3.1-8b",
                8192,
                1,
                256,
            ),  # the defaults' R, where `fused` is chosen on some cards
        )
    ),
    dict(
        workload(model, tokens, 8, rank)
        for model, rank in (("llama-3.2-1b", 512), ("llama-3.1-8b", 64))
        for tokens in (1, 4, 16, 64)
    ),
)
_tiny = partial(Workload, hidden=48, intermediate=80, num_ranks=2, rank=16)
TINY = Shapes({"tiny k=2 r=16 T=33": _tiny(tokens=33)}, {"tiny k=2 r=16 T=4": _tiny(tokens=4)})
_odd = partial(Workload, hidden=45, intermediate=77, num_ranks=3, rank=5)
ODD = Shapes({"odd k=3 r=5 T=33": _odd(tokens=33)}, {"odd k=3 r=5 T=3": _odd(tokens=3)})
"""Odd sizes: every access is masked and narrow."""
