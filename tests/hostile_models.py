"""Hostile base models, with code in every place from which transformers would run it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training import tiny

OWN = "own.Own"
KERNEL = "somebody/kernel"


class _Run:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.canary), "w")


def change(folder: Path, file: str, **values: Any) -> None:
    """Set keys of a JSON file in the folder; the file is created if it does not exist."""
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def plant(folder: Path, canary: Path) -> Path:
    """Write a valid model, and modules beside it that write `canary` when they are imported."""
    tiny.save(folder)
    code = f"open({str(canary)!r}, 'w')\n"
    for name in ("own.py", "custom_generate/generate.py", "__init__.py", "sitecustomize.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps(_Run(canary), protocol=2))
    return folder


def _config(**values: Any) -> Callable[[Path, Path], None]:
    return lambda folder, canary: change(folder, "config.json", **values)


def _tokenizer(**values: Any) -> Callable[[Path, Path], None]:
    return lambda folder, canary: change(folder, "tokenizer_config.json", **values)


def _generation(**values: Any) -> Callable[[Path, Path], None]:
    return lambda folder, canary: change(folder, "generation_config.json", **values)


def _adapter(**values: Any) -> Callable[[Path, Path], None]:
    return lambda folder, canary: change(folder, "adapter_config.json", **values)


def _bare_adapter(folder: Path, canary: Path) -> None:
    """Write an adapter without a model; transformers would load the model that it names."""
    other = plant(folder.with_name(f"{folder.name}-other"), canary)
    change(other, "config.json", model_type="ours", auto_map=_ALL)
    (folder / "config.json").unlink()
    change(folder, "adapter_config.json", base_model_name_or_path=str(other), peft_type="LORA")


def _pickled_weights(name: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, canary: Path) -> None:
        (folder / "model.safetensors").unlink()
        # as long as the weights of the model are
        (folder / name).write_bytes(pickle.dumps(_Run(canary), protocol=2) + bytes(200_000))

    return spoil


def _pickled_shard(folder: Path, canary: Path) -> None:
    _pickled_weights("pytorch_model-1.bin")(folder, canary)
    change(
        folder, "pytorch_model.bin.index.json", weight_map={"x": "pytorch_model-1.bin"}, metadata={}
    )


_ALL = {name: OWN for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")} | {
    "AutoTokenizer": [OWN, OWN]
}
_STRANGER = {"auto_map": {"AutoModelForCausalLM": OWN}}  # a model, but none that writes text

REFUSED: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {
    "config": (_config(model_type="ours", auto_map=_ALL), "config.json", "auto_map"),
    "config-elsewhere": (
        _config(model_type="ours", auto_map={"AutoConfig": f"some/where--{OWN}"}),
        "config.json",
        "auto_map",
    ),
    "model": (_config(model_type="clip_text_model", **_STRANGER), "config.json", "auto_map"),
    "tokenizer": (
        _tokenizer(tokenizer_class="Own", auto_map={"AutoTokenizer": [None, OWN]}),
        "tokenizer_config.json",
        "auto_map",
    ),
    "slow-tokenizer": (
        _tokenizer(tokenizer_class="Own", auto_map={"AutoTokenizer": [OWN, None]}),
        "tokenizer_config.json",
        "auto_map",
    ),
    "old-tokenizer": (
        _tokenizer(tokenizer_class="Own", auto_map=[OWN, None]),
        "tokenizer_config.json",
        "auto_map",
    ),
    **{
        key: (_config(**{key: KERNEL}), "config.json", key)
        for key in (
            "attn_implementation", "_attn_implementation", "experts_implementation",
            "_experts_implementation", "use_kernels", "kernel_config",
        )
    },
    "paged": (
        _config(_attn_implementation=f"paged|{KERNEL}:f"), "config.json", "_attn_implementation"
    ),
    "by-part": (
        _config(attn_implementation={"": "eager", "text_config": KERNEL}),
        "config.json",
        "attn_implementation",
    ),
    "part": (
        _config(text_config={"attn_implementation": KERNEL}), "config.json", "attn_implementation"
    ),
    "quantized": (
        _config(quantization_config={"quant_method": KERNEL}), "config.json", "quant_method"
    ),
    "contrastive": (
        _generation(penalty_alpha=0.6, top_k=4), "generation_config.json", "penalty_alpha"
    ),
    "dola": (_generation(dola_layers="high"), "generation_config.json", "dola_layers"),
    "generate": (
        _generation(custom_generate=KERNEL), "generation_config.json", "custom_generate"
    ),
    "adapter": (
        _adapter(base_model_name_or_path="x", peft_type="LORA"),
        "adapter_config.json",
        "base_model_name_or_path",
    ),
    "adapter-library": (
        _adapter(auto_mapping={"parent_library": "own", "base_model_class": "Own"}),
        "adapter_config.json",
        "base_model_name_or_path",
    ),
    "bare-adapter": (_bare_adapter, "adapter_config.json", "base_model_name_or_path"),
}  # fmt: skip
"""Name -> what is done to a planted model, the file that is to blame, and its key."""

UNREADABLE: dict[str, Callable[[Path, Path], None]] = {
    "pickle": _pickled_weights("pytorch_model.bin"),
    "pickled-shard": _pickled_shard,
}
"""What cannot be loaded for another reason, and runs nothing either."""

HARMLESS: dict[str, Callable[[Path, Path], None]] = {
    "as-planted": lambda folder, canary: None,
    "own-class": _config(auto_map=_ALL),
    "own-tokenizer": _tokenizer(auto_map={"AutoTokenizer": [OWN, OWN]}),
    "local": _config(_attn_implementation="eager", use_kernels=False),
}
"""What transformers has classes of its own for: it loads, and nothing of the folder runs."""
