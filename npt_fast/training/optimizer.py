"""AdamW whose steps are in proportion to the parameters that they change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from npt_fast.arguments import check_constructor
from npt_fast.functional import whole
from npt_fast.hf.convert import components, trainable_parameters

BETAS = (0.9, 0.95)  # with .999, layer 1 of SmolLM2 answers one outlier with jumps for 1000 steps

_USUAL_SIZE = 0.02  # a usual standard deviation of weights


@check_constructor
class RelativeAdamW(torch.optim.AdamW):
    """AdamW for NP layers, with rates that follow the size of what they change.

    AdamW changes all numbers by about its rate, but ``W_down`` of a layer is the smaller the larger
    its attention outputs are: by 48 times in SmolLM2-135M, so that no rate suits all layers
    (design.md#learning-rate). Here the rate of each layer's ``W_down`` is `lr` times its root mean
    square over 0.02, anew at each step. So is that of ``W_a_up`` and ``W_b_up`` together, but it is
    at most `lr`: while ``W_b_up`` is zero, the size of ``W_a_up`` means nothing. The betas are 0.9
    and 0.95. The original's starts are near zero, and learn more with `torch.optim.AdamW`.

    Args:
        model: model with NP layers; those that require gradients are trained.
        lr: rate of parameters whose root mean square is 0.02; schedules change it.
        weight_decay: weight decay of AdamW.

    Raises:
        ModelError: no NP layer of the model requires gradients.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-4, *, weight_decay: float = 0.01) -> None:
        trainable_parameters(model)  # to refuse a model without
        groups: list[dict[str, Any]] = []
        for component in components(model).values():
            up = [p for p in component.parameters() if p is not component.w_down]
            for part, most in (([component.w_down], math.inf), (up, 1.0)):
                if trained := [p for p in part if p.requires_grad]:
                    groups.append({"params": trained, "most": most})
        super().__init__(groups, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True)
        self._follow_sizes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._follow_sizes()  # a copy has no hooks; with load_state_dict there are some

    def _follow_sizes(self) -> None:
        # no step of its own around AdamW's: the hooks of users would run in both
        if _multiply_rates not in self._optimizer_step_pre_hooks.values():
            self.register_step_pre_hook(_multiply_rates)
            self.register_step_post_hook(_restore_rates)


def _multiply_rates(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    groups = [group for group in optimizer.param_groups if "most" in group]  # not those of users
    sizes = [_size(group["params"]) for group in groups]
    together = torch.stack([size.to(sizes[0].device) for size in sizes]).tolist()
    for group, size in zip(groups, together, strict=True):
        scheduled, multiplied = group.pop("rates", (None, None))
        if group["lr"] == multiplied:  # the step before raised an error, and left it
            group["lr"] = scheduled
        rate = group["lr"] * min(size / _USUAL_SIZE, group["most"])
        group["lr"], group["rates"] = rate, (group["lr"], rate)


def _restore_rates(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if "rates" in group:
            group["lr"], _ = group.pop("rates")


def _size(parameters: Sequence[Tensor]) -> Tensor:
    """Root mean square of all numbers of parameters, which may be shards; a scalar."""
    norm = nn.utils.get_total_norm([parameter.detach() for parameter in parameters])
    size: Tensor = whole(norm) / sum(parameter.numel() for parameter in parameters) ** 0.5
    return size
