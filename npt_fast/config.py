"""Options as frozen dataclasses, validated where they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

ConflictPolicy = Literal["first", "last", "error", "identical", "concat", "mean"]
FileFormat = Literal["pt", "safetensors"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""
WeightDType = Literal["float64", "float32", "float16", "bfloat16"]


ModulationType = Literal["single", "dual", "triple"]
Residual = Literal["removed", "kept"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NPTConfig:
    """The NP layers of a model, all of one architecture.

    Attributes:
        layers: indices of decoder layers; negative ones count from the end.
        rank: bottleneck r of each component.
        num_ranks: components k per projection.
        modulation: projections whose weights change: gate; gate and up; gate, up and down.
        residual: ``removed``: the layer adds its MLP alone, which stands for attention too;
            ``kept``: it adds attention as well (SPEC 1.3).
    """

    layers: Sequence[int]
    rank: int = 64
    num_ranks: int = 1
    modulation: ModulationType = "triple"
    residual: Residual = "removed"

    def __post_init__(self) -> None:
        if not self.layers or any(type(layer) is not int for layer in self.layers):
            raise ValueError(f"layers must be a list of layer indices, got {self.layers!r}")
        if self.rank < 1 or self.num_ranks < 1:
            raise ValueError(
                f"rank and num_ranks must be positive, got {self.rank} and {self.num_ranks}"
            )
        for name, value, allowed in (
            ("modulation", self.modulation, get_args(ModulationType)),
            ("residual", self.residual, get_args(Residual)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """How to merge.

    Attributes:
        on_conflict: what to do when two inputs hold the same layer. ``first`` and ``last`` take the
            whole layer from one input, ``error`` refuses, ``identical`` accepts only equal bytes,
            ``concat`` joins the components so that the weight changes add up, ``mean`` joins them
            so that they average (SPEC 6.5, MERGE.md 6).
        uniform: give all layers one modulation type, num_ranks and rank by exact padding, which is
            what the original needs.
        dtype: convert all weights to this type; None keeps each as it is.
        format: file format of the weights; None takes the first input's.
        max_shard_size: bytes of tensors per safetensors file; more become shards with an index.
        weights_only: leave out optimizer, scheduler, step and curriculum.
        copy_multi_layer_state: take the curriculum from this ``multi_layer_state.pt``.
        allow_different_base: merge although the configs name different base models.
    """

    on_conflict: ConflictPolicy = "first"
    uniform: bool = False
    dtype: WeightDType | None = None
    format: FileFormat | None = None
    max_shard_size: int = 5_000_000_000
    weights_only: bool = False
    copy_multi_layer_state: Path | None = None
    allow_different_base: bool = False

    def __post_init__(self) -> None:
        choices = {
            "on_conflict": (self.on_conflict, get_args(ConflictPolicy)),
            "dtype": (self.dtype, (None, *get_args(WeightDType))),
            "format": (self.format, (None, *get_args(FileFormat))),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                names = ", ".join(str(choice) for choice in allowed if choice)
                raise ValueError(f"{name} must be one of {names}, got {value!r}")
        if self.max_shard_size < 1:
            raise ValueError(f"max_shard_size must be positive, got {self.max_shard_size}")
