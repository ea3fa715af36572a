"""NP layers among the weights of a whole model, as save_pretrained and torch.save write them.

There, tensors are the parameters of `NPComponent`, each of which joins several tensors of an NPT
checkpoint; num_ranks and residual are in ``config.json``, under ``npt``. Earlier versions had the
original's names there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from npt_fast.checkpoint.keys import PROJECTIONS_OF, modulated, parse_key
from npt_fast.checkpoint.np_module import Architecture
from npt_fast.checkpoint.npt_config import LayerDescription
from npt_fast.checkpoint.tensor_entry import Record, TensorEntry
from npt_fast.checkpoint.torch_zip import dense_strides
from npt_fast.errors import CheckpointError

NPT = "npt"
"""Key of ``config.json`` that describes the NP layers, as ``npt_config.json`` does elsewhere."""

# DDP, FSDP, PEFT and torch.compile put names of their own in front or in between
_KEY = re.compile(
    r"(?:\w+\.)*(?:layers|h)\.(?P<layer>0|[1-9][0-9]{0,4})\.(?:_\w+\.)*np_component\."
    r"(?:_\w+\.|modules_to_save\.\w+\.)*"
    r"(?P<name>(?:w_down|w_a_in|w_a_mid|w_b_gate|w_b_up|w_b_down)(?:_scale)?"
    r"|W_\w+(?:\.[0-9]{1,5})?)"
)
_REPLACED = "np_component.original_module."  # PEFT keeps it beside the trained copy
_MAX_TENSORS = 200_000  # twice those of 80 layers with 128 components; the file sets num_ranks


def holds_np_layers(names: Mapping[str, object]) -> bool:
    """Whether these are names of a whole model's tensors, with NP layers among them.

    The names of an NPT checkpoint, also with others among them, are not.
    """
    found = [name for name in names if "np_component." in name]
    return bool(found) and (
        any(parse_key(name) is None for name in found)
        or not all("np_component." in name or parse_key(name) for name in names)
    )


def np_layers(names: Iterable[str]) -> list[int]:
    """The layers that have NP tensors among these names, ascending."""
    return sorted({int(match["layer"]) for name in names if (match := _KEY.fullmatch(name))})


def np_tensors(
    tensors: Mapping[str, TensorEntry], layers: Mapping[int, LayerDescription] | None, where: str
) -> dict[str, TensorEntry]:
    """The NP tensors of a whole model, under the names that they have in an NPT checkpoint.

    Args:
        tensors: all tensors of the model by their names in the file.
        layers: what ``config.json`` says about each NP layer; None if it has no ``npt``.
        where: path of the weights, for messages.

    Raises:
        CheckpointError: num_ranks of a layer is not known, or its tensors do not fit it.
    """
    found: dict[int, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        if "np_component." not in name or _REPLACED in name:
            continue
        match = _KEY.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{where}: {name!r:.160} is not the name of an NP tensor")
        own = found.setdefault(int(match["layer"]), {})
        if match["name"] in own:
            raise CheckpointError(f"{where}: layer {match['layer']} has {match['name']} twice")
        own[match["name"]] = entry
    split: dict[str, TensorEntry] = {}
    for layer, own in sorted(found.items()):
        if any(name.startswith("W_") for name in own):
            split |= {f"layer_{layer}_np.{name}": entry for name, entry in own.items()}
            continue
        about = (layers or {}).get(layer)
        if about is None or about.num_ranks is None:
            raise CheckpointError(
                f"{where}: num_ranks and residual of layer {layer} are recorded nowhere; save the "
                "model with save_pretrained or npt.save, or convert a base model as it was "
                "converted and use load_state_dict"
            )
        split |= _split(layer, own, about.num_ranks, where, _MAX_TENSORS - len(split))
    return split


def _split(
    layer: int, joined: Mapping[str, TensorEntry], num_ranks: int, where: str, room: int
) -> Iterator[tuple[str, TensorEntry]]:
    if "w_b_gate" in joined or "w_b_up" not in joined:
        modulation = "triple" if "w_a_mid" in joined else "dual" if "w_b_up" in joined else "single"
    else:
        modulation = "plain"
    written = f"w_b_{modulated(modulation)[0]}"
    for name in ("w_down", written):
        if name not in joined or len(joined[name].shape) != 2:
            raise CheckpointError(f"{where}: layer {layer} has no matrix {name}")
    columns = len(PROJECTIONS_OF[modulation]) * num_ranks
    d, width = joined["w_down"].shape
    f = joined[written].shape[1]
    if not num_ranks or width % columns or not width:
        raise CheckpointError(
            f"{where}: layer {layer}: num_ranks {num_ranks} does not fit w_down {[d, width]}"
        )
    if 3 * columns > room:
        raise CheckpointError(
            f"{where}: NP layers up to {layer} have more than {_MAX_TENSORS:,} tensors; refused"
        )
    architecture = Architecture(modulation, num_ranks, width // columns, d, f)
    shapes = architecture.joined_shapes()
    if "w_down_scale" in joined:
        for name, (rows, width) in list(shapes.items()):
            shapes[f"{name}_scale"] = (rows, 1) if name.startswith("w_a") else (1, width)
    for name in sorted(shapes.keys() | joined.keys()):
        own, wanted = joined[name].shape if name in joined else (), shapes.get(name, ())
        if own != wanted:
            raise CheckpointError(
                f"{where}: layer {layer}: {name} is {list(own) or 'missing'}, "
                f"{list(wanted) or 'none'} expected ({architecture})"
            )
    parts = [
        (architecture.place(slot), str(architecture.key(layer, slot)), architecture.shape(slot))
        for slot in architecture.slots()
    ]
    for scale in architecture.scale_slots() if "w_down_scale" in joined else ():
        name, axis, start = architecture.place((*scale, 0))
        place = f"{name}_scale", axis, start  # W_b_up's scales are whole: there start is 0
        parts.append(
            (place, str(architecture.scale_key(layer, scale)), architecture.scale_shape(scale))
        )
    for (name, axis, start), key, shape in parts:
        whole = joined[name]
        strides = whole.strides or dense_strides(whole.shape)
        yield (
            key,
            replace(
                whole,
                name=key,
                shape=shape,
                offset=whole.offset + start * strides[axis] * whole.dtype.itemsize,
                crc32=0,
                strides=None if strides == dense_strides(shape) else strides,
                record=whole.record or Record(whole.file, whole.offset, whole.nbytes, whole.crc32),
            ),
        )
