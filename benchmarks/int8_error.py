"""What int8 factors cost in accuracy and save in bytes, on a checkpoint and its base model.

    python -m npt_fast.benchmarks.int8_error MODEL CHECKPOINT [TEXT_FILE]

For each layer: the relative error of its MLP's output and of the weight changes' part of it,
against float64, with int8 factors in float64 and with everything in bfloat16. For the whole model
in bfloat16: KL divergence and top-1 agreement of int8 against bfloat16 factors. It is all computed
on a CPU, from the text's first 512 tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.functional import Factors, Int8Matrix, modulated_mlp
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.modules import NPComponent

TEXT = (
    "The capital of France is Paris, and the capital of Germany is Berlin. Both cities lie on "
    "rivers: Paris on the Seine, Berlin on the Spree. Trains between them take about eight hours, "
    "and most travellers change in Cologne or Frankfurt on the way. In winter the days are short "
    "in both places, but the museums are open and the cafes are full."
)


def outputs(
    component: NPComponent, mlp: Any, x: Tensor, h: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """The modulated MLP's output in float64, computed in `dtype`; `scale` is that of the change."""
    given = [
        w.to(dtype).dense() if isinstance(w, Int8Matrix) else w if w is None else w.to(dtype)
        for w in component.factors[:-1]
    ]
    given[3:] = [w if w is None else w * scale for w in given[3:]]
    gate, up, down = (p.weight.to(dtype) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return modulated_mlp(
        x.to(dtype),
        h.to(dtype),
        gate,
        up,
        down,
        Factors._make([*given, component.num_ranks]),
        activation=component.activation,
        impl="factored",
    ).double()


@torch.no_grad()
def main(name: str, checkpoint: str, text: str = TEXT) -> None:
    model, tokenizer = load_base_model(name, dtype="float32", device="cpu")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    npt.load(model, checkpoint)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, component in components(model).items():
        component.register_forward_pre_hook(
            lambda _, args, layer=layer: seen.update({layer: (args[0][0], args[1][0])})
        )
    model(ids, use_cache=False)
    wide, narrow = torch.float64, torch.bfloat16
    rows = {}
    for layer, component in components(model).items():
        mlp, (x, h) = decoder_layers(model)[layer].mlp, seen[layer]
        y = outputs(component, mlp, x, h, wide)
        change = y - outputs(component, mlp, x, h, wide, 0.0)
        rows[layer] = component, mlp, x, h, y, change, outputs(component, mlp, x, h, narrow)
    before = {status.layer: status for status in npt.status(model)}
    npt.quantize(model)
    print("layer  MiB of bf16, int8   error of y: int8, all bf16   of the change: int8, all bf16")
    for status in npt.status(model):
        component, mlp, x, h, y, change, in_bf16 = rows[status.layer]
        int8 = outputs(component, mlp, x, h, wide)
        errors = [
            f"{((found - y).norm() / norm):.1e}"
            for norm in (y.norm(), change.norm())
            for found in (int8, in_bf16)
        ]
        sizes = 2 * before[status.layer].parameters, status.nbytes
        print(f"{status.layer:5}", *(f"{size / 2**20:8.3f}" for size in sizes), *errors, sep="  ")

    logits = []
    kinds: tuple[Literal["int8"] | None, ...] = (None, "int8")
    for factors in kinds:
        model, _ = load_base_model(name, dtype="bfloat16", device="cpu")
        npt.load(model, checkpoint, factors=factors)
        logits.append(model(ids, use_cache=False).logits[0].double())
    bf16, int8 = (found.log_softmax(-1) for found in logits)
    kl = (bf16.exp() * (bf16 - int8)).sum(-1).mean()
    same = (bf16.argmax(-1) == int8.argmax(-1)).double().mean()
    print(f"{ids.numel()} tokens: KL {kl:.2e} nats, top-1 agreement {same:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:3], *(Path(path).read_text() for path in sys.argv[3:4]))
