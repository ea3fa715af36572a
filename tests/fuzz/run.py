"""Draw inputs for one target, run them, and shrink an input that fails."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.target import Place, Recipe


class InputError(Exception):
    """An input that a reader does not handle as it should; the cause says why.

    Attributes:
        data: bytes of the input, with the fewest edits that fail.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(f"an input of {len(data)} bytes")
        self.data = data


def run(place: Place, examples: int, number: int | None = None) -> None:
    """Draw inputs and run them.

    Args:
        place: folder with the target.
        examples: number of inputs.
        number: seed; without one, the same inputs are drawn every time.

    Raises:
        InputError: an input failed.
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
