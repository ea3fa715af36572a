"""``npt-fast models``"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from npt_fast.cli.arguments import PathText
from npt_fast.cli.output import print_json, say
from npt_fast.hf.model_types import MODEL_TYPE_HEADS, MODEL_TYPES, model_type_rows
from npt_fast.layer_names import ranges
from npt_fast.tables import markdown_table


def models(
    model: PathText | None = None,
    /,
    *,
    trust_remote_code: bool = False,
    json: bool = False,
) -> None:
    """Show which models, or which layers of one model, can have NP layers.

    npt-fast models meta-llama/Llama-3.2-1B

    Without MODEL, it lists model types. With one, it builds the model from its config, gives one
    layer of each kind random weights, and compares what that computes with what an NP layer
    assumes. The model's own weights are neither downloaded nor read.

    Parameters
    ----------
    model
        Base model: Hub id, folder, .gguf file, or smollm2-135m.
    trust_remote_code
        Run the code that comes with the model or that its files name, with all your rights.
    json
        Print JSON: model types, or each layer and what is in its way, which is null if nothing is.
    """
    if model is None:
        if json:
            print_json({name: asdict(about) for name, about in MODEL_TYPES.items()})
            return
        _print(MODEL_TYPE_HEADS, model_type_rows())
        say("Others may do, too: npt-fast models MODEL tries each kind of layer of a model")
        return
    from npt_fast.hf.examine import examine

    found = examine(model, trust_remote_code=trust_remote_code)
    if json:
        print_json({"model": model, "layers": found})
        return
    groups: dict[str | None, list[int]] = {}
    for layer, obstacle in found.items():
        groups.setdefault(obstacle, []).append(layer)
    _print(
        ["layers", "can be NP layers"],
        [
            (ranges(layers), "yes" if obstacle is None else f"no: {obstacle}")
            for obstacle, layers in groups.items()
        ],
    )
    say(f"{len(groups.get(None, ()))} of {len(found)} layers of {model} can be NP layers")


def _print(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    for line in markdown_table(heads, list(rows)).splitlines():
        say(line)
