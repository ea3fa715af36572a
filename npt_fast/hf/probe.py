"""The probe: run a few random tokens through a decoder layer to prove which block it is.

Names of parts are not enough. StableLM's blocks are of two forms, GPT-NeoX's names are the same
for both of its own, and published configs name another activation than the one that is used.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from npt_fast.called_mlp import first
from npt_fast.errors import ModelError
from npt_fast.functional import ACTIVATIONS
from npt_fast.hf.decoder import Call, call_of, layers_of, with_layers
from npt_fast.hf.families import Block, candidates, mlp_of, obstacle
from npt_fast.hf.wrappers import unwrapped
from npt_fast.mlp_layout import MLPLayout
from npt_fast.moe_mlp import Mixture, call_mixture, obstacle_of_experts

OFFLOADED = "is offloaded; NP layers must be on a device"
_TOKENS = 8
_SHARED = "shared_kv_states"  # keys and values that layers of Gemma 4 leave to later ones
# both sides round the same sums, but an implementation may fuse additions
_ROUNDINGS = 2
# functions: activations, and forwards that were replaced
_CONSTANT = (int, float, str, FunctionType, BuiltinFunctionType, CodeType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fit(NamedTuple):
    """What an NP component must know about a layer.

    Attributes:
        block: the layer's block.
        layout: how its MLP, or the part of a mixture that changes, names its projections.
        mixture: the parts of an MLP that is a mixture of experts.
        hidden_size: model width D.
        intermediate_size: MLP width F.
        activation: the MLP's activation, a name of `npt_fast.functional.ACTIVATIONS`; routed
            experts apply their own, whatever it is.
    """

    block: Block
    layout: MLPLayout
    mixture: Mixture | None
    hidden_size: int
    intermediate_size: int
    activation: str


def fit(decoder: Any, index: int, *, probe: bool = True) -> Fit:
    """Find the block of a layer and, unless `probe` is false, prove it.

    The model's weights, hooks, training mode and random state stay as they are.

    Args:
        decoder: decoder with a list of layers.
        index: index of the layer.
        probe: whether to run the layer on random tokens and compare it with its block. Where names
            fit several blocks, it is run in any case. So is the MLP, which is how its activation
            is found.

    Raises:
        ModelError: the layer is no block of `families.BLOCKS`; the message names the part that
            differs.
    """
    layer = unwrapped(layers_of(decoder)[index])
    blocks = candidates(layer)
    part = mlp_of(layer) if blocks else None
    if part is None:
        raise ModelError(obstacle(layer))
    if is_offloaded(layer):
        raise ModelError(OFFLOADED)
    if part.is_routed and (problem := obstacle_of_experts(part.module)):
        raise ModelError(problem)
    hidden_size, intermediate_size = part.sizes
    dtype = getattr(decoder, "dtype", torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TOKENS, hidden_size, generator=generator).to(device_of(layer), dtype)
    with _undisturbed(layer):
        activation = "silu" if part.is_routed else _activation(part.module, part.layout, x)
        if part.mixture is not None:
            _check_mixture(getattr(layer, blocks[0].mlp), part.mixture, x)
        if probe or [len(block.parts) for block in blocks].count(len(blocks[0].parts)) > 1:
            call = _call(decoder, index, x, blocks)
            problems = [_difference(layer, block, x, call) for block in blocks]
            if all(problems):
                raise ModelError(str(problems[0]))
            block = blocks[problems.index(None)]
        else:
            block = blocks[0]
    return Fit(block, part.layout, part.mixture, hidden_size, intermediate_size, activation)


def device_of(layer: Any) -> torch.device:
    """Device of a layer; quantized weights may be buffers, or neither (dynamic int8)."""
    found: Tensor = next(chain(layer.parameters(), layer.buffers()))
    return found.device


def is_offloaded(layer: nn.Module) -> bool:
    """Whether a layer's weights are elsewhere until accelerate loads them for a call.

    NP layers use the weights of the MLP and its norm without that.
    """
    return any(parameter.is_meta for parameter in layer.parameters())


def kind(layer: nn.Module) -> object:
    """A value that is equal for layers that compute the same but for their weights."""
    return tuple((name, type(part), _constants(part)) for name, part in layer.named_modules())


def _constants(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """What a module was told when it was made, such as Granite's scale; not where it stands."""
    return tuple(
        (name, function)
        for name, value in sorted(vars(module).items())
        if isinstance(function := _function(value), _CONSTANT)
        and name not in ("layer_idx", "training")
    )


