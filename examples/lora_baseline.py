"""Bake modulations, and train LoRAs of their rank to the same end; print both as a Markdown table.

    python examples/lora_baseline.py experiments/merged_11_13_23 23

" Rome" shall follow "The capital of Germany is". `npt.bake` adds the modulation of "The capital of
Italy is" to the weights of the layers (here 23), without any training. A LoRA of the same rank, in
the same projections of the same model, is trained on the one prompt until " Rome" has a probability
of 0.5. What the changes do beyond that is measured on paraphrases of the prompt, on the capitals of
other countries and on unrelated sentences.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn.functional import cross_entropy

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.convert import disabled
from npt_fast.hf.tokenizer import first_token
from npt_fast.tables import markdown_table
from npt_fast.transfer.suite import default_suite, filled

PAIRS, OTHERS = 8, 4
LEARNING_RATE, MOST_STEPS, ENOUGH = 1e-3, 60, 0.5
ADAPTER = "edit"
HEADS = (
    "moved", "on top", "paraphrases: moved", "on top", "others: own", "on top", "unrelated: KL",
)  # fmt: skip


class Asked(NamedTuple):
    """One edit.

    Attributes:
        target: The subject of the prompt.
        source: The subject whose object shall follow the prompt.
        moved: First token of that object.
        others: First token of the object of each other subject.
    """

    target: str
    source: str
    moved: int
    others: dict[str, int]


class Effect(NamedTuple):
    """What one edit does; probabilities, shares of prompts, and nats."""

    moved: float
    top: float
    reworded: float
    reworded_top: float
    others: float
    others_top: float
    unrelated: float


class Lab:
    """A model with NP layers, and the default suite's capitals."""

    def __init__(self, checkpoint: str, layers: str) -> None:
        self.model, self.tokenizer = load_base_model("smollm2-135m", checkpoints=[checkpoint])
        npt.load(self.model, checkpoint, layers=[int(each) for each in layers.split(",")])
        self.suite = default_suite()
        (self.relation,) = self.suite.named(["capital"])
        self.rank = npt.status(self.model)[0].architecture.num_ranks
        with torch.no_grad():
            self.plain_unrelated = self.logits(self.suite.controls).log_softmax(-1)

    def logits(self, texts: Any) -> Tensor:
        """Logits of the token after each text, ``(texts, vocab)``, float32."""
        ids = [torch.tensor([self.tokenizer(text)["input_ids"]]) for text in texts]
        return torch.cat([self.model(each, use_cache=False).logits[:, -1] for each in ids]).float()

    @torch.no_grad()
    def edits(self) -> Iterator[Asked]:
        """Pairs of neighbours in a list of the countries whose capitals the base model knows."""
        countries = list(self.relation.pairs)
        with disabled(self.model):
            tops = self.logits(map(self.relation.about, countries)).argmax(-1).tolist()
        tokens = [first_token(self.tokenizer, " " + text) for text in self.relation.pairs.values()]
        known = {c: t for c, t, top in zip(countries, tokens, tops, strict=True) if t == top}
        ring = list(known)
        for place, target in enumerate(ring[:PAIRS]):
            source = ring[(place + 1) % len(ring)]
            later = [ring[(place + step) % len(ring)] for step in range(2, 2 + OTHERS)]
            yield Asked(target, source, known[source], {c: known[c] for c in later})

    @torch.no_grad()
    def effect(self, edit: Asked) -> Effect:
        """Measure the model as it is."""
        asked = self.logits([self.relation.about(edit.target)]).softmax(-1)
        reworded = self.logits(
            [filled(text, edit.target) for text in self.relation.paraphrases]
        ).softmax(-1)
        others = self.logits(map(self.relation.about, edit.others)).softmax(-1)
        own = torch.tensor(list(edit.others.values()))
        changed = self.logits(self.suite.controls).log_softmax(-1)
        plain = self.plain_unrelated
        return Effect(
            asked[0, edit.moved].item(), float(asked.argmax() == edit.moved),
            reworded[:, edit.moved].mean().item(),
            (reworded.argmax(-1) == edit.moved).float().mean().item(),
            others.gather(1, own[:, None]).mean().item(),
            (others.argmax(-1) == own).float().mean().item(),
            (plain.exp() * (plain - changed)).sum(-1).mean().item(),
        )  # fmt: skip

    @contextmanager
    def baked(self, edit: Asked, strength: float) -> Iterator[None]:
        """The source's modulation in the weights."""
        text = self.relation.about(edit.source)
        changed = npt.bake(self.model, npt.extract(self.model, self.tokenizer, text), strength)
        yield
        changed.undo()

    def add_lora(self) -> None:
        """Wrap the projections of the NP layers, which cannot be baked from then on."""
        names = "|".join(str(status.layer) for status in npt.status(self.model))
        inside = rf".*\.layers\.({names})\..*(gate|up|down)_proj"
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=inside)
        inject_adapter_in_model(config, self.model, ADAPTER)

    @contextmanager
    def trained(self, edit: Asked) -> Iterator[None]:
        """A LoRA that was trained on the edit's prompt; afterwards as it began."""
        parameters = [p for name, p in self.model.named_parameters() if f".{ADAPTER}." in name]
        start = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
        prompt, moved = [self.relation.about(edit.target)], torch.tensor([edit.moved])
        for _ in range(MOST_STEPS):
            loss = cross_entropy(self.logits(prompt), moved)
            if loss.neg().exp() >= ENOUGH:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield
        with torch.no_grad():
            for parameter, begun in zip(parameters, start, strict=True):
                parameter.copy_(begun)


def main() -> None:
    """Print a row for each change, the mean over all edits."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    torch.manual_seed(0)
    lab = Lab(*sys.argv[1:])
    edits = list(lab.edits())
    changes: dict[str, Callable[[Asked], Any]] = {
        "none": lambda edit: nullcontext(),
        "bake, strength 1": partial(lab.baked, strength=1.0),
        "bake, strength 2": partial(lab.baked, strength=2.0),
        f"LoRA of rank {lab.rank}, trained": lab.trained,
    }
    body = []
    for name, change in changes.items():
        if change == lab.trained:
            lab.add_lora()
        effects = []
        for edit in edits:
            with change(edit):
                effects.append(lab.effect(edit))
        means = map(statistics.mean, zip(*effects, strict=True))
        body.append((name, *(f"{mean:.3f}" for mean in means)))
    print(markdown_table(("change", *HEADS), body))
    print(f"\n{len(edits)} edits")


if __name__ == "__main__":
    main()
