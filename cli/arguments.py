"""Options that several verbs take: dataclasses that cyclopts flattens into a verb's own options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from cyclopts import Parameter

import npt_fast as npt
from npt_fast.config import (
    BaseDType,
    Injection,
    InjectionMode,  # noqa: F401  cyclopts resolves the hints of `Injection` in this module
    InjectionTime,  # noqa: F401
    parse_layers,
)
from npt_fast.hf.tokenizer import Reading
from npt_fast.paths import expand
from npt_fast.text_sources import parse_data

DEFAULT_MODEL = "meta-llama/Llama-3.2-1B"


def _check_path(kind: object, text: str | None) -> None:
    if text is not None:
        expand(text)


PathText = Annotated[str, Parameter(validator=_check_path)]
"""A path. A text that is not one is a usage error, before anything is loaded. It stays text, since
``Path("")`` is the current directory."""
DataText = Annotated[str, Parameter(validator=lambda _, text: parse_data(text) and None)]
"""Texts to train or measure on. As with paths, mistakes in their names are usage errors."""
Layers = Annotated[str | None, Parameter(validator=lambda _, text: text and parse_layers(text))]
Text = Annotated[str, Parameter(allow_leading_hyphen=True)]
SpecialTokens = Annotated[bool, Parameter(negative="--no-special-tokens")]
Texts = Annotated[Sequence[str], Parameter(consume_multiple=True)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """How the weights of a base model are read.

    Attributes:
        base_dtype: Type of the base model's weights; auto is the checkpoint's on a GPU, else
            float32.
        trust_remote_code: Run the code that comes with the base model or that its files name,
            with all your rights.
    """

    base_dtype: BaseDType = "auto"
    trust_remote_code: bool = False

    def load(
        self, model_name: str, device: str, checkpoints: Sequence[str] = ()
    ) -> tuple[Any, Any]:
        """A base model on a device, for these checkpoints, and its tokenizer."""
        from npt_fast.hf.base_model import load_base_model

        return load_base_model(
            model_name,
            dtype=self.base_dtype,
            device=device,
            trust_remote_code=self.trust_remote_code,
            checkpoints=checkpoints,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A base model.

    Attributes:
        model_name: Base model: Hub id, folder, .gguf file, or smollm2-135m.
        weights: How its weights are read.
        cpu: Use the CPU even if there is a GPU.
    """

    model_name: PathText = DEFAULT_MODEL
    weights: WeightOptions = field(default_factory=WeightOptions)
    cpu: bool = False

    def load(self, checkpoints: Sequence[str] = ()) -> tuple[Any, Any]:
        """The base model, for these checkpoints, and its tokenizer."""
        from npt_fast.hf.base_model import default_device

        device = "cpu" if self.cpu else default_device()
        return self.weights.load(self.model_name, device, checkpoints)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """A base model with the layers of a checkpoint.

    Attributes:
        checkpoint: Checkpoint directory or weights file.
        base: The base model.
        layers: Layers of the checkpoint to load, as 11,13 or 11-15; all if not given.
    """

    checkpoint: PathText
    base: ModelOptions = field(default_factory=ModelOptions)
    layers: Layers = None

    def load(self) -> tuple[Any, Any]:
        """The base model with these layers, and its tokenizer."""
        model, tokenizer = self.base.load([self.checkpoint])
        layers = None if self.layers is None else parse_layers(self.layers)
        return npt.load(model, self.checkpoint, layers=layers), tokenizer


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Reading):
    """`Reading`, of all texts that a verb reads."""

    special_tokens: SpecialTokens = True


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """A text whose modulation is injected, and the prompt that it is injected into.

    Attributes:
        source: Text to extract the modulation from, at its last token.
        prompt: Prompt to inject the modulation into.
        sequence: Extract the mean over all tokens of the text instead, as extract-seq does.
        track: Texts whose first token is tracked; a leading space counts.
        reading: How text and prompt become tokens.
    """

    source: Annotated[str, Parameter(name="--from", allow_leading_hyphen=True)]
    prompt: Text
    sequence: bool = False
    track: Texts = ()
    reading: ReadingOptions = field(default_factory=ReadingOptions)

    def extract(self, model: Any, tokenizer: Any) -> npt.Modulation:
        """The modulation of the text: at its last token, or the mean over all."""
        position = "all" if self.sequence else "last"
        return npt.extract(
            model, tokenizer, self.source, position=position, reduce="mean", **asdict(self.reading)
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class InjectionOptions(Injection):
    """`Injection`, with its position as text.

    Attributes:
        position: Tokens of the prompt to inject into: a number, 2:5, 1,4, last, first, all, at:WORD
            or after:WORD.
    """

    position: Text = "last"
