"""Check the content of a pickle: plain data and tensors, with limits on depth and size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

from npt_fast.checkpoint.torch_symbols import OrderedDict, Symbol, TensorRef
from npt_fast.errors import CheckpointError, printable

MAX_DEPTH = 64
"""Limit on the nesting of containers, for reader and writer."""

_MAX_PATH = 160  # limit on the characters of keys in a message
_LEAVES = frozenset((str, int, float, bool, type(None), TensorRef))
_CONTAINERS = frozenset((dict, Counter, OrderedDict, list, tuple))


class _Level:
    """A container whose items are being checked.

    Attributes:
        container: the container.
        items: items that are not checked yet.
        size: bytes of the checked items; a shared item counts as often as it occurs.
        height: levels of containers below this one, found so far.
    """

    __slots__ = ("container", "height", "items", "size")

    def __init__(self, container: Any) -> None:
        self.container = container
        self.items: Iterator[Any] = iter(container)
        if isinstance(container, dict):
            self.items = chain(container, container.values())
        self.size = 64
        self.height = 0


def check_content(value: Any, max_memory: int, error: Callable[[str], CheckpointError]) -> None:
    """Raise an error unless `value` is as the docstring of `torch_pickle` describes.

    The check uses no recursion, and visits a shared container once.

    Args:
        value: content of the pickle.
        max_memory: limit on its size in bytes; a shared item counts as often as it occurs.
        error: function that makes the exception for a problem.
    """

    def fail(problem: str, *found: Any) -> CheckpointError:
        keys = []
        for outer, inner in pairwise([*(level.container for level in levels), *found]):
            items = outer.items() if isinstance(outer, dict) else ()
            keys += [key for key, item in items if item is inner][:1]
        return error(at(keys, problem))

    # a loop, since recursion would end where hostile nesting begins; each container is checked
    # once, or 40 tuples that hold each other twice would take 2^40 steps
    measured: dict[int, tuple[int, int]] = {}  # size and height of each checked container, by id
    unfinished: set[int] = set()  # ids of the containers in `levels`
    levels = [_Level((value,))]
    while True:
        level = levels[-1]
        for item in level.items:
            kind = type(item)
            if kind in _LEAVES:
                level.size += 16 + len(item) if kind is str else 16
                continue
            if kind not in _CONTAINERS:
                name = item.name if kind is Symbol else f"a value of type {kind.__name__}"
                raise fail(f"{name} is neither plain data nor a tensor; refused", item)
            if id(item) not in measured:
                if id(item) in unfinished:
                    raise fail("a container that holds itself; refused")
                unfinished.add(id(item))
                levels.append(_Level(item))
                break
            size, height = measured[id(item)]
            level.size += size
            level.height = max(level.height, height + 1)
        else:
            levels.pop()
            if not levels:
                return
            above = levels[-1]
            above.size += level.size
            above.height = max(above.height, level.height + 1)
            unfinished.discard(id(level.container))
            measured[id(level.container)] = level.size, level.height
        if len(levels) + level.height > MAX_DEPTH + 1:
            raise fail(f"nested more than {MAX_DEPTH} deep; refused")
        if level.size > max_memory:
            raise fail(
                f"stands for more than {max_memory:,} bytes, with shared values counted wherever "
                "they occur; refused"
            )


def at(keys: Sequence[str | int], problem: str) -> str:
    """A message with up to five keys that lead to the problem; the keys are untrusted text."""
    path = printable(".".join(f"{key!s:.80}" for key in keys[:5]))[:_MAX_PATH]
    return f"{path}: {problem}" if path else problem
