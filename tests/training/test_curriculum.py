"""The grammar of the curriculum, and the stage of a step."""

from __future__ import annotations

import pytest

from npt_fast.errors import TrainingError
from npt_fast.training.curriculum import Stage, parse_curriculum, stage_index


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        pytest.param(
            "teacher:5000,mixed:5000:0.5,student:20000",  # the original's default
            [
                Stage("teacher", 5000, 0.0, 0.0),
                Stage("mixed", 10000, 0.5, 0.5),
                Stage("student", 30000, 1.0, 1.0),
            ],
            id="default",
        ),
        pytest.param("mixed:7", [Stage("mixed", 7, 0.5, 0.5)], id="half without ratios"),
        pytest.param("mixed:7:0.25", [Stage("mixed", 7, 0.25, 0.25)], id="one ratio is for both"),
        pytest.param("mixed:7:0.25:1", [Stage("mixed", 7, 0.25, 1.0)], id="two ratios"),
        pytest.param("mixed:7:0:1.0", [Stage("mixed", 7, 0.0, 1.0)], id="ends of the range"),
        pytest.param("student:1", [Stage("student", 1, 1.0, 1.0)], id="one stage"),
        pytest.param(
            " teacher : 1 , teacher:2 ",
            [Stage("teacher", 1, 0.0, 0.0), Stage("teacher", 3, 0.0, 0.0)],
            id="spaces, and a name twice",
        ),
    ],
)
def test_the_grammar(text: str, stages: list[Stage]) -> None:
    assert list(parse_curriculum(text)) == stages


def test_every_step_has_a_stage() -> None:
    stages = parse_curriculum("teacher:2,mixed:1,student:3")
    # after the end the last stage continues; the original went back to the first on resuming
    assert [stage_index(stages, step) for step in range(9)] == [0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert stage_index(stages, 10**9) == 2


@pytest.mark.parametrize(
    ("text", "named", "why"),
    [
        pytest.param("", "''", "whole number", id="empty"),
        pytest.param("teacher", "'teacher'", "whole number", id="no steps"),
        pytest.param("teacher:", "'teacher:'", "whole number", id="empty steps"),
        pytest.param("teacher:10,", "''", "whole number", id="comma at the end"),
        pytest.param("teacher:ten", "'teacher:ten'", "whole number", id="steps in letters"),
        pytest.param("teacher:1.5", "'teacher:1.5'", "whole number", id="half a step"),
        pytest.param("teacher:" + "9" * 5000, "'teacher:9", "whole number", id="a huge number"),
        pytest.param("mixed:10:", "'mixed:10:'", "whole number", id="empty ratio"),
        pytest.param("mixed:10:half", "'mixed:10:half'", "numbers", id="ratio in letters"),
        pytest.param("teacher:0", "'teacher:0'", "positive", id="no step"),
        pytest.param("teacher:-5", "'teacher:-5'", "positive", id="negative steps"),
        pytest.param("mixed:10:1.1", "'mixed:10:1.1'", "from 0 to 1", id="ratio above 1"),
        pytest.param("mixed:10:-0.1", "'mixed:10:-0.1'", "from 0 to 1", id="ratio below 0"),
        pytest.param("mixed:10:0.5:nan", "'mixed:10:0.5:nan'", "from 0 to 1", id="not a number"),
        pytest.param("mixed:10:inf", "'mixed:10:inf'", "from 0 to 1", id="infinite ratio"),
        pytest.param("mixed:10:0:0:0", "'mixed:10:0:0:0'", "at most two", id="three ratios"),
        pytest.param("teacher:10:0.5", "'teacher:10:0.5'", "takes no ratios", id="teacher's ratio"),
        pytest.param("student:10:1", "'student:10:1'", "takes no ratios", id="student's ratio"),
        pytest.param("pupil:10", "'pupil:10'", "teacher, mixed, student", id="no such stage"),
        pytest.param("Teacher:10", "'Teacher:10'", "teacher, mixed, student", id="upper case"),
        pytest.param(":10", "':10'", "teacher, mixed, student", id="no name"),
        pytest.param("teacher:5,\nmixed:x", "'mixed:x'", "whole number", id="second part"),
        pytest.param("tea\ncher:5", "'tea\\ncher:5'", "teacher, mixed", id="line break"),
    ],
)
def test_malformed_text_is_named_in_one_line(text: str, named: str, why: str) -> None:
    with pytest.raises(TrainingError) as caught:
        parse_curriculum(text)
    message = str(caught.value)
    assert message.startswith("curriculum_stages: ") and "\n" not in message
    assert named in message and why in message
