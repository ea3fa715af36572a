"""One training step up to its losses: the teacher's pass, the student's pass, and their errors.

It is a module whose forward returns the losses, so that DDP and FSDP wrap it like any model. It
skips layers no loss depends on (design.md#training-step): with direct losses alone, it runs the
base model up to the last trained layer, and the MLPs of the trained layers once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from npt_fast.config import LossKind
from npt_fast.functional import VectorNorms
from npt_fast.hf.convert import Parts, Scaffold, components, decoder_layers
from npt_fast.training.curriculum import Stage
from npt_fast.training.losses import (
    Agreement,
    agreement,
    direct_errors,
    fidelity_sum,
    sink_errors,
)
from npt_fast.training.teacher_pass import (
    Activations,
    TeacherCache,
    TeacherPass,
    run_teacher,
    trained_layers,
)

STUDENT = Stage("student", 0, 1.0, 1.0)


class Losses(NamedTuple):
    """Sums over the real tokens of a batch.

    Attributes:
        total: what is minimised: weighted sum of the following; divide it by the tokens.
        direct: error of every trained layer.
        fidelity: difference in logits, None if not asked for.
        regularization: of every trained layer, mean squares of its v_a and v_b; None likewise.
        norms: of every trained layer, measures of its vectors, None if not asked for.
        agreement: how predictions compare, when evaluating.
    """

    total: Tensor
    direct: dict[int, Tensor]
    fidelity: Tensor | None = None
    regularization: dict[int, Tensor] | None = None
    norms: dict[int, Tensor] | None = None
    agreement: Agreement | None = None


class Distillation(nn.Module):
    """Trained layers against the base model, both in one model.

    Args:
        model: with converted layers, all of which are trained.
        layer_weights: by layer.
        loss: how errors are measured.
        direct_weight: of the layers' own errors.
        sink_weight: of `sink_errors`, which are added to them where `loss` is relative; what is
            reported as the layers' errors is without.
        fidelity_weight: of the difference in logits; 0 leaves it out.
        reg_weight: of the mean squares of v_a and v_b; 0 leaves them out.
        cache_bytes: memory for the base model's activations of windows seen before; used where they
            are all that is needed.
    """

    accepts_loss_kwargs = True  # the trainer counts tokens over the whole optimizer step
    model: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        layer_weights: Mapping[int, float] | None = None,
        loss: LossKind = "relative",
        direct_weight: float = 1.0,
        sink_weight: float = 0.0,
        fidelity_weight: float = 0.0,
        reg_weight: float = 0.0,
        cache_bytes: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        trained = components(model)
        self.layer_weights = {n: (layer_weights or {}).get(n, 1.0) for n in trained}
        self.loss = loss
        self.direct_weight = direct_weight
        self.sink_weight = sink_weight if loss == "relative" else 0.0
        self.fidelity_weight = fidelity_weight
        self.reg_weight = reg_weight
        self.cache = TeacherCache(cache_bytes)

    @property
    def config(self) -> Any:
        """The model's, where a trainer looks for it."""
        return self.model.config

    def train(self, mode: bool = True) -> Distillation:
        """A trainer asks for training mode; the model stays out of it: no target is random."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        stage: Stage = STUDENT,
        windows: Tensor | None = None,
        measure_norms: bool = False,
        evaluate: bool = False,
    ) -> Losses:
        """Losses of one batch.

        Args:
            input_ids: ``(B, S)``.
            attention_mask: ``(B, S)``, 1 for tokens, 0 for padding; None without padding.
            stage: what the trained layers get as input.
            windows: numbers of the rows' texts, ``(B,)``: equal numbers, equal texts.
            measure_norms: measure v_a and v_b.
            evaluate: compare predictions too.
        """
        trained = trained_layers(self.model)
        all_layers = evaluate or self.fidelity_weight > 0
        # before the first trained layer both models are one, so a lone one needs no student pass
        runs_student = all_layers or (stage.name != "teacher" and len(trained) > 1)
        present = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = present.to(torch.float32)
        norms_needed = measure_norms or self.reg_weight > 0

        if not runs_student and windows is not None and self.cache.limit:
            activations = self.cache.get(windows, input_ids, attention_mask, self._activations)
        else:
            teacher = run_teacher(
                self.model,
                input_ids,
                attention_mask,
                record_calls=runs_student,
                all_layers=all_layers,
            )
            activations = teacher.activations

        parts: dict[int, Parts] = {}
        if runs_student:
            final = self._student(
                teacher, stage, parts, all_layers=all_layers, measure_norms=norms_needed
            )
        else:
            for index, seen in activations.items():
                scaffold = Scaffold(attention=seen.attention, norms=norms_needed)
                parts[index] = decoder_layers(self.model)[index](seen.hidden, scaffold=scaffold)

        direct, minimised = {}, {}
        for index, seen in activations.items():
            kept = trained[index].residual == "kept"
            target = seen.mlp if kept else seen.attention + seen.mlp
            errors = direct_errors(parts[index].mlp, target, self.loss) * weights
            direct[index] = errors.sum()
            minimised[index] = direct[index]
            if self.sink_weight:
                sink = sink_errors(parts[index].mlp, target, seen.output) * weights[:, 0]
                minimised[index] = direct[index] + self.sink_weight * sink.sum()
        losses = Losses(self._weighted(minimised) * self.direct_weight, direct)
        measured = {n: part.norms for n, part in parts.items() if part.norms is not None}
        if self.reg_weight:
            squares = {n: (m.mean_square * weights).sum() for n, m in measured.items()}
            losses = losses._replace(
                total=losses.total + self._weighted(squares) * self.reg_weight,
                regularization=squares,
            )
        if measure_norms:
            losses = losses._replace(
                norms={n: _norm_sums(m, weights).detach() for n, m in measured.items()}
            )
        if all_layers:
            head = self.model.get_output_embeddings()
            if self.fidelity_weight:
                fidelity = fidelity_sum(final, teacher.final, head, weights, self.loss)
                losses = losses._replace(
                    total=losses.total + fidelity * self.fidelity_weight, fidelity=fidelity
                )
            if evaluate:
                compared = agreement(final, teacher.final, head, input_ids, weights)
                losses = losses._replace(agreement=compared)
        return losses

    @torch.no_grad()
    def calibrate(self, input_ids: Tensor, layers: Sequence[int]) -> None:
        """Scale W_down of fresh layers so that the bottleneck's entries are of size 1 on a text.

        A change of weights grows with the square of the attention output, whose size differs
        tenfold from layer to layer; without this, the learning rate that a layer can bear differs
        a hundredfold.

        Args:
            input_ids: the text, ``(B, S)``.
            layers: which.
        """
        activations = self._activations(input_ids, None)
        for layer in layers:
            w_down = trained_layers(self.model)[layer].w_down
            u = activations[layer].attention.to(w_down.dtype) @ w_down
            w_down.div_(u.square().mean(-1).sqrt().median())

    def _weighted(self, by_layer: Mapping[int, Tensor]) -> Tensor:
        return torch.stack([self.layer_weights[n] * value for n, value in by_layer.items()]).sum()

    def _activations(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> dict[int, Activations]:
        return run_teacher(self.model, input_ids, attention_mask).activations

    def _student(
        self,
        teacher: TeacherPass,
        stage: Stage,
        parts: dict[int, Parts],
        *,
        all_layers: bool,
        measure_norms: bool,
    ) -> Tensor:
        """The trained model from its first trained layer on; fills `parts`, returns hidden states.

        Trained layers add what they compute from their scaffold to the running state; other layers
        run as they are (design.md#training-step).
        """
        layers = decoder_layers(self.model)
        trained = trained_layers(self.model)
        first = min(trained)
        state = teacher.activations[first].hidden
        for index in range(first, len(layers) if all_layers else max(trained) + 1):
            call = teacher.calls[index]
            if index not in trained:
                state = layers[index](state, **call)
                continue
            seen = teacher.activations[index]
            same = index == first or not stage.attention_ratio
            scaffold = Scaffold(
                attention_input=_mixed(seen.hidden, state, stage.attention_ratio),
                attention=seen.attention if same else None,
                norms=measure_norms,
            )
            residual = _mixed(seen.hidden, state, stage.mlp_ratio)
            parts[index] = layers[index](residual, scaffold=scaffold, **call)
            state = state + parts[index].mlp
            if trained[index].residual == "kept":
                state = state + parts[index].attention
        if not all_layers:
            return state
        normed: Tensor = self.model.get_decoder().norm(state)
        return normed


def _mixed(teacher: Tensor, student: Tensor, ratio: float) -> Tensor:
    if ratio in (0.0, 1.0):
        return student if ratio else teacher
    return torch.lerp(teacher, student, ratio)


def _norm_sums(norms: VectorNorms, weights: Tensor) -> Tensor:
    """Sums over tokens of |v_a|, |v_b| (gate, mean over components) and of the similarity."""
    lengths = (squares[..., 0, :].clamp_min(0).sqrt().mean(-1) for squares in norms[:2])
    return torch.stack([(m * weights).sum() for m in (*lengths, norms.similarity)])
