"""The NP component of one layer: its parameters and their names; `functional` computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from npt_fast.checkpoint.keys import PROJECTIONS_OF
from npt_fast.checkpoint.np_module import Architecture
from npt_fast.config import Initialization
from npt_fast.functional import Factors, modulated_mlp
from npt_fast.initialization import initialize


class NPComponent(nn.Module):
    """Changes a layer's MLP weights by a low-rank product made from its attention output.

    Parameters are joined as the GEMMs need them (`Factors`). The state dict has one tensor per
    factor, projection and component under the original's names (``W_down_gate.0``), so that
    checkpoints need no translation.

    Args:
        hidden_size: model width D.
        intermediate_size: MLP width F.
        rank: rank r of each component.
        num_ranks: number of components k.
        modulation: ``"single"`` (gate), ``"dual"`` (gate, up) or ``"triple"`` (gate, up, down).
        residual: ``"removed"`` if the MLP replaces attention + MLP, ``"kept"`` if the attention
            output is still added to the residual stream.
        activation: the MLP's activation, a name of `npt_fast.functional.ACTIVATIONS`.
        init: initialization of the parameters, see `npt_fast.initialization`.
        init_scale: scale of the initializations that are the original's.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: an argument is not one of the allowed values.
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
        init: Initialization = "zero",
        init_scale: float = 0.001,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if modulation not in PROJECTIONS_OF:
            raise ValueError(f"modulation must be single, dual or triple, got {modulation!r}")
        if residual not in ("removed", "kept"):
            raise ValueError(f"residual must be removed or kept, got {residual!r}")
        if rank < 1 or num_ranks < 1:
            raise ValueError(f"rank and num_ranks must be positive, got {rank} and {num_ranks}")
        if init not in get_args(Initialization):
            raise ValueError(f"init must be zero, improved or conservative, got {init!r}")
        if not 0 < init_scale < math.inf:
            raise ValueError(f"init_scale must be positive and finite, got {init_scale}")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.modulation_type = modulation
        self.residual = residual
        self.activation = activation
        self.init = init
        self.init_scale = init_scale
        self.enabled = True
        d, f, r = hidden_size, intermediate_size, rank * num_ranks
        projections = len(PROJECTIONS_OF[modulation])
        inputs = min(projections, 2)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w_down = parameter(d, projections * r)
        self.w_a_in = parameter(inputs * r, d)
        # apart from w_a_in: down reads F columns, gate and up read D
        self.w_a_mid = parameter(r, f) if projections == 3 else None
        self.w_b_gate = parameter(r, f)
        self.w_b_up = parameter(r, f) if projections > 1 else None
        self.w_b_down = parameter(r, d) if projections == 3 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize all parameters as `init` says; the same seed gives the same parameters."""
        initialize(
            self.split(dict(self.named_parameters())),
            init=self.init,
            scale=self.init_scale,
            num_ranks=self.num_ranks,
        )

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
    def factors(self) -> Factors:
        """The parameters as `modulated_mlp` takes them."""
        return Factors(
            self.w_down,
            self.w_a_in,
            self.w_a_mid,
            self.w_b_gate,
            self.w_b_up,
            self.w_b_down,
            self.num_ranks,
        )

    def forward(self, attention: Tensor, h: Tensor, mlp: Any) -> Tensor:
        """Output of `mlp` with weights changed by the attention output.

        Args:
            attention: attention output after its output projection, ``(..., D)``.
            h: MLP input, ``(..., D)``.
            mlp: module with gate_proj, up_proj and down_proj.

        Returns:
            ``(..., D)``.
        """
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        return modulated_mlp(
            attention,
            h,
            gate.weight,
            up.weight,
            down.weight,
            self.factors,
            gate_bias=gate.bias,
            up_bias=up.bias,
            down_bias=down.bias,
            activation=self.activation,
        )

    def split(self, joined: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Split tensors of the parameters' shapes into the original's tensors.

        Args:
            joined: parameter name -> the parameter itself, or AdamW's moment of it.

        Returns:
            Name -> view for each tensor of the original, in its order, such as
            ``W_down_gate.0`` -> ``(D, r)``.
        """
        r, size = self.rank, self.rank * self.num_ranks
        views: dict[str, Tensor] = {}
        for index, projection in enumerate(PROJECTIONS_OF[self.modulation_type]):
            name = f"_{projection}" if projection else ""
            w_a, first = ("w_a_mid", 0) if index == 2 else ("w_a_in", index * size)
            stems = {
                "W_down": (joined["w_down"], index * size, 1),
                "W_a_up": (joined[w_a], first, 0),
                "W_b_up": (joined[f"w_b_{projection or 'gate'}"], 0, 0),
            }
            for stem, (tensor, start, axis) in stems.items():
                for component in range(self.num_ranks):
                    suffix = f".{component}" if self.num_ranks > 1 else ""
                    views[f"{stem}{name}{suffix}"] = tensor.narrow(axis, start + component * r, r)
        return views

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, view in self.split(dict(self.named_parameters())).items():
            # a copy, because saving a view would save the whole joined tensor
            destination[prefix + name] = view if keep_vars else view.detach().clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        views = self.split(dict(self.named_parameters()))
        for name, view in views.items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
            elif value.shape != view.shape:
                shapes = f"{list(value.shape)}, {list(view.shape)} expected"
                error_msgs.append(f"{prefix}{name} is {shapes}")
            else:
                # the views are of parameters, which autograd lets nobody write to
                with torch.no_grad():
                    view.copy_(value)
        unexpected_keys += [
            key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in views
        ]

    def extra_repr(self) -> str:
        return (
            f"{self.modulation_type}, num_ranks={self.num_ranks}, rank={self.rank}, "
            f"residual={self.residual!r}"
        )
