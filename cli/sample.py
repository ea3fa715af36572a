"""``npt-fast sample``"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from npt_fast.cli.arguments import ModelOptions, PathText
from npt_fast.cli.output import print_json, progress_bar, say
from npt_fast.text_sources import DEFAULT_TOKENS

_MODEL = ModelOptions()


def sample(
    *,
    output: PathText,
    model: ModelOptions = _MODEL,
    tokens: Annotated[int, Parameter(validator=Number(gte=1, lte=100_000_000))] = DEFAULT_TOKENS,
    max_length: Annotated[int, Parameter(validator=Number(gte=2))] = 512,
    seed: int = 42,
    first_tokens: Annotated[Sequence[str], Parameter(consume_multiple=True)] = (),
    json: bool = False,
) -> None:
    """Sample a text from a base model, at temperature 1, and write it to a file for train --data.

    npt-fast sample --model_name smollm2-135m --tokens 100000 --output self.jsonl

    Parameters
    ----------
    output
        File to write, .jsonl: an object with the key text for each row. It replaces one of that
        name in one step.
    tokens
        Number of tokens; the last row is sampled to its end.
    max_length
        Tokens per row.
    seed
        Seed of the draws.
    first_tokens
        Texts that rows begin with, in turn, instead of the model's own first token.
    json
        Print what was written as JSON.
    """
    from npt_fast.training.sampled_file import check, write_rows
    from npt_fast.training.sampling import sample_text

    check(output)  # before minutes of sampling
    loaded, tokenizer = model.load()
    with progress_bar("tokens") as progress:
        ids = sample_text(
            loaded,
            tokenizer,
            tokens,
            max_length=max_length,
            seed=seed,
            first_tokens=first_tokens,
            progress=progress,
        )
    report = write_rows(ids, tokenizer, output)
    if json:
        print_json({"model_name": loaded.config.name_or_path, "seed": seed, **report})
        return
    say(f"Sampled {report['tokens']:,} tokens from {loaded.config.name_or_path}, seed {seed}")
    say(f"{report['same']} of {report['rows']} rows are read back as the same tokens")
    say(f"Text saved to: {output}")
