"""``npt-fast compare``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

import npt_fast as npt
from npt_fast.cli.arguments import PathText
from npt_fast.cli.output import print_json, say
from npt_fast.config import BaseDType, Injection, InjectionMode, InjectionTime, parse_layers
from npt_fast.tables import markdown_table

if TYPE_CHECKING:
    from npt_fast.transfer.compare import Comparison, Token

Layers = Annotated[str | None, Parameter(validator=lambda _, text: text and parse_layers(text))]
Text = Annotated[str, Parameter(allow_leading_hyphen=True)]
Texts = Annotated[Sequence[str], Parameter(consume_multiple=True)]
Source = Annotated[str, Parameter(name="--from", allow_leading_hyphen=True)]


def compare(
    *,
    checkpoint: PathText,
    source: Source,
    prompt: Text,
    model_name: PathText = "meta-llama/Llama-3.2-1B",
    layers: Layers = None,
    sequence: bool = False,
    position: Text = "last",
    mode: InjectionMode = "replace",
    strength: float = 1.0,
    when: InjectionTime = "prefill",
    tokens: Annotated[int, Parameter(validator=Number(gte=1))] = 20,
    track: Texts = (),
    base_dtype: BaseDType = "auto",
    trust_remote_code: bool = False,
    cpu: bool = False,
    html: PathText | None = None,
    json: bool = False,
) -> None:
    """Continue a prompt with and without what another text makes of the weights.

    npt-fast compare --checkpoint experiments/merged_11_13_23 --from "The capital of France is"
    --prompt "The capital of Germany is" --track " Paris" " Berlin" --html report.html

    Parameters
    ----------
    checkpoint
        Checkpoint directory or weights file.
    source
        Text whose modulation is injected: that of its last token.
    prompt
        Text that is continued.
    model_name
        Base model: Hub id, folder, .gguf file, or smollm2-135m.
    layers
        Some of the checkpoint's layers, as 11,13 or 11-15; all if not given.
    sequence
        Inject the mean over the tokens of the text, as extract-seq does.
    position
        Where it goes: a number, 2:5, 1,4, last, first, all, at:WORD or after:WORD.
    mode
        replace: the text's weight changes for the token's own; blend, add: vectors of both are
        mixed, as in the original; exact-blend, exact-add: their weight changes are.
    strength
        How much.
    when
        Into the prompt, what is generated, or both.
    tokens
        Length of the continuations.
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
    from npt_fast.transfer.generate import Sampling

    model, tokenizer = load_model(
        checkpoint, model_name, layers, base_dtype, cpu, trust_remote_code
    )
    modulation = extract_text(model, tokenizer, source, sequence)
    found = library.compare(
        model, tokenizer, modulation, prompt,
        Injection(position=position, mode=mode, strength=strength, when=when),
        sampling=Sampling(tokens=tokens), tracked=track,
    )  # fmt: skip
    facts = {
        "checkpoint": checkpoint,
        "model": model_name,
        "injected": modulation.description,
        "mode": f"{mode}, strength {strength:g}, {when}",
    }
    if html is not None:
        from npt_fast.transfer.report import comparison_html, write

        write(comparison_html(found, facts), html)
    if json:
        print_json({**facts, **asdict(found)})
    else:
        for name, value in facts.items():
            say(f"{name.capitalize()}: {value}")
        _print(found)


def load_model(
    checkpoint: str,
    model_name: str,
    layers: str | None,
    base_dtype: BaseDType,
    cpu: bool,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """A base model with a checkpoint's layers, and its tokenizer."""
    from npt_fast.hf.base_model import load_base_model
    from npt_fast.training.evaluation import default_device

    model, tokenizer = load_base_model(
        model_name,
        dtype=base_dtype,
        device="cpu" if cpu else default_device(),
        trust_remote_code=trust_remote_code,
    )
    chosen = None if layers is None else parse_layers(layers)
    return npt.load(model, checkpoint, layers=chosen), tokenizer


def extract_text(model: Any, tokenizer: Any, text: str, sequence: bool) -> npt.Modulation:
    """What a text makes of the weights: at its last token, or the mean over all."""
    return npt.extract(
        model, tokenizer, text, position="all" if sequence else "last", reduce="mean"
    )


def _print(found: Comparison) -> None:
    hit = ", ".join(f"{place} {found.prompt[place]!r}" for place in found.positions)
    say(f"Hit: layers {found.layers}, tokens {hit or 'that are generated'}")
    say(f"Prompt: {''.join(found.prompt)}")
    say(f"  base:     {found.base_text}")
    say(f"  injected: {found.injected_text}")
    say(f"KL of the next token: {found.kl:.4f} nats")
    seen: dict[str, Token] = {t.text: t for t in (*found.tracked, *found.top, *found.top_base)}
    rows = [[repr(t.text), f"{t.before:.4f}", f"{t.after:.4f}"] for t in seen.values()]
    for line in markdown_table(["next token", "before", "after"], rows).splitlines():
        say(line)
    say(f"{found.seconds:.2f} s, {found.base_seconds:.2f} s without")
