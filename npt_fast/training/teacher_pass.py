"""The teacher's pass of a training step: the base model's activations in the trained layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from npt_fast.called_mlp import first
from npt_fast.errors import ModelError
from npt_fast.hf.convert import components, decoder_layers, disabled
from npt_fast.hf.decoder import call_of, decoder_of, with_layers
from npt_fast.hf.wrappers import unwrapped
from npt_fast.modules import NPComponent


class Activations(NamedTuple):
    """Activations of the base model in one trained layer, each ``(B, S, D)``.

    Attributes:
        hidden: input of the layer.
        attention: what its attention adds to the residual stream.
        mlp: what its MLP adds.
    """

    hidden: Tensor
    attention: Tensor
    mlp: Tensor

    @property
    def output(self) -> Tensor:
        """Residual stream behind the MLP, ``(B, S, D)``."""
        return self.hidden + self.attention + self.mlp

    def target(self, residual: str) -> Tensor:
        """What an NP layer's MLP has to add to the residual stream, ``(B, S, D)``."""
        return self.mlp if residual == "kept" else self.attention + self.mlp


class TeacherPass(NamedTuple):
    """Results of the teacher's pass.

    Attributes:
        activations: activations by trained layer.
        calls: arguments that each layer was called with, by layer and name: positions and masks,
            which may differ between layers.
        final: hidden states after the last layer that was run, ``(B, S, D)``.
    """

    activations: dict[int, Activations]
    calls: dict[int, dict[str, Any]]
    final: Tensor


def trained_layers(model: nn.Module) -> dict[int, NPComponent]:
    """NP components that are on, by layer index, ascending."""
    return {n: part for n, part in components(model).items() if part.enabled}


@torch.no_grad()
def run_teacher(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    layers: Collection[int] | None = None,
    record_calls: bool = False,
    all_layers: bool = False,
) -> TeacherPass:
    """Run the base model, up to the last trained layer.

    Args:
        model: model with NP layers, which are off during the pass.
        input_ids: ``(B, S)``.
        attention_mask: ``(B, S)``, 1 for tokens, 0 for padding; None without padding.
        layers: the trained layers; by default those whose NP component is on.
        record_calls: whether to record how each layer from the first trained one on is called.
        all_layers: whether to run the layers after the last trained one too.
    """
    trained = trained_layers(model) if layers is None else layers
    end = len(decoder_layers(model)) if all_layers else max(trained) + 1
    decoder = unwrapped(model).get_decoder()
    called = range(min(trained), end) if record_calls else ()
    run = decoder_layers(model)[:end]
    with (
        disabled(model),
        _recorded(model, trained, called) as record,
        with_layers(decoder_of(model), run),
    ):
        final = decoder(
            input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True
        ).last_hidden_state
    activations = {
        n: Activations(record.hidden[n], record.attention[n], record.mlp[n]) for n in trained
    }
    return TeacherPass(activations, record.calls, final)


@torch.no_grad()
def check_teacher(model: Any, input_ids: Tensor) -> dict[int, Activations]:
    """Activations of a text, after the proof that they are all that a base layer's output is.

    Targets are made of these parts, so training would be for nothing if a layer did more.

    Args:
        model: model with NP layers.
        input_ids: the text, ``(B, S)``.

    Raises:
        ModelError: the output of a trained layer is not its input + attention + MLP.
    """
    outputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index in trained_layers(model):

            def keep(_: Any, args: Any, output: Any, index: int = index) -> None:
                outputs[index] = first(output)

            hook = decoder_layers(model)[index].register_forward_hook(keep)
            stack.callback(hook.remove)
        seen_by_layer, calls, _ = run_teacher(model, input_ids, None, record_calls=True)
    for index, seen in seen_by_layer.items():
        layer = unwrapped(decoder_layers(model)[index])
        own = layer.np_block.finished(layer, seen.output, calls[index]).double()
        error = (outputs[index].double() - own).norm(dim=-1)
        size = sum(part.double().norm(dim=-1) for part in seen).maximum(own.norm(dim=-1))
        worst = (error / size.clamp_min(torch.finfo(torch.float32).tiny)).max().item()
        # two additions, each rounded; a fused one may round once less
        if not worst <= 2 * torch.finfo(seen.output.dtype).eps:
            raise ModelError(
                f"layer {index}: on this text the base layer's output differs from input + "
                f"attention + MLP by {worst:.2g} of their size, so it cannot be trained"
            )
    return seen_by_layer


class TeacherCache:
    """Cache of the teacher's activations by window, in main memory.

    Each window is computed alone, because its last bits may depend on the batch it is in. So a run
    that resumes with an empty cache ends with the same bits.

    Args:
        limit: bytes that the cache may hold.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.hits = 0
        self.misses = 0
        self._held: dict[int, dict[int, Activations]] = {}

    def get(
        self,
        windows: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        compute: Callable[[Tensor, Tensor | None], dict[int, Activations]],
    ) -> dict[int, Activations]:
        """Activations of a batch by layer.

        Args:
            windows: numbers of the rows' windows, ``(B,)``; equal numbers mean equal texts.
            input_ids: ``(B, S)``.
            attention_mask: ``(B, S)``, or None without padding.
            compute: computes the activations of one window, by layer.
        """
        rows = []
        for row, window in enumerate(windows.tolist()):
            found = self._held.get(window)
            if found is None:
                self.misses += 1
                one = slice(row, row + 1)
                mask = None if attention_mask is None else attention_mask[one]
                found = compute(input_ids[one], mask)
                size = sum(t.nbytes for seen in found.values() for t in seen)
                # nothing is evicted: each window comes once per epoch, so none is worth more than
                # another
                if self.size + size <= self.limit:
                    self.size += size
                    self._held[window] = {
                        n: Activations(*(t.cpu() for t in s)) for n, s in found.items()
                    }
            else:
                self.hits += 1
            rows.append(found)
        device = input_ids.device
        return {
            n: Activations(
                *(
                    torch.cat([t.to(device) for t in ts])
                    for ts in zip(*(row[n] for row in rows), strict=True)
                )
            )
            for n in rows[0]
        }


class _Record(NamedTuple):
    hidden: dict[int, Tensor]
    attention: dict[int, Tensor]
    mlp: dict[int, Tensor]
    calls: dict[int, dict[str, Any]]


@contextmanager
def _recorded(
    model: nn.Module, trained: Collection[int], called: Collection[int]
) -> Iterator[_Record]:
    """Record what the layers `trained` compute, and how the layers `called` are called."""
    record = _Record({}, {}, {}, {})
    layers = decoder_layers(model)
    with ExitStack() as stack:

        def on(handle: Any) -> None:
            stack.callback(handle.remove)

        for index in {*trained, *called}:
            # a default binds the index now; a closure would see the loop's last one
            def before(_: Any, args: Any, kwargs: Any, index: int = index) -> None:
                hidden, call = call_of(layers[index], args, kwargs)
                if index in trained:
                    record.hidden[index] = hidden
                record.calls[index] = call

            on(layers[index].register_forward_pre_hook(before, with_kwargs=True))
        for index in trained:

            def attention(added: Tensor, index: int = index) -> None:
                record.attention[index] = added

            def mlp(added: Tensor, index: int = index) -> None:
                record.mlp[index] = added

            layer = unwrapped(layers[index])
            for handle in layer.np_block.register_hooks(layer, attention, mlp):
                on(handle)
        yield record
