"""A training step against the same step written out layer by layer in float64.

The truth below (design.md#training-step) shares nothing with the code under test or with
transformers: attention, rotary positions and masks are spelled out, v_a and v_b are formed, and all
logits exist at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

import npt_fast as npt
from npt_fast.config import LossKind, Residual
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.training.curriculum import Stage
from npt_fast.training.distillation import Distillation, Losses
from npt_fast.training.teacher_pass import run_teacher
from tests.reference import delta, vectors
from tests.training import tiny

TEACHER = Stage("teacher", 10, 0.0, 0.0)
MIXED = Stage("mixed", 20, 0.3, 0.8)
STUDENT = Stage("student", 30, 1.0, 1.0)
STAGES = [pytest.param(stage, id=stage.name) for stage in (TEACHER, MIXED, STUDENT)]
LAYERS, LENGTH = 5, 10
# weights for which attention and MLPs are as large as what they are added to
LARGE: dict[str, Any] = {"initializer_range": 0.25}
MILD: dict[str, Any] = {"initializer_range": 0.1}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: the tensors are so small that a second one would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(**changes: Any) -> Any:
    return tiny.model(LAYERS, **{**LARGE, **changes})


def other_family(family: str) -> Any:
    """Qwen3 normalises queries and keys and has some sliding windows; Mistral has only those."""
    options: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 4,
        **LARGE,
    }
    config: Any
    if family == "qwen3":
        sliding: dict[str, Any] = {"use_sliding_window": True, "max_window_layers": 2}
        config = Qwen3Config(**options, **sliding, head_dim=12)  # not width / heads
    else:
        config = MistralConfig(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def converted(
    model: Any, layers: Sequence[int], residual: Residual = "removed", dtype: Any = torch.float64
) -> Any:
    """Convert layers to unlike architectures, as after a merge, so that they have an effect."""
    kinds: list[Any] = ["triple", "dual", "single"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for number, layer in enumerate(layers):
            npt.convert(
                model,
                npt.NPTConfig(
                    layers=[layer],
                    rank=4,
                    num_ranks=2 - number % 2,
                    modulation=kinds[number % 3],
                    residual=residual,
                ),
            )
        for part in components(model).values():
            for parameter in part.parameters():
                nn.init.normal_(parameter, std=0.1)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype)
    if dtype == torch.float64:
        _exact_norms(model)
    return model


def _exact_norms(model: nn.Module) -> None:
    """Replace transformers' norms, which round to float32 in any dtype, by torch's."""
    for module in list(model.modules()):
        child: Any
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.numel(), child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)


def batch(rows: int = 3, padded: bool = True) -> dict[str, Tensor]:
    """Return texts of 10, 7 and 4 tokens padded on the right, or all of 10 tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 257, (rows, LENGTH), generator=generator)
    if not padded:
        return {"input_ids": ids}
    mask = (torch.arange(LENGTH) < LENGTH - 3 * torch.arange(rows)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


# ---- the truth ----


class Teacher(NamedTuple):
    """Activations of a layer of the base model."""

    before: Tensor
    attention: Tensor
    mlp: Tensor


class Truth:
    """The base model, and the NPT model on top of its weights.

    Attributes:
        weights: of the NP layers, under the names of a checkpoint; leaves of the graph.
        losses: by name: ``total``, ``direct.1``, ``fidelity``, ``regularization.1``.
    """

    def __init__(self, model: Any, layers: Sequence[int], residual: Residual) -> None:
        self.config = model.config
        self.base = {
            name: tensor.double().clone()
            for name, tensor in model.state_dict().items()
            if "np_component" not in name
        }
        self.layers, self.residual = layers, residual
        self.weights = {
            f"layer_{layer}_np.{name}": tensor.double().clone().requires_grad_()
            for layer, part in components(model).items()
            for name, tensor in part.state_dict().items()
        }

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean_square = (x * x).mean(-1, keepdim=True)
        return x / (mean_square + self.config.rms_norm_eps).sqrt() * self.base[f"{name}.weight"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.base[f"{name}.weight"].T

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate pairs (i, i + half) by position * theta ** (-i / half), for positions 0, 1, ..."""
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        # angles in float32, as in transformers
        frequencies = 1 / theta ** (torch.arange(half, dtype=torch.float32) * 2 / (2 * half))
        angles = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos().double(), angles.sin().double()
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def attention(self, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        """Norm, attention and output projection of a layer, on its input."""
        stem = f"model.layers.{layer}.self_attn"
        x = self.norm(f"model.layers.{layer}.input_layernorm", hidden)

        def heads(name: str) -> Tensor:
            size = getattr(self.config, "head_dim", None) or 8
            return self.linear(f"{stem}.{name}_proj", x).unflatten(-1, (-1, size)).transpose(1, 2)

        q, k, v = heads("q"), heads("k"), heads("v")
        if f"{stem}.q_norm.weight" in self.base:
            q, k = self.norm(f"{stem}.q_norm", q), self.norm(f"{stem}.k_norm", k)
        q, k = self.rotate(q), self.rotate(k)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        positions = torch.arange(hidden.shape[1])
        distance = positions[:, None] - positions
        # padding attends to itself where a window holds nothing else: a mean of nothing is NaN
        seen = (distance >= 0) & (mask[:, None, None, :] == 1) | (distance == 0)
        types = getattr(self.config, "layer_types", None)
        if types[layer] == "sliding_attention" if types else self._window():
            seen = seen & (distance < self._window())
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        mixed = scores.softmax(-1) @ v
        return self.linear(f"{stem}.o_proj", mixed.transpose(1, 2).flatten(2))

    def _window(self) -> int:
        return getattr(self.config, "sliding_window", None) or 0

    def mlp(self, layer: int, hidden: Tensor, attention: Tensor | None = None) -> Tensor:
        """Output of the MLP on `hidden`, with weights that `attention` changes if it is given."""
        stem = f"model.layers.{layer}.mlp"
        x = self.norm(f"model.layers.{layer}.post_attention_layernorm", hidden)

        def projection(name: str, x: Tensor) -> Tensor:
            y = self.linear(f"{stem}.{name}_proj", x)
            if attention is None:
                return y
            return y + delta(self.weights, layer, name, attention, x)

        m = silu(projection("gate", x)) * projection("up", x)
        return projection("down", m)

    def teacher(self, ids: Tensor, mask: Tensor) -> tuple[list[Teacher], Tensor]:
        """Return the activations of each layer of the base model, and its logits."""
        state = self.base["model.embed_tokens.weight"][ids]
        seen = []
        for layer in range(self.config.num_hidden_layers):
            attention = self.attention(layer, state, mask)
            mlp = self.mlp(layer, state + attention)
            seen.append(Teacher(state, attention, mlp))
            state = state + attention + mlp
        return seen, self.logits(state)

    def logits(self, state: Tensor) -> Tensor:
        return self.linear("lm_head", self.norm("model.norm", state))

    def losses(
        self,
        ids: Tensor,
        mask: Tensor,
        stage: Stage,
        *,
        kind: LossKind,
        layer_weights: dict[int, float],
        direct_weight: float,
        fidelity_weight: float,
        reg_weight: float,
        sink_weight: float = 0.0,
    ) -> dict[str, Tensor]:
        """Sum losses over the real tokens, running all layers of both models, needed or not."""
        teacher, teacher_logits = self.teacher(ids, mask)
        q, q_mlp = stage.attention_ratio, stage.mlp_ratio
        state = teacher[0].before
        found: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=torch.float64)
        for layer, seen in enumerate(teacher):
            if layer not in self.layers:
                attention = self.attention(layer, state, mask)
                state = state + attention + self.mlp(layer, state + attention)
                continue
            attention = self.attention(layer, (1 - q) * seen.before + q * state, mask)
            y = self.mlp(layer, (1 - q_mlp) * seen.before + q_mlp * state, attention)
            state = state + y
            target = seen.attention + seen.mlp
            if self.residual == "kept":
                state, target = state + attention, seen.mlp
            error = ((y - target) ** 2).sum(-1)
            error = error / (target.shape[-1] if kind == "mse" else (target**2).sum(-1))
            squares = torch.zeros(mask.shape, dtype=torch.float64)
            for projection in ("gate", "up", "down"):
                pairs = vectors(self.weights, layer, projection, attention)
                for group in zip(*pairs, strict=True):  # v_a of all components, then v_b
                    squares = squares + torch.stack([(v**2).mean(-1) for v in group]).mean(0)
            found[f"direct.{layer}"] = (error * mask).sum()
            leaving = seen.before + seen.attention + seen.mlp
            sink = ((y - target)[:, 0] ** 2).sum(-1) / (leaving[:, 0] ** 2).sum(-1)
            added = sink_weight * sink.sum() if kind == "relative" else 0.0
            found[f"regularization.{layer}"] = (squares * mask).sum()
            total = total + layer_weights.get(layer, 1.0) * (
                direct_weight * (found[f"direct.{layer}"] + added)
                + reg_weight * found[f"regularization.{layer}"]
            )
        logits = self.logits(state)
        if kind == "mse":
            difference = ((logits - teacher_logits) ** 2).mean(-1)
        else:
            p, q_ = teacher_logits.softmax(-1), logits.softmax(-1)
            difference = (p * (p.log() - q_.log())).sum(-1)
        found["fidelity"] = (difference * mask).sum()
        found["total"] = total + fidelity_weight * found["fidelity"]
        return found

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(self.weights.values()))
        return dict(zip(self.weights, found, strict=True))


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of the NP parameters under their names in a checkpoint."""
    found: dict[str, Tensor] = {}
    for layer, part in components(model).items():
        joined = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
        assert joined.keys() == dict(part.named_parameters()).keys(), "a parameter has no gradient"
        found |= {f"layer_{layer}_np.{name}": grad for name, grad in part.split(joined).items()}
    return found


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    scale = expected.detach().abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def check(
    model: Any,
    layers: Sequence[int],
    stage: Stage,
    *,
    inputs: dict[str, Tensor],
    residual: Residual = "removed",
    kind: LossKind = "relative",
    fidelity_weight: float = 0.0,
    reg_weight: float = 0.0,
    sink_weight: float = 0.0,
) -> None:
    """Assert that losses and gradients equal those of the truth."""
    options: dict[str, Any] = {
        "layer_weights": {layers[0]: 0.5},  # the others have weight 1
        "direct_weight": 3.0,
        "fidelity_weight": fidelity_weight,
        "reg_weight": reg_weight,
        "sink_weight": sink_weight,
    }
    truth = Truth(model, layers, residual)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    expected = truth.losses(inputs["input_ids"], mask, stage, kind=kind, **options)
    found = Distillation(model, loss=kind, **options)(**inputs, stage=stage)
    found.total.backward()

    assert list(found.direct) == list(layers)
    for layer, value in found.direct.items():
        same(value, expected[f"direct.{layer}"])
    assert (found.fidelity is not None) == (fidelity_weight > 0)
    if found.fidelity is not None:
        same(found.fidelity, expected["fidelity"])
    assert (found.regularization is not None) == (reg_weight > 0)
    for layer, value in (found.regularization or {}).items():
        same(value, expected[f"regularization.{layer}"])
    same(found.total, expected["total"])
    assert found.norms is None and found.agreement is None
    actual = gradients(model)
    wanted = truth.gradients(expected["total"])
    assert actual.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.any(), f"{name}: a case that shows nothing"
        same(actual[name], gradient)
    trained = {id(p) for part in components(model).values() for p in part.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


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
    step = Distillation(model, fidelity_weight=0.7, reg_weight=0.2)
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


# ---- what is run ----


@contextmanager
def watched(model: Any) -> Iterator[dict[str, list[Any]]]:
    """Record the calls of layers, as base layers and as trained ones, and of what is in them.

    ``layers`` has their indices in the order of the calls, a trained one with an asterisk.
    """
    calls: dict[str, list[Any]] = {"layers": [], "attention": [], "lm_head": []}
    handles = []
    for index, layer in enumerate(decoder_layers(model)):

        def on_layer(layer: Any, args: Any, kwargs: Any, index: int = index) -> None:
            calls["layers"].append(f"{index}*" if "scaffold" in kwargs else f"{index}")

        def on_attention(module: Any, args: Any, index: int = index) -> None:
            calls["attention"].append(index)

        handles.append(layer.register_forward_pre_hook(on_layer, with_kwargs=True))
        handles.append(layer.get_submodule("self_attn").register_forward_pre_hook(on_attention))
    head = model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda *_: calls["lm_head"].append("head")))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("layers", "stage", "layer_calls", "attention_calls"),
    [
        # a single layer needs no student pass in any stage, and its attention is known
        pytest.param([2], TEACHER, "0 1 2 2*", "0 1 2", id="lone-teacher"),
        pytest.param([2], MIXED, "0 1 2 2*", "0 1 2", id="lone-mixed"),
        pytest.param([2], STUDENT, "0 1 2 2*", "0 1 2", id="lone-student"),
        pytest.param([0], STUDENT, "0 0*", "0", id="first-student"),
        # in the teacher stage no trained layer reads the output of another one
        pytest.param([1, 3], TEACHER, "0 1 2 3 1* 3*", "0 1 2 3", id="teacher"),
        pytest.param([0, 2, 4], TEACHER, "0 1 2 3 4 0* 2* 4*", "0 1 2 3 4", id="three-teacher"),
        # the student starts at the first trained layer, whose attention is the teacher's
        pytest.param([1, 3], MIXED, "0 1 2 3 1* 2 3*", "0 1 2 3 2 3", id="mixed"),
        pytest.param([1, 3], STUDENT, "0 1 2 3 1* 2 3*", "0 1 2 3 2 3", id="student"),
    ],
)
def test_no_layer_is_run_that_no_loss_needs(
    layers: list[int], stage: Stage, layer_calls: str, attention_calls: str
) -> None:
    model = converted(llama(), layers)
    step = Distillation(model, reg_weight=0.2)
    with watched(model) as calls:
        step(**batch(), stage=stage, measure_norms=True).total.backward()
    assert calls["layers"] == layer_calls.split()
    assert calls["attention"] == [int(index) for index in attention_calls.split()]
    assert calls["lm_head"] == []


