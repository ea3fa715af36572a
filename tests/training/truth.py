"""A training step written out layer by layer in float64, and models to try it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

import npt_fast as npt
from npt_fast.config import LossKind, Residual
from npt_fast.hf.convert import components
from npt_fast.training.curriculum import Stage
from npt_fast.training.distillation import Distillation, Losses
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
            f"layer_{layer}_np.{name}": tensor.detach().double().clone().requires_grad_()
            for layer, part in components(model).items()
            for name, tensor in part.split().items()
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
        virtual_stride: int = 0,
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
            minimised = (error * mask).sum()
            if kind == "relative":
                bound = bounds(seen.attention, mask)
                minimised = (bounded(error, bound) * mask).sum()
                minimised = minimised + sink_weight * bounded(sink, bound[:, 0]).sum()
                minimised = minimised + self.virtual(layer, seen, mask, virtual_stride)
            found[f"regularization.{layer}"] = (squares * mask).sum()
            total = total + layer_weights.get(layer, 1.0) * (
                direct_weight * minimised + reg_weight * found[f"regularization.{layer}"]
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

    def virtual(self, layer: int, seen: Teacher, mask: Tensor, stride: int) -> Tensor:
        """Sum a tenth of the bounded errors of virtual tokens, one by one."""
        total = torch.zeros((), dtype=torch.float64)
        typical = typical_square(seen.attention, mask)
        for row, count in enumerate(mask.sum(1).tolist()):
            for order, host in enumerate(range(0, count, stride) if stride else ()):
                factor = 6.0 ** (order * (5**0.5 - 1) / 2 % 1)
                a = factor * seen.attention[row, (host + count // 2) % count][None]
                h = seen.before[row, host][None]
                target = self.mlp(layer, h + a) + (0 if self.residual == "kept" else a)
                error = ((self.mlp(layer, h, a) - target) ** 2).sum() / (target**2).sum()
                total = total + 0.01 * bounded(error, (typical / (a**2).sum()).clamp(max=1))
        return total

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(self.weights.values()))
        return dict(zip(self.weights, found, strict=True))


def typical_square(attention: Tensor, mask: Tensor) -> Tensor:
    """Median of the squared lengths of the real tokens' attention outputs."""
    lengths = (attention**2).sum(-1)[mask == 1].sort().values
    return lengths[(len(lengths) - 1) // 2]


def bounds(attention: Tensor, mask: Tensor) -> Tensor:
    return (typical_square(attention, mask) / (attention**2).sum(-1)).clamp(max=1)


def bounded(error: Tensor, bound: Tensor) -> Tensor:
    """Huber's loss of the root of the error, where it turns at the bound."""
    return torch.where(error.sqrt() > bound, bound * (2 * error.sqrt() - bound), error)


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
    virtual_stride: int = 0,
) -> None:
    """Assert that losses and gradients equal those of the truth."""
    options: dict[str, Any] = {
        "layer_weights": {layers[0]: 0.5},  # the others have weight 1
        "direct_weight": 3.0,
        "fidelity_weight": fidelity_weight,
        "reg_weight": reg_weight,
        "sink_weight": sink_weight,
        "virtual_stride": virtual_stride,
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


def outcome(step: Distillation, stage: Stage = TEACHER, **inputs: Tensor) -> list[Tensor]:
    """Return losses and gradients of one batch."""
    step.zero_grad()
    losses: Losses = step(**inputs, stage=stage)
    losses.total.backward()
    return [losses.total.detach(), *losses.direct.values(), *gradients(step.model).values()]
