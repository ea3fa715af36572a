"""An export that is killed anywhere leaves the whole folder or none."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.killing import Runner
from tests.checkpoint.staging import content
from tests.checkpoints import layer_weights, write_checkpoint
from tests.training import tiny

_IMPORTS = """
import os
os.umask(0o022)
from npt_fast.checkpoint import verify
from npt_fast.hf.export import export
def write(inputs, output, **options):
    export(inputs[0], output, model_name=inputs[1], **options)
"""


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner(_IMPORTS)
    yield runner
    runner.close()


@pytest.mark.parametrize("options", [{"verify": True}, {"hardlink": True}], ids=str)
def test_killed_around_system_calls(
    options: dict[str, bool], runner: Runner, tmp_path: Path
) -> None:
    base = tiny.save(tmp_path / "base")
    checkpoint = write_checkpoint(tmp_path / "np", layer_weights(1, d=32, f=48))
    inputs = [checkpoint, base]
    target = tmp_path / "first" / "out"
    target.parent.mkdir()
    code, events = runner.run(inputs, target, at=0, **options)
    assert code == 0, events
    expected, last = content(target), int(events)
    assert len(expected) >= 9
    # the last calls publish it; of those before, a few everywhere
    points = [*random.Random(1).sample(range(1, last - 40), 20), *range(last - 40, last)]
    complete = 0
    for point in points:
        target = tmp_path / str(point) / "out"
        target.parent.mkdir()
        code, said = runner.run(inputs, target, at=point, **options)
        assert code == -signal.SIGKILL, f"at {point} of {last}: {code}, {said}"
        if target.exists():
            complete += 1
        else:
            code, said = runner.run(inputs, target, **options)
            assert code == 0, said
        assert content(target) == expected
        assert os.listdir(target.parent) == ["out"]
    assert 0 < complete < len(points) / 2
