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

from npt_fast.arguments import check_constructor
from npt_fast.called_mlp import first
from npt_fast.config import LossKind, TrainOptions, parse_size
from npt_fast.errors import DataError
from npt_fast.functional import VectorNorms
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.hf.decoder import final_norm
from npt_fast.hf.logits import head_of
from npt_fast.hf.scaffold import Parts, Scaffold, VirtualTokens
from npt_fast.training.curriculum import Stage
from npt_fast.training.fitted_start import fit_layers
from npt_fast.training.losses import (
    Agreement,
    agreement,
    bounded_errors,
    counted,
    direct_errors,
    fidelity_sum,
    sink_errors,
    squared_length,
)
from npt_fast.training.teacher_pass import (
    Activations,
    TeacherCache,
    TeacherPass,
    check_teacher,
    run_teacher,
    trained_layers,
)
from npt_fast.training.virtual_tokens import WEIGHT, VirtualPlan

STUDENT = Stage("student", 0, 1.0, 1.0)


class Losses(NamedTuple):
    """Losses, summed over the tokens of a batch that count.

    Attributes:
        tokens: number of these tokens, int64 scalar: all but padding, and of those that have
            labels all but -100.
        total: the weighted sum to minimise; divide it by the number of tokens.
        direct: error of each trained layer, without its weight, bounds, sink errors and virtual
            tokens.
        fidelity: fidelity loss, None if its weight is 0.
        regularization: mean squares of v_a and v_b of each trained layer, None if their weight
            is 0.
        norms: norms of v_a and of v_b and their similarity to attention, ``(3,)``, for each trained
            layer; None if not measured.
        agreement: comparison of predictions, None unless evaluating.
    """

    tokens: Tensor
    total: Tensor
    direct: dict[int, Tensor]
    fidelity: Tensor | None = None
    regularization: dict[int, Tensor] | None = None
    norms: dict[int, Tensor] | None = None
    agreement: Agreement | None = None

    @property
    def loss(self) -> Tensor:
        """The mean of `total` over tokens, a scalar to call ``backward`` on."""
        return self.total / self.tokens


