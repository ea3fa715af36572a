"""The families of decoder layers: what attention and the MLP add to the residual stream.

An NP layer computes by the block and the MLP of its base layer, so a layer that is none of these
would be wrong in silence. Nothing here is believed for its name: `probe` proves that a layer is
what the table says (design.md#families).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from npt_fast.called_mlp import first
from npt_fast.hf.wrappers import unwrapped
from npt_fast.mlp_layout import GATED, MLPLayout
from npt_fast.moe_mlp import EXPERTS, Mixture, expert_sizes


@dataclass(frozen=True)
class Block:
    """A decoder block: ``out = h + a + m``, where ``a`` and ``m`` are what its parts add.

    ``a = scale * post_norm(attention(norm(h)))`` and ``m = scale * post_norm(mlp(norm(h + a)))``.
    The defaults are Llama's, which has no post-norms and no scale. An attribute is the name of a
    submodule of the layer; None means that the block has no such part.

    Attributes:
        attn: attention, or what is in its place.
        attn_norm: norm that attention reads the residual stream through.
        attn_post_norm: norm of attention's output.
        mlp: MLP.
        mlp_norm: norm that the MLP reads the residual stream through.
        mlp_post_norm: norm of the MLP's output.
        scale: the layer's attribute whose number attention's and the MLP's output are multiplied
            by.
        parallel: whether the MLP reads the layer's input, as attention does, not ``h + a``.
        renamed: names of attention's arguments, and the layer's names of the same, where they
            differ.
        returns_weights: whether the layer returns a tuple, its output and what attention returns
            behind its own.
    """

    attn: str = "self_attn"
    attn_norm: str | None = "input_layernorm"
    attn_post_norm: str | None = None
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    scale: str | None = None
    parallel: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    returns_weights: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Submodules and attributes that the layer must have."""
        norms = (self.attn_norm, self.attn_post_norm, self.mlp_norm, self.mlp_post_norm)
        return tuple(dict.fromkeys(filter(None, (self.attn, self.mlp, *norms, self.scale))))

    def fits(self, layer: nn.Module) -> bool:
        """Whether a layer has the parts of the block."""
        return all(getattr(layer, part, None) is not None for part in self.parts)

    def attention_output(self, layer: Any, h: Tensor, call: Mapping[str, Any]) -> Any:
        """What attention returns: ``(B, S, D)``, or a tuple that begins with it.

        Args:
            layer: decoder layer.
            h: input of the layer, ``(B, S, D)``.
            call: arguments that the model calls the layer with, by name.
        """
        if self.renamed:
            call = dict(call)
            call.update((own, call.pop(name)) for own, name in self.renamed if name in call)
        read = h if self.attn_norm is None else first(getattr(layer, self.attn_norm)(h))
        return getattr(layer, self.attn)(hidden_states=read, **call)

    def attention_added(self, layer: Any, output: Any) -> Tensor:
        """What attention adds to the residual stream, ``(B, S, D)``; NP components read it.

        Args:
            layer: decoder layer.
            output: what attention returns.
        """
        return self._added(layer, first(output), self.attn_post_norm)

    def returned(self, out: Tensor, attention: Any) -> Any:
        """What the layer returns, from its output and what attention returns."""
        return (out, *attention[1:]) if self.returns_weights else out

    def mlp_input(self, layer: Any, h: Tensor, attention: Tensor | None = None) -> Tensor:
        """What the MLP reads.

        Args:
            layer: decoder layer.
            h: input of the layer, ``(B, S, D)``.
            attention: what attention adds; None for the input without it, which an NP layer's MLP
                reads.

        Returns:
            ``(B, S, D)``.
        """
        state = h if attention is None or self.parallel else h + attention
        return state if self.mlp_norm is None else first(getattr(layer, self.mlp_norm)(state))

    def mlp_added(self, layer: Any, output: Any, *, normed: bool = True) -> Tensor:
        """What an MLP's output adds to the residual stream.

        Args:
            layer: decoder layer.
            output: output of the MLP, ``(B, S, D)``, maybe with more behind it.
            normed: whether the post-norm is part of it. It fixes the length of what is added, so an
                MLP that stands for attention too goes without.

        Returns:
            ``(B, S, D)``.
        """
        return self._added(layer, first(output), self.mlp_post_norm if normed else None)

    def unscaled(self, layer: Any, added: Tensor) -> Tensor:
        """The output of an MLP without a post-norm that adds this, ``(..., D)``."""
        return added if self.scale is None else added / getattr(layer, self.scale)

    def _added(self, layer: Any, output: Tensor, norm: str | None = None) -> Tensor:
        """A part's output through a norm, and times the layer's scale, if there are such."""
        if norm is not None:
            output = getattr(layer, norm)(output)
        return output if self.scale is None else output * getattr(layer, self.scale)

    def finished(self, layer: Any, state: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The layer's output, given the residual stream behind its MLP; nothing follows in most.

        Args:
            layer: decoder layer.
            state: input of the layer and what its parts have added, ``(B, S, D)``.
            call: arguments that the model calls the layer with, by name.
        """
        return state

    def register_hooks(
        self, layer: Any, attention: Callable[[Tensor], None], mlp: Callable[[Tensor], None]
    ) -> list[Any]:
        """Call two functions with what attention and the MLP add when the base layer runs.

        Args:
            layer: decoder layer.
            attention: gets what attention adds, ``(B, S, D)``.
            mlp: gets what the MLP adds, ``(B, S, D)``.

        Returns:
            Handles that remove the hooks.
        """

        def hooked(name: str, visit: Callable[[Tensor], None]) -> Any:
            def hook(_: Any, args: Any, output: Any) -> None:
                own = first(output)
                # Falcon adds attention's output to the MLP's in place
                visit(self._added(layer, own.clone() if self.parallel else own))

            return getattr(layer, name).register_forward_hook(hook)

        return [
            hooked(self.attn_post_norm or self.attn, attention),
            hooked(self.mlp_post_norm or self.mlp, mlp),
        ]


@dataclass(frozen=True)
class Gemma4Block(Block):
    """Gemma 4's: Gemma 2's, and then what the layer reads of each token id, and a scale of all."""

    attn_post_norm: str | None = "post_attention_layernorm"
    mlp_norm: str | None = "pre_feedforward_layernorm"
    mlp_post_norm: str | None = "post_feedforward_layernorm"

    @property
    def parts(self) -> tuple[str, ...]:
        return (*super().parts, "layer_scalar")

    def attention_output(self, layer: Any, h: Tensor, call: Mapping[str, Any]) -> Any:
        own = {name: value for name, value in call.items() if name != "per_layer_input"}
        return super().attention_output(layer, h, own)

    def finished(self, layer: Any, state: Tensor, call: Mapping[str, Any]) -> Tensor:
        read = call.get("per_layer_input")
        if read is not None:
            read = layer.act_fn(layer.per_layer_input_gate(state)) * read
            state = state + layer.post_per_layer_input_norm(layer.per_layer_projection(read))
        scaled: Tensor = state * layer.layer_scalar
        return scaled


_LINEAR = Block(attn="linear_attn", renamed=(("cache_params", "past_key_values"),))
_GPT2 = Block(attn="attn", attn_norm="ln_1", mlp_norm="ln_2")
_FALCON = Block(attn="self_attention", returns_weights=True)
BLOCKS: tuple[Block, ...] = (
    Block(),  # Llama, Qwen, Mistral, Phi-3
    _LINEAR,  # Qwen3-Next and Qwen3.5, their other layers
    Block(scale="residual_multiplier"),  # Granite
    Block(scale="residual_scale"),  # MiniCPM
    Block(  # Gemma 2 and 3
        attn_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    Gemma4Block(),
    Block(attn_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),  # GLM-4
    Block(  # OLMo 2 and 3, Exaone 4
        attn_norm=None,
        attn_post_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
    ),
    Block(mlp_norm="input_layernorm", parallel=True),  # Cohere, Phi-2
    Block(mlp="block_sparse_moe", scale="residual_multiplier"),  # Granite's mixtures
    Block(attn="attention", parallel=True),  # GPT-NeoX
    Block(attn="attention"),  # GPT-NeoX that is not parallel
    _GPT2,
    replace(_GPT2, returns_weights=True),  # GPT-Neo
    replace(_GPT2, mlp_norm="ln_1", parallel=True, returns_weights=True),  # GPT-J
    _FALCON,
    replace(_FALCON, mlp_norm="input_layernorm", parallel=True),
    replace(_FALCON, attn_norm="ln_attn", mlp_norm="ln_mlp", parallel=True),
)
"""Decoder blocks, and models that have them."""

LAYOUTS: tuple[MLPLayout, ...] = (
    GATED,
    MLPLayout("gate_up_proj", "gate_up_proj", activation="activation_fn"),  # Phi-3, GLM-4
    MLPLayout(None),  # Nemotron
    MLPLayout(None, "dense_h_to_4h", "dense_4h_to_h", "act"),  # GPT-NeoX, Falcon
    MLPLayout(None, "fc1", "fc2", "activation_fn"),  # Phi-2
    MLPLayout(None, "c_fc", "c_proj", "act"),  # GPT-2, StarCoder2
    MLPLayout(None, "fc_in", "fc_out", "act"),  # GPT-J, CodeGen
)
"""MLPs, and models that have them."""


def candidates(layer: nn.Module) -> list[Block]:
    """Blocks whose parts a layer has, those with the most parts first."""
    found = [block for block in BLOCKS if block.fits(layer)]
    return sorted(found, key=lambda block: -len(block.parts))


def layout_of(mlp: nn.Module | None) -> MLPLayout | None:
    """The layout whose projections an MLP has; None if there is none."""
    return next((layout for layout in LAYOUTS if layout.fits(mlp)), None)


def attention_of(layer: nn.Module) -> Any:
    """A decoder layer's attention, or what is in its place; None if it is none of the table's."""
    return next((part for b in BLOCKS if (part := getattr(layer, b.attn, None)) is not None), None)


class MLPPart(NamedTuple):
    """A decoder layer's MLP, or the part of a mixture of experts whose weights can be changed.

    Attributes:
        name: its name in the layer, such as ``"mlp"`` or ``"mlp.experts"``.
        module: the module without wrappers.
        layout: how it names its projections.
        mixture: the mixture that it is a part of; None if it is the MLP itself.
    """

    name: str
    module: Any
    layout: MLPLayout
    mixture: Mixture | None = None

    @property
    def is_routed(self) -> bool:
        """Whether it is the routed experts, whose matrices are one tensor."""
        return self.mixture is not None and self.mixture.shared is None

    @property
    def sizes(self) -> tuple[int, int]:
        """Width D of what it reads and width F of what is inside, of one expert."""
        if self.is_routed:
            return expert_sizes(self.module)
        return self.layout.widths(self.module)


def mlp_of(layer: nn.Module) -> MLPPart | None:
    """A decoder layer's MLP; None if it has none of the table's."""
    for name in dict.fromkeys(block.mlp for block in BLOCKS):
        mlp = unwrapped(getattr(layer, name, None))
        if (layout := layout_of(mlp)) is not None:
            return MLPPart(name, mlp, layout)
        if (mixture := mixture_of(mlp)) is not None:
            part = unwrapped(getattr(mlp, mixture.changed))
            layout = layout_of(part) if mixture.shared else EXPERTS
            assert layout is not None
            return MLPPart(f"{name}.{mixture.changed}", part, layout, mixture)
    return None


def mixture_of(mlp: nn.Module | None) -> Mixture | None:
    """The parts of an MLP that is a mixture of experts as transformers has them; else None."""
    experts: Any = getattr(mlp, "experts", None)
    needed = (*EXPERTS.names, "is_transposed")
    if mlp is None or not all(hasattr(experts, name) for name in needed):
        return None
    if getattr(experts.down_proj, "ndim", 0) != 3:  # packed
        return None
    others = ((name, part) for name, part in mlp.named_children() if name != "experts")
    shared = next((name for name, part in others if layout_of(unwrapped(part)) is not None), None)
    return Mixture(shared=shared)


def obstacle(layer: nn.Module) -> str:
    """What a layer that has the parts of no block has in their place."""
    missing = [part for part in BLOCKS[0].parts if getattr(layer, part, None) is None]
    parts = dict(layer.named_children())
    problems = []
    if "self_attn" in missing:
        others = [
            f"{name} ({type(part).__name__})"
            for name, part in parts.items()
            if name not in ("mlp", "feed_forward") and list(part.children())
        ]
        problems.append(f"no self_attn, but {', '.join(others) or 'no attention at all'}")
    mlp = parts.get("mlp")
    routed = [part for part in parts.values() if hasattr(part, "experts")]
    if routed and mixture_of(routed[0]) is None:
        problems.append(f"a mixture of experts of another form ({type(routed[0]).__name__})")
    elif not routed and layout_of(mlp) is None:
        # of the layout that it has most of
        layout = max(LAYOUTS, key=lambda one: sum(hasattr(mlp, name) for name in one.names))
        absent = [f"mlp.{name}" for name in layout.names if not hasattr(mlp, name)]
        part = layer if mlp is None else mlp
        problems.append(f"no {absent[0]} ({type(part).__name__} has {_names(part)})")
    elif absent := [part for part in missing if part != "self_attn"]:
        problems.append(f"no {absent[0]} ({type(layer).__name__} has {_names(layer)})")
    return f"has {' and '.join(problems)}"


def _names(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no parts"
