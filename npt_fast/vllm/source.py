"""Where an engine finds the NP layers of a model, and whether it can serve them; no vLLM here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.npt_config import SIZES
from npt_fast.checkpoint.whole_model import NPT
from npt_fast.errors import ModelError
from npt_fast.hf.auto import open_exported
from npt_fast.hf.base_folder import download_weights
from npt_fast.hf.checkpoint import check_range
from npt_fast.hf.exported import ARCHITECTURE_PREFIX, Exported
from npt_fast.hf.fingerprint import stored_fingerprint
from npt_fast.hf.model_folder import weights_of
from npt_fast.paths import is_directory
from npt_fast.schema import shown
from npt_fast.vllm.layer import ARCHITECTURES

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


def check(source: Source, model_config: Any, shards: int, cache: str | None = None) -> None:
    """Raise ModelError unless an engine can serve the NP layers of `source`.

    Args:
        source: the NP layers.
        model_config: vLLM's ``ModelConfig``.
        shards: number of devices that share a layer.
        cache: folder into which the engine downloads; the Hub's cache if None.
    """
    checkpoint, config = source.checkpoint, model_config.hf_config
    check_architectures(checkpoint.given, config.architectures or ())
    sizes: Mapping[str, Any] = {name: getattr(config, name, None) for name in SIZES}
    checkpoint.check_sizes(sizes)
    for layer, module in checkpoint.modules.items():
        if module.architecture.modulation == "plain":
            raise ModelError(
                f"{checkpoint.given}: layer {layer} is plain, for an MLP without a gate, which "
                "vLLM's models here do not have"
            )
        if checkpoint.record(layer).residual is None:
            raise ModelError(
                f"{checkpoint.given}: no file says whether layer {layer} keeps attention in the "
                "residual stream; npt.load it, which finds out, and npt.save and export that"
            )
        check_range(module, model_config.dtype)
    if source.fingerprint is not None:
        place, revision = source.base or (model_config.model, model_config.revision)
        # the engine would fetch it, too
        folder = place if is_directory(Path(place)) else download_weights(place, revision, cache)
        if stored_fingerprint(Path(folder)) not in (None, source.fingerprint):
            raise ModelError(
                f"{checkpoint.given}: belongs to another base model of the same sizes than "
                f"{place}: its weights are others; give the right one, or export both with "
                "--allow_different_base if that is meant"
            )
    width = config.intermediate_size
    if width % shards:
        raise ModelError(
            f"{checkpoint.given}: tensor parallel size {shards} does not divide the MLP's width "
            f"{width}"
        )


def check_architectures(name: str, architectures: Sequence[str]) -> None:
    """Raise ModelError unless vLLM serves NP layers in models of these `architectures`.

    Args:
        name: name of the model, for messages.
        architectures: as in ``config.json``.
    """
    for architecture in architectures:
        if architecture not in ARCHITECTURES:
            raise ModelError(
                f"{name}: vLLM serves NP layers in {', '.join(ARCHITECTURES)}, not in "
                f"{architecture}; load it with AutoModelForCausalLM"
            )


def check_plain(model_config: Any) -> None:
    """Raise ModelError if a model that an engine takes for a plain one names NP layers.

    Args:
        model_config: vLLM's ``ModelConfig``.
    """
    config = model_config.hf_config
    if getattr(config, OVERRIDE, None) is not None or getattr(config, NPT, None) is not None:
        named = [f"{ARCHITECTURE_PREFIX}{architecture}" for architecture in config.architectures]
        raise ModelError(
            f"{model_config.model}: has NP layers, but is asked for as a plain model; "
            f'{{"architectures": {json.dumps(named)}}} in --hf-overrides asks for them'
        )


def has_pickles(model: str) -> bool:
    """Whether the base weights in the folder of an exported model are pickles."""
    found = weights_of(Path(model)) if is_directory(Path(model)) else []
    return any(path.suffix == ".bin" for path in found)


def describe(source: Source) -> dict[str, str]:
    """What the NP layers compute, apart from their numbers, by layer."""
    checkpoint = source.checkpoint
    return {
        str(layer): f"{module.architecture}, {checkpoint.record(layer).residual}"
        for layer, module in checkpoint.modules.items()
    }