def _function(value: Any) -> Any:
    """The function of a method or partial, such as a forward of the module's own."""
    if isinstance(value, partial):  # accelerate makes one of the same code for each module
        return getattr(value.func, "__code__", value.func)
    return value.__func__ if isinstance(value, MethodType) else value


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Context that runs a module in eval mode, without its hooks and with other norms and scales.

    A norm whose weight is 1, or a scale of 1, would hide otherwise. Tensors are replaced, not
    written to, and everything is put back as it was.
    """
    source = random.Random(0)
    with ExitStack() as stack, torch.no_grad():
        for part in module.modules():
            state = vars(part)
            tensors = state["_parameters"], state["_buffers"]
            for values in (state, *tensors):  # rotary embeddings note how long the text was
                stack.callback(values.update, dict(values))
            # the wrapper of torch.compile has no mode of its own
            state |= {name: OrderedDict() for name in _HOOKS} | dict.fromkeys(
                state.keys() & {"training"}, False
            )
            for named in tensors:
                for name, tensor in named.items():
                    if tensor is None or not tensor.is_floating_point() or tensor.is_meta:
                        continue
                    # norms, biases and scales, but no weight of a projection
                    if tensor.numel() == max(tensor.shape, default=1) and tensor.itemsize > 1:
                        changed = tensor.detach() * source.uniform(1.5, 3) + source.uniform(0.1, 1)
                        named[name] = changed
        yield


class _Called(Exception):
    """Carries the arguments of a layer out of the model's forward."""


class _Stub(nn.Module):
    """Stands where a layer was, with the attributes that a decoder may ask it for."""

    def __init__(self, layer: nn.Module, *, last: bool, returns_weights: bool) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, last=last, returns_weights=returns_weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.last:
            raise _Called(args, kwargs)
        if kwargs.get(_SHARED) is not None and not is_offloaded(self.layer):
            self.layer.forward(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None) if self.returns_weights else hidden


def _call(decoder: Any, index: int, x: Tensor, blocks: Sequence[Block]) -> Call:
    """What the model calls a layer with, by name; no layer is run to find it, if it can be."""
    errors = []
    # GPT-2 and GPT-Neo have the same parts, and take different things from the layers before
    for returns_weights in dict.fromkeys(block.returns_weights for block in blocks):
        try:
            return _reached(decoder, index, x, returns_weights=returns_weights)
        except ModelError as error:
            errors.append(error)
    raise errors[0]


def _reached(decoder: Any, index: int, x: Tensor, *, returns_weights: bool) -> Call:
    layers = layers_of(decoder)
    stubs = [
        _Stub(layer, last=i == index, returns_weights=returns_weights)
        for i, layer in enumerate(layers[: index + 1])
    ]
    words = decoder.get_input_embeddings().weight
    ids = torch.arange(x.shape[1], device=x.device if words.is_meta else words.device)[None]
    hidden: Any = None
    call: Call = {}
    try:
        with with_layers(decoder, stubs), _undisturbed(decoder):
            _fill(decoder, x.device)
            decoder.forward(input_ids=ids, use_cache=False)
    except _Called as called:
        hidden, call = call_of(layers[index], *called.args)
    except Exception as error:
        raise ModelError(f"cannot be reached by running the model: {_line(error)}") from error
    if not isinstance(hidden, Tensor) or hidden.shape != x.shape:
        shape = tuple(getattr(hidden, "shape", ()))
        raise ModelError(f"has hidden states {shape}, not (batch, tokens, {x.shape[-1]})")
    if call.get(_SHARED) is not None:
        call[_SHARED] = dict(call[_SHARED])  # a dict that tree_map knows
    # device_map: the layer's own hook would move them
    moved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.to(x.device), call)
    return moved


