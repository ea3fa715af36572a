"""Read YAML files of others strictly: bounded, without aliases or tags, all mistakes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from npt_fast.checkpoint.source_file import read_file
from npt_fast.errors import CheckpointError, DataError, printable
from npt_fast.schema import Kind, is_text, mistakes

_MAX_BYTES = 1_000_000
_MAX_NODES = 30_000  # keys and values; PyYAML parses as many in about two seconds
_MAX_DEPTH = 10  # levels of nesting; a correct file has 5
_MAX_DIGITS = 40  # Python converts long integers in quadratic time
MAX_MISTAKES = 100
WORDS = Kind("a text", lambda value: is_text(value) and bool(value))


class MistakesError(DataError):
    """A file has mistakes.

    Attributes:
        problems: One line per mistake, each naming the file and the entry.
    """

    def __init__(self, problems: list[str]) -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.problems = [printable(problem) for problem in problems]


def load(path: Path) -> Any:
    """The document in a YAML file.

    Raises:
        MistakesError: the file cannot be read, is too large, or is not the YAML that we take.
    """
    try:
        text = read_file(path, _MAX_BYTES, follow_links=True).decode("utf-8")
        return yaml.load(text, Loader=_Loader)
    except CheckpointError as error:
        raise MistakesError([str(error)]) from None
    except (yaml.YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise MistakesError([f"{path}: is not valid YAML: {problem:.300}"]) from error


def fields(
    given: Any, kinds: Mapping[str, Kind], required: Sequence[str], where: str, problems: list[str]
) -> dict[str, Any]:
    """The correct entries of a mapping; mistakes are added to `problems`."""
    if not isinstance(given, dict):
        problems.append(f"{where}: must be a mapping with {', '.join(required or kinds)}")
        return {}
    found = islice(mistakes(given, kinds, required, closed=True), MAX_MISTAKES)
    problems.extend(f"{where}: {line}" for line in found)
    return {
        key: given[key] for key, kind in kinds.items() if key in given and kind.fits(given[key])
    }


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """`yaml.SafeLoader` without what makes a small file expensive or ambiguous.

    Aliases and merge keys let a few bytes stand for gigabytes, a long integer takes quadratic time,
    and of two equal keys the first would be lost.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        # looked at before the node is built, so that limits come before memory
        event = self.peek_event()
        self._nodes += 1
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(
                f"*{event.anchor:.40}: write the value out again{event.start_mark}"
            )
        if event.tag is not None:
            raise yaml.YAMLError(f"{event.tag:.40}: leave tags out{event.start_mark}")
        if self._depth == _MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} deep{event.start_mark}")
        if self._nodes > _MAX_NODES:
            raise yaml.YAMLError(f"more than {_MAX_NODES:,} values; split the file")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > _MAX_DIGITS:
            raise yaml.YAMLError(f"a number of {len(node.value):,} characters{node.start_mark}")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                what = (
                    f"{key.value!r:.40}"
                    if isinstance(key, yaml.ScalarNode)
                    else "a list or mapping"
                )
                raise yaml.YAMLError(
                    f"{what}: a key must be a text; put it in quotes{key.start_mark}"
                )
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value!r:.40} is there twice{key.start_mark}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)
