"""Read YAML files of others strictly: bounded, without aliases or tags, all mistakes at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

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
    return _read(path, lambda loader: loader.get_single_data())


class Setting(NamedTuple):
    """A key of a flat YAML file.

    Attributes:
        line: line of the key, from 1.
        value: value as it is written, without quotes; texts for a list; None for null.
    """

    line: int
    value: str | list[str] | None


def settings(path: Path) -> dict[str, Setting]:
    """The keys of a YAML file whose values are plain values or lists of them.

    Values stay as they are written, so that ``1e-4`` and ``no`` mean what they mean on a command
    line.

    Raises:
        MistakesError: as for `load`; or the file is no mapping of this form.
    """

    def mapping(loader: _Loader) -> dict[str, Setting]:
        top = loader.get_single_node()
        if top is None:
            return {}
        if not isinstance(top, yaml.MappingNode):
            raise yaml.YAMLError(f"not a mapping of options to values{top.start_mark}")
        loader.check_keys(top)
        return {key.value: Setting(key.start_mark.line + 1, _plain(v)) for key, v in top.value}

    found: dict[str, Setting] = _read(path, mapping)
    return found


def _plain(node: Any) -> str | list[str] | None:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in items:
        if not isinstance(item, yaml.ScalarNode):
            raise yaml.YAMLError(f"not a value or a list of values{item.start_mark}")
    if isinstance(node, yaml.SequenceNode):
        return [item.value for item in items]
    return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)


def _read(path: Path, parse: Callable[[_Loader], Any]) -> Any:
    try:
        text = read_file(path, _MAX_BYTES, follow_links=True).decode("utf-8")
        return parse(_Loader(text))
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
        self.check_keys(node)
        return super().construct_mapping(node, deep)

    def check_keys(self, node: Any) -> None:
        """Refuse keys that are no texts, and those that are there twice."""
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
