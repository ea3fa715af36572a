"""Which types of transformers' causal language models are right, which are refused, and why.

    python -m tests.hf.survey [TYPE ...]

A layer is right if, with its NP component replaced by the ideal one, the converted model gives the
base model's logits, if the component reads what attention adds, and if it computes the base MLP at
dW = 0. All are judged by what hooks record in passes of the base model, not by what the library
believes of the block.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import npt_fast as npt
from npt_fast.called_mlp import first
from npt_fast.hf.convert import decoder_layers
from npt_fast.hf.families import Block, mlp_of
from npt_fast.moe_mlp import Mixture
from npt_fast.tables import markdown_table
from npt_fast.training.distillation import Distillation
from tests.hf.small_models import TYPES, build

IDS = torch.tensor([[3, 14, 15, 92, 6, 5, 35, 89]])


class Found(NamedTuple):
    """What became of one layer: ``"right"``, ``"refused"`` or ``"wrong"``, and the words for it."""

    outcome: str
    words: str = ""


def perturb(model: nn.Module) -> None:
    """Change norms, biases and scales, so that none of them can hide at 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.numel() == max(tensor.shape, default=1):
                tensor += 0.5 + 0.5 * torch.rand(tensor.shape, generator=generator)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(IDS, use_cache=False).logits
    return out


def judge(model: Any, layer: int, residual: Any) -> Found:
    """Convert one layer and say what became of it; the model is a base model again afterwards."""
    expected = logits(model)
    base = decoder_layers(model)[layer]
    try:
        npt.convert(model, npt.NPTConfig(layers=[layer], rank=4, residual=residual))
    except npt.ModelError as error:
        return Found("refused", str(error))
    try:
        return _compare(model, base, layer, residual, expected)
    finally:
        npt.unload(model)


