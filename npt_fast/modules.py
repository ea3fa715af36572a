"""The NP component of one layer: its parameters and their names; `functional` computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from npt_fast.called_mlp import Change, Edit, call_mlp, called_as_module, is_plain
from npt_fast.checkpoint.keys import PROJECTIONS_OF, modulated
from npt_fast.checkpoint.np_module import Architecture, ScaleSlot
from npt_fast.config import Initialization
from npt_fast.errors import ModelError, OptionError
from npt_fast.functional import (
    ACTIVATIONS,
    Factors,
    Int8Matrix,
    bottleneck,
    change_from_bottleneck,
    compute_dtype,
    heads_of,
    is_shard,
    modulated_mlp,
    quantize,
    sharded_change,
    sum_of_mean_squares,
)
from npt_fast.initialization import initialize
from npt_fast.kept_cast import KeptCast
from npt_fast.mlp_layout import GATED, MLPLayout
from npt_fast.moe_mlp import Mixture, call_mixture


class NPComponent(nn.Module):
    """Changes a layer's MLP weights by a low-rank product made from its attention output.

    Parameters are joined as the GEMMs need them (`Factors`), and the state dict has the parameters'
    names. Files have one tensor per factor, projection and component under the original's names
    (``W_down_gate.0``), which `split` gives; `load_state_dict` takes those names as well.

    Args:
        hidden_size: model width D.
        intermediate_size: MLP width F.
        rank: rank r of each component.
        num_ranks: number of components k.
        modulation: ``"single"`` (gate), ``"dual"`` (gate, up) or ``"triple"`` (gate, up, down), or
            ``"plain"`` (up, down) of an MLP without a gate.
        residual: ``"removed"`` if the MLP replaces attention + MLP, ``"kept"`` if the attention
            output is still added to the residual stream.
        activation: the MLP's activation, a name of `npt_fast.functional.ACTIVATIONS`.
        layout: how the MLP, or the part of a mixture that changes, names its projections.
        mixture: the parts of an MLP that is a mixture of experts; None for any other.
        init: initialization of the parameters, see `npt_fast.initialization`.
        init_scale: scale of the initializations that are the original's.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Attributes:
        enabled: whether an NP layer uses the component; otherwise it runs as in the base model.
        rounded: whether `npt_fast.load` rounded numbers of a file to the parameters' dtype.

    Raises:
        OptionError: an argument is not one of the allowed values.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        rank: int,
        num_ranks: int = 1,
        modulation: str = "triple",
        residual: str = "removed",
        activation: str = "silu",
        layout: MLPLayout = GATED,
        mixture: Mixture | None = None,
        init: Initialization = "zero",
        init_scale: float = 0.001,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if modulation not in PROJECTIONS_OF:
            raise OptionError(
                f"modulation must be single, dual, triple or plain, got {modulation!r}"
            )
        layout.check(modulation)
        if residual not in ("removed", "kept"):
            raise OptionError(f"residual must be removed or kept, got {residual!r}")
        if rank < 1 or num_ranks < 1:
            raise OptionError(f"rank and num_ranks must be positive, got {rank} and {num_ranks}")
        if init not in get_args(Initialization):
            raise OptionError(f"init must be zero, improved or conservative, got {init!r}")
        if not 0 < init_scale < math.inf:
            raise OptionError(f"init_scale must be positive and finite, got {init_scale}")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.modulation_type = modulation
        self.residual = residual
        self.activation = activation
        self.layout = layout
        self.mixture = mixture
        self.init = init
        self.init_scale = init_scale
        self.enabled = True
        self.rounded = False
        self._kept_cast = KeptCast()
        d, f, r = hidden_size, intermediate_size, rank * num_ranks
        names = self.projections

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w_down = parameter(d, len(names) * r)
        self.w_a_in = parameter((len(names) - ("down" in names)) * r, d)
        # apart from w_a_in: down reads F columns, gate and up read D
        self.w_a_mid = parameter(r, f) if "down" in names else None
        self.w_b_gate = parameter(r, f) if "gate" in names else None
        self.w_b_up = parameter(r, f) if "up" in names else None
        self.w_b_down = parameter(r, d) if "down" in names else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize all parameters as `init` says; the same seed gives the same parameters."""
        initialize(
            self.split(),
            init=self.init,
            scale=self.init_scale,
            num_ranks=self.num_ranks,
        )

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections that are modulated, in order."""
        return modulated(self.modulation_type)

    @property
    def architecture(self) -> Architecture:
        """What a checkpoint records of the component."""
        return Architecture(
            self.modulation_type,
            self.num_ranks,
            self.rank,
            self.hidden_size,
            self.intermediate_size,
        )

    @property
    def joined(self) -> dict[str, Tensor]:
        """The parameters by name; of a quantized component their int8 numbers."""
        found = {name: getattr(self, name) for name in Factors._fields[:-1]}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def scales(self) -> dict[str, Tensor]:
        """The scales of a quantized component, by the names of the parameters; else none."""
        names = self.joined if self.is_int8 else ()
        return {name: getattr(self, f"{name}_scale") for name in names}

    @property
    def is_int8(self) -> bool:
        """Whether the component is quantized: then it has buffers in place of parameters."""
        return "w_down_scale" in self._buffers

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, scales included."""
        return sum(tensor.nbytes for tensor in (*self.joined.values(), *self.scales.values()))

    @property
    def factors(self) -> Factors:
        """The parameters as `modulated_mlp` takes them."""
        if self.is_int8:
            return self._numbers(torch.float32)
        return Factors(
            self.w_down,
            self.w_a_in,
            self.w_a_mid,
            self.w_b_gate,
            self.w_b_up,
            self.w_b_down,
            self.num_ranks,
        )

    def _numbers(self, dtype: torch.dtype) -> Factors:
        """int8 factors, whose products are in `dtype`."""
        scales = self.scales
        whole = {name: Int8Matrix(w, scales[name], dtype) for name, w in self.joined.items()}
        return Factors._make([*map(whole.get, Factors._fields[:-1]), self.num_ranks])

    def quantize(self) -> None:
        """Round the factors to int8; they become buffers, and cannot be trained."""
        self._kept_cast.forget()
        for name, tensor in self.joined.items():
            values, scale = quantize(tensor, 0 if name.startswith("w_a") else 1)
            delattr(self, name)
            self.register_buffer(name, values)
            self.register_buffer(f"{name}_scale", scale)

    def dequantize(self) -> None:
        """Turn int8 factors into float32 parameters without gradients."""
        factors = self.factors
        for name in self.joined:
            whole: Any = getattr(factors, name)
            delattr(self, name)
            delattr(self, f"{name}_scale")
            dense = whole.dense().contiguous()
            self.register_parameter(name, nn.Parameter(dense, requires_grad=False))

    def copies_for(self, tensor: Tensor) -> Factors | None:
        """`factors` without gradients in the dtype of products with `tensor`, made once and kept.

        None if they have that dtype. Those that are int8 are no copies, but make some when used.
        """
        if self.is_int8:
            return self._numbers(compute_dtype(tensor))
        tensors, dtype = self.factors[:-1], compute_dtype(tensor)
        if all(t is None or t.dtype == dtype for t in tensors):
            return None
        return Factors._make([*self._kept_cast(tensors, dtype), self.num_ranks])

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 sets parameters whose memory it has filled, and train() and eval() set `training`
        if "_kept_cast" in self.__dict__:
            self._kept_cast.forget()
        super().__setattr__(name, value)

    def bottleneck(self, attention: Tensor) -> Tensor:
        """The bottlenecks of all projections, ``(..., c R)``."""
        copies = self.copies_for(attention) or self.factors
        return bottleneck(attention.to(compute_dtype(attention)), self.w_down, copies.w_down)

    def sum_of_mean_squares(self, u: Tensor, weights: Tensor) -> Tensor:
        """`functional.sum_of_mean_squares` of the bottlenecks of weighted tokens."""
        return sum_of_mean_squares(u, weights, self.factors, copies=self.copies_for(u))

    def forward(
        self,
        attention: Tensor,
        h: Tensor,
        mlp: Any,
        *,
        routed_by: Tensor | None = None,
        edits: Sequence[Edit] = (),
        bottleneck: list[Tensor] | None = None,
    ) -> Tensor:
        """Output of `mlp` with weights changed by the attention output.

        The fused path computes a gated MLP that `is_plain`; any other one calls its projections.

        Args:
            attention: attention output after its output projection, ``(..., D)``.
            h: MLP input, ``(..., D)``.
            mlp: module with the projections of the layout, or a mixture of experts with a part that
                has them; or a function that returns it.
            routed_by: what a mixture's router reads, ``(..., D)``; `h` if not given.
            edits: what replaces the weight change of some tokens, applied in this order. Other
                tokens get the same bits as without edits.
            bottleneck: list that gets the bottlenecks, if the fused path computes a graph.

        Returns:
            ``(..., D)``.

        Raises:
            ModelError: the component's own parameters are shards; or they are int8, and gradients
                are needed, which these do not pass on.
        """
        if not isinstance(mlp, nn.Module):
            mlp = mlp()
        if self.is_int8 and torch.is_grad_enabled():
            if any(t.requires_grad for t in (attention, h, *mlp.parameters())):
                raise ModelError(
                    "int8 factors pass no gradients on: call the model under torch.no_grad(), or "
                    "load float factors"
                )
        gated = partial(self._gated, attention, h, edits=edits, u=bottleneck)
        if self.mixture is None:
            return gated(mlp)
        change = partial(self._edited_change, attention, edits)
        read = h if routed_by is None else routed_by
        return call_mixture(mlp, self.mixture, h, read, shared=gated, change=change)

    def _gated(
        self, attention: Tensor, h: Tensor, mlp: Any, edits: Sequence[Edit], u: list[Tensor] | None
    ) -> Tensor:
        if self.layout.gate is None or not is_plain(mlp, self.layout):
            return self._called(attention, h, mlp, edits)
        if not edits:
            return self._fused(attention, h, mlp, u)
        tokens = edits[0].tokens
        for edit in edits[1:]:
            tokens = tokens | edit.tokens
        rows = tokens.nonzero(as_tuple=True)
        part = self._called(attention[rows], h[rows], mlp, [edit.at(rows) for edit in edits])
        if len(part) == tokens.numel():
            return part.view_as(h)
        return self._fused(attention, h, mlp).index_put(rows, part)

    def _fused(
        self, attention: Tensor, h: Tensor, mlp: Any, bottleneck: list[Tensor] | None = None
    ) -> Tensor:
        weights = self.layout.weights(mlp)
        copies = self.copies_for(h)
        return modulated_mlp(
            attention,
            h,
            weights.gate,
            weights.up,
            weights.down,
            copies if copies is not None and self.is_int8 else self.factors,
            gate_bias=weights.gate_bias,
            up_bias=weights.up_bias,
            down_bias=weights.down_bias,
            activation=self.activation,
            copies=copies,
            bottleneck=bottleneck,
        )

    def _called(self, attention: Tensor, h: Tensor, mlp: Any, edits: Sequence[Edit]) -> Tensor:
        run = partial(
            call_mlp,
            activation=ACTIVATIONS[self.activation][0],
            change=self._edited_change(attention, edits),
            layout=self.layout,
        )
        return called_as_module(mlp, run, h)

    def _edited_change(self, attention: Tensor, edits: Sequence[Edit]) -> Change:
        if is_shard(self.w_down):
            raise ModelError(
                "an NP component's parameters are shards (DTensor): FSDP2 gathers them in the call "
                "of the module that it wraps; for tensor parallelism leave them whole"
            )
        change = self.change(attention)
        for edit in edits:
            change = edit.applied(change, self, attention)
        return change

    def change(self, attention: Tensor) -> Change:
        """What the weight changes add to the projections' outputs, given the attention output."""
        factors, k = self.factors, self.num_ranks
        heads = heads_of(factors)
        bottlenecks: list[Tensor] = []

        def change(name: str, projection: Any, a: Tensor) -> Tensor | None:
            if name not in self.projections:
                return None
            index = self.projections.index(name)
            copies = self.copies_for(a) or factors
            if not bottlenecks:  # one product for all projections, and none if all are edited
                joined = bottleneck(attention.to(compute_dtype(a)), factors.w_down, copies.w_down)
                bottlenecks.extend(torch.split(joined, self.rank * k, -1))
            u, (w_a, w_b) = bottlenecks[index], heads[index]
            if is_shard(getattr(projection, "weight", None)):
                if self.layout.joined and name != "down":
                    raise ModelError(
                        f"{self.layout.gate} is a shard (DTensor), whose rows are neither gate's "
                        "nor up's alone; load the model without tp_plan"
                    )
                a, w_a, w_b = (tensor.to(u.dtype) for tensor in (a, w_a, w_b))
                return sharded_change(projection, a, u, w_a, w_b, num_ranks=k)
            used = heads_of(copies)[index]
            return change_from_bottleneck(a, u, w_a, w_b, num_ranks=k, copies=used)

        return change

    def split(self, joined: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Split tensors of the parameters' shapes into the original's tensors.

        Args:
            joined: parameter name -> AdamW's moment of it, for example; the parameters themselves
                if not given.

        Returns:
            Name -> view for each tensor of the original, in its order, such as
            ``W_down_gate.0`` -> ``(D, r)``.
        """
        joined = self.joined if joined is None else joined
        views: dict[str, Tensor] = {}
        for slot in self.architecture.slots():
            parameter, axis, start = self.architecture.place(slot)
            name = str(self.architecture.key(0, slot)).removeprefix("layer_0_np.")
            views[name] = joined[parameter].narrow(axis, start, self.rank)
        return views

    def split_scales(self) -> dict[ScaleSlot, Tensor]:
        """Views of a quantized component's scales, as a checkpoint has them."""
        views = {}
        for slot in self.architecture.scale_slots():
            parameter, axis, start = self.architecture.place((*slot, 0))
            whole = self.scales[parameter]
            # W_b_up's channels are columns, which all components share
            views[slot] = (
                whole
                if slot[1] == "W_b_up"
                else whole.narrow(axis, start, self.rank * self.num_ranks)
            )
        return views

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = {name: self._buffers[f"{name}_scale"] for name in self.scales}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in scales.items():
            moved = self._buffers[f"{name}_scale"]
            assert scale is not None and moved is not None
            if moved.dtype != scale.dtype:  # half() would lose small scales, bfloat16() precision
                self._buffers[f"{name}_scale"] = scale.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given_int8 = f"{prefix}w_down_scale" in state_dict
        if given_int8 != self.is_int8 and any(name.startswith(prefix) for name in state_dict):
            kinds = ("int8", "floats") if self.is_int8 else ("floats", "int8")
            found_errors: list[str] = rest[-1]
            found_errors.append(
                f"{prefix}: its factors are {kinds[0]}, those of the state dict {kinds[1]}; "
                "take npt.load, or npt.quantize a model of floats"
            )
            return
        own = self.split()
        if all(prefix + name in state_dict for name in own):  # written by an earlier version
            given = {name: state_dict.pop(prefix + name) for name in own}
            wrong = [name for name, view in own.items() if given[name].shape != view.shape]
            if wrong:
                found, wanted = list(given[wrong[0]].shape), list(own[wrong[0]].shape)
                errors: list[str] = rest[-1]
                errors.append(f"{prefix}{wrong[0]} is {found}, {wanted} expected")
                return
            like = next(iter(given.values()))
            joined = {
                name: torch.empty(parameter.shape, dtype=like.dtype, device=like.device)
                for name, parameter in self.joined.items()
            }
            for name, view in self.split(joined).items():
                view.copy_(given[name])
            state_dict |= {prefix + name: tensor for name, tensor in joined.items()}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f"{self.modulation_type}, num_ranks={self.num_ranks}, rank={self.rank}, "
            f"residual={self.residual!r}" + (", int8" if self.is_int8 else "")
        )
