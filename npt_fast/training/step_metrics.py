"""Averages of what training steps measure, from one line of metrics to the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from npt_fast.training.distillation import Losses


class Averages(NamedTuple):
    """Averages over the optimizer steps between two lines of metrics.

    Attributes:
        values: means over tokens, by name of the metric (design.md#metrics).
        tokens: real tokens trained on by all processes.
        seconds: duration of the training.
    """

    values: dict[str, float]
    tokens: float
    seconds: float


class StepMetrics:
    """Sums of losses over micro-batches.

    The sums stay on the device: reading one after each step would wait for the step to finish.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.start_clock()

    def start_clock(self) -> None:
        """Start counting seconds."""
        self._since = time.monotonic()

    def exclude(self, seconds: float) -> None:
        """Exclude seconds that passed without training."""
        self._since += seconds

    def add(self, losses: Losses) -> None:
        """Add the losses of a micro-batch."""
        tokens = losses.tokens
        values = {"loss/total": losses.total, "tokens": tokens}
        if losses.fidelity is not None:
            values["loss/fidelity"] = losses.fidelity
        for layer, value in losses.direct.items():
            values[f"mlp_direct_loss/layer_{layer}"] = value
        for layer, value in (losses.regularization or {}).items():
            values[f"regularization/layer_{layer}"] = value
        if losses.norms is not None:
            values["measured"] = tokens
            for layer, (v_a, v_b, similarity) in losses.norms.items():
                values[f"v_a_norm/layer_{layer}"] = v_a
                values[f"v_b_norm/layer_{layer}"] = v_b
                values[f"v_a_attention_similarity/layer_{layer}"] = similarity
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._last = losses

    def not_finite(self) -> str | None:
        """Say whose loss in the last micro-batch is infinite or NaN; None if all are finite.

        Waits for the device.
        """
        losses = self._last
        if bool(torch.isfinite(losses.total)):
            return None
        bad = [layer for layer, value in losses.direct.items() if not bool(torch.isfinite(value))]
        return f"of layer {', '.join(map(str, bad))}" if bad else "in all"

    def take(self, sum_over_processes: Callable[[Tensor], Tensor]) -> Averages:
        """Return the averages since the last call and start over; waits for the device.

        Args:
            sum_over_processes: adds up a tensor of sums over all processes.
        """
        names = sorted(self._sums)
        sums = sum_over_processes(torch.stack([self._sums[name].double() for name in names]))
        found = dict(zip(names, sums.tolist(), strict=True))
        # norms are measured only in steps that end with a line, so fewer tokens count for them
        tokens, measured = found.pop("tokens"), found.pop("measured", 0.0)
        means = {
            name: value / (measured if name.startswith("v_") else tokens)
            for name, value in found.items()
        }
        seconds = time.monotonic() - self._since
        self._sums = {}
        self.start_clock()
        return Averages(means, tokens, seconds)
