"""Exported models in transformers' Auto classes.

An exported model is loaded by transformers' own class, such as LlamaForCausalLM, and then by
`npt_fast.load`. So it equals a base model that is loaded and converted by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.tensor_source import SAFETENSORS_WEIGHTS
from npt_fast.checkpoint.whole_model import NPT
from npt_fast.errors import CheckpointError, ModelError
from npt_fast.hf.base_folder import base_weights
from npt_fast.hf.exported import MODEL_TYPE_PREFIX, Exported
from npt_fast.hf.model_folder import check_files
from npt_fast.hf.model_types import MODEL_TYPES
from npt_fast.hf.tokenizer import library_errors
from npt_fast.paths import exists, is_directory, path_errors

_CONFIG_PREFIX = "NPT_"  # a pickled config, as engines send to their workers, finds its class by it
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def register(types: Any) -> None:
    """Enter the model types of exported models into transformers' ``CONFIG_MAPPING``.

    Their classes are made when a ``config.json`` asks for one: importing all would take seconds.
    """
    for base in MODEL_TYPES:
        if base in types:
            reader = type(f"{_CONFIG_PREFIX}{base}", (_Reader,), {"base": base})
            types.register(MODEL_TYPE_PREFIX + base, reader, exist_ok=True)


class _Reader:
    """Stands in the table for a config class."""

    base: str

    @classmethod
    def from_dict(cls, content: dict[str, Any], **options: Any) -> Any:
        own = {key: value for key, value in content.items() if key != "model_type"}
        return config_class(cls.base).from_dict(own, **options)


@cache
def config_class(base: str) -> Any:
    """The config class of exported models of a type, such as ``"llama"``.

    It is the base model's, also in its ``model_type``, by which libraries treat models specially.
    Only in files is the type another one.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    parent = CONFIG_MAPPING[base]

    def to_dict(self: Any) -> dict[str, Any]:
        content: dict[str, Any] = parent.to_dict(self)
        return {**content, "model_type": MODEL_TYPE_PREFIX + base}

    own = type(_CONFIG_PREFIX + base, (parent,), {"to_dict": to_dict, "__module__": __name__})
    models: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    models.register(own, NPTForCausalLM, exist_ok=True)
    if parent in TOKENIZER_MAPPING:
        TOKENIZER_MAPPING.register(own, TOKENIZER_MAPPING[parent], exist_ok=True)
    return own


def __getattr__(name: str) -> Any:
    base = name.removeprefix(_CONFIG_PREFIX)
    if name.startswith(_CONFIG_PREFIX) and base in MODEL_TYPES:
        return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open_exported(exported: str | Path, config: Any, **hub: Any) -> tuple[Exported, Checkpoint]:
    """The NP layers of an exported model, of which no tensor data is kept.

    Args:
        exported: folder or Hub id of the exported model.
        config: config of the exported model.
        **hub: where and how it is found on the Hub, as for transformers' ``cached_file``.

    Raises:
        CheckpointError: the NP weights cannot be read, are not those that were exported, or are of
            another version of the format, or two files describe a layer differently.
        ModelError: the NP weights or the base model's are missing.
    """
    from transformers.utils.hub import cached_file

    found = Exported.parse(getattr(config, NPT, None), f"{exported}: config.json: {NPT}")
    folder = _folder(exported, hub)
    if found.sha256 is None:  # saved by save_pretrained, among the other weights
        there = Path(str(cached_file(exported, "config.json", **hub))).parent
        if exists(there / SAFETENSORS_WEIGHTS):
            raise CheckpointError(
                f"{there / SAFETENSORS_WEIGHTS}: is of an older export: save_pretrained wrote "
                "newer NP layers among the other weights; delete it, or save to another folder"
            )
        checkpoint = open_checkpoint(there)
    else:
        problem = f"{exported}: {SAFETENSORS_WEIGHTS} is missing"
        if is_directory(folder) and not exists(folder / SAFETENSORS_WEIGHTS):
            raise ModelError(f"{problem}; copy the folder or export the checkpoint again")
        with library_errors(problem):
            path = Path(str(cached_file(exported, SAFETENSORS_WEIGHTS, **hub)))
        found.check_weights(path)
        checkpoint = open_checkpoint(path)
        found.check_layers(checkpoint)
    _check_base(found, folder)
    return found, checkpoint


def _folder(exported: str | Path, hub: Mapping[str, Any]) -> Path:
    """The folder of an exported model, if it is none of the Hub."""
    return Path(exported, hub.get("subfolder") or "")


def _check_base(found: Exported, folder: Path) -> None:
    """Raise ModelError unless the base weights are there; those on the Hub are not looked for."""
    name = str(folder)
    if found.base is not None:
        if found.base.folder is None:
            return
        folder = Path(found.base.place(folder))
        name = f"{name}: its base model {folder}"
    with path_errors(folder, ModelError):
        if is_directory(folder):
            check_files(folder)
            base_weights(name, folder)
        elif found.base is not None:
            raise ModelError(f"{name} is missing: no such folder; put it there, or export again")


class NPTForCausalLM:
    """What AutoModelForCausalLM calls for an exported model, of whatever type."""

    @classmethod
    def from_pretrained(cls, exported: str | Path, *args: Any, config: Any, **options: Any) -> Any:
        """Load an exported model: its base model, then its NP layers for inference.

        Args:
            exported: folder or Hub id of the exported model.
            *args: as for transformers' own class.
            config: config of the exported model.
            **options: as for transformers' own class.

        Returns:
            The model, of transformers' own class; with ``output_loading_info``, what its loader
            says too.

        Raises:
            CheckpointError: the NP weights cannot be read, are not those that were exported, or are
                of another version of the format.
            ModelError: the base model is missing or incomplete, or the NP layers do not fit it.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        from npt_fast.hf.base_model import check_complete
        from npt_fast.hf.checkpoint import load

        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        found, checkpoint = open_exported(exported, config, **hub)
        place: str | Path = exported
        if found.base is not None:
            place = found.base.place(_folder(exported, hub))
            options["revision"] = found.base.revision
            options.pop("subfolder", None)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config).__mro__[1]]
        asked = options.pop("output_loading_info", False)
        model, about = model_class.from_pretrained(
            place, *args, config=config, output_loading_info=True, **options
        )
        check_complete(str(exported), about)
        load(model, checkpoint)
        return (model, about) if asked else model

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        raise ModelError(
            "the config of an exported NPT model has no weights, and a model without them would be "
            "none: use from_pretrained"
        )
