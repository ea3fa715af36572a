"""A training step against the same step written out layer by layer in float64.

The truth below (design.md#training-step) shares nothing with the code under test or with
transformers: attention, rotary positions and masks are spelled out, v_a and v_b are formed, and all
logits exist at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import GraniteConfig, GraniteForCausalLM

import npt_fast as npt
from npt_fast.config import LossKind, Residual
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.training.curriculum import Stage
from npt_fast.training.distillation import Distillation
from npt_fast.training.teacher_pass import run_teacher
from tests.reference import vectors
from tests.training.truth import (
    LAYERS,
    MILD,
    MIXED,
    STAGES,
    STUDENT,
    TEACHER,
    Truth,
    batch,
    check,
    converted,
    gradients,
    llama,
    other_family,
    outcome,
    same,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_the_truth_is_the_base_model(family: str, padded: bool) -> None:
    """Before the truth judges others: its logits are those of transformers."""
    model = llama() if family == "llama" else other_family(family)
    model = converted(model, [2])
    inputs = batch(padded=padded)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    _, logits = Truth(model, [2], "removed").teacher(inputs["input_ids"], mask)
    with torch.no_grad(), npt.disabled(model):
        expected = model(**inputs, use_cache=False).logits
    same(logits[mask == 1], expected[mask == 1], 1e-12)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("fidelity_weight", [0.0, 0.7], ids=["", "fidelity"])
@pytest.mark.parametrize("reg_weight", [0.0, 0.2], ids=["", "regularization"])
@pytest.mark.parametrize("residual", ["removed", "kept"])
@pytest.mark.parametrize("layers", [[0], [2], [1, 3], [0, 2, 4]], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_gradients(
    stage: Stage,
    layers: list[int],
    residual: Residual,
    reg_weight: float,
    fidelity_weight: float,
    padded: bool,
) -> None:
    check(
        converted(llama(), layers, residual),
        layers,
        stage,
        inputs=batch(padded=padded),
        residual=residual,
        reg_weight=reg_weight,
        fidelity_weight=fidelity_weight,
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("residual", ["removed", "kept"])
def test_the_originals_losses(stage: Stage, residual: Residual) -> None:
    """``mse``, in the direct losses and the fidelity loss."""
    check(
        converted(llama(), [1, 3], residual),
        [1, 3],
        stage,
        inputs=batch(),
        residual=residual,
        kind="mse",
        fidelity_weight=0.7,
        reg_weight=0.2,
    )


@pytest.mark.parametrize("kind", ["relative", "mse"])
@pytest.mark.parametrize("residual", ["removed", "kept"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_weight_of_first_tokens(stage: Stage, residual: Residual, kind: LossKind) -> None:
    """Sink errors are in the total, not in the reported losses; the original's loss has none."""
    check(
        converted(llama(), [1, 3], residual),
        [1, 3],
        stage,
        inputs=batch(),
        residual=residual,
        kind=kind,
        fidelity_weight=0.7,
        sink_weight=5.0,
    )