@pytest.mark.parametrize(
    ("stage", "attention_calls"),
    [
        pytest.param(
            TEACHER, "0 1 2 3 4 2 4", id="teacher"
        ),  # attention is known in trained layers only
        pytest.param(STUDENT, "0 1 2 3 4 2 3 4", id="student"),
    ],
)
def test_logits_need_all_layers_from_the_first_trained_one(
    stage: Stage, attention_calls: str
) -> None:
    model = converted(llama(), [1, 3])
    step = Distillation(model, fidelity_weight=0.7)
    with watched(model) as calls:
        losses = step(**batch(), stage=stage)
    assert calls["layers"] == "0 1 2 3 4 1* 2 3* 4".split()
    assert calls["attention"] == [int(index) for index in attention_calls.split()]
    assert calls["lm_head"] == ["head"] * 2
    with watched(model) as calls:
        losses.total.backward()
    assert calls["layers"] == [], "only logits are made once more"


def test_no_more_logits_than_needed_when_evaluating() -> None:
    model = converted(llama(), [2])
    with watched(model) as calls, torch.no_grad():
        Distillation(model)(**batch(), evaluate=True)
    assert calls["layers"] == "0 1 2 3 4 2* 3 4".split()
    assert calls["lm_head"] == ["head"] * 2


