"""Options that several verbs take: dataclasses that cyclopts flattens into a verb's own options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Annotated, Any

from cyclopts import Parameter

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.cli.output import note
from npt_fast.config import (
    BaseDType,
    Injection,
    InjectionMode,  # noqa: F401  cyclopts resolves the hints of `Injection` in this module
    InjectionTime,  # noqa: F401
    Residual,
)
from npt_fast.errors import ModelError
from npt_fast.hf.tokenizer import Reading
from npt_fast.hub import parse_name
from npt_fast.layer_names import check_layers, is_name, parse_layers
from npt_fast.paths import expand
from npt_fast.text_sources import parse_data


def _check_path(kind: object, text: str | None) -> None:
    if text is not None:
        expand(text)


def _check_repo(kind: object, text: str | None) -> None:
    if text is not None and parse_name(text) is None:
        raise ValueError(f"{text!r} is not the name of a repository, ORG/REPO")


def _check_data(kind: object, text: str | None) -> None:
    if text is not None:
        parse_data(text)


PathText = Annotated[str, Parameter(validator=_check_path, metavar="PATH")]
"""A path. A text that is not one is a usage error, before anything is loaded. It stays text, since
``Path("")`` is the current directory."""
CheckpointText = Annotated[PathText, Parameter(name=("--checkpoint", "--checkpoints"))]
"""A checkpoint, a path or a name on the Hub: the verb's argument, or either option."""
CheckpointTexts = Annotated[
    list[PathText],
    Parameter(name=("--checkpoint", "--checkpoints"), consume_multiple=(1, None)),
]
"""Checkpoints, one or more, given likewise."""
HubRepo = Annotated[str, Parameter(metavar="ORG/REPO", validator=_check_repo)]
"""A repository on the Hub. A text that is none is a usage error, before hours of work."""
DataText = Annotated[str, Parameter(validator=_check_data)]
"""Texts to train or measure on. As with paths, mistakes in their names are usage errors."""
Layers = Annotated[str | None, Parameter(validator=lambda _, text: text and check_layers(text))]
Text = Annotated[str, Parameter(allow_leading_hyphen=True)]
SpecialTokens = Annotated[bool, Parameter(negative="--no_special_tokens")]
Texts = Annotated[Sequence[str], Parameter(consume_multiple=True)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A base model: its name, how its weights are read, and where it runs.

    Attributes:
        model_name: Base model: Hub id, folder, .gguf file, or smollm2-135m; if not given, the one
            that the checkpoint records, or meta-llama/Llama-3.2-1B without a checkpoint.
        base_dtype: Type of the base model's weights; auto is the checkpoint's on a GPU, else
            float32.
        trust_remote_code: Run the code that comes with the base model or that its files name,
            with all your rights.
        device: Device to run the model on, such as cpu or cuda:1; a GPU if there is one and none is
            given.
        cpu: Use the CPU even if there is a GPU, as --device cpu does.
    """

    model_name: PathText | None = None
    base_dtype: BaseDType = "auto"
    trust_remote_code: bool = False
    device: str | None = None
    cpu: bool = False

    def __post_init__(self) -> None:
        if self.cpu and self.device not in (None, "cpu"):
            raise ValueError(f"--cpu and --device {self.device} exclude each other")

    def named(self, checkpoints: Sequence[Checkpoint] = ()) -> ModelOptions:
        """The same with the name of the base model, which is told if it was not given.

        Raises:
            NPTError: as `npt_fast.hf.base_name.base_name`.
        """
        from npt_fast.hf.base_name import base_name

        code = self.trust_remote_code
        name = base_name(self.model_name, checkpoints, note, trust_remote_code=code)
        return replace(self, model_name=name)

    def load(self, checkpoints: Sequence[Checkpoint] = ()) -> tuple[Any, Any]:
        """The base model, for these checkpoints, and its tokenizer."""
        from npt_fast.hf.base_model import default_device, load_base_model
        from npt_fast.hf.quiet import silence

        silence()  # also what comes later: the program's output is its own
        name = str(self.named(checkpoints).model_name)
        device = "cpu" if self.cpu else self.device or default_device()
        try:
            return load_base_model(
                name,
                dtype=self.base_dtype,
                device=device,
                trust_remote_code=self.trust_remote_code,
                checkpoints=[checkpoint.given for checkpoint in checkpoints],
            )
        except (RuntimeError, AssertionError) as error:  # torch: no such device
            reason = str(error).splitlines()[0]
            raise ModelError(f"{name} cannot be put on {device!r}: {reason}") from error


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Which layers of a checkpoint are loaded, and how.

    Attributes:
        layers: Layers of the checkpoint to load: 11,13 or 11-15, all, upper_half or lower_half; all
            if not given.
        residual: What happens to the attention output in layers of which no file says it: removed
            or kept; if not given, they are run on random tokens to find out.
    """

    layers: Layers = None
    residual: Residual | None = None

    def open(self, path: str) -> Checkpoint:
        """Open a checkpoint that must have these layers: said now, not after loading a model.

        Raises:
            CheckpointError: it cannot be read.
            ModelError: it lacks a layer.
        """
        checkpoint = open_checkpoint(path)
        if self.layers is not None and not is_name(self.layers):
            checkpoint.require(n for n in parse_layers(self.layers) if n >= 0)
        return checkpoint

    def load(self, model: Any, checkpoint: Checkpoint, default: Any = None) -> Any:
        """Load the layers into a model, and return it; without `layers` those of `default`.

        Raises:
            NPTError: as `npt_fast.load`.
        """
        layers = default if self.layers is None else self.layers
        return npt.load(model, checkpoint, layers=layers, residual=self.residual)


@Parameter(name="*")
@dataclass(frozen=True)
class CheckpointOptions:
    """A base model with the layers of a checkpoint.

    Attributes:
        checkpoint: Checkpoint directory, weights file, or ORG/REPO on the Hub.
        base: The base model.
        loading: Which of its layers are loaded, and how.
    """

    checkpoint: CheckpointText
    _: KW_ONLY
    base: ModelOptions = field(default_factory=ModelOptions)
    loading: LayerOptions = field(default_factory=LayerOptions)

    def load(self) -> tuple[Any, Any]:
        """The base model with these layers, and its tokenizer."""
        checkpoint = self.loading.open(self.checkpoint)
        model, tokenizer = self.base.load([checkpoint])
        return self.loading.load(model, checkpoint), tokenizer


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Reading):
    """`Reading`, of all texts that a verb reads."""

    special_tokens: SpecialTokens = True


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Where the documents of a data set are.

    Attributes:
        text_column: Column of the data that holds texts, chats or token ids, given as for train.
        chat_template: File with the template that makes texts of chats, given as for train.
    """

    text_column: str | None = None
    chat_template: PathText | None = None


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
        position: Tokens of the prompt to inject into: a number, 2:5, 1,4, last, last_3, first, all,
            at:WORD or after:WORD.
    """

    position: Text = "last"
