"""Count the bytes that calls move to and from memory, on a CPU, with kernels in the interpreter.

Each kernel launch and each torch operation is counted separately. A distinct byte that it loads
or stores counts once, as if a cache held everything during the launch and nothing after it.
Accesses of a kernel are seen address by address; a torch operation reads its operands and writes
its results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

MULTIPLYING = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "_modulated_linear_kernel",
    "_modulated_gate_up_kernel",
    "_probe_kernel",
    "_decode_products_kernel",
    "_decode_inner_kernel",
    "_decode_low_rank_kernel",
}
"""Names of launches with matrix products; all others are elementwise or sums."""

_ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::resize_")
_OVERWRITING = ("aten::copy_", "aten::fill_", "aten::zero_")


@dataclass(slots=True)
class Launch:
    """One kernel launch, or one operation of torch.

    Attributes:
        name: name of the kernel or operation.
        loaded: distinct bytes loaded, by address of their storage.
        stored: distinct bytes stored, by address of their storage.
        requested: bytes that a kernel's programs load, repetitions included, by address.
    """

    name: str
    loaded: dict[int, int] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    requested: dict[int, int] = field(default_factory=dict)

    def moved(self, among: Callable[[int], bool]) -> int:
        """Bytes loaded and stored, in the storages at the given addresses."""
        both = [*self.loaded.items(), *self.stored.items()]
        return sum(count for address, count in both if among(address))


class _Memory:
    """The bytes of its arguments' storages that a running kernel touches."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        sizes = {address_of(t): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        self.starts = np.array(sorted(sizes), dtype=np.uint64)
        self.loaded = {start: np.zeros(size, dtype=bool) for start, size in sizes.items()}
        self.stored = {start: np.zeros(size, dtype=bool) for start, size in sizes.items()}
        self.requested = dict.fromkeys(sizes, 0)

    def touch(self, seen: dict[int, Any], addresses: Any, itemsize: int) -> int | None:
        """Mark elements of one tensor at these addresses; return the storage's address."""
        if not addresses.size:
            return None
        index = int(np.searchsorted(self.starts, addresses.min(), side="right")) - 1
        assert index >= 0, "an access before all tensors"
        start = int(self.starts[index])
        offsets = (addresses - np.uint64(start)).astype(np.int64)
        for byte in range(itemsize):  # an index past the end raises
            seen[start][offsets + byte] = True
        return start


def address_of(tensor: Tensor) -> int:
    """Address of the tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def addresses_of(tensors: Iterable[Any]) -> set[int]:
    """Addresses of the storages of all tensors among the values."""
    return {address_of(tensor) for tensor in tensors if isinstance(tensor, Tensor)}


class Traffic(TorchDispatchMode):
    """Counts bytes while it is entered.

    Attributes:
        launches: everything that moved bytes, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._alive: list[torch.UntypedStorage] = []  # so that no address repeats
        self._memory: _Memory | None = None
        self._patches = ExitStack()

    def __enter__(self) -> Traffic:
        for owner, name, replacement in (
            (GridExecutor, "__call__", self._run_kernel),
            (InterpreterBuilder, "create_masked_load", self._load),
            (InterpreterBuilder, "create_masked_store", self._store),
        ):
            original = getattr(owner, name)
            patch = mock.patch.object(owner, name, _bound(replacement, original))
            self._patches.enter_context(patch)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def moved(self, *, only: set[int] | None = None, but: set[int] | None = None) -> int:
        """Bytes of all storages, of `only` some, or of all `but` some."""
        return sum(launch.moved(_choice(only, but)) for launch in self.launches)

    def exposed(self, *, but: set[int]) -> int:
        """Bytes of launches without a matrix product, whose time no product can hide."""
        among = _choice(None, but)
        return sum(x.moved(among) for x in self.launches if x.name not in MULTIPLYING)

    def _run_kernel(self, original: Any, executor: Any, *arguments: Any, **options: Any) -> None:
        tensors = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor)]
        self._alive += [t.untyped_storage() for t in tensors]
        memory = self._memory = _Memory(tensors)
        try:
            original(executor, *arguments, **options)
        finally:
            self._memory = None
        launch = Launch(executor.fn.__name__, requested=memory.requested)
        launch.loaded = {at: int(seen.sum()) for at, seen in memory.loaded.items() if seen.any()}
        launch.stored = {at: int(seen.sum()) for at, seen in memory.stored.items() if seen.any()}
        self.launches.append(launch)

    def _load(self, original: Any, builder: Any, pointers: Any, mask: Any, *rest: Any,
              **options: Any) -> Any:  # fmt: skip
        if self._memory is not None:
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            addresses = pointers.data[mask.data]
            start = self._memory.touch(self._memory.loaded, addresses, itemsize)
            if start is not None:
                self._memory.requested[start] += addresses.size * itemsize
        return original(builder, pointers, mask, *rest, **options)

    def _store(self, original: Any, builder: Any, pointers: Any, value: Any, mask: Any,
               *rest: Any, **options: Any) -> Any:  # fmt: skip
        if self._memory is not None:
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            self._memory.touch(self._memory.stored, pointers.data[mask.data], itemsize)
        return original(builder, pointers, value, mask, *rest, **options)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            self._memory is None
        ):  # otherwise the interpreter itself calls torch for a kernel's arguments
            self._count(func._schema, args, kwargs or {}, result)
        return result

    def _count(self, schema: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        operands, changed = [], []
        for index, argument in enumerate(schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            written = argument.alias_info is not None and argument.alias_info.is_write
            changed += tensors if written else []
            if not (written and (argument.is_out or schema.name in _OVERWRITING)):
                operands += tensors
        known = addresses_of([*operands, *changed])
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        written = changed + [tensor for tensor in results if address_of(tensor) not in known]
        self._alive += [tensor.untyped_storage() for tensor in (*operands, *written)]
        if not written or schema.name.startswith(_ALLOCATIONS):  # a view, or uninitialized memory
            return
        if schema.name == "aten::addmm":
            self._count_copy(operands[0], written[0])
        if schema.name in MULTIPLYING:
            assert not any(map(_would_be_copied, [*operands[-2:], *written]))
        self.launches.append(Launch(schema.name, _by_storage(operands), _by_storage(written)))

    def _count_copy(self, addend: Tensor, output: Tensor) -> None:
        """Count the copy that torch's addmm makes first, if its output is not its addend.

        A vector is added by cuBLASLt instead (pytorch #153590; aten/src/ATen/native/cuda/Blas.cpp).
        """
        if addend.ndim == 2 and addend.data_ptr() != output.data_ptr():
            self.launches.append(Launch("copy", _by_storage([addend]), _by_storage([output])))


def _bound(replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a method by a function that gets the original."""

    def method(*arguments: Any, **options: Any) -> Any:
        return replacement(original, *arguments, **options)

    return method


def _choice(only: set[int] | None, but: set[int] | None) -> Callable[[int], bool]:
    return lambda at: (only is None or at in only) and (but is None or at not in but)


def _by_storage(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Distinct bytes of tensors, by address of their storage; a view of a view counts once."""
    found: dict[int, int] = {}
    views = {(t.data_ptr(), tuple(t.shape), t.stride()): t for t in tensors}
    for tensor in views.values():
        counts = (n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
        at = address_of(tensor)
        found[at] = found.get(at, 0) + int(np.prod([*counts], dtype=int)) * tensor.itemsize
    return found


def _would_be_copied(matrix: Tensor) -> bool:
    """Whether cuBLAS needs a copy, because neither rows nor columns are contiguous."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    return not ((down == 1 and right >= max(1, rows)) or (right == 1 and down >= max(1, columns)))
