"""Copies of parameters in the dtype of the activations, which are made once and kept.

Float32 parameters meet 16-bit activations in every call. A cast of its own for each call moves 6
bytes per parameter, three times what a decode step has to read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class KeptCast:
    """Copies of one module's parameters in another dtype, made once and kept.

    Copies are renewed when a parameter is another object, lies at another address or has another
    version, and when the dtype or the CUDA stream is another one: there is one set of copies at
    most. Some writes leave no trace on a parameter. They drop the copies instead:

    - Writes through ``.data`` give no new version, so reading it drops all copies.
    - Fused optimizers write without a new version, so each optimizer's step drops them, first and
      last: its closure, or another thread, may call the module in between.
    - FSDP2 gathers into the same memory without a new version. It sets the module's parameters
      before and after, and the module calls `forget` when one is set.

    What is left are writes to the memory itself: through a ``.data`` that was read before the
    copies were made, a storage, a NumPy or DLPack array, a replayed CUDA graph, a collective
    operation of ``torch.distributed`` or a fused optimizer's function. ``model.train()`` and
    ``model.eval()`` drop the copies after them.

    A copy or a pickle of this object is empty. Threads may share it. It keeps no parameter alive.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __call__(
        self, parameters: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor | None, ...]:
        """The parameters in `dtype`, without gradients.

        Args:
            parameters: parameters of one module on one device; None stays None.
            dtype: dtype of the result.

        Returns:
            One tensor for each parameter, detached, of its shape. Those that have the dtype share
            the parameter's memory. Nothing may be written to any of them.
        """
        given = [p for p in parameters if p is not None and p.dtype != dtype]
        if not given or not _can_be_kept(given, dtype):
            return tuple(None if p is None else p.detach().to(dtype) for p in parameters)
        stream = torch.cuda.current_stream(given[0].device) if given[0].is_cuda else None
        kept = self._kept
        if kept is None or not kept.holds_for(given, dtype, stream):
            kept = _Kept.of(given, dtype, stream)
            # those of a mode, such as fake tensors, are of no use to calls outside of it
            if all(type(copy) is Tensor for copy in kept.copies):
                self._kept = kept
                _HOLDERS.add(self)
        copies = iter(kept.copies)
        return tuple(
            None if p is None else p.detach() if p.dtype == dtype else next(copies)
            for p in parameters
        )

    def forget(self) -> None:
        """Drop the copies of this module, because a parameter was set, or may have been written."""
        if self._kept is not None:
            self._kept = self._kept._replace(copies=[])

    def __reduce__(self) -> tuple[type[KeptCast], tuple[()]]:
        return KeptCast, ()


def drop_copies(*_: Any) -> None:
    """Forget the copies of all modules, because a parameter may be written without a trace."""
    while _HOLDERS:
        try:
            holder = _HOLDERS.pop()
        except KeyError:  # another thread was faster
            return
        kept, holder._kept = holder._kept, None
        for source in kept.sources if kept else ():
            parameter = source.parameter()
            if parameter is not None:
                _set_class(parameter, nn.Parameter)


_HOLDERS: WeakSet[KeptCast] = WeakSet()
_NEW = nn.Parameter.__new__.__code__


class _Watched(nn.Parameter):
    """The class that a parameter has while a copy of it is kept.

    Optimizers take their fast paths for `nn.Parameter` alone, and find it: see `drop_copies`.
    """

    def __new__(cls, *args: Any, **options: Any) -> Any:
        return nn.Parameter(*args, **options)  # libraries make new parameters of a parameter's type

    @property
    def data(self) -> Tensor:
        drop_copies()
        _set_class(self, nn.Parameter)
        return self.data

    @data.setter
    def data(self, value: Tensor) -> None:
        drop_copies()
        _set_class(self, nn.Parameter)
        self.data = value

    def detach(self) -> Tensor:
        # `nn.Parameter(p)` takes p if this has p's own type
        if torch.compiler.is_compiling() or sys._getframe(1).f_code is not _NEW:
            return super().detach()
        drop_copies()
        _set_class(self, nn.Parameter)
        return nn.Parameter(self, requires_grad=False)


def _set_class(parameter: Any, to: type[nn.Parameter]) -> None:
    parameter.__class__ = to


class _Source(NamedTuple):
    parameter: ReferenceType[Tensor]
    address: int
    version: int

    @classmethod
    def of(cls, parameter: Tensor) -> _Source:
        return cls(ref(parameter), parameter.data_ptr(), parameter._version)


class _Kept(NamedTuple):
    sources: list[_Source]
    dtype: torch.dtype
    stream: Any
    copies: list[Tensor]

    @classmethod
    def of(cls, parameters: list[Tensor], dtype: torch.dtype, stream: Any) -> _Kept:
        for parameter in parameters:  # before they are read
            _set_class(parameter, _Watched)
        sources = [_Source.of(parameter) for parameter in parameters]
        # no inference tensors, so that a later call with gradients can save them
        with torch.inference_mode(False), torch.no_grad():
            return cls(sources, dtype, stream, [p.to(dtype) for p in parameters])

    def holds_for(self, parameters: list[Tensor], dtype: torch.dtype, stream: Any) -> bool:
        """Whether these are copies of such parameters, and nothing was written since.

        On another stream, the kernels that make the copies might not have run yet.
        """
        return (
            (self.dtype, self.stream) == (dtype, stream)
            and len(parameters) == len(self.copies)
            and all(
                p is source.parameter()
                and type(p) is _Watched
                and p.data_ptr() == source.address
                and p._version == source.version
                for p, source in zip(parameters, self.sources, strict=True)
            )
        )


def _can_be_kept(parameters: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether copies can be kept, and a later write will be seen.

    A graph of torch.compile and a CUDA graph have the cast in them: they would go on with a copy
    when the parameters have changed, and what is allocated in a capture belongs to its graph.
    Tensors that stand in for parameters (DTensor, replicas, functional calls) live for one call,
    and so does what torch.func's transforms compute. Inference tensors have no version.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return all(
        type(p) in (nn.Parameter, _Watched)
        and dtype.itemsize < p.dtype.itemsize
        and not p.is_inference()
        for p in parameters
    )


register_optimizer_step_pre_hook(drop_copies)
register_optimizer_step_post_hook(drop_copies)
