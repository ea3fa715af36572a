"""``npt-fast evaluate``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

import npt_fast as npt
from npt_fast.cli.arguments import (
    CheckpointTexts,
    DataText,
    LayerOptions,
    ModelOptions,
    ReadingOptions,
    RowOptions,
)
from npt_fast.cli.output import certificate_lines, print_json, progress_bar, say
from npt_fast.text_sources import data_name

_MODEL, _LOADING, _READING, _ROWS = ModelOptions(), LayerOptions(), ReadingOptions(), RowOptions()


def evaluate(
    checkpoint: CheckpointTexts,
    *,
    model: ModelOptions = _MODEL,
    loading: LayerOptions = _LOADING,
    reading: ReadingOptions = _READING,
    data: DataText | None = None,
    rows: RowOptions = _ROWS,
    first_tokens: Annotated[Sequence[str], Parameter(consume_multiple=True)] = (),
    num_eval_samples: Annotated[int, Parameter(validator=Number(gte=1))] = 100,
    max_length: Annotated[int, Parameter(validator=Number(gte=2))] = 512,
    batch_size: Annotated[int, Parameter(validator=Number(gte=1))] = 4,
    prompt: Annotated[Sequence[str], Parameter(consume_multiple=True)] = (),
    max_new_tokens: Annotated[int, Parameter(validator=Number(gte=1))] = 30,
    json: bool = False,
) -> None:
    """Measure how closely a model with each checkpoint follows its base model on held-out text,
    and on four texts of other kinds: news, a story, code and French.

    npt-fast evaluate experiments/merged_11_13 --prompt "The capital of France is"

    Parameters
    ----------
    checkpoint
        Checkpoint directories, weight files, or ORG/REPO on the Hub, each measured on its own.
    data
        Text to measure on, given as for train; by default medium, or self where medium cannot be
        streamed. Only windows that train holds out are used.
    first_tokens
        Texts that rows of self begin with, given as for train.
    num_eval_samples
        Number of windows.
    max_length
        Tokens per window.
    batch_size
        Windows per batch.
    prompt
        Prompts to continue, with the base model and with each checkpoint; --chat is for them alone.
    max_new_tokens
        Tokens to generate for each prompt.
    json
        Print the results as JSON.
    """
    from npt_fast.training.evaluation import continue_text

    opened = [loading.open(path) for path in checkpoint]
    if data is None:
        from npt_fast.training.data import default_data
        from npt_fast.training.run import say as note

        data = default_data(note)
    loaded, tokenizer = model.load(opened)

    def continuations() -> list[str]:
        return [continue_text(loaded, tokenizer, p, max_new_tokens, reading) for p in prompt]

    results = []
    texts = {"base": continuations()}
    for path, layers_of in zip(checkpoint, opened, strict=True):
        loading.load(loaded, layers_of)
        with progress_bar("tokens") as progress:
            found = npt.evaluate(
                loaded,
                tokenizer,
                data,
                windows=num_eval_samples,
                max_length=max_length,
                batch_size=batch_size,
                special_tokens=reading.special_tokens,
                first_tokens=first_tokens,
                **asdict(rows),
                progress=progress,
            )
        layers = [status.layer for status in npt.status(loaded)]
        texts[path] = continuations()
        npt.unload(loaded)
        results.append({"checkpoint": path, "layers": layers, **asdict(found)})
        if not json:
            say(f"{path}: layers {layers}")
            say(
                f"  perplexity {found.perplexity:.3f}, base model {found.base_perplexity:.3f}, "
                f"ratio {found.perplexity_ratio:.4f}"
            )
            say(f"  KL {found.kl:.4f} nats, top-1 agreement {found.top1_agreement:.4f}")
            errors = ", ".join(
                f"layer {layer} {value:.4f}" for layer, value in found.direct.items()
            )
            say(f"  direct loss: {errors}")
            say(f"  {found.tokens:,} tokens")
            for line in certificate_lines(found.certificate(data_name(data))):
                say(line)
    if json:
        print_json({"results": results, "prompts": list(prompt), "texts": texts})
        return
    for index, text in enumerate(prompt):
        say(f"Prompt: {text}")
        for name, continued in texts.items():
            say(f"  {name}: {' '.join(continued[index].split())}")
