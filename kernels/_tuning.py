"""The tiles that a GEMM kernel runs with: the default of a rule or, on request, the fastest.

Each kernel has a rule that lists candidates for a device, a dtype and a number of tokens. The first
is the default, the same in every process and run. Measuring candidates is opt-in because timings
vary, and so would results. It happens once for each shape and power of two of the tokens; a file
keeps the results.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

import torch
import triton
from torch import Tensor

from npt_fast.kernels._launch import Target, Tiles, target_of

TileRule = Callable[[Target, torch.dtype, int], list[Tiles]]

NARROW = Tiles(32, 32, 32, 4, 2)
"""For rows that are not aligned: each element needs an address in registers."""
# each is compiled by `aot`, for every target and dtype
MAX_CANDIDATES = 2
"""Most tiles that a rule may offer."""

_forced: Tiles | None = None
_candidate = 0
_cache: dict[str, Tiles] | None = None
_file: Path | None = None


@contextmanager
def forced_tiles(tiles: Tiles) -> Iterator[None]:
    """Run all GEMM kernels with these tiles, so that small tests cross tile borders."""
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before


@contextmanager
def nth_candidate(number: int) -> Iterator[None]:
    """Run all GEMM kernels with candidate `number` of their rule, or with its last one."""
    global _candidate
    before, _candidate = _candidate, number
    try:
        yield
    finally:
        _candidate = before


def enable_autotuning(path: str | os.PathLike[str] | None = None) -> None:
    """Measure tiles from now on, and keep the fastest.

    Results then depend on timings in their last bits, and may differ between processes.

    Args:
        path: JSON file to read and write; None means ``~/.cache/npt_fast/tiles.json``.
    """
    global _cache, _file
    _file = Path(path) if path else Path.home() / ".cache" / "npt_fast" / "tiles.json"
    found = json.loads(_file.read_text()) if _file.exists() else {}
    _cache = {key: Tiles(*sizes) for key, sizes in found.items()}


def disable_autotuning() -> None:
    """Return to the default tiles."""
    global _cache
    _cache = None


def rows_are_aligned(operands: Iterable[Tensor | None], sizes: Iterable[int]) -> bool:
    """Whether Triton finds out that rows can be read 16 bytes at a time.

    It is compiled for pointers that are multiples of 16, in bytes, and for numbers that are, in
    elements of any dtype. It takes all others, multiples of 8 among them, for odd ones.
    """
    return all(size % 16 == 0 for size in sizes) and all(
        tensor.data_ptr() % 16 == 0 and all(n == 1 or n % 16 == 0 for n in tensor.stride())
        for tensor in operands
        if tensor is not None
    )


def choose_tiles(
    kernel: str,
    rule: TileRule,
    run: Callable[[Tiles], None],
    output: Tensor,
    operands: Iterable[Tensor | None],
    sizes: Sequence[int],
) -> Tiles:
    """Tiles for one launch.

    Args:
        kernel: name of the kernel.
        rule: function of target, dtype and tokens that returns candidates, the default first.
        run: launches the kernel; called only if measuring is on and these sizes are new.
        output: tensor ``(T, ...)`` on the kernel's device, of its dtype.
        operands: tensors that the kernel reads blocks of.
        sizes: all sizes besides T.
    """
    if _forced is not None:
        return _forced
    if not rows_are_aligned(operands, sizes):
        return NARROW
    tokens, target = output.shape[0], target_of(output)
    candidates = rule(target, output.dtype, tokens)
    # an empty grid launches nothing: nothing to time
    if _cache is None or not tokens:
        return candidates[min(_candidate, len(candidates) - 1)]
    bucket = triton.next_power_of_2(tokens)
    dtype = str(output.dtype).removeprefix("torch.")
    # a file may outlive the compiler and the GPU whose timings it holds, hence both are in the key
    key = " ".join(map(str, (kernel, target, triton.__version__, dtype, bucket, *sizes)))
    if key not in _cache:
        if torch.cuda.is_current_stream_capturing():  # measuring would become part of the graph
            return candidates[0]
        _cache[key] = min(candidates, key=lambda tiles: _milliseconds(run, tiles))
        _save()
    return _cache[key]


def _milliseconds(run: Callable[[Tiles], None], tiles: Tiles) -> float:
    return float(triton.testing.do_bench(lambda: run(tiles), return_mode="median"))


def _save() -> None:
    """Replace the file in one step, because other processes may be reading it."""
    assert _file is not None and _cache is not None
    _file.parent.mkdir(parents=True, exist_ok=True)
    # two processes that save at once must not write one temporary file
    temporary = _file.with_name(f"{_file.name}.{os.getpid()}")
    found = {key: astuple(tiles) for key, tiles in sorted(_cache.items())}
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(_file)
