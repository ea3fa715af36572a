"""The original's options that are other options here, or none.

Each is accepted with a note that says what happens instead. A value that would change what is
computed becomes the option that means it, or is refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple


class _Instead(NamedTuple):
    """What stands for a retired option: arguments of the verb, and a note."""

    arguments: list[str]
    note: str


_Rule = Callable[[str, Collection[str]], _Instead]
"""From the option's value and the names of all options given; ValueError refuses them."""

_LARGER = {"3b": "meta-llama/Llama-3.2-3B", "8b": "meta-llama/Llama-3.1-8B"}


def _model_size(value: str, given: Collection[str]) -> _Instead:
    if value not in ("1b", *_LARGER):
        raise ValueError(
            f"--model_size {value} is not known here, and no model is made up; give --model_name"
        )
    if value in _LARGER and "model_name" not in given:
        return _renamed("model_name", _LARGER[value], "model_size", given)
    return _Instead([], "--model_size has no effect: --model_name says which model is trained")


def _modulation(option: str) -> _Rule:
    def rule(_: str, given: Collection[str]) -> _Instead:
        kind = option.removesuffix("_modulation")
        if kind == "dual" and "triple_modulation" in given:
            return _Instead([], "--dual_modulation has no effect beside --triple_modulation")
        return _renamed("modulation", kind, option, given)

    return rule


def _dataset_preset(value: str, given: Collection[str]) -> _Instead:
    if value == "custom":
        raise ValueError("--dataset_preset custom names no text; give --data FILE")
    return _renamed("data", value, "dataset_preset", given)


def _gradient_scale_factor(value: str, _: Collection[str]) -> _Instead:
    try:
        positive = 0 < float(value) < float("inf")
    except ValueError:
        positive = False
    if not positive:
        raise ValueError(f"--gradient_scale_factor must be a positive number, not {value!r:.80}")
    return _Instead(
        [], "--gradient_scale_factor has no effect: clipping and AdamW undo a factor of gradients"
    )


def _demo_mode(_: str, given: Collection[str]) -> _Instead:
    raise ValueError(
        "--demo_mode trained a random model; instead give --model_name smollm2-135m "
        "--data python-docs --max_steps 100 --cpu"
    )


def _single_layer_mode(_: str, given: Collection[str]) -> _Instead:
    return _Instead([], "--single_layer_mode has no effect: one layer is trained like several")


def _architecture_version(value: str, given: Collection[str]) -> _Instead:
    residuals = {"v1": "kept", "v2": "removed"}
    if value == "auto":
        return _Instead([], "--architecture_version auto is what happens without --residual")
    if value not in residuals:
        raise ValueError(f"--architecture_version must be auto, v1 or v2, not {value!r:.80}")
    return _renamed("residual", residuals[value], "architecture_version", given)


def _called(new: str, old: str) -> _Rule:
    return lambda value, given: _renamed(new, value, old, given)


def _renamed(new: str, value: str, old: str, given: Collection[str]) -> _Instead:
    if new in given:
        raise ValueError(f"--{old} is --{new} here, which is given too; leave out --{old}")
    return _Instead([f"--{new}={value}"], f"--{old} is --{new} {shlex.quote(value)} here")


_RETIRED: dict[str, dict[str, _Rule]] = {
    "train": {
        "model_size": _model_size,
        "dual_modulation": _modulation("dual_modulation"),
        "triple_modulation": _modulation("triple_modulation"),
        "dataset_preset": _dataset_preset,
        "gradient_scale_factor": _gradient_scale_factor,
        "demo_mode": _demo_mode,
        "single_layer_mode": _single_layer_mode,
        "convert_layers": _called("train_layers", "convert_layers"),
        "load_npt_weights": _called("resume_from", "load_npt_weights"),
    },
    "interact": {
        "architecture_version": _architecture_version,
        "use_npt_layers": _called("layers", "use_npt_layers"),
    },
}
"""What stands for each retired option, by verb and name."""
_FLAGS = {"dual_modulation", "triple_modulation", "demo_mode", "single_layer_mode"}


def replaced(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without retired options, and notes that say what happens instead.

    Args:
        arguments: the verb and its options.

    Raises:
        ValueError: an option has a value that nothing here means, lacks one, or is given beside the
            option that it has become.
    """
    rules = _RETIRED.get(arguments[0], {}) if arguments else {}
    given = {name for word in arguments if (name := _name(word))}
    found: list[str] = []
    notes: list[str] = []
    words = iter(arguments)
    for word in words:
        name = _name(word)
        if name not in rules:
            found.append(word)
            continue
        value = word.partition("=")[2]
        if name not in _FLAGS and "=" not in word:
            value = next(words, "")
        if (name in _FLAGS) == bool(value):
            raise ValueError(f"--{name} takes {'no' if value else 'a'} value")
        instead = rules[name](value, given)
        found += instead.arguments
        notes.append(instead.note)
    return found, notes


def _name(word: str) -> str:
    """The name of an option; "" for another word."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""
