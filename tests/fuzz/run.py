"""Inputs for one target: drawn, run, and made small where one fails."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import Place, Recipe


class InputError(Exception):
    """An input that a reader does not take as it should; the cause says how.

    Attributes:
        data: the input, with as few edits as it takes.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(f"an input of {len(data)} bytes")
        self.data = data


def run(place: Place, examples: int, number: int | None = None) -> None:
    """Draw inputs and run them.

    Args:
        place: where.
        examples: how many.
        number: that they are drawn from; without one, the same ones are drawn every time.

    Raises:
        InputError: one failed.
    """
    data = b""

    @given(place.recipes())
    def one(recipe: Recipe) -> None:
        nonlocal data
        data = place.build(recipe)
        place.run(data)

    test = settings(
        max_examples=examples, derandomize=number is None, database=None, deadline=None,
        phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )(one)  # fmt: skip
    try:
        (test if number is None else seed(number)(test))()
    except Exception as error:
        raise InputError(data) from error  # what has run last is the smallest
