"""Describe the NP layers of a model, in ``npt_config.json`` and in the model's own config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npt_fast.checkpoint.certificate import Certificate
from npt_fast.checkpoint.npt_config import Description, LayerDescription
from npt_fast.checkpoint.whole_model import NPT
from npt_fast.hf.base_sizes import base_sizes
from npt_fast.hf.fingerprint import fingerprint
from npt_fast.hf.wrappers import unwrapped
from npt_fast.modules import NPComponent


def describe(
    model: Any,
    components: Mapping[int, NPComponent],
    *,
    base_name: str | None = None,
    steps: Mapping[int, int] | None = None,
    fidelity: Mapping[int, float] | None = None,
    certificate: Certificate | None = None,
) -> dict[str, Any]:
    """The content of ``npt_config.json`` for a model.

    Args:
        model: model with NP layers.
        components: its NP components by layer.
        base_name: name of the base model; if not given, the name that it was loaded by.
        steps: optimizer steps that each layer was trained for, by layer, if known.
        fidelity: measured error of each layer, by layer, if known.
        certificate: what an evaluation measured of all layers together, if known.
    """
    config = unwrapped(model).config
    layers = {
        layer: LayerDescription.of(
            component.architecture,
            component.residual,
            step=(steps or {}).get(layer),
            fidelity=(fidelity or {}).get(layer),
            factors="int8" if component.is_int8 else None,
            certificate=certificate,
        )
        for layer, component in components.items()
    }
    name = base_name or getattr(config, "_name_or_path", "") or None
    # once sharded or moved away, a model's weights cannot tell
    known = getattr(config, NPT, {}).get("base_model", {}).get("fingerprint")
    return Description(name, base_sizes(model), layers, fingerprint(model) or known).to_dict()


def record(model: Any, components: Mapping[int, NPComponent]) -> None:
    """Describe the NP layers in the model's config, which save_pretrained writes; none: nothing.

    A whole model's tensors do not tell num_ranks and residual.
    """
    config = getattr(unwrapped(model), "config", None)
    if config is None:
        return
    if components:
        setattr(config, NPT, describe(model, components))
    elif hasattr(config, NPT):
        delattr(config, NPT)