def _fill(module: nn.Module, device: torch.device) -> None:
    """Give parameters on the meta device some numbers, whose rows overlap in memory.

    No layer is among them, so they are embeddings above all, and any numbers do as well.
    """
    for part in module.modules():
        for name, empty in part._parameters.items():
            if empty is not None and empty.is_meta:
                numbers = torch.arange(sum(empty.shape), device=device).sin().to(empty.dtype)
                overlapping = numbers.as_strided(empty.shape, [1] * empty.ndim)
                part._parameters[name] = nn.Parameter(overlapping, requires_grad=False)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _activation(mlp: Any, layout: MLPLayout, x: Tensor) -> str:
    """The activation of an MLP, found by what the MLP does, since names may lie."""
    *parts, down = (getattr(mlp, name) for name in layout.names)
    try:
        # inputs of the activation from -6 to 6, where activations differ most
        x = x * (2 / parts[0](x).float().std().clamp_min(1e-6)).to(x.dtype)
        with _recorded(down) as seen, ExitStack() as stack:
            outputs = [_visible(part, x, stack) for part in parts]
            activated, *up = outputs[0].chunk(2, -1) if layout.joined else outputs
            output = mlp(x)
    except Exception as error:
        raise ModelError(f"has an MLP that cannot be run: {_line(error)}") from error
    hint = _hint("it", mlp, (*layout.names, layout.activation))
    formula = f"has an MLP ({type(mlp).__name__}) that does not compute {layout.formula}{hint}"
    if not isinstance(output, Tensor) or not seen or not _close(output, seen["output"]):
        raise ModelError(formula)
    inner = seen["input"]

    def with_activation(act: Callable[[Tensor], Tensor]) -> Tensor:
        return act(activated) * up[0] if up else act(activated)

    errors = {name: _error(with_activation(act), inner) for name, (act, _) in ACTIVATIONS.items()}
    best = min(errors, key=errors.__getitem__)
    # fused kernels round the activation in float32
    if errors[best] <= 4 * torch.finfo(x.dtype).eps:
        return best
    own = getattr(mlp, layout.activation, None)
    if callable(own) and _close(with_activation(own), inner):
        name = getattr(own, "__name__", type(own).__name__)
        raise ModelError(
            f"has the activation {name} in its MLP; supported are {', '.join(ACTIVATIONS)}"
        )
    raise ModelError(formula)


def _check_mixture(mlp: Any, mixture: Mixture, x: Tensor) -> None:
    """Check that a mixture's experts read its input, and that its output grows with theirs."""
    name = f"has a mixture of experts ({type(mlp).__name__})"
    try:
        output = first(mlp(x))
        found = call_mixture(
            mlp, mixture, x, x, shared=lambda part: part(x), change=lambda: lambda *_: None
        )
        with ExitStack() as stack:
            for part in mixture.parts:
                louder = getattr(mlp, part).register_forward_hook(lambda *args: 2 * args[-1])
                stack.callback(louder.remove)
            doubled = first(mlp(x))
    except Exception as error:
        raise ModelError(f"{name} that cannot be run: {_line(error)}") from error
    if not _close(found, output):
        raise ModelError(f"{name} whose experts do not read its input as it is")
    if not _close(doubled, 2 * output):  # a norm, another part, or its input as it is
        raise ModelError(f"{name} whose output is no sum of its {' and '.join(mixture.parts)}")


def _visible(projection: Any, x: Tensor, stack: ExitStack) -> Tensor:
    """A projection's output, and another one in `stack` if its weights of 0 hide what follows."""
    out: Tensor = projection(x)
    if not out.any():
        out = torch.linspace(-6, 6, out.numel()).view(out.shape).to(out)
        stack.callback(projection.register_forward_hook(lambda *_: out).remove)
    return out


def _hint(owner: str, module: nn.Module, known: Sequence[str]) -> str:
    """What a module has besides the known parts, which is likely why it differs."""
    own = chain(module.named_children(), module.named_parameters(recurse=False))
    others = [name for name, _ in own if not any(part.startswith(name) for part in known)]
    return f" ({owner} also has {', '.join(others)})" if others else ""


