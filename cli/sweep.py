"""``npt-fast sweep``"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from npt_fast.cli.arguments import CheckpointOptions, PathText, SourceOptions, Text
from npt_fast.cli.output import show_report
from npt_fast.config import Injection, InjectionMode
from npt_fast.tables import markdown_table
from npt_fast.transfer.positions import named

if TYPE_CHECKING:
    from npt_fast.transfer.compare import Sweep


def sweep(
    model: CheckpointOptions,
    *,
    texts: SourceOptions,
    position: Text = "",
    each_token: bool = False,
    mode: InjectionMode = "replace",
    strength: Annotated[Sequence[float], Parameter(consume_multiple=True)] = (),
    html: PathText | None = None,
    json: bool = False,
) -> None:
    """Inject into every layer alone and into all layers, at several strengths or tokens.

    npt-fast sweep experiments/merged_11_13_23 --from "The capital of France is" --prompt "The
    capital of Germany is" --track " Paris" " Berlin" --html sweep.html

    Parameters
    ----------
    position
        Tokens of the prompt to inject into: a number, 2:5, 1,4, last, last_3, first, all, at:WORD
        or after:WORD; if not given, last, and with --each_token all.
    each_token
        Make one column per token of --position instead of one per strength, all at the first
        strength, or at 1 if none is given.
    mode
        How the modulation and a token's own weight changes combine, as for compare.
    strength
        Strengths, one column each; 0.25, 0.5, 1 and 2 if not given.
    html
        HTML report to write; a single file without scripts.
    json
        Print everything as JSON.
    """
    from npt_fast.transfer import compare as library
    from npt_fast.transfer import report

    position = position or ("all" if each_token else "last")
    strength = strength or ((1.0,) if each_token else (0.25, 0.5, 1.0, 2.0))
    loaded, tokenizer = model.load()
    modulation = texts.extract(loaded, tokenizer)
    found = library.sweep(
        loaded, tokenizer, modulation, texts.prompt, Injection(position=position, mode=mode),
        strengths=strength, tracked=texts.track, each_token=each_token, reading=texts.reading,
    )  # fmt: skip
    facts = {
        "checkpoint": model.checkpoint,
        "model": loaded.config.name_or_path,
        "modulation": modulation.description,
        "reading": texts.reading,
        "prompt": texts.prompt,
        "position": position,
        "mode": mode,
    }
    show_report(facts, found, _lines, report.sweep_html, html=html, json=json)


def _lines(found: Sweep) -> Iterator[str]:
    yield f"Hit: tokens {named(found.positions, found.tokens)}"
    tables = {"KL of the next token, nats": found.kl}
    for text, values in found.tracked.items():
        tables[f"Probability of {text!r}, {found.no_injection[text]:.4f} without injection"] = (
            values
        )
    for title, rows in tables.items():
        yield ""
        yield title
        body = [
            [",".join(map(str, layers)), *(f"{value:.4f}" for value in row)]
            for layers, row in zip(found.layers, rows, strict=True)
        ]
        yield from markdown_table(["layers", *found.columns], body).splitlines()
