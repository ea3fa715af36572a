"""``npt-fast sweep``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from npt_fast.cli.arguments import PathText
from npt_fast.cli.compare import Layers, Source, Text, Texts, extract_text, load_model
from npt_fast.cli.output import print_json, say
from npt_fast.config import BaseDType, Injection, InjectionMode
from npt_fast.tables import markdown_table

if TYPE_CHECKING:
    from npt_fast.transfer.compare import Sweep


def sweep(
    *,
    checkpoint: PathText,
    source: Source,
    prompt: Text,
    model_name: PathText = "meta-llama/Llama-3.2-1B",
    layers: Layers = None,
    sequence: bool = False,
    position: Text = "",
    each_token: bool = False,
    mode: InjectionMode = "replace",
    strength: Annotated[Sequence[float], Parameter(consume_multiple=True)] = (),
    track: Texts = (),
    base_dtype: BaseDType = "auto",
    trust_remote_code: bool = False,
    cpu: bool = False,
    html: PathText | None = None,
    json: bool = False,
) -> None:
    """Inject into every layer alone, and into all, at several strengths or tokens.

    Parameters
    ----------
    checkpoint
        Checkpoint directory or weights file.
    source
        Text whose modulation is injected: that of its last token.
    prompt
        Text that it is injected into.
    model_name
        Base model: Hub id, folder, .gguf file, or smollm2-135m.
    layers
        Some of the checkpoint's layers, as 11,13 or 11-15; all if not given.
    sequence
        Inject the mean over the tokens of the text, as extract-seq does.
    position
        Where it goes: a number, 2:5, 1,4, last, first, all, at:WORD or after:WORD; last if not
        given, and all with --each_token.
    each_token
        A column for each of these tokens, at the first strength.
    mode
        How, as for compare.
    strength
        Columns of the table; 0.25, 0.5, 1 and 2 if not given.
    track
        Texts whose first token is followed, with their space.
    base_dtype
        Of the base model's weights; auto is the checkpoint's on a GPU, else float32.
    trust_remote_code
        Run code that comes with the base model or that it names, with all your rights.
    cpu
        Use the CPU although there is a GPU.
    html
        Report to write: one file that needs nothing else.
    json
        Print everything as JSON.
    """
    from npt_fast.transfer import compare as library

    position = position or ("all" if each_token else "last")
    strength = strength or ((1.0,) if each_token else (0.25, 0.5, 1.0, 2.0))
    model, tokenizer = load_model(
        checkpoint, model_name, layers, base_dtype, cpu, trust_remote_code
    )
    modulation = extract_text(model, tokenizer, source, sequence)
    found = library.sweep(
        model, tokenizer, modulation, prompt,
        Injection(position=position, mode=mode), strengths=strength, tracked=track,
        each_token=each_token,
    )  # fmt: skip
    facts = {
        "checkpoint": checkpoint,
        "model": model_name,
        "injected": modulation.description,
        "prompt": prompt,
        "position": position,
        "mode": mode,
    }
    if html is not None:
        from npt_fast.transfer.report import sweep_html, write

        write(sweep_html(found, facts), html)
    if json:
        print_json({**facts, **asdict(found)})
    else:
        for name, value in facts.items():
            say(f"{name.capitalize()}: {value}")
        _print(found)


def _print(found: Sweep) -> None:
    tables = {"KL of the next token, nats": found.kl}
    for text, values in found.tracked.items():
        tables[f"Probability of {text!r}, {found.base[text]:.4f} with nothing injected"] = values
    for title, rows in tables.items():
        say()
        say(title)
        body = [
            [",".join(map(str, layers)), *(f"{value:.4f}" for value in row)]
            for layers, row in zip(found.layers, rows, strict=True)
        ]
        heads = ["layers", *found.columns]
        for line in markdown_table(heads, body).splitlines():
            say(line)
