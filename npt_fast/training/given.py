"""What a caller gives a run as objects, in place of what its options name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainerCallback

from npt_fast.config import TrainOptions
from npt_fast.errors import TrainingError
from npt_fast.hf.wrappers import unwrapped
from npt_fast.text_sources import TextData, data_name


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """Objects for a run, as `npt_fast.train` describes them.

    Attributes:
        model: the base model, with NP layers or without.
        tokenizer: its tokenizer.
        train_dataset: training text.
        eval_dataset: held-out text.
        callbacks: callbacks of transformers.
    """

    model: Any = None
    tokenizer: Any = None
    train_dataset: TextData | None = None
    eval_dataset: TextData | None = None
    callbacks: Sequence[Any] = ()

    def check(self, options: TrainOptions) -> None:
        """Raise TrainingError if an object does not go with another one or with the options."""
        if (self.model is None) != (self.tokenizer is None):
            raise TrainingError("model and tokenizer belong together; give both or none")
        parts = ("config", "device", "get_input_embeddings")
        if self.model is not None and not all(hasattr(self.model, part) for part in parts):
            raise TrainingError(
                f"model: is a {type(self.model).__name__}, not a language model of transformers"
            )
        if not all(map(_is_callback, self.callbacks)):
            raise TrainingError("callbacks: must be a list of transformers' TrainerCallback")
        for name, data in (("data", self.train_dataset), ("eval_data", self.eval_dataset)):
            if data is not None and getattr(options, name) is not None:
                raise TrainingError(f"{name} is named, and a data set is given; leave one out")
        objects = (self.model, self.train_dataset, self.eval_dataset)
        if options.num_processes > 1 and (self.callbacks or any(o is not None for o in objects)):
            raise TrainingError(
                f"num_processes {options.num_processes}: other processes cannot get a model, data "
                "sets or callbacks as objects; start them with torchrun, or name all in the options"
            )

    def named(self, options: TrainOptions) -> TrainOptions:
        """The options with the names that the run's files have for these objects.

        Raises:
            DataError: an object is no data set.
        """
        changes: dict[str, Any] = {}
        if self.model is not None:
            model = unwrapped(self.model)
            # a model's own name_or_path is the temporary folder of a GGUF file
            changes["model_name"] = model.config.name_or_path or type(model).__name__
        if self.train_dataset is not None:
            changes["data"] = data_name(self.train_dataset)
        if self.eval_dataset is not None:
            changes["eval_data"] = data_name(self.eval_dataset)
        return replace(options, **changes) if changes else options


def _is_callback(given: object) -> bool:
    kind = given if isinstance(given, type) else type(given)
    return issubclass(kind, TrainerCallback)
