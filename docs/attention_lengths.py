"""Draws attention_lengths.png: how large attention outputs are in layers of SmolLM2-135M.

    python -m docs.attention_lengths     # 20 thousand tokens of the demo's text

It prints the tokens of layer 23 that have the largest ones. The first token of each window, an
attention sink, is left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.convert import decoder_layers

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TEXT = Path(__file__).parent.parent / "examples" / "smollm2_self_text.jsonl"
PICTURE = Path(__file__).with_suffix(".png")
LAYERS = (1, 11, 13, 23, 28)
LENGTH, WINDOWS, SHOWN = 256, 80, 23


def windows(tokenizer: Any) -> Tensor:
    """The first windows of the text, ``(WINDOWS, LENGTH)``."""
    rows = [json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()]
    ids = [i for row in rows for i in tokenizer(row)["input_ids"]]
    return torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


@torch.no_grad()
def squares(model: Any, ids: Tensor) -> dict[int, Tensor]:
    """|a|² over the layer's median, without first tokens, ``(WINDOWS, LENGTH - 1)`` by layer."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    for layer in LAYERS:

        def keep(_: Any, args: Any, output: Any, layer: int = layer) -> None:
            found[layer].append(output[0][:, 1:].square().sum(-1))

        decoder_layers(model)[layer].self_attn.register_forward_hook(keep)
    for batch in ids.split(4):
        model.get_decoder()(batch, use_cache=False)
    return {n: (t := torch.cat(parts)) / t.median() for n, parts in found.items()}


def draw(found: dict[int, Tensor]) -> None:
    """Draw a histogram for each layer, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    bins = torch.logspace(-2, 2, 61).tolist()
    for layer, values in found.items():
        axes.hist(values.flatten().tolist(), bins=bins, histtype="step", label=f"layer {layer}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="|a|² over the layer's median",
        ylabel=f"tokens of {WINDOWS * (LENGTH - 1):,}",
        title="Attention outputs of SmolLM2-135M on its own text",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Draw the picture, and print the largest tokens of one layer."""
    model, tokenizer = load_base_model("smollm2-135m", dtype="float32")
    ids = windows(tokenizer)
    found = squares(model, ids)
    draw(found)
    for layer, values in found.items():
        shares = ", ".join(f"{(values > n).double().mean():.4%} above {n}" for n in (2, 5, 10, 20))
        print(f"layer {layer}: {shares}; largest {values.max():.1f}")
    largest: dict[str, list[float]] = defaultdict(list)
    values, where = found[SHOWN].flatten().topk(40)
    for value, token in zip(values.tolist(), ids[:, 1:].flatten()[where].tolist(), strict=True):
        largest[tokenizer.decode([token])].append(value)
    print(f"layer {SHOWN}, the 40 largest:")
    for text, sizes in sorted(largest.items(), key=lambda item: -max(item[1])):
        print(f"  {text!r}: {len(sizes)}, up to {max(sizes):.1f}")


if __name__ == "__main__":
    main()
