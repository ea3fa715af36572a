"""The model's own head: logits from hidden states, with its scaling and soft-capping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from npt_fast.errors import ModelError


def head_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function that makes a causal language model's logits from its final hidden states.

    It runs the forward of the model's class, where the decoder only passes on what it is given. So
    it does all that the model does behind its decoder: Granite divides logits, Gemma 2 caps them.
    The model's own hooks and those of its decoder are not called.

    Args:
        model: Hugging Face causal language model, or a wrapper around one.

    Returns:
        A function of the decoder's ``last_hidden_state``, ``(..., D)``, that returns logits
        ``(..., vocab)``. It is differentiable and changes nothing in the model.

    Raises:
        ModelError: the model has no decoder or no forward behind it.
    """
    whole = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    decoder: Any = None if whole is None else whole.get_decoder()  # type: ignore[no-untyped-call]
    if whole is None or decoder is whole:
        raise ModelError(f"{type(model).__name__}: has no head; a causal language model is needed")
    # a copy that shares all weights: the model may be in use by other threads
    twin = object.__new__(type(whole))
    vars(twin).update(vars(whole))
    vars(twin)["_modules"] = {
        name: _PassedOn() if part is not None and decoder in part.modules() else part
        for name, part in whole._modules.items()
    }

    def head(hidden: Tensor) -> Tensor:
        # as one row of tokens, the form in which every model's forward takes them
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        logits: Tensor = type(whole).forward(twin, inputs_embeds=rows, return_dict=True).logits
        return logits.reshape(*hidden.shape[:-1], -1)

    return head


class _PassedOn(nn.Module):
    """Stands for a decoder whose result is known: it is passed in as embeddings."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


@dataclass
class _Output(BaseModelOutputWithPast):
    """Has nothing but hidden states; whatever else a model asks for is None."""

    def __getattr__(self, name: str) -> Any:
        return None
