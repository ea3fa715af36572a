"""One pass of training: what the base model computes, what the trained layers make of it, losses.

A module whose forward returns the losses, so that DDP and FSDP wrap it like any model. It runs no
layer that no loss needs (DESIGN 8): with the layers' own errors alone, the base model up to the
last trained layer, and of the trained layers only their MLPs once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from npt_fast.config import LossKind
from npt_fast.functional import VectorNorms
from npt_fast.hf.convert import Parts, Scaffold, components, decoder_layers, disabled
from npt_fast.modules import NPComponent
from npt_fast.training.curriculum import Stage
from npt_fast.training.losses import (
    Agreement,
    agreement,
    direct_errors,
    fidelity_sum,
    sink_errors,
)

STUDENT = Stage("student", 0, 1.0, 1.0)


class Activations(NamedTuple):
    """What the base model computes in one trained layer, each ``(B, S, D)``.

    Attributes:
        hidden: the layer's input.
        attention: the output of its attention.
        mlp: the output of its MLP.
    """

    hidden: Tensor
    attention: Tensor
    mlp: Tensor

    @property
    def output(self) -> Tensor:
        """The layer's output."""
        return self.hidden + self.attention + self.mlp


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


class _Base(NamedTuple):
    """The base model's pass: trained layers, how every layer was called, final hidden states."""

    activations: dict[int, Activations]
    options: dict[int, dict[str, Any]]
    final: Tensor


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
        norms: bool = False,
        evaluate: bool = False,
    ) -> Losses:
        """Losses of one batch.

        Args:
            input_ids: ``(B, S)``.
            attention_mask: ``(B, S)``, 1 for tokens, 0 for padding; None without padding.
            stage: what the trained layers get as input.
            windows: numbers of the rows' texts, ``(B,)``: equal numbers, equal texts.
            norms: measure v_a and v_b.
            evaluate: compare predictions too.
        """
        trained = self._trained()
        first, last = min(trained), max(trained)
        to_the_end = evaluate or self.fidelity_weight > 0
        # before the first trained layer both models are one, so a lone one needs no student pass
        student_pass = to_the_end or (stage.name != "teacher" and len(trained) > 1)
        present = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = present.to(torch.float32)
        want_norms = norms or self.reg_weight > 0

        if not student_pass and windows is not None and self.cache.limit:
            activations = self.cache.get(windows, input_ids, attention_mask, self._base)
        else:
            base = self._base(input_ids, attention_mask, student_pass, to_the_end)
            activations = base.activations

        parts: dict[int, Parts] = {}
        if student_pass:
            final = self._student(base, stage, first, last, to_the_end, want_norms, parts)
        else:
            for index, seen in activations.items():
                scaffold = Scaffold(attention=seen.attention, norms=want_norms)
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
        if norms:
            losses = losses._replace(
                norms={n: _norm_sums(m, weights).detach() for n, m in measured.items()}
            )
        if student_pass and to_the_end:
            head = self.model.get_output_embeddings()
            if self.fidelity_weight:
                fidelity = fidelity_sum(final, base.final, head, weights, self.loss)
                losses = losses._replace(
                    total=losses.total + fidelity * self.fidelity_weight, fidelity=fidelity
                )
            if evaluate:
                compared = agreement(final, base.final, head, input_ids, weights)
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
        activations = self._base(input_ids, None).activations
        for layer in layers:
            w_down = self._trained()[layer].w_down
            u = activations[layer].attention.to(w_down.dtype) @ w_down
            w_down.div_(u.square().mean(-1).sqrt().median())

    def _trained(self) -> dict[int, NPComponent]:
        """NP layers by index; one that is off is a base layer."""
        return {n: part for n, part in components(self.model).items() if part.enabled}

    def _weighted(self, by_layer: Mapping[int, Tensor]) -> Tensor:
        return torch.stack([self.layer_weights[n] * value for n, value in by_layer.items()]).sum()

    @torch.no_grad()
    def _base(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        student_pass: bool = False,
        to_the_end: bool = False,
    ) -> _Base:
        """The base model, up to the last layer that is needed."""
        trained = self._trained()
        end = len(decoder_layers(self.model)) if to_the_end else max(trained) + 1
        decoder = self.model.get_decoder()
        with ExitStack() as stack:
            stack.enter_context(disabled(self.model))
            record = stack.enter_context(
                _recorded(self.model, trained, range(min(trained), end) if student_pass else ())
            )
            stack.enter_context(_truncated(decoder, end))
            final = decoder(
                input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        activations = {
            n: Activations(record.hidden[n], record.attention[n], record.mlp[n]) for n in trained
        }
        return _Base(activations, record.options, final)

    def _student(
        self,
        base: _Base,
        stage: Stage,
        first: int,
        last: int,
        to_the_end: bool,
        norms: bool,
        parts: dict[int, Parts],
    ) -> Tensor:
        """The trained model from its first trained layer on; fills `parts`, returns hidden states.

        Trained layers add what they compute from their scaffold to the running state; other layers
        run as they are (SPEC 5.3).
        """
        layers = decoder_layers(self.model)
        trained = self._trained()
        state = base.activations[first].hidden
        for index in range(first, len(layers) if to_the_end else last + 1):
            options = base.options[index]
            if index not in trained:
                state = layers[index](state, **options)
                continue
            teacher = base.activations[index]
            same = index == first or not stage.attention_ratio
            scaffold = Scaffold(
                attention_input=_mixed(teacher.hidden, state, stage.attention_ratio),
                attention=teacher.attention if same else None,
                norms=norms,
            )
            residual = _mixed(teacher.hidden, state, stage.mlp_ratio)
            parts[index] = layers[index](residual, scaffold=scaffold, **options)
            state = state + parts[index].mlp
            if trained[index].residual == "kept":
                state = state + parts[index].attention
        if not to_the_end:
            return state
        normed: Tensor = self.model.get_decoder().norm(state)
        return normed


class TeacherCache:
    """Activations of windows seen before, in main memory.

    Every window is computed by itself, so that its activations do not depend on which others were
    in its batch: training goes on bit for bit after a restart with an empty cache.

    Args:
        limit: bytes that may be held.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.hits = 0
        self.misses = 0
        self._held: dict[int, dict[int, Activations]] = {}

    def get(
        self, windows: Tensor, input_ids: Tensor, attention_mask: Tensor | None, compute: Any
    ) -> dict[int, Activations]:
        """Activations of a batch by layer; `compute` is `Distillation._base`."""
        rows = []
        for row, window in enumerate(windows.tolist()):
            found = self._held.get(window)
            if found is None:
                self.misses += 1
                one = slice(row, row + 1)
                mask = None if attention_mask is None else attention_mask[one]
                found = compute(input_ids[one], mask).activations
                size = sum(t.nbytes for seen in found.values() for t in seen)
                if self.size + size <= self.limit:
                    self.size += size
                    self._held[window] = {
                        n: Activations(*(t.cpu() for t in s)) for n, s in found.items()
                    }
            else:
                self.hits += 1
            rows.append(found)
        device = input_ids.device
        return {
            n: Activations(
                *(
                    torch.cat([t.to(device) for t in ts])
                    for ts in zip(*(row[n] for row in rows), strict=True)
                )
            )
            for n in rows[0]
        }


class _Record(NamedTuple):
    hidden: dict[int, Tensor]
    attention: dict[int, Tensor]
    mlp: dict[int, Tensor]
    options: dict[int, dict[str, Any]]


@contextmanager
def _recorded(model: nn.Module, trained: Mapping[int, Any], called: Any) -> Iterator[_Record]:
    """Keep what trained layers compute, and how the layers `called` were called.

    How depends on the model: positions, and masks that may differ from layer to layer.
    """
    record = _Record({}, {}, {}, {})
    layers = decoder_layers(model)
    with ExitStack() as stack:

        def on(handle: Any) -> None:
            stack.callback(handle.remove)

        for index in {*trained, *called}:

            def before(_: Any, args: Any, kwargs: Any, index: int = index) -> None:
                options = dict(kwargs)
                hidden = args[0] if args else options.pop("hidden_states")
                if index in trained:
                    record.hidden[index] = hidden
                record.options[index] = options

            on(layers[index].register_forward_pre_hook(before, with_kwargs=True))
        for index in trained:

            def attention(_: Any, args: Any, output: Any, index: int = index) -> None:
                record.attention[index] = output[0]

            def mlp(_: Any, args: Any, output: Tensor, index: int = index) -> None:
                record.mlp[index] = output

            on(layers[index].get_submodule("self_attn").register_forward_hook(attention))
            on(layers[index].get_submodule("mlp").register_forward_hook(mlp))
        yield record


@contextmanager
def _truncated(decoder: Any, end: int) -> Iterator[None]:
    """The decoder ends after layer ``end - 1``."""
    layers = decoder.layers
    decoder.layers = layers[:end]
    try:
        yield
    finally:
        decoder.layers = layers


def _mixed(teacher: Tensor, student: Tensor, ratio: float) -> Tensor:
    if ratio in (0.0, 1.0):
        return student if ratio else teacher
    return torch.lerp(teacher, student, ratio)


def _norm_sums(norms: VectorNorms, weights: Tensor) -> Tensor:
    """Sums over tokens of |v_a|, |v_b| (gate, mean over components) and of the similarity."""
    lengths = (squares[..., 0, :].clamp_min(0).sqrt().mean(-1) for squares in norms[:2])
    return torch.stack([(m * weights).sum() for m in (*lengths, norms.similarity)])
