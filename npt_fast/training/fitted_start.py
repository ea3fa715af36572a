"""Fitted start: factors of fresh layers in closed form, from the base model's activations.

Training then begins near its end. The derivation and figures are in design.md#fitted-start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from npt_fast.called_mlp import call_mlp, first
from npt_fast.errors import TrainingError
from npt_fast.functional import ACTIVATIONS, heads_of
from npt_fast.hf.convert import decoder_layers
from npt_fast.hf.np_layer import mlp_module
from npt_fast.hf.wrappers import unwrapped
from npt_fast.modules import NPComponent
from npt_fast.training.losses import counted, squared_length, wide
from npt_fast.training.teacher_pass import Activations, run_teacher

TOKENS = 8192
"""Tokens of the text that a start is fitted to."""

_BYTES = 2_000_000_000  # of activations at once; layers that need more take turns
_TOKENS_PER_DIRECTION = 16  # of attention outputs; with fewer, a fit learns its tokens by heart
_RIDGE = 0.01  # times the mean square of the features
_RIDGE_OF_ONE = 0.1  # likewise, where what is fitted is a 1 for every token


@torch.no_grad()
def fit_layers(
    model: Any, batches: Sequence[Mapping[str, Tensor]], layers: Sequence[int], sink_weight: float
) -> None:
    """Set the factors of fresh layers so that each MLP is near its target.

    Args:
        model: model with NP layers.
        batches: the text, batches of a collator; the base model reads one at a time.
        layers: fresh layers; those that `can_be_fitted` is not true of stay as they are.
        sink_weight: as of `Distillation`.

    Raises:
        TrainingError: the text gives no finite factors.
    """
    every = [unwrapped(layer) for layer in decoder_layers(model)]
    fitted = [n for n in layers if can_be_fitted(every[n])]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    width = max((every[n].np_component.hidden_size for n in fitted), default=0)
    at_once = max(1, _BYTES // max(1, 3 * tokens * width * model.dtype.itemsize))
    for begin in range(0, len(fitted), at_once):
        group = fitted[begin : begin + at_once]
        begins: list[Tensor] = []
        found: dict[int, list[Activations]] = {n: [] for n in group}
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            present = counted(ids, mask, batch.get("labels"))
            first_of_row = torch.zeros_like(present)
            first_of_row[:, 0] = True
            begins.append(first_of_row[present])
            for n, seen in run_teacher(model, ids, mask, layers=group).activations.items():
                found[n].append(Activations(*(part[present] for part in seen)))
        for n in group:
            joined = Activations(*map(torch.cat, zip(*found.pop(n), strict=True)))
            if not len(joined.hidden):  # no token counts
                continue
            try:
                _fit_layer(every[n], joined, torch.cat(begins), sink_weight)
            except LinAlgError:
                raise TrainingError(
                    f"layer {n}: no finite start fits this text; take --init_strategy zero"
                ) from None


def can_be_fitted(layer: Any) -> bool:
    """Whether a start can be fitted to an NP layer: not to a mixture of experts.

    Nor where the MLP goes without its post-norm: its output has another size than its target then,
    which no change of low rank mends.
    """
    component: NPComponent = layer.np_component
    normed = layer.np_block.mlp_post_norm is not None
    return component.mixture is None and not (normed and component.residual == "removed")


def _fit_layer(layer: Any, seen: Activations, begins: Tensor, sink_weight: float) -> None:
    """Fit gate and up to their outputs in the base model, then down to the layer's target.

    Each is fitted on what it reads once those before it are fitted.

    Args:
        layer: NP layer.
        seen: the base model's activations of all tokens, ``(N, D)`` each.
        begins: whether a token is the first of its row, ``(N,)``.
        sink_weight: as of `Distillation`.
    """
    component: NPComponent = layer.np_component
    block, mlp = layer.np_block, mlp_module(layer)
    read = block.mlp_input(layer, seen.hidden, seen.attention)
    added = seen.target(component.residual)
    # where a post-norm follows, the MLP's output is not known from what it adds
    kept = component.residual == "kept"
    target = first(mlp(read)) if kept else block.unscaled(layer, added)
    weights = _weights(added, seen.output, begins, sink_weight)
    start = _Start(component, seen.attention, weights)

    def change(name: str, projection: Any, a: Tensor) -> Tensor | None:
        if name not in component.projections:
            return None
        wanted = target if name == "down" else projection(read)
        missing = wanted - projection(a)  # a bias is in both
        if name != "down" and component.layout.joined:
            missing = missing.chunk(2, -1)[name == "up"]
        return start.fit(name, a, missing)

    activation = ACTIVATIONS[component.activation][0]
    h = block.mlp_input(layer, seen.hidden)
    call_mlp(unwrapped(mlp), h, activation, change, component.layout)


def _weights(target: Tensor, output: Tensor, begins: Tensor, sink_weight: float) -> Tensor:
    """Weights of the tokens' squared errors, as the loss has them where errors are small, (N,)."""
    squares = squared_length(target)
    least = squares.median() / 10  # a token with a target near 0 would decide alone
    least = least.clamp_min(torch.finfo(squares.dtype).tiny)
    sinks = begins / squared_length(output).maximum(least)
    return 1 / squares.maximum(least) + sink_weight * sinks


