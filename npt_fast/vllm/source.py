"""Where an engine finds the NP layers of a model, and whether it can serve them; no vLLM here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.npt_config import SIZES
from npt_fast.checkpoint.whole_model import NPT
from npt_fast.errors import ModelError
from npt_fast.hf.auto import open_exported
from npt_fast.hf.exported import ARCHITECTURE_PREFIX, Exported
from npt_fast.hf.fingerprint import stored_fingerprint
from npt_fast.schema import shown

ARCHITECTURES = tuple(
    f"{ARCHITECTURE_PREFIX}{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
)
"""What ``architectures`` of ``config.json`` may name for vLLM to serve it."""
OVERRIDE = "npt_checkpoint"
"""Key of ``--hf-overrides`` that names another NPT checkpoint than the exported one."""


class Source(NamedTuple):
    """The NP layers of a model.

    Attributes:
        checkpoint: the checkpoint that holds them.
        base: folder or Hub id of the base weights, and the commit; None if the model has them.
        fingerprint: fingerprint of the base model that they belong to, if it is recorded.
    """

    checkpoint: Checkpoint
    base: tuple[str, str | None] | None
    fingerprint: str | None


def open_source(model_config: Any) -> Source:
    """Find the NP layers of a model.

    Args:
        model_config: vLLM's ``ModelConfig``.

    Raises:
        CheckpointError: they cannot be read, or are not those that were exported.
        ModelError: the base model of an export is missing.
    """
    config, model = model_config.hf_config, model_config.model
    other, content = getattr(config, OVERRIDE, None), getattr(config, NPT, None)
    if other is None:
        exported, checkpoint = open_exported(model, config, revision=model_config.revision)
        base, fingerprint = exported.base, exported.description.fingerprint
    else:
        if not isinstance(other, str) or not other:
            raise ModelError(f"{OVERRIDE} must be the path of a checkpoint, not {shown(other)}")
        checkpoint = open_checkpoint(other)
        fingerprint = checkpoint.fingerprint
        base = Exported.parse(content, f"{model}: {NPT}").base if content else None
    return Source(checkpoint, (base.place(model), base.revision) if base else None, fingerprint)


def check(source: Source, model_config: Any, shards: int) -> None:
    """Raise ModelError unless an engine can serve the NP layers of `source`.

    Args:
        source: the NP layers.
        model_config: vLLM's ``ModelConfig``.
        shards: number of devices that share a layer.
    """
    checkpoint, config = source.checkpoint, model_config.hf_config
    for architecture in config.architectures or ():
        if architecture not in ARCHITECTURES:
            raise ModelError(
                f"{checkpoint.given}: vLLM serves NP layers in {', '.join(ARCHITECTURES)}, not in "
                f"{architecture}; load it with AutoModelForCausalLM"
            )
    sizes: Mapping[str, Any] = {name: getattr(config, name, None) for name in SIZES}
    checkpoint.check_sizes(sizes)
    for layer in checkpoint.modules:
        if checkpoint.record(layer).residual is None:
            raise ModelError(
                f"{checkpoint.given}: no file says whether layer {layer} keeps attention in the "
                "residual stream; npt.load it, which finds out, and npt.save and export that"
            )
    # a commit on the Hub is the same for ever
    folder = Path(source.base[0] if source.base else model_config.model)
    if source.fingerprint is not None and folder.is_dir():
        if stored_fingerprint(folder) not in (None, source.fingerprint):
            raise ModelError(
                f"{checkpoint.given}: belongs to another base model of the same sizes than "
                f"{folder}: its weights are others; give the right one, or export both with "
                "--allow_different_base if that is meant"
            )
    width = config.intermediate_size
    if width % shards:
        raise ModelError(
            f"{checkpoint.given}: tensor parallel size {shards} does not divide the MLP's width "
            f"{width}"
        )


def describe(source: Source) -> dict[str, str]:
    """What the NP layers compute, apart from their numbers, by layer."""
    checkpoint = source.checkpoint
    return {
        str(layer): f"{module.architecture}, {checkpoint.record(layer).residual}"
        for layer, module in checkpoint.modules.items()
    }
