"""``npt-fast trace``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from npt_fast.cli.arguments import ModelOptions, PathText, ReadingOptions, Text
from npt_fast.cli.output import print_json, say
from npt_fast.tables import markdown_table
from npt_fast.transfer.positions import named

if TYPE_CHECKING:
    from npt_fast.transfer.trace import Trace

_MODEL, _READING = ModelOptions(), ReadingOptions()


def trace(
    *,
    source: Annotated[str, Parameter(name="--from", allow_leading_hyphen=True)],
    target: Annotated[str, Parameter(name="--to", allow_leading_hyphen=True)],
    model: ModelOptions = _MODEL,
    reading: ReadingOptions = _READING,
    track: Annotated[Sequence[str], Parameter(consume_multiple=True)] = (),
    window: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    from_position: Annotated[str, Parameter(allow_leading_hyphen=True)] = "last",
    to_position: Annotated[str, Parameter(allow_leading_hyphen=True)] = "last",
    cross_relation: Text | None = None,
    json: bool = False,
    plot: PathText | None = None,
) -> None:
    """Find the layers that carry the difference between two prompts, before anything is trained.

    npt-fast trace --from "The capital of France is" --to "The capital of Germany is"

    Parameters
    ----------
    source
        Prompt to take attention outputs from.
    target
        Prompt to put them into, one layer at a time.
    track
        Texts whose first token is tracked; a leading space counts. If not given, the likeliest
        next token of each prompt is tracked.
    window
        Number of neighbouring layers to patch at a time.
    from_position
        Tokens to take outputs from: a number, 2:5, 1,4, last, first, all, at:WORD or after:WORD.
    to_position
        Tokens to put them into, written the same way.
    cross_relation
        Another relation's prompt, as "The official language of {} is", to see whether a layer
        carries the subject: {} becomes the word in which --from differs from --to.
    json
        Print everything as JSON.
    plot
        Picture to write, .png, .svg or .pdf: layers by tokens from the first that differs on,
        each patched by itself, whatever the positions above are.
    """
    from npt_fast.pictures.figure import check, save
    from npt_fast.transfer import trace as library

    if plot is not None:
        check(plot)  # before minutes of loading
    loaded, tokenizer = model.load()
    found = library.trace(
        loaded, tokenizer, source, target,
        tracked=track, window=window, source_position=from_position, target_position=to_position,
        cross_relation=cross_relation, reading=reading,
    )  # fmt: skip
    if plot is not None:
        each = library.trace_tokens(
            loaded, tokenizer, source, target, tracked=track, window=window, reading=reading
        )
        save(library.draw(each), plot)
    if json:
        decisive = [patch.layers for patch in found.decisive]
        strongest = found.strongest.layers
        more = {"decisive": decisive, "strongest": strongest, "finding": found.finding}
        print_json({**asdict(found), **more})
    else:
        _print(found)


def _print(found: Trace) -> None:
    for name, tokens, places, top, tracked in (
        ("From", found.source, found.source_positions, found.source_top, found.source_tracked),
        ("To", found.target, found.target_positions, found.target_top, found.target_tracked),
    ):
        where = named(places, tokens)
        likely = ", ".join(
            f"{text!r} {value:.4f}" for text, value in zip(found.tracked, tracked, strict=True)
        )
        say(f"{name}: {''.join(tokens)!r} at token {where}; likeliest {top!r}; {likely}")
    decisive = found.decisive
    heads = ["layer", *map(repr, found.tracked), "KL", "top-1"]
    body = [
        [
            patch.name,
            *(
                f"{before:.4f} -> {after:.4f}"
                for before, after in zip(found.target_tracked, patch.tracked, strict=True)
            ),
            f"{patch.kl:.4f}",
            f"{found.target_top!r} -> {patch.top!r}" if patch in decisive else repr(patch.top),
        ]
        for patch in found.patches
    ]
    for line in markdown_table(heads, body).splitlines():
        say(line)
    if decisive:
        what = "; ".join(f"{p.name} (top-1 {p.top!r}, KL {p.kl:.4f})" for p in decisive)
        say(f"Layers that change the answer: {what}")
    say(found.finding)