@pytest.mark.parametrize("kind", ["relative", "mse"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("residual", ["removed", "kept"])
@pytest.mark.parametrize("stage", STAGES)
def test_virtual_tokens(
    stage: Stage, residual: Residual, stride: int, padded: bool, kind: LossKind
) -> None:
    """They are in the total, not in the reported losses; the original's loss has none."""
    check(
        converted(llama(), [1, 3], residual),
        [1, 3],
        stage,
        inputs=batch(padded=padded),
        residual=residual,
        kind=kind,
        reg_weight=0.2,
        sink_weight=5.0,
        virtual_stride=stride,
    )


@pytest.mark.parametrize(("attention_ratio", "mlp_ratio"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.4)])
def test_ratios_at_their_ends(attention_ratio: float, mlp_ratio: float) -> None:
    """Attention reads as in one stage and the MLP as in another, so other work can be skipped."""
    stage = Stage("mixed", 20, attention_ratio, mlp_ratio)
    check(converted(llama(), [1, 3]), [1, 3], stage, inputs=batch(), reg_weight=0.2)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("fidelity_weight", [0.0, 0.7], ids=["", "fidelity"])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@pytest.mark.parametrize("stage", STAGES)
def test_other_families(stage: Stage, family: str, fidelity_weight: float, padded: bool) -> None:
    """Masks differ between layers, and windows are shorter than the text."""
    check(
        converted(other_family(family), [1, 3]),
        [1, 3],
        stage,
        inputs=batch(padded=padded),
        fidelity_weight=fidelity_weight,
        reg_weight=0.2,
    )


def test_padding_changes_nothing() -> None:
    """A text gives the same alone and in a batch of longer ones."""
    model = converted(llama(), [1, 3])
    step = Distillation(model, fidelity_weight=0.7, reg_weight=0.2, virtual_stride=2)
    together = batch()
    alone: list[Tensor] = []
    for ids, mask in zip(together["input_ids"], together["attention_mask"], strict=True):
        alone.append(step(ids[mask == 1][None], stage=MIXED).total)
    same(step(**together, stage=MIXED).total, torch.stack(alone).sum())


def evaluation(model: Any, layers: Sequence[int]) -> None:
    """Evaluation is in student mode, whatever the losses; torch's cross-entropy is the truth."""
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        found = Distillation(model)(**inputs, evaluate=True)
        ours = model(**inputs, use_cache=False).logits
    truth = Truth(model, layers, "removed")
    _, theirs = truth.teacher(ids, mask)
    expected = truth.losses(
        ids,
        mask,
        STUDENT,
        kind="relative",
        layer_weights={},
        direct_weight=1.0,
        fidelity_weight=0.0,
        reg_weight=0.0,
    )
    assert list(found.direct) == list(layers)
    same(found.total, expected["total"])
    agreement = found.agreement
    assert agreement is not None and found.fidelity is None
    same(agreement.kl, expected["fidelity"])
    labels = ids.masked_fill(mask == 0, -100)[:, 1:].flatten()
    for loss, logits in ((agreement.loss, ours), (agreement.base_loss, theirs)):
        flat = logits[:, :-1].flatten(0, 1)
        same(loss, nn.functional.cross_entropy(flat, labels, reduction="sum"))
    assert (agreement.predicted, agreement.tokens) == (9 + 6 + 3, 10 + 7 + 4)


@pytest.mark.parametrize("layers", [[2], [1, 3]], ids=str)
def test_evaluation(layers: list[int]) -> None:
    evaluation(converted(llama(), layers), layers)


def test_predictions_of_a_model_that_scales_its_logits() -> None:
    """Granite divides logits: loss, KL and fidelity are those of its own logits."""
    config = GraniteConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = converted(GraniteForCausalLM(config).eval(), [1])
    inputs = batch(padded=False)
    ids = inputs["input_ids"]
    with torch.no_grad():
        found = Distillation(model, fidelity_weight=1.0)(**inputs, evaluate=True)
        ours = model(ids, use_cache=False).logits
        with npt.disabled(model):
            theirs = model(ids, use_cache=False).logits
    kl = nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert found.agreement is not None and found.fidelity is not None
    same(found.agreement.kl, kl)
    same(found.fidelity, kl)
    labels = ids[:, 1:].flatten()
    for loss, logits in ((found.agreement.loss, ours), (found.agreement.base_loss, theirs)):
        same(
            loss, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
        )


@pytest.mark.parametrize(("off", "left"), [(1, 3), (3, 1)])
def test_a_layer_that_is_off_is_a_base_layer(off: int, left: int) -> None:
    model = converted(llama(), [1, 3])
    with npt.disabled(model, layers=[off]):
        evaluation(model, [left])
        assert [layer.enabled for layer in npt.status(model)] == [off != 1, off != 3]


def test_measures_of_the_vectors() -> None:
    """|v_a|, |v_b| of gate and the cosine of v_a with attention are means over components."""
    model = converted(llama(), [2])  # triple, with two components
    inputs = batch()
    truth = Truth(model, [2], "removed")
    seen = truth.teacher(inputs["input_ids"], inputs["attention_mask"])[0][2]
    pairs = vectors(truth.weights, 2, "gate", seen.attention)
    assert len(pairs) == 2
    per_token = torch.stack(
        [
            torch.stack([v_a.norm(dim=-1) for v_a, _ in pairs]).mean(0),
            torch.stack([v_b.norm(dim=-1) for _, v_b in pairs]).mean(0),
            torch.stack(
                [nn.functional.cosine_similarity(v_a, seen.attention, dim=-1) for v_a, _ in pairs]
            ).mean(0),
        ]
    )
    found = Distillation(model)(**inputs, stage=TEACHER, measure_norms=True).norms
    assert found is not None and list(found) == [2] and not found[2].requires_grad
    same(found[2], (per_token * inputs["attention_mask"]).sum((-1, -2)))


@pytest.mark.parametrize("reg_weight", [0.0, 0.1])
def test_measures_of_the_vectors_keep_nothing_for_backward(reg_weight: float) -> None:
    """And they change no gradient."""
    model = converted(llama(), [1, 2])
    step = Distillation(model, reg_weight=reg_weight)

    def saved(measure_norms: bool) -> tuple[list[torch.Size], list[Tensor]]:
        shapes: list[torch.Size] = []

        def pack(tensor: Tensor) -> Tensor:
            shapes.append(tensor.shape)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            total = step(**batch(), stage=TEACHER, measure_norms=measure_norms).total
        model.zero_grad()
        total.backward()
        return shapes, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (without, expected), (with_norms, found) = saved(False), saved(True)
    assert with_norms == without
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


# ---- precision, and the model after a step ----


def close(low: list[Tensor], exact: list[Tensor]) -> None:
    """Compare in low precision: losses are means of many numbers, entries of gradients are not."""
    for actual, expected in zip(low, exact, strict=True):
        assert actual.isfinite().all()
        allowed = 0.1 if expected.ndim else 0.02
        assert (actual - expected).norm() < allowed * expected.norm()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(stage: Stage, dtype: torch.dtype) -> None:
    model = converted(llama(**MILD), [1, 3], dtype=torch.float32)
    step = Distillation(model, fidelity_weight=0.7, reg_weight=0.2)
    exact = outcome(step, stage, **batch())
    step.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        losses = step(**batch(), stage=stage)
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    close([losses.total, *losses.direct.values(), *gradients(model).values()], exact)


def test_a_bfloat16_base_model() -> None:
    """NP layers, errors and gradients are float32."""
    exact = outcome(
        Distillation(converted(llama(**MILD), [1, 3], dtype=torch.float32)), MIXED, **batch()
    )
    model = converted(llama(**MILD), [1, 3], dtype=torch.bfloat16)
    for part in components(model).values():
        part.float()
    low = outcome(Distillation(model), MIXED, **batch())
    assert all(value.dtype == torch.float32 for value in low)
    close(low, exact)


def test_targets_are_not_random() -> None:
    """Trainer puts modules in training mode, where a base model may have dropout in attention."""
    model = converted(llama(attention_dropout=0.5), [1, 3])
    step = Distillation(model, fidelity_weight=0.7)
    expected = outcome(step.eval(), STUDENT, **batch())
    found = outcome(step.train(), STUDENT, **batch())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("raises", [False, True], ids=["", "raises"])
@pytest.mark.parametrize("where", ["base", "student"])
def test_the_model_is_as_before(raises: bool, where: str) -> None:
    model = converted(llama(), [1, 3])
    step = Distillation(model, fidelity_weight=0.7)
    layers = decoder_layers(model)
    with torch.no_grad():
        before = model(**batch()).logits

    def interrupt(module: Any, args: Any, kwargs: Any) -> None:
        if raises and ("scaffold" in kwargs) == (where == "student"):
            raise KeyboardInterrupt

    handle = layers[3].register_forward_pre_hook(interrupt, with_kwargs=True)
    own = hooks(model)
    if raises:
        with pytest.raises(KeyboardInterrupt):
            step(**batch(), stage=STUDENT)
    else:
        step(**batch(), stage=STUDENT)
    assert hooks(model) == own
    handle.remove()
    assert decoder_layers(model) is layers and len(layers) == LAYERS
    assert [layer.enabled for layer in npt.status(model)] == [True, True]
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, before)


# ---- calibration ----


def test_a_fresh_layer_starts_at_a_scale_that_is_the_models() -> None:
    model = llama()
    npt.convert(model, npt.NPTConfig(layers=[1, 3], rank=4, num_ranks=2))
    before = {n: part.w_down.detach().clone() for n, part in components(model).items()}
    inputs = batch(padded=False)
    Distillation(model).calibrate(inputs["input_ids"], [3])
    attention = run_teacher(model, inputs["input_ids"], None).activations[3].attention
    u = attention @ components(model)[3].w_down
    assert (u**2).mean(-1).sqrt().median().item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(components(model)[1].w_down, before[1])  # was not to be calibrated
    ratio = components(model)[3].w_down / before[3]
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean().item()))