@contextmanager
def _recorded(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Record the first input and the output of a module."""
    seen: dict[str, Any] = {}

    def record(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.update(input=args[0] if args else kwargs.get("hidden_states"), output=output)

    handle = module.register_forward_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _difference(layer: Any, block: Block, x: Tensor, call: dict[str, Any]) -> str | None:
    """What a layer does otherwise than its block; None if nothing.

    Args:
        layer: decoder layer.
        block: block that it may be.
        x: random numbers, ``(1, S, D)``.
        call: keyword arguments that the model calls the layer with.
    """
    mlp_module = getattr(layer, block.mlp)
    with _recorded(getattr(layer, block.attn)) as attention, _recorded(mlp_module) as mlp:
        try:
            layer.forward(x, **call)
        except Exception as error:
            return f"cannot be run by itself: {_line(error)}"
        if not attention:
            return f"does not call its {block.attn}"
        if not mlp:
            return f"does not call its {block.mlp}"
        returned = attention["output"]
        if not isinstance(first(returned), Tensor):
            return f"has an attention that returns a {type(returned).__name__}, not its output"
        # a stream as large as what is added to it: rounding of the sum must not hide a part
        added = first(returned) if first(returned).any() else first(mlp["output"])
        size = added.float().norm() / x.float().norm()
        h = x * size.to(x.dtype) if size > 0 else x
        out = layer.forward(h, **call)
    if isinstance(out, tuple) != block.returns_weights:
        return f"returns a {type(out).__name__}, not its hidden states alone"
    out = first(out)
    try:
        output = block.attention_output(layer, h, call)
        a = block.attention_added(layer, output)
        m = block.mlp_added(layer, mlp_module(block.mlp_input(layer, h, a)))
        state = block.finished(layer, h + a + m, call)
    except Exception as error:
        return f"has an attention that cannot be called as in Llama: {_line(error)}"
    if _close(out, state, over=(h, a, m)):
        return None
    hint = _hint("the layer", layer, block.parts)
    if not _close(first(attention["output"]), first(output)):
        return f"has an attention that does not read {block.attn_norm or ''}(h){hint}"
    scales = _scales(h, out, a, block.mlp_added(layer, mlp["output"]))
    if scales is not None:
        parts = [
            f"{name}'s output by {scale:.3g}"
            for name, part, scale in zip(("attention", "the MLP"), (a, m), scales, strict=True)
            if part.any() and abs(scale - 1) > 8 * torch.finfo(a.dtype).eps
        ]
        if parts:
            return f"scales {' and '.join(parts)} before adding it to the residual stream"
    read = mlp["input"]
    if not block.parallel and _close(read, block.mlp_input(layer, h)):
        return f"runs attention and MLP side by side: its MLP reads the layer's input{hint}"
    if not _close(read, block.mlp_input(layer, h, a)):
        words = "h" if block.parallel else "h + a"
        return f"has an MLP that does not read {block.mlp_norm or ''}({words}){hint}"
    return f"does not add its MLP's output to the residual stream as it is{hint}"


def _scales(h: Tensor, out: Tensor, a: Tensor, m: Tensor) -> tuple[float, float] | None:
    """Factors with which ``out = h + s a + t m``; None if there are none."""
    columns = torch.stack([a.flatten(), m.flatten()], 1).double()
    found = torch.linalg.pinv(columns) @ (out.double() - h.double()).flatten()  # a part may be 0
    s, t = found.tolist()
    return (s, t) if _close(out, h + s * a + t * m, over=(h, a, m)) else None


def _error(value: Tensor, truth: Tensor, over: Sequence[Tensor] = ()) -> float:
    """Norm of the difference, relative to the norms of `over` or, without it, of `truth`."""
    size = sum(float(t.double().norm()) for t in over or (truth,))
    return float((value.double() - truth.double()).norm()) / max(size, 1e-30)


def _close(value: Tensor, truth: Tensor, over: Sequence[Tensor] = ()) -> bool:
    if value.shape != truth.shape:
        return False
    return _error(value, truth, over) <= _ROUNDINGS * torch.finfo(truth.dtype).eps
