"""Which tiles a GEMM kernel runs with: a default by rule, or, when asked for, the fastest measured.

The default is the first of what the kernel's own rule gives for the device, the dtype and the
number of tokens: the same in every process and every run. Measuring is opt-in, since its winner
depends on the day; it is done once for shape and bucket of tokens (powers of two) and kept on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

import torch
import triton
from torch import Tensor

from npt_fast.kernels._launch import Target, Tiles, target_of

Rule = Callable[[Target, torch.dtype, int], list[Tiles]]

NARROW = Tiles(32, 32, 32, 4, 2)
"""For rows that are read element by element, each with an address in registers."""
MAX_CANDIDATES = 2
"""Tiles that a rule offers at most."""

_forced: Tiles | None = None
_candidate = 0
_cache: dict[str, Tiles] | None = None
_file: Path | None = None


@contextmanager
def forced(tiles: Tiles) -> Iterator[None]:
    """All GEMM kernels run with these tiles: tests cross tile borders with small problems."""
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before


@contextmanager
def candidate(number: int) -> Iterator[None]:
    """All GEMM kernels run with that one of their rule's tiles, or its last."""
    global _candidate
    before, _candidate = _candidate, number
    try:
        yield
    finally:
        _candidate = before


def enable_autotuning(path: str | os.PathLike[str] | None = None) -> None:
    """Measure tiles from now on, and keep what was found.

    Results then depend on timings in their last bits, and may differ between processes.

    Args:
        path: JSON file that is read and written; ``~/.cache/npt_fast/tiles.json`` if None.
    """
    global _cache, _file
    _file = Path(path) if path else Path.home() / ".cache" / "npt_fast" / "tiles.json"
    found = json.loads(_file.read_text()) if _file.exists() else {}
    _cache = {key: Tiles(*sizes) for key, sizes in found.items()}


def disable_autotuning() -> None:
    """Back to the defaults."""
    global _cache
    _cache = None


def aligned(sizes: Sequence[int]) -> bool:
    """Whether rows of these lengths can be read 16 bytes at a time."""
    return all(size % 8 == 0 for size in sizes)


def choose(
    kernel: str, rule: Rule, run: Callable[[Tiles], None], output: Tensor, sizes: Sequence[int]
) -> Tiles:
    """Tiles for one launch.

    Args:
        kernel: its name.
        rule: target, dtype, tokens -> candidates, the default first.
        run: launches it; called only if measuring is on and these sizes are new.
        output: ``(T, ...)``, of the kernel's device and dtype.
        sizes: the other sizes.
    """
    if _forced is not None:
        return _forced
    tokens, target = output.shape[0], target_of(output)
    candidates = rule(target, output.dtype, tokens) if aligned(sizes) else [NARROW]
    if _cache is None or not tokens:
        return candidates[min(_candidate, len(candidates) - 1)]
    bucket = triton.next_power_of_2(tokens)
    dtype = str(output.dtype).removeprefix("torch.")
    key = " ".join(map(str, (kernel, target, triton.__version__, dtype, bucket, *sizes)))
    if key not in _cache:
        if torch.cuda.is_current_stream_capturing():  # measuring would be captured
            return candidates[0]
        _cache[key] = min(candidates, key=lambda tiles: _milliseconds(run, tiles))
        _save()
    return _cache[key]


def _milliseconds(run: Callable[[Tiles], None], tiles: Tiles) -> float:
    return float(triton.testing.do_bench(lambda: run(tiles), return_mode="median"))


def _save() -> None:
    """Replace the file in one step: other processes may read it."""
    assert _file is not None and _cache is not None
    _file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _file.with_name(f"{_file.name}.{os.getpid()}")
    found = {key: astuple(tiles) for key, tiles in sorted(_cache.items())}
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(_file)