# ---- cache of the teacher's activations ----


def outcome(step: Distillation, stage: Stage = TEACHER, **inputs: Tensor) -> list[Tensor]:
    """Return losses and gradients of one batch."""
    step.zero_grad()
    losses: Losses = step(**inputs, stage=stage)
    losses.total.backward()
    return [losses.total.detach(), *losses.direct.values(), *gradients(step.model).values()]


@pytest.mark.parametrize(
    ("layers", "stage"),
    [
        pytest.param([2], STUDENT, id="single layer"),  # in any stage
        pytest.param([1, 3], TEACHER, id="teacher"),
    ],
)
def test_the_cache_changes_nothing(layers: list[int], stage: Stage) -> None:
    model = converted(llama(), layers)
    plain = Distillation(model, reg_weight=0.2)
    cached = Distillation(model, reg_weight=0.2, cache_bytes=10**9)
    inputs = {**batch(), "windows": torch.tensor([7, 3, 11])}
    first = outcome(cached, stage, **inputs)
    assert (cached.cache.hits, cached.cache.misses) == (0, 3)
    for actual, expected in zip(first, outcome(plain, stage, **inputs), strict=True):
        same(actual, expected, 1e-12)
    with watched(model) as calls:
        second = outcome(cached, stage, **inputs)
    assert calls["layers"] == [f"{layer}*" for layer in layers], "no base model the second time"
    assert (cached.cache.hits, cached.cache.misses) == (3, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "bit for bit"
    assert plain.cache.hits == plain.cache.misses == plain.cache.size == 0


def test_a_stop_empties_the_cache_and_shows_in_no_bit() -> None:
    """Windows come back in another order; some are in the cache and some are not."""
    model = converted(llama(), [1, 3], dtype=torch.float32)
    kept = Distillation(model, cache_bytes=10**9)
    fresh = Distillation(model, cache_bytes=10**9)
    windows = torch.tensor([0, 1, 2])
    padded = {**batch(), "windows": windows}
    outcome(kept, **padded)  # the first epoch, before the stop
    for rows in ([2, 0], [0], [1, 1, 2]):
        epoch = {name: tensor[rows] for name, tensor in padded.items()}
        if rows == [0]:
            del epoch["attention_mask"]  # a batch without padding comes without a mask
        pairs = zip(outcome(kept, **epoch), outcome(fresh, **epoch), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), rows
    assert (kept.cache.hits, kept.cache.misses) == (2 + 1 + 3, 3)
    # after its restart the second one computed 2, 0 and then 1, once each
    assert (fresh.cache.hits, fresh.cache.misses) == (0 + 1 + 2, 3)


def test_the_cache_is_not_used_where_the_student_is_run() -> None:
    model = converted(llama(), [1, 3])
    step = Distillation(model, cache_bytes=10**9)
    inputs = {**batch(), "windows": torch.tensor([0, 1, 2])}
    outcome(step, MIXED, **inputs)
    step(**inputs, stage=TEACHER, evaluate=True)
    step(**batch(), stage=TEACHER)  # windows without numbers
    assert step.cache.hits == step.cache.misses == step.cache.size == 0


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