@check_constructor
class Distillation(nn.Module):
    """A training step as a module: with NP layers off a model is the teacher, with them on the
    student.

    Its parameters that require gradients are those of the NP layers. `forward` takes a batch of any
    collator for language models, and returns `Losses`.

    Args:
        model: model with NP layers, all of which are trained.
        layer_weights: weight of each layer in the loss; 1 for layers that are missing.
        loss: how errors are measured (design.md#losses).
        direct_weight: weight of the direct losses.
        sink_weight: weight of `sink_errors` relative to the direct loss, which they are added to if
            `loss` is relative; `Losses.direct` does not include them.
        virtual_stride: positions from one virtual token to the next, if `loss` is relative; 0
            trains without (`npt_fast.training.virtual_tokens`).
        fidelity_weight: weight of the fidelity loss; 0 skips it.
        reg_weight: weight of the mean squares of v_a and v_b; 0 skips them.
        cache_bytes: memory for the teacher's activations of windows seen before, used in steps that
            need nothing else of the teacher.
    """

    accepts_loss_kwargs = True  # Trainer counts tokens over the whole optimizer step
    model: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        layer_weights: Mapping[int, float] | None = None,
        loss: LossKind = "relative",
        direct_weight: float = 1.0,
        sink_weight: float = 0.0,
        virtual_stride: int = 0,
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
        self.virtual_stride = virtual_stride if loss == "relative" else 0
        self.fidelity_weight = fidelity_weight
        self.reg_weight = reg_weight
        self.cache = TeacherCache(cache_bytes)
        self._typical: dict[int, Tensor] = {}  # squares of attention outputs

    @classmethod
    def of(
        cls,
        model: nn.Module,
        options: TrainOptions,
        layer_weights: Mapping[int, float] | None = None,
    ) -> Distillation:
        """The training step with the losses of a run's options."""
        return cls(
            model,
            layer_weights=layer_weights,
            loss=options.loss,
            direct_weight=options.direct_mlp_weight,
            sink_weight=options.sink_weight,
            virtual_stride=options.virtual_stride,
            fidelity_weight=options.fidelity_weight,
            reg_weight=options.lambda_reg,
            cache_bytes=parse_size(options.teacher_cache),
        )

    @property
    def config(self) -> Any:
        """The model's config, where Trainer looks for it."""
        return self.model.config

    def train(self, mode: bool = True) -> Distillation:
        """Keep the model in eval mode when Trainer asks for training mode: dropout would make
        targets random."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
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
            labels: ``(B, S)``; a token whose label is -100 is read and does not count. Other values
                do not matter, since the base model is what is learned.
            stage: decides the input of the trained layers.
            windows: numbers of the rows' windows, ``(B,)``; equal numbers mean equal texts.
            measure_norms: whether to measure v_a and v_b.
            evaluate: whether to compare predictions too.
        """
        trained = trained_layers(self.model)
        all_layers = evaluate or self.fidelity_weight > 0
        # teacher and student differ from the first trained layer on, so a single trained layer
        # reads the same in all stages and needs no student pass
        runs_student = all_layers or (stage.name != "teacher" and len(trained) > 1)
        present = counted(input_ids, attention_mask, labels)
        weights = present.to(torch.float32)
        adds = self.virtual_stride and not evaluate
        plan = VirtualPlan(weights, self.virtual_stride) if adds else None

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

        scaffolds = {
            index: Scaffold(
                attention=seen.attention,
                norms=measure_norms,
                squares=weights if self.reg_weight else None,
                virtual=plan.tokens(seen) if plan else None,
            )
            for index, seen in activations.items()
        }
        parts: dict[int, Parts] = {}
        if runs_student:
            final = self._student(teacher, stage, scaffolds, parts, all_layers=all_layers)
        else:
            for index, seen in activations.items():
                layer = decoder_layers(self.model)[index]
                parts[index] = layer(seen.hidden, scaffold=scaffolds[index])

        direct, minimised = {}, {}
        for index, seen in activations.items():
            direct[index], minimised[index] = self._direct(
                index, seen, parts[index], weights, scaffolds[index].virtual, plan
            )
        losses = Losses(present.sum(), self._weighted(minimised) * self.direct_weight, direct)
        if self.reg_weight:
            squares = {n: part.squares for n, part in parts.items() if part.squares is not None}
            losses = losses._replace(
                total=losses.total + self._weighted(squares) * self.reg_weight,
                regularization=squares,
            )
        if measure_norms:
            losses = losses._replace(
                norms={
                    n: _norm_sums(part.norms, weights)
                    for n, part in parts.items()
                    if part.norms is not None
                }
            )
        if all_layers:
            head = head_of(self.model)
            if self.fidelity_weight:
                fidelity = fidelity_sum(final, teacher.final, head, weights, self.loss)
                losses = losses._replace(
                    total=losses.total + fidelity * self.fidelity_weight, fidelity=fidelity
                )
            if evaluate:
                compared = agreement(final, teacher.final, head, input_ids, weights)
                losses = losses._replace(agreement=compared)
        return losses

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` was called."""
        return self._typical.keys() == self.layer_weights.keys()

    @torch.no_grad()
    def calibrate(self, input_ids: Tensor, layers: Sequence[int] | None = None) -> None:
        """Scale W_down of fresh layers so that the bottleneck's median RMS on a text is 1.

        The text also tells how large attention outputs usually are (`bounded_errors`). On the way,
        `check_teacher` proves on it what training relies on.

        The weight change grows with the square of the attention output, whose size differs by a
        factor of 10 between layers. Without calibration, a step of W_b_up would change what layers
        compute by a factor of 100 more in one than in another.

        Args:
            input_ids: the text, ``(B, S)``.
            layers: fresh layers; there may be none. By default those that are the base model's yet,
                as ``npt.convert`` leaves them.

        Raises:
            ModelError: a base layer does more than the targets say.
        """
        activations = check_teacher(self.model, input_ids)
        trained = trained_layers(self.model)
        for layer, seen in activations.items():
            self._typical_square(layer, seen.attention, torch.ones_like(input_ids))
        for layer in filter(self._is_fresh, trained) if layers is None else layers:
            w_down = trained[layer].w_down
            u = activations[layer].attention.to(w_down.dtype) @ w_down
            w_down.div_(u.square().mean(-1).sqrt().median())

    def fit(
        self, batches: Sequence[Mapping[str, Tensor]], layers: Sequence[int] | None = None
    ) -> None:
        """Set the factors of fresh layers in closed form, so that training begins near its end.

        What their factors were is lost, but for columns of W_down that are left over. Mixtures of
        experts stay as they are, and so do MLPs that go without a post-norm
        (design.md#fitted-start). A step that is not calibrated is calibrated first, on the longest
        rows of the first batch.

        Args:
            batches: a text, in batches of any collator; `npt_fast.training.fitted_start.TOKENS`
                tokens are enough.
            layers: fresh layers; by default those that are the base model's yet.

        Raises:
            TrainingError: the text gives no finite factors.
            DataError: there are no batches.
        """
        if not batches:
            raise DataError("there is nothing to fit layers to: give at least one batch")
        if not self.calibrated:
            self.calibrate(_longest_rows(batches[0]).to(self.model.device), layers)
        fresh = list(filter(self._is_fresh, trained_layers(self.model)))
        fit_layers(self.model, batches, fresh if layers is None else layers, self.sink_weight)

    def _is_fresh(self, layer: int) -> bool:
        views = components(self.model)[layer].split().items()
        return not any(view.any() for name, view in views if "W_b_up" in name)

    def _direct(
        self,
        index: int,
        seen: Activations,
        part: Parts,
        weights: Tensor,
        virtual: VirtualTokens | None,
        plan: VirtualPlan | None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of a layer's errors, and what is minimised in its place."""
        residual = trained_layers(self.model)[index].residual
        target = seen.target(residual)
        errors = direct_errors(part.mlp, target, self.loss) * weights
        if self.loss != "relative":
            return errors.sum(), errors.sum()
        typical = self._typical_square(index, seen.attention, weights)
        minimised = bounded_errors(errors, seen.attention, typical).sum()
        if self.sink_weight:
            sink = sink_errors(part.mlp, target, seen.output) * weights[:, 0]
            sink = bounded_errors(sink, seen.attention[:, 0], typical)
            minimised = minimised + self.sink_weight * sink.sum()
        if plan is not None and virtual is not None:
            assert part.virtual is not None and part.virtual_base is not None
            target = Activations(*virtual, part.virtual_base).target(residual)
            more = direct_errors(part.virtual, target, self.loss) * plan.weights
            more = bounded_errors(more, virtual.attention, typical)
            minimised = minimised + WEIGHT * more.sum()
        return errors.sum(), minimised

    def _typical_square(self, index: int, attention: Tensor, weights: Tensor) -> Tensor:
        """Median of the squared attention outputs of a layer, measured once."""
        if index not in self._typical:
            lengths = squared_length(attention)[weights > 0]
            self._typical[index] = lengths.median().clamp_min(torch.finfo(lengths.dtype).tiny)
        return self._typical[index]

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
        scaffolds: Mapping[int, Scaffold],
        parts: dict[int, Parts],
        *,
        all_layers: bool,
    ) -> Tensor:
        """Run the student from the first trained layer on (design.md#training-step).

        Trained layers compute from their scaffold and add the result to the student's state; other
        layers run unchanged.

        Args:
            teacher: pass over the same batch, with calls.
            stage: decides the input of the trained layers.
            scaffolds: scaffold of each trained layer, with the teacher's attention output.
            parts: filled with the output of each trained layer.
            all_layers: whether to run the layers after the last trained one too.

        Returns:
            Hidden states, normed if `all_layers`, ``(B, S, D)``.
        """
        layers = decoder_layers(self.model)
        trained = trained_layers(self.model)
        start = min(trained)
        state = teacher.activations[start].hidden
        for index in range(start, len(layers) if all_layers else max(trained) + 1):
            call = teacher.calls[index]
            if index not in trained:
                state = first(layers[index](state, **call))
                continue
            seen, scaffold = teacher.activations[index], scaffolds[index]
            # the same input gives the attention output that the teacher computed
            if index != start and stage.attention_ratio:
                read = _mixed(seen.hidden, state, stage.attention_ratio)
                scaffold = scaffold._replace(attention_input=read, attention=None)
            residual = _mixed(seen.hidden, state, stage.mlp_ratio)
            parts[index] = layers[index](residual, scaffold=scaffold._replace(state=state), **call)
            output = parts[index].output
            assert output is not None
            state = output
        if not all_layers:
            return state
        normed: Tensor = final_norm(self.model)(state)
        return normed


def _longest_rows(batch: Mapping[str, Tensor]) -> Tensor:
    """Ids of the longest rows, without their padding, ``(B, S)``."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return ids
    lengths = mask.sum(-1)
    longest = lengths == lengths.max()
    return ids[longest][:, mask[longest][0] > 0]


def _mixed(teacher: Tensor, student: Tensor, ratio: float) -> Tensor:
    if ratio in (0.0, 1.0):
        return student if ratio else teacher
    return torch.lerp(teacher, student, ratio)


def _norm_sums(norms: VectorNorms, weights: Tensor) -> Tensor:
    """Sums over tokens of |v_a|, |v_b| (first projection, mean over components), and similarity."""
    lengths = (squares[..., 0, :].clamp_min(0).sqrt().mean(-1) for squares in norms[:2])
    return torch.stack([(m * weights).sum() for m in (*lengths, norms.similarity)])
