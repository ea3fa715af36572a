"""What ``config.json`` of an exported model says under ``npt``; no torch, no transformers.

It is what ``npt_config.json`` says, and which weights file belongs to it, and where the base model
is if the folder does not hold it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npt_fast.checkpoint.checkpoint import Checkpoint
from npt_fast.checkpoint.npt_config import Description
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.errors import CheckpointError
from npt_fast.schema import MAPPING, TEXT, Kind, checked, or_none

MODEL_TYPE_PREFIX = "npt_fast-"
"""In front of the base model's ``model_type``. transformers goes by the type, not by
``architectures``, and would load the base model alone in silence if it knew the type."""
ARCHITECTURE_PREFIX = "NPT"

_KINDS = {"weights": or_none(MAPPING), "base": or_none(MAPPING)}
_WEIGHTS = {"sha256": TEXT}
_LONGEST = 4096  # characters of a path, on Linux
_FOLDER = Kind("the path of a folder", lambda v: isinstance(v, str) and 0 < len(v) <= _LONGEST)
_HUB_ID = Kind(
    "the id of a model on the Hub",
    lambda v: isinstance(v, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", v, re.A) is not None,
)
_BASE = {"folder": or_none(_FOLDER), "hub_id": or_none(_HUB_ID), "revision": or_none(TEXT)}


@dataclass(frozen=True, slots=True)
class BaseReference:
    """Where the base model's weights are, if the exported folder does not hold them.

    Attributes:
        folder: folder of the base model, maybe relative to the exported folder; None on the Hub.
        hub_id: its name on the Hub; None in a folder.
        revision: commit on the Hub, if it is known.
    """

    folder: str | None = None
    hub_id: str | None = None
    revision: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of the file, without what is None."""
        facts = {"folder": self.folder, "hub_id": self.hub_id, "revision": self.revision}
        return {name: value for name, value in facts.items() if value is not None}

    def place(self, exported: str | Path) -> str:
        """The folder or Hub id of the base model of the model in the folder `exported`."""
        real = os.path.realpath(exported)  # a link to it is not where its neighbours are
        return self.hub_id or os.path.normpath(os.path.join(real, self.folder or ""))


@dataclass(frozen=True, slots=True)
class Exported:
    """The content of ``npt`` in ``config.json``.

    Attributes:
        description: what ``npt_config.json`` says; its fingerprint is that of the base model that
            the layers were exported with.
        sha256: SHA-256 of ``npt_weights.safetensors``; None if the NP layers are among the weights
            of the model, as save_pretrained writes them.
        base: where the base model is; None if the folder holds it.
    """

    description: Description
    sha256: str | None
    base: BaseReference | None

    def to_dict(self) -> dict[str, Any]:
        """The content of the file; `parse` turns it back into the same."""
        return {
            **self.description.to_dict(),
            **({"weights": {"sha256": self.sha256}} if self.sha256 else {}),
            **({"base": self.base.to_dict()} if self.base else {}),
        }

    @classmethod
    def parse(cls, content: Any, where: str) -> Exported:
        """Build it from the file's content; the type of every used field is checked.

        Args:
            content: any value.
            where: file and place in it, for messages.

        Raises:
            CheckpointError: a field has the wrong type, or the format has another version.
        """
        top = checked(content, _KINDS, (), where, CheckpointError)
        sha256 = base = None
        if top.get("weights") is not None:
            about = f"{where}: weights"
            sha256 = checked(top["weights"], _WEIGHTS, ("sha256",), about, CheckpointError)[
                "sha256"
            ]
        if top.get("base") is not None:
            about = f"{where}: base"
            base = BaseReference(**checked(top["base"], _BASE, (), about, CheckpointError))
            if (base.folder is None) == (base.hub_id is None):
                raise CheckpointError(f"{about}: must name either a folder or a hub_id")
        return cls(Description.parse(content, where), sha256, base)

    def check_layers(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless `checkpoint` has the layers that were exported.

        Modulation and ranks are not compared: what computes are its tensors, which have them.
        """
        for layer in sorted({*checkpoint.modules, *(self.description.layers or {})}):
            own = (self.description.layers or {}).get(layer)
            there = layer in checkpoint.modules
            if own is None or not there or own.residual != checkpoint.recorded_residual(layer):
                raise CheckpointError(
                    f"{checkpoint.given}: layer {layer} is not as config.json describes it; copy "
                    "the folder or export the checkpoint again"
                )

    def check_weights(self, path: Path) -> None:
        """Raise CheckpointError unless `path` is the weights file that was exported."""
        if file_sha256(path) != self.sha256:
            raise CheckpointError(
                f"{path}: is not the file that was exported with config.json: its SHA-256 differs; "
                "copy the folder or export the checkpoint again"
            )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, which may be a link.

    Raises:
        CheckpointError: the file cannot be read, or changes meanwhile.
    """
    file = SourceFile.of(path, follow_links=True)
    digest = hashlib.sha256()
    for window in file.windows(0, file.size):
        digest.update(window)
    return digest.hexdigest()


def base_type(config: Mapping[str, Any]) -> str | None:
    """The base model's ``model_type`` in an exported ``config.json``; None in any other."""
    given = config.get("model_type")
    if isinstance(given, str) and given.startswith(MODEL_TYPE_PREFIX):
        return given.removeprefix(MODEL_TYPE_PREFIX)
    return None
