"""Stages of training, which decide the input of the trained layers (design.md#curriculum)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npt_fast.errors import TrainingError

_NAMES = ("teacher", "mixed", "student")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    Attributes:
        name: ``teacher``: trained layers read the teacher's hidden states; ``student``: the
            student's own; ``mixed``: a weighted mean of both.
        until_step: first optimizer step after the stage.
        attention_ratio: weight of the student's hidden states in the input of attention, 0 to 1.
        mlp_ratio: weight of the student's hidden states in the input of the MLP, 0 to 1.
    """

    name: str
    until_step: int
    attention_ratio: float
    mlp_ratio: float


def parse_curriculum(text: str) -> tuple[Stage, ...]:
    """Parse comma-separated stages ``name:steps[:attention_ratio[:mlp_ratio]]``.

    Raises:
        TrainingError: `text` does not have this form.
    """
    stages: list[Stage] = []
    end = 0
    for part in text.split(","):
        name, *numbers = (field.strip() for field in part.split(":"))
        try:
            steps = int(numbers[0])
            ratios = [float(number) for number in numbers[1:]]
        except (IndexError, ValueError):
            raise _bad(part, "steps must be a whole number, ratios must be numbers") from None
        if name not in _NAMES:
            raise _bad(part, f"stages are {', '.join(_NAMES)}")
        if steps < 1 or len(ratios) > 2 or not all(0 <= ratio <= 1 for ratio in ratios):
            raise _bad(part, "steps must be positive, and ratios at most two numbers from 0 to 1")
        if ratios and name != "mixed":
            raise _bad(part, f"{name} takes no ratios")
        if not ratios:
            ratios = [{"teacher": 0.0, "mixed": 0.5, "student": 1.0}[name]]
        end += steps
        stages.append(Stage(name, end, ratios[0], ratios[-1]))
    return tuple(stages)


def _bad(part: str, why: str) -> TrainingError:
    return TrainingError(
        f"curriculum_stages: {part.strip()!r} is not name:steps[:attention_ratio[:mlp_ratio]]: "
        f"{why}"
    )


def stage_index(stages: Sequence[Stage], step: int) -> int:
    """Index of the stage of an optimizer step, counted from 0; after the last stage, the last."""
    found = (index for index, stage in enumerate(stages) if step < stage.until_step)
    return next(found, len(stages) - 1)