class _Start:
    """Start of one component, whose bottlenecks are a number near 1 and coordinates.

    The coordinates are those of the attention output in its directions of most variance. Columns
    of W_down that are left over stay as they are, for training.
    """

    def __init__(self, component: NPComponent, attention: Tensor, weights: Tensor) -> None:
        self.component = component
        self.weights = weights / weights.mean()
        k, r = component.num_ranks, component.rank
        attention = wide(attention)
        count = min(k * (r - 1), attention.shape[-1], len(attention) // _TOKENS_PER_DIRECTION)
        weighted = attention * self.weights.sqrt().unsqueeze(-1)
        directions = torch.linalg.eigh(weighted.T @ weighted).eigenvectors.flip(-1)[:, :count]
        usual = (attention @ directions).square().mean(-1).sqrt().median()
        directions = directions / usual.clamp_min(torch.finfo(usual.dtype).tiny)
        one = _reader_of_one(attention, self.weights)
        self.w_down = torch.cat((one, directions), -1)
        self.z = attention @ self.w_down

    def fit(self, name: str, a: Tensor, missing: Tensor) -> Tensor:
        """Set the factors of one projection, which reads `a`, for a change near `missing`.

        Returns:
            The change, ``(N, out)``.
        """
        k, r = self.component.num_ranks, self.component.rank
        index = self.component.projections.index(name)
        w_down = self.component.w_down.unflatten(-1, (-1, k, r))[:, index]
        w_a, w_b = (w.unflatten(0, (k, r)) for w in heads_of(self.component.factors)[index])
        a = wide(a)
        reader = _reader_of_one(a, self.weights)
        # v_a x is the same for all components, and with it every coordinate's factor
        features = self.z * self.z[:, :1] * (a @ reader)
        solved = _ridge(features, wide(missing), self.weights, _RIDGE)
        number = torch.arange(len(solved) - 1, device=solved.device)
        where, column = number % k, 1 + number // k  # components take turns
        # W_a_up and W_b_up get the same norm, or AdamW's steps, as large in all factors, spoil the
        # smaller one: layer 28 of SmolLM2 ends at 2.5 times the error without
        size = (solved.norm() / (k**0.5 * reader.norm())).sqrt()
        size = size if size > 0 and size.isfinite() else torch.ones_like(size)
        w_a.zero_()
        w_b.zero_()
        w_a[:, 0] = (reader.T * size).to(w_a.dtype)
        w_b[0, 0] = (solved[0] / size).to(w_b.dtype)
        w_b[where, column] = (solved[1:] / size).to(w_b.dtype)
        w_down[..., 0] = self.w_down[:, :1].to(w_down.dtype)
        w_down[:, where, column] = self.w_down[:, 1:].to(w_down.dtype)
        return features @ solved


def _reader_of_one(x: Tensor, weights: Tensor) -> Tensor:
    """The vector c, ``(D, 1)``, with ``x @ c`` near 1 for every token."""
    return _ridge(x, torch.ones_like(weights).unsqueeze(-1), weights, _RIDGE_OF_ONE)


def _ridge(x: Tensor, y: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """Weighted ridge regression of ``(N, out)`` on ``(N, in)``; ``(in, out)``."""
    root = weights.sqrt().unsqueeze(-1)
    x, y = x * root, y * root
    many = x.shape[1] > len(x)  # both forms are the same; the matrix to solve is the smaller one
    square = (x @ x.T if many else x.T @ x).double()
    mean = x.square().sum() / x.shape[1]
    square.diagonal().add_(ridge * mean.clamp_min(torch.finfo(x.dtype).tiny))
    solved: Tensor = torch.linalg.solve(square, (y if many else x.T @ y).double()).to(x.dtype)
    found = x.T @ solved if many else solved
    if not found.isfinite().all():
        raise LinAlgError
    return found
