"""A mistake in an argument or an option is one line that names it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pytest

import npt_fast as npt
from npt_fast.arguments import check_arguments, kind_of
from npt_fast.config import Injection
from npt_fast.hf.tokenizer import Reading
from npt_fast.schema import Kind
from npt_fast.training.run import configuration
from tests.training import tiny
from tests.transfer import models


class Wrong:
    """What no argument may be."""


FUNCTIONS = [name for name in npt.__all__ if isinstance(getattr(npt, name), FunctionType)]
CLASSES = {
    **{"NPTConfig": npt.NPTConfig, "MergeOptions": npt.MergeOptions},
    **{"TrainOptions": npt.TrainOptions, "Injection": Injection, "Reading": Reading},
    **{"Distillation": npt.Distillation, "NPTTrainer": npt.NPTTrainer},
    **{"RelativeAdamW": npt.RelativeAdamW},
}
CALLS: dict[str, Callable[..., Any]] = {
    **{name: getattr(npt, name) for name in FUNCTIONS},
    **CLASSES,
    **{f"Modulation.{n}": getattr(npt.Modulation, n) for n in ("compress", "only", "save")},
}


def arguments() -> list[tuple[str, str]]:
    """Each argument that has a name, of each call."""
    return [
        (call, name)
        for call, function in CALLS.items()
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind != parameter.VAR_KEYWORD
    ]


@pytest.fixture(scope="module")
def valid() -> dict[str, Any]:
    """A value of each argument that must be given."""
    modulation = models.random_modulation()
    return {
        **{"model": tiny.model(), "tokenizer": tiny.tokenizer(), "modulation": modulation},
        **{"self": modulation, "modulations": [modulation], "config": npt.NPTConfig(layers=1)},
        **{"options": npt.TrainOptions(train_layers=1), "text": "a text", "layers": 1},
        **dict.fromkeys(("checkpoint", "checkpoints", "output", "path", "repo"), "nowhere"),
        "train_layers": 1,
    }


@pytest.mark.parametrize(("call", "name"), arguments())
def test_wrong_types(call: str, name: str, valid: dict[str, Any]) -> None:
    parameters = inspect.signature(CALLS[call]).parameters
    given = {n: valid[n] for n, p in parameters.items() if p.default is p.empty and n in valid}
    with pytest.raises(npt.OptionError) as caught:
        CALLS[call](**{**given, name: Wrong()})
    assert str(caught.value).startswith(f"{name} must be ")
    assert str(caught.value).endswith(", not a Wrong")
    assert len(str(caught.value).splitlines()) == 1


def test_every_public_function_is_tried() -> None:
    assert {"merge", "load", "export", "inject", "evaluate", "study", "verify"} <= {*FUNCTIONS}
    assert len(arguments()) > 150


@pytest.mark.parametrize("call", CALLS)
def test_unknown_names(call: str, valid: dict[str, Any]) -> None:
    if call in ("merge", "NPTTrainer"):
        return  # they take more names than their signatures have
    parameters = inspect.signature(CALLS[call]).parameters
    given = {n: valid[n] for n, p in parameters.items() if p.default is p.empty and n in valid}
    name = list(parameters)[-1]
    with pytest.raises(npt.OptionError, match=rf"^{call} has no argument '{name}x'; did you mean"):
        CALLS[call](**given, **{f"{name}x": 1})


def test_names_of_merge() -> None:
    for wrong, right in (("on_conflct", "on_conflict"), ("verfy", "verify")):
        with pytest.raises(npt.OptionError, match=f"no argument '{wrong}'; did you mean '{right}'"):
            npt.merge("a", "b", **{wrong: "mean"})
    with pytest.raises(npt.OptionError, match="on_conflict must be one of first, last"):
        npt.merge("a", "b", on_conflict="average")


def test_missing_arguments_are_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'output'"):
        npt.merge("a")  # type: ignore[call-arg]


MISTAKES: list[tuple[type, dict[str, Any], str]] = [
    (npt.NPTConfig, {"layers": []}, "layers must name a layer"),
    (npt.NPTConfig, {"layers": "one"}, "'one' is not a list of layers"),
    (npt.NPTConfig, {"layers": 1, "rank": 0}, "rank and num_ranks must be positive, got 0 and 1"),
    (npt.NPTConfig, {"layers": 1, "modulation": "both"}, "modulation must be one of single, dual"),
    (npt.NPTConfig, {"layers": 1, "init_scale": float("nan")}, "init_scale must be positive"),
    (npt.TrainOptions, {"train_layers": 1, "max_steps": "5"}, "max_steps must be a whole number"),
    (npt.TrainOptions, {"train_layers": 1, "fp16": 1}, "fp16 must be True or False, not 1"),
    (npt.TrainOptions, {"train_layers": 1, "residual": "both"}, "residual must be one of removed"),
    (npt.TrainOptions, {"train_layers": 1, "data": ["a"]}, "data must be the name of a text"),
    (
        npt.TrainOptions,
        {"train_layers": 1, "wandb_tags": "a"},
        "wandb_tags must be a list, each",
    ),
    (npt.MergeOptions, {"max_shard_size": 0}, "max_shard_size must be positive"),
    (npt.MergeOptions, {"max_shard_size": True}, "max_shard_size must be a whole number"),
]


@pytest.mark.parametrize(("options", "values", "message"), MISTAKES)
def test_values_of_options(options: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(npt.OptionError, match=message) as caught:
        options(**values)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value).splitlines()) == 1


def test_a_path_names_a_text() -> None:
    options = npt.TrainOptions(train_layers=1, data=Path("a.txt"))  # type: ignore[arg-type]
    assert options.data == "a.txt"


Bound = TypeVar("Bound", bound=Path)


@pytest.mark.parametrize(
    ("hint", "name", "fitting", "others"),
    [
        (int, "a whole number", [0, -1], [True, 1.0, "1", None]),
        (float, "a number", [0, 1.5, float("nan")], [False, "1"]),
        (bool, "True or False", [True], [0, None]),
        (str | Path | None, "a text, a path or None", ["", Path("a"), None], [b"", 1]),
        (Literal["a", "b"], "one of a, b", ["a"], ["c", 1, []]),
        (
            Sequence[int],
            "a list, each item a whole number",
            [[], (1, 2), range(3)],
            ["12", [1, "2"], {1}, 1],
        ),
        (Sequence[Any], "a list", [[None, 1.5]], ["a", 1]),
        (Callable[[int], int] | None, "a function or None", [len, None], [1]),
        (Bound, "a path", [Path("a")], ["a"]),
        (dict[str, int], "of type dict", [{}, {"a": 1}], [[]]),
        (npt.Modulation, "of type Modulation", [models.random_modulation()], [Wrong()]),
        (Annotated[int, "note", Kind("even", lambda v: v % 2 == 0)], "even", [2], [1]),
        (Any, "anything", [None, Wrong()], []),
    ],
)
def test_kinds(hint: Any, name: str, fitting: list[Any], others: list[Any]) -> None:
    kind = kind_of(hint)
    assert kind.name == name
    assert [value for value in fitting if not kind.fits(value)] == []
    assert [value for value in others if kind.fits(value)] == []


def test_numbers_of_other_libraries() -> None:
    options = npt.TrainOptions(
        train_layers=np.array([1, 2]),  # type: ignore[arg-type]
        max_steps=np.int64(4),  # type: ignore[arg-type]
        learning_rate=np.float32(0.5),  # type: ignore[arg-type]
    )
    assert (options.train_layers, options.max_steps, options.learning_rate) == ([1, 2], 4, 0.5)
    json.dumps(configuration(options))
    for layers in (range(1, 3), {1, 2}, [np.int32(1), 2]):
        options = npt.TrainOptions(train_layers=layers)
        assert json.loads(json.dumps(configuration(options)))["train_layers"] == [1, 2]

    @check_arguments
    def function(a: Annotated[int, Kind("even", lambda v: v % 2 == 0)], b: Any) -> Any:
        return a, b

    assert [type(v) for v in function(np.uint8(2), np.int8(2))] == [int, np.int8]
    with pytest.raises(npt.OptionError, match=r"^a must be even, not 3$"):
        function(np.int64(3), 0)
    for wrong in (np.bool_(True), np.float64(4), np.array([4]), "4"):
        with pytest.raises(npt.OptionError, match=r"^max_steps must be a whole number, not "):
            npt.TrainOptions(train_layers=1, max_steps=wrong)  # type: ignore[arg-type]


def test_a_checked_function_is_called_as_it_is() -> None:
    @check_arguments
    def function(a: int, *more: Any, b: str = "b", **others: Any) -> tuple[Any, ...]:
        """Text."""
        return a, more, b, others

    assert function(1, 2, b="c", d=3) == (1, (2,), "c", {"d": 3})
    assert function.__doc__ == "Text." and function.__name__ == "function"
    with pytest.raises(npt.OptionError, match=r"^a must be a whole number, not 'x'$"):
        function("x")  # type: ignore[arg-type]