def _compare(model: Any, layer: Any, index: int, residual: str, expected: Tensor) -> Found:
    part = mlp_of(layer)
    assert part is not None
    mlp: Any = getattr(layer, part.name.partition(".")[0])
    added: dict[str, Tensor] = {}
    block = layer.np_block
    with npt.disabled(model):
        handles = block.register_hooks(
            layer, lambda a: added.update(a=a), lambda m: added.update(m=m)
        )
        seen = _run(model, layer, mlp)
        for handle in handles:
            handle.remove()
        base = logits(model)
        # without what the MLP adds, the layer's output is its input and what attention adds
        handle = mlp.register_forward_hook(lambda *args: tree_map(torch.zeros_like, args[-1]))
        attention = _run(model, layer, mlp)["output"] - seen["input"]
        handle.remove()
    # what follows in the layer (Gemma 4) hides both, so that the table must be believed
    finished = type(block).finished is not Block.finished
    if finished:
        attention = added["a"]
    reads: list[Tensor] = []

    def given(output: Tensor) -> Any:
        return layer.np_component.register_forward_hook(
            lambda _, args, __: (reads.append(args[0]), output)[1]
        )

    ideal = seen["mlp"]
    linear = True
    if residual == "removed":  # then it adds the component's output, times a number
        # far larger than the layer's input, whose rounding would hide it
        large = ideal / ideal.norm() * seen["input"].norm() * 1000
        handle = given(large)
        moved = (_run(model, layer, mlp)["output"] - seen["input"]).double()
        handle.remove()
        scale = (moved * large).sum() / large.double().square().sum()
        linear = finished or _close(moved, scale * large)
        moved = added["a"] + added["m"] if finished else (seen["output"] - seen["input"]) / scale
        ideal = moved.to(ideal)

    # at dW = 0 the component is the base MLP; inputs from -6 to 6 tell activations apart
    x = 3 * torch.randn(1, 64, attention.shape[-1], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        if part.mixture is None:
            x = x / getattr(mlp, part.layout.names[0])(x).std() * 3
            same, truth = layer.np_component(x, x, mlp), mlp(x)
        else:  # whose experts read something else than its router
            same = layer.np_component(x, x, mlp, routed_by=x.flip(1))
            truth = _mixture(mlp, part.mixture, x, x.flip(1))
    handle = given(ideal)
    found = logits(model)
    compared = Distillation(model)(IDS, evaluate=True).agreement
    handle.remove()
    targets, rows = IDS[0, 1:], expected[0, :-1].double()
    perplexity = nn.functional.cross_entropy(rows, targets, reduction="sum")
    assert compared is not None
    checks = {
        "the layer, off, is not the base layer": torch.equal(base, expected),
        "the component at dW = 0 is not the MLP": _close(same, truth),
        "the component does not read what attention adds": all(
            _close(read, attention, seen["input"]) for read in reads
        ),
        "the layer does not add the component's output": linear,
        "the ideal component does not give the base model's logits": _close(found, expected),
        "evaluation has another base loss": _close(compared.base_loss, perplexity),
        "evaluation has another loss": _close(compared.loss, perplexity),
    }
    wrong = [words for words, passed in checks.items() if not passed]
    return Found("wrong", "; ".join(wrong)) if wrong else Found("right")


@torch.no_grad()
def _run(model: Any, layer: Any, mlp: Any) -> dict[str, Any]:
    """Input and output of a layer in a pass of the model, and its MLP's output if it is called."""
    seen: dict[str, Any] = {}

    def before(_: Any, args: Any, kwargs: Any) -> None:
        seen["input"] = args[0] if args else kwargs["hidden_states"]

    handles = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(lambda _, args, output: seen.update(output=first(output))),
        # a copy: Falcon adds to it in place
        mlp.register_forward_hook(lambda _, args, output: seen.update(mlp=first(output).clone())),
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


def _mixture(mlp: Any, mixture: Mixture, h: Tensor, routed_by: Tensor) -> Tensor:
    """Output of a mixture whose experts read `h`, which hooks give them."""

    def replaced(_: Any, args: Any) -> Any:
        return h.reshape(args[0].shape), *args[1:]

    handles = [getattr(mlp, name).register_forward_pre_hook(replaced) for name in mixture.parts]
    output = mlp(routed_by)
    for handle in handles:
        handle.remove()
    return first(output)


def _close(found: Tensor, truth: Tensor, rounded: Tensor | None = None) -> bool:
    """Whether both are the same, if the truth is a difference of tensors like `rounded`."""
    allowed = 1e-5 * truth.double().norm()
    if rounded is not None:
        allowed = allowed + torch.finfo(rounded.dtype).eps * rounded.double().norm()
    return bool((found.double() - truth.double()).norm() <= allowed)


def survey(
    model_type: str, layers: Sequence[int] | None = None, **changes: Any
) -> dict[int, Found]:
    """What becomes of layers of a small model of a type; -1 is a model without such a list.

    Args:
        model_type: type of the model.
        layers: indices of the layers; all if not given.
        changes: fields of the model's config.

    Raises:
        Exception: the type cannot be built small.
    """
    model = build(model_type, **changes)
    perturb(model)
    logits(model)  # whatever cannot even run is not built
    try:
        count = len(decoder_layers(model))
    except npt.ModelError as error:
        return {-1: Found("refused", str(error))}
    found = {}
    for layer in range(count) if layers is None else layers:
        found[layer] = judge(model, layer, "kept")
        if found[layer].outcome == "right":
            found[layer] = judge(model, layer, "removed")
    return found


def main(types: Sequence[str]) -> int:
    """Print the table, and return how many types have a layer that is wrong."""
    rows, counts = [], dict.fromkeys(("right", "in part", "refused", "wrong", "not built"), 0)
    for model_type in types:
        try:
            layers = survey(model_type)
        except Exception as error:  # whatever transformers says of sizes that do not fit
            found = {Found("not built", " ".join(str(error).split())[:100]): [0]}
            whole = "not built"
        else:
            found = {}
            for layer, outcome in layers.items():
                # without the list of layers and the layer's number, which are the same words
                words = outcome.words.partition(") ")[2] or outcome.words
                found.setdefault(Found(outcome.outcome, words), []).append(layer)
            outcomes = {outcome for outcome, _ in found}
            whole = (
                "wrong" if "wrong" in outcomes
                else "in part" if len(outcomes) > 1
                else outcomes.pop()
            )  # fmt: skip
        counts[whole] += 1
        rows += [
            [model_type, "" if layers == [-1] else ",".join(map(str, layers)), *outcome]
            for outcome, layers in found.items()
        ]
    print(markdown_table(["type", "layers", "outcome", "words"], rows))
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    return counts["wrong"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or TYPES) > 0)
