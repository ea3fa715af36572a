"""How far a run had come: the values besides weights and moments, checked when read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npt_fast import schema
from npt_fast.checkpoint.numbers import read_number
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.checkpoint.training_state import TrainingState
from npt_fast.errors import CheckpointError
from npt_fast.schema import Kind


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run had come; the defaults are the beginning of a run.

    Attributes:
        micro_batches: micro-batches trained on.
        best_kl: lowest KL on the held-out text, in nats, None before the first evaluation.
        scaler: state of float16's gradient scaler, None without one.
        data: position in the text, from `TokenWindows.state_after` or that of `MixedWindows`, None
            if unknown.
    """

    micro_batches: int = 0
    best_kl: float | None = None
    scaler: dict[str, Any] | None = None
    data: dict[str, Any] | None = None


def _is_position(value: Any) -> bool:
    return schema.is_count(value) and value < schema.LARGEST // 2  # leaves room to grow


def _is_measure(value: Any) -> bool:
    """A loss may be infinite or NaN, and other tools may save it as a tensor."""
    if isinstance(value, TensorEntry):
        return read_number(value) is not None
    return type(value) is float or schema.is_number(value)


def _is_tensor_or(kind: Kind) -> Kind:
    return Kind(
        kind.name,
        lambda value: kind.fits(value) or (isinstance(value, TensorEntry) and value.numel == 1),
    )


def _is_json_object(value: Any) -> bool:
    try:
        return isinstance(value, str) and isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


_POSITION = Kind("a whole number from 0 to 2^62", _is_position)
_PATH = Kind("a text", lambda value: isinstance(value, str))  # a path need not be valid Unicode
_SEED = Kind("a whole number", lambda value: type(value) is int and schema.is_number(value))
_POSITIVE = Kind("a positive number", lambda value: schema.is_number(value) and value > 0)
_NUMBER = _is_tensor_or(Kind("a number from 0 on", lambda v: schema.is_number(v) and v >= 0))
_BETAS = Kind(
    "two numbers from 0 to 1",
    lambda value: (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(
            isinstance(beta, TensorEntry) or (schema.is_number(beta) and 0 <= beta < 1)
            for beta in value
        )
    ),
)
_FLAG = schema.or_none(schema.FLAG)
_STATE = schema.or_none(schema.MAPPING)

_CONTENT = {
    "batch_count": schema.or_none(_POSITION),
    "best_val_loss": schema.or_none(Kind("a number", _is_measure)),
    "scaler_state_dict": _STATE,
    "scheduler_state_dict": _STATE,
    "data_state": _STATE,
}
_GROUP = {
    **dict.fromkeys(("lr", "initial_lr", "eps", "weight_decay"), _NUMBER),
    "betas": _BETAS,
    "amsgrad": _FLAG,
    "maximize": _FLAG,
    "foreach": _FLAG,
    "capturable": _FLAG,
    "differentiable": _FLAG,
    "fused": _FLAG,
    "decoupled_weight_decay": _FLAG,
}
_SCHEDULER = {
    "last_epoch": schema.COUNT,
    "_step_count": schema.COUNT,
    "base_lrs": schema.list_of(_NUMBER),
    "_last_lr": schema.list_of(_NUMBER),
}
_SCALER = {
    "scale": _POSITIVE,
    "growth_factor": _POSITIVE,
    "backoff_factor": _POSITIVE,
    "growth_interval": _POSITION,
    "_growth_tracker": _POSITION,
}
_DATA = {
    "source": _PATH,
    "seed": _SEED,
    **dict.fromkeys(("max_length", "stride", "held_out", "block"), _POSITION),
    **dict.fromkeys(("windows", "before", "epoch", "window", "skip"), _POSITION),
    "documents": Kind("a JSON object as text", _is_json_object),
    "tokens": schema.list_of(schema.COUNT),
}
_OPTIONAL = {"special_tokens": schema.COUNT, "text": schema.TEXT, "text_column": schema.TEXT}
"""In data_state only if it is 0, of a sampled text or an object, and if it was chosen."""
_MIXED = {"source": _PATH, "windows": _POSITION, "parts": schema.list_of(schema.MAPPING)}
"""The data_state of several texts."""


def read_progress(saved: TrainingState | None) -> Progress:
    """Read the progress from a training state; None gives the beginning of a run.

    Raises:
        CheckpointError: a value that the run continues with, or that it was trained with, has a
            wrong type.
    """
    if saved is None:
        return Progress()

    def checked(
        given: Any, kinds: Mapping[str, Kind], key: str = "", *, complete: bool = False
    ) -> dict[str, Any]:
        where = f"{saved.path}: {key}" if key else str(saved.path)
        return schema.checked(given, kinds, list(kinds) if complete else (), where, CheckpointError)

    content = checked(saved.content, _CONTENT)
    checked(saved.group or {}, _GROUP, "optimizer_state_dict")
    checked(content.get("scheduler_state_dict") or {}, _SCHEDULER, "scheduler_state_dict")
    scaler, data = content.get("scaler_state_dict"), content.get("data_state")
    if scaler:  # a scaler that is turned off has an empty state
        scaler = checked(scaler, _SCALER, "scaler_state_dict", complete=True)

    def position(given: Mapping[str, Any], key: str) -> dict[str, Any]:
        found = checked(given, _DATA, key, complete=True) | checked(given, _OPTIONAL, key)
        if not 0 <= found["windows"] - found["before"] <= found["block"]:
            raise CheckpointError(
                f"{saved.path}: {key}: windows must be from before to before + block"
            )
        return found

    if data is not None and "parts" in data:
        data = checked(data, _MIXED, "data_state", complete=True)
        data["parts"] = [
            position(part, f"data_state: parts: {n}") for n, part in enumerate(data["parts"])
        ]
    elif data is not None:
        data = position(data, "data_state")
    best = content.get("best_val_loss")
    if isinstance(best, TensorEntry):
        best = read_number(best)
    return Progress(
        micro_batches=content.get("batch_count") or 0,
        best_kl=float(best) if best is not None and math.isfinite(best) else None,
        scaler=scaler or None,
        data=data,
    )
