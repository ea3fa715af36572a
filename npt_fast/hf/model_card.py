"""``README.md`` of a checkpoint on the Hub and of an exported model: what it is, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from npt_fast.checkpoint.certificate import Certificate
from npt_fast.checkpoint.merged_layer import MergedLayer
from npt_fast.checkpoint.npt_config import Description
from npt_fast.errors import printable
from npt_fast.hf.exported import BaseReference
from npt_fast.hub import HubName
from npt_fast.tables import markdown_table

MODEL_CARD = "README.md"

_LOAD_EXPORTED = """\
Install npt_fast with the extra `hf`: `pip install 'npt_fast[hf]'`. Without it, transformers says
that it does not know the model type, {model_type}.

```python
import npt_fast  # tells transformers of the model type
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({place})
tokenizer = AutoTokenizer.from_pretrained({place})
```
"""
_LOAD_LAYERS = """\
Install npt_fast with the extra `hf`: `pip install 'npt_fast[hf]'`.

```python
import npt_fast as npt
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{base}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
npt.load(model, "{name}")
```

`npt-fast merge {name} ANOTHER --output merged` joins the layers with those of another checkpoint.
"""


def exported_card(
    layers: Sequence[MergedLayer],
    description: Description,
    model_type: str,
    place: BaseReference | None,
    *,
    trained_on: str | None = None,
    name: HubName | None = None,
) -> str:
    """The card of an exported model, in Markdown.

    Args:
        layers: the exported layers, with the checkpoint that they come from.
        description: what ``npt_config.json`` says about them.
        model_type: ``model_type`` of the exported ``config.json``.
        place: where the base model is; None if its weights are in the folder.
        trained_on: name of the base model that the layers were trained on, if it is recorded.
        name: where the model is on the Hub; None in a folder.
    """
    weights = "in this folder" if place is None else f"not here but in {_code(_named(place))}"
    where = '"path/to/this/folder"'
    if name is not None:
        where = f'"{name.repo}"' + (f', revision="{name.revision}"' if name.revision else "")
    load = _LOAD_EXPORTED.format(model_type=_code(model_type), place=where)
    about = f" Its weights are {weights}."
    if trained_on not in (None, description.base_name):
        about += f" The layers were trained on {_code(trained_on)}."
    return _card(layers, description, about, load)


def checkpoint_card(layers: Sequence[MergedLayer], description: Description, name: HubName) -> str:
    """The card of a checkpoint on the Hub, in Markdown.

    Args:
        layers: its layers.
        description: what ``npt_config.json`` says about them.
        name: where it is.
    """
    place = name.repo + (f"@{name.revision}" if name.revision else "")
    load = _LOAD_LAYERS.format(base=_hub_id(description) or "the/base-model", name=place)
    return _card(layers, description, "", load)


def _card(layers: Sequence[MergedLayer], description: Description, weights: str, load: str) -> str:
    base = _hub_id(description)
    lines = [
        *("---", "library_name: npt_fast", *([f"base_model: {base}"] if base else [])),
        *("tags:", "- neuro-plastic-transformer", "---", ""),
        "# A Neuro-Plastic Transformer",
        "",
        "A layer with NP weights turns its attention output into a low-rank change of its MLP "
        "weights, anew for every token.",
        "",
        f"The base model is {_code(description.base_name or 'not recorded')}.{weights}",
        "",
        "## NP layers",
        "",
        markdown_table(
            ("layer", "projections", "num_ranks", "rank", "residual", "factors", "step", "from"),
            [_row(layer) for layer in layers],
        ),
        "",
        "`from` is the checkpoint that the layer comes from, and those before it through merges.",
        "",
        *_fidelity(layers, description),
        "## Load it",
        "",
        load,
    ]
    return "\n".join(lines)


def _hub_id(description: Description) -> str | None:
    """The name of the base model if it has the form of one on the Hub, and can stand in code."""
    name = description.base_name or ""
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) else None


def _row(merged: MergedLayer) -> tuple[str, ...]:
    origin = merged.parts[0].origin.checkpoint
    record = origin.record(merged.layer)
    chained = [source for source in (record.source, *record.chain) if source]
    return (
        str(merged.layer),
        merged.architecture.modulation,
        str(merged.architecture.num_ranks),
        str(merged.architecture.rank),
        merged.residual or "not recorded",
        merged.factors or "float",
        "unknown" if merged.step is None else str(merged.step),
        _code(" <- ".join(chained)) if chained else "not merged",
    )


def _fidelity(layers: Sequence[MergedLayer], description: Description) -> Iterator[str]:
    """What evaluations measured: one table for each certificate."""
    found: dict[str, tuple[Certificate, list[int]]] = {}
    for layer, about in (description.layers or {}).items():
        if about.certificate is not None:
            key = repr(about.certificate)
            found.setdefault(key, (about.certificate, []))[1].append(layer)
    yield "## Fidelity"
    yield ""
    if not found:
        yield from ("Nobody has recorded how close these layers are to the base model.", "")
        return
    yield "KL is the mean of KL(base model, NPT model) in nats; ratio is that of perplexities."
    for certificate, of in found.values():
        texts = {certificate.data or "held-out text": certificate.held_out, **certificate.texts}
        yield ""
        yield f"Measured with the NP layers {list(certificate.layers)} on, for layers {of}:"
        yield ""
        yield markdown_table(
            ("text", "tokens", "KL", "ratio"),
            [
                (_code(name), str(text.tokens), _figure(text.kl), _figure(text.perplexity_ratio))
                for name, text in texts.items()
            ],
        )
    yield ""
    together = [merged.layer for merged in layers]
    if not any(list(certificate.layers) == together for certificate, _ in found.values()):
        yield from (f"Nobody has measured all layers of this folder, {together}, together.", "")


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _named(place: BaseReference) -> str:
    return " at commit ".join(filter(None, (place.hub_id or place.folder, place.revision)))


def _code(text: str) -> str:
    """Untrusted text in a line or cell, where it cannot be Markdown."""
    plain = printable(text).replace("`", "'").replace("|", "/")
    return f"`{plain[:300]}`"
