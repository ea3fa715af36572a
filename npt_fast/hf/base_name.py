"""Which base model is loaded for checkpoints, if the user does not name it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.checkpoint import Checkpoint
from npt_fast.checkpoint.own_files import CONFIG
from npt_fast.checkpoint.whole_model import NPT
from npt_fast.config import DEFAULT_MODEL
from npt_fast.errors import ModelError
from npt_fast.hf.exported import Exported, base_type
from npt_fast.hub import is_hub_name
from npt_fast.paths import exists


def base_name(
    given: str | None,
    checkpoints: Sequence[Checkpoint],
    say: Callable[[str], None],
    *,
    trust_remote_code: bool = False,
) -> str:
    """The base model to load: the given one, or else the one that the checkpoints record.

    Args:
        given: name of the base model; None if the user did not give it.
        checkpoints: checkpoints that will be loaded into it; without any, the model is
            `DEFAULT_MODEL`.
        say: gets a line that says which model is taken, if it was not given.
        trust_remote_code: whether the model's code will be run.

    Raises:
        CheckpointError: the ``config.json`` of an exported model cannot be read.
        ModelError: the checkpoints record several base models or none, or only a checkpoint names
            the model whose code would be run.
    """
    if given is not None:
        return given
    if not checkpoints:
        say(f"Note: the base model is {DEFAULT_MODEL}, the default; --model_name takes another")
        return DEFAULT_MODEL
    found: dict[str, str] = {}
    for one in checkpoints:
        if own := _own_base(one):
            found.setdefault(own, one.given)
    if not found:
        raise ModelError(
            f"{checkpoints[0].given}: does not record its base model; give it (--model_name)"
        )
    if len(found) > 1:
        records = " and ".join(f"{place} records {name}" for name, place in found.items())
        raise ModelError(f"the base model is not certain: {records}; give it (--model_name)")
    ((name, place),) = found.items()
    if trust_remote_code:  # a file may not choose whose code is run
        raise ModelError(
            f"{place}: names the base model {name}; to run its code, repeat the name (--model_name)"
        )
    say(f"Note: the base model is {name}, which {place} records")
    return name


def _own_base(checkpoint: Checkpoint) -> str | None:
    """The base model that a checkpoint records; an exported model holds or names its own."""
    config = checkpoint.directory and checkpoint.directory / CONFIG
    if is_hub_name(checkpoint.given):  # of an export there, only the NP layers are in the cache
        return checkpoint.model_name
    if config and exists(config) and CONFIG not in checkpoint.unread:
        content = strict_json.read_foreign(config)
        if base_type(content) is not None:
            base = Exported.parse(content.get(NPT), f"{config}: {NPT}").base
            return str(config.parent) if base is None else base.place(config.parent)
    return checkpoint.model_name
