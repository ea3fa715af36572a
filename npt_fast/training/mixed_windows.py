"""Windows of several texts, which take turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from torch.utils.data import IterableDataset

from npt_fast.training.token_windows import TokenWindows, Window


class MixedWindows(IterableDataset[Window]):
    """Endless stream of one window of each text in turn, whatever the lengths of the texts.

    Window n of text i of k has the number n k + i.

    Args:
        texts: the streams of the texts; those of a stream that starts at a state start at its
            parts.
        source: what names the texts.
        windows: windows of all texts that were used before these streams start.

    Attributes:
        position: as `windows`.
        held_out: number of windows held out.
    """

    def __init__(self, texts: Sequence[TokenWindows], source: str, windows: int = 0) -> None:
        self._texts = texts
        self._source = source
        self.position = windows
        self.held_out = sum(text.held_out for text in texts)

    def held_out_windows(self) -> list[Window]:
        """The windows held out of each text, in turn, numbered from -held_out to -1."""
        turns = zip_longest(*(text.held_out_windows() for text in self._texts))
        windows = [window for window in chain.from_iterable(turns) if window is not None]
        return [
            {**window, "window": torch.tensor(n - len(windows))} for n, window in enumerate(windows)
        ]

    def skip(self, windows: int) -> None:
        """Begin so many windows later, of all texts together."""
        for n, text in enumerate(self._texts):
            text.skip(self._turns(self.position + windows, n) - self._turns(self.position, n))
        self.position += windows

    def state_after(self, windows: int) -> dict[str, Any]:
        """The state to start at, as `TokenWindows.state_after` gives it, of each text in parts."""
        parts = [text.state_after(self._turns(windows, n)) for n, text in enumerate(self._texts)]
        return {"source": self._source, "windows": windows, "parts": parts}

    def accepts(self, state: Mapping[str, Any]) -> bool:
        """Whether streams of these texts can start at the parts of `state`."""
        parts = state.get("parts") if isinstance(state, Mapping) else None
        return (
            isinstance(parts, list)
            and type(state.get("windows")) is int
            and len(parts) == len(self._texts)
            and all(
                text.accepts(part) and part["windows"] == self._turns(state["windows"], n)
                for n, (text, part) in enumerate(zip(self._texts, parts, strict=True))
            )
        )

    def _turns(self, windows: int, text: int) -> int:
        """How many of the first `windows` windows are of a text."""
        count = len(self._texts)
        return (windows + count - 1 - text) // count

    def __iter__(self) -> Iterator[Window]:
        count = len(self._texts)
        streams = [iter(text) for text in self._texts]
        turn = self.position % count
        while True:
            window = next(streams[turn])
            yield {**window, "window": window["window"] * count + turn}
            turn = (turn + 1) % count
