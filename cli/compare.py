"""``npt-fast compare``"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from npt_fast.cli.arguments import CheckpointOptions, InjectionOptions, PathText, SourceOptions
from npt_fast.cli.output import show_report
from npt_fast.config import InjectionTime
from npt_fast.tables import markdown_table
from npt_fast.transfer.positions import reached

if TYPE_CHECKING:
    from npt_fast.transfer.compare import Comparison, Token

_DEFAULT = InjectionOptions()


def compare(
    model: CheckpointOptions,
    *,
    texts: SourceOptions,
    injection: InjectionOptions = _DEFAULT,
    tokens: Annotated[int, Parameter(validator=Number(gte=1))] = 20,
    html: PathText | None = None,
    json: bool = False,
) -> None:
    """Continue a prompt with and without the modulation of another text.

    npt-fast compare --checkpoint experiments/merged_11_13_23 --from "The capital of France is"
    --prompt "The capital of Germany is" --track " Paris" " Berlin" --html report.html

    Parameters
    ----------
    tokens
        Number of tokens to generate.
    html
        HTML report to write; a single file without scripts.
    json
        Print everything as JSON.
    """
    from npt_fast.transfer import compare as library
    from npt_fast.transfer import report
    from npt_fast.transfer.generate import Sampling

    loaded, tokenizer = model.load()
    modulation = texts.extract(loaded, tokenizer)
    found = library.compare(
        loaded, tokenizer, modulation, texts.prompt, injection,
        sampling=Sampling(tokens=tokens), tracked=texts.track, base=True, reading=texts.reading,
    )  # fmt: skip
    facts = {
        "checkpoint": model.checkpoint,
        "model": loaded.config.name_or_path,
        "modulation": modulation.description,
        "reading": texts.reading,
        "mode": injection.mode,
        "strength": injection.strength,
        "when": injection.when,
    }
    lines = partial(_lines, injection.when)
    page = partial(report.comparison_html, when=injection.when)
    show_report(facts, found, lines, page, html=html, json=json)


def _lines(when: InjectionTime, found: Comparison) -> Iterator[str]:
    hit = reached(found.positions, found.prompt, when)
    yield f"Hit: layers {found.layers}, tokens {hit}"
    yield f"Prompt: {''.join(found.prompt)}"
    yield f"  no injection: {found.no_injection_text}"
    yield f"  injected:     {found.injected_text}"
    yield f"KL of the next token: {found.kl:.4f} nats"
    seen: dict[str, Token] = {
        t.text: t for t in (*found.tracked, *found.top, *found.no_injection_top)
    }
    rows = [
        [repr(t.text), f"{t.base:.4f}", f"{t.before:.4f}", f"{t.after:.4f}"] for t in seen.values()
    ]
    heads = ["next token", "base model", "no injection", "injected"]
    yield from markdown_table(heads, rows).splitlines()
    yield f"{found.seconds:.2f} s, {found.no_injection_seconds:.2f} s without"
