"""The text of a run: which it is, and its windows at the place where the run resumes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.config import Progress, TrainOptions
from npt_fast.errors import DataError, TrainingError
from npt_fast.hf.base_model import default_device, load_base_model
from npt_fast.hf.base_name import base_name
from npt_fast.hf.wrappers import unwrapped
from npt_fast.text_sources import (
    SAMPLED,
    STREAMED,
    Source,
    TextData,
    data_name,
    parse_data,
    sources_of,
)
from npt_fast.training.documents import WITHOUT_A_PATH, check_hub, open_documents
from npt_fast.training.mixed_windows import MixedWindows
from npt_fast.training.progress import read_progress
from npt_fast.training.rows import with_chat_template
from npt_fast.training.self_text import self_text
from npt_fast.training.state import read_state
from npt_fast.training.token_windows import TokenWindows, Window

Say = Callable[[str], None]


def with_base_model(options: TrainOptions, checkpoint: Checkpoint | None, say: Say) -> TrainOptions:
    """Options that name their base model, which is looked up as `base_name` says."""
    resumed = [] if checkpoint is None else [checkpoint]
    code = options.trust_remote_code
    name = base_name(options.model_name, resumed, say, trust_remote_code=code)
    return dataclasses.replace(options, model_name=name)


def with_data(options: TrainOptions, recorded: Mapping[str, Any] | None, say: Say) -> TrainOptions:
    """Options that name their data: what is given, or that of the resumed run, or the default.

    Args:
        options: options of a run.
        recorded: position in the text of the resumed run, None if there is none.
        say: called with a line if the default cannot be streamed.

    Raises:
        TrainingError: the resumed run read files, which no file may name.
    """
    data = options.data
    if data is None and recorded is not None:
        data = _recorded(str(recorded["source"]), options)
    elif data is None:
        data = default_data(say)
    return dataclasses.replace(options, data=data_name(data))


def default_data(say: Say) -> str:
    """The text of a run or an evaluation that names none: ``medium`` if it can be streamed.

    Args:
        say: called with a line if it cannot, so that it is ``self``.
    """
    try:
        check_hub(STREAMED)
        open_documents(STREAMED, seed=0)
    except DataError as error:
        say(f"Note: no --data is named; {error}. The base model's own text takes its place")
        return SAMPLED
    return STREAMED


def _recorded(source: str, options: TrainOptions) -> str:
    try:
        sources = parse_data(source)
    except ValueError:
        sources = ()
    if not sources or any(s.tokens is None and s.name not in WITHOUT_A_PATH for s in sources):
        raise TrainingError(
            f"{options.resume_from}: was trained on {source!r:.200}; name it with --data, since "
            "a checkpoint may not say which files are read"
        )
    return source


def sampled_beforehand(options: TrainOptions, progress: Progress | None, say: Say) -> TrainOptions:
    """Options that name their data, which is on the disk if it is sampled from the base model.

    Processes of a group cannot wait for minutes until one of them has sampled a text.

    Raises:
        NPTError: as `npt_fast.train`.
    """
    checkpoint = open_checkpoint(options.resume_from) if options.resume_from else None
    options = with_base_model(options, checkpoint, say)
    state = read_state(checkpoint) if checkpoint else None
    options = with_data(options, read_progress(state).data, say)
    texts = filter(None, (options.data, options.eval_data))
    if any(source.tokens for text in texts for source in parse_data(text)):
        on_cpu = options.cpu or default_device() == "cpu"
        model, tokenizer = load_base_model(
            options.base_name,
            dtype=options.base_dtype,
            device="cpu" if on_cpu else f"cuda:{os.environ.get('LOCAL_RANK', 0)}",
            trust_remote_code=options.trust_remote_code,
            checkpoints=[options.resume_from] if options.resume_from else [],
        )
        open_data(options, model, tokenizer, None, progress, say)
        del model
        if not on_cpu:
            torch.cuda.empty_cache()
    return options


def open_windows(
    data: TextData,
    model: Any,
    tokenizer: Any,
    *,
    max_length: int,
    held_out: int,
    stride: int | None = None,
    seed: int = 42,
    sampling_seed: int = 42,
    special_tokens: bool = True,
    first_tokens: Sequence[str] = (),
    text_column: str | None = None,
    chat_template: str | Path | None = None,
    start: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    say: Say = lambda line: None,
) -> TokenWindows | MixedWindows:
    """Open the windows of a text; what is to be sampled is sampled now.

    Args:
        data: what `npt_fast.text_sources.sources_of` reads.
        model: base model to sample from; its NP layers do not matter.
        tokenizer: its tokenizer.
        max_length: tokens per window.
        held_out: number of windows to hold out; several texts share it.
        stride: as for `TokenWindows`, and so are `seed` and `special_tokens`.
        seed: seed of the order.
        sampling_seed: seed of sampled texts.
        special_tokens: let the tokenizer add its special tokens.
        first_tokens: as for `npt_fast.sample_text`.
        text_column: as for `npt_fast.TrainOptions`, and so is `chat_template`.
        chat_template: file of a chat template.
        start: result of `state_after`, to resume there.
        progress: called while a text is sampled.
        say: called with a line before that.

    Raises:
        ValueError: `start` belongs to other settings or other data.
        DataError: a text cannot be read, kept or sampled, or is too short.
        ModelError: the tokenizer has no token that ends a text.
    """
    sources = sources_of(data)
    tokenizer = with_chat_template(tokenizer, chat_template)
    count = len(sources)
    parts = [start] if count == 1 or start is None else start["parts"]

    def open_one(number: int, source: Source) -> TokenWindows:
        sampled = None
        if source.tokens is not None:
            if source.tokens < 2 * max_length:
                raise DataError(
                    f"{source.name}: windows of {max_length} tokens need {2 * max_length} or "
                    "more, one window to train on and one to evaluate"
                )
            sampled = self_text(
                model, tokenizer, source.tokens,
                max_length=max_length, seed=sampling_seed, first_tokens=first_tokens,
                progress=progress, say=say,
            )  # fmt: skip
        return TokenWindows(
            source.name,
            tokenizer,
            max_length=max_length,
            stride=stride,
            seed=seed,
            held_out=(held_out + count - 1 - number) // count,
            special_tokens=special_tokens,
            sampled=sampled,
            rows=source.rows,
            text_column=text_column if sampled is None else None,
            vocabulary=unwrapped(model).get_input_embeddings().num_embeddings,
            start=parts[number] if start is not None else None,
        )

    texts = [open_one(number, source) for number, source in enumerate(sources)]
    if count == 1:
        return texts[0]
    return MixedWindows(texts, data_name(data), 0 if start is None else start["windows"])


def beginning(windows: Iterable[Window], tokens: int) -> list[Window]:
    """The first windows that training reads, of so many tokens; fewer if they come again before."""
    found: dict[int, Window] = {}
    for window in windows:
        number = int(window["window"])
        if tokens <= 0 or number in found:
            break
        found[number] = window
        tokens -= int(window["attention_mask"].sum())
    return list(found.values())


def open_data(
    options: TrainOptions,
    model: Any,
    tokenizer: Any,
    position: Mapping[str, Any] | None,
    progress: Progress | None,
    say: Say,
    *,
    data: TextData | None = None,
    eval_data: TextData | None = None,
) -> tuple[TokenWindows | MixedWindows, list[Window]]:
    """Open the training text where the run resumes, and return the held-out windows with it.

    Args:
        options: options of the run, which name their data.
        model: the base model, with NP layers or without.
        tokenizer: its tokenizer.
        position: place in the text where the resumed run ended, None if there is none.
        progress: called while a text is sampled.
        say: called with notes.
        data: a data set in place of the one that the options name.
        eval_data: likewise.

    Raises:
        TrainingError: the position does not fit the text or the model.
        DataError: as `open_windows`.
        ModelError: as `open_windows`.
    """
    data = options.data if data is None else data
    eval_data = options.eval_data if eval_data is None else eval_data
    assert data is not None
    # read once, when a fast tokenizer first uses threads
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.num_workers))
    common: dict[str, Any] = {
        "max_length": options.max_length,
        "special_tokens": options.special_tokens,
        "first_tokens": options.first_tokens,
        "text_column": options.text_column,
        "chat_template": options.chat_template,
        "progress": progress,
        "say": say,
    }
    own = {
        **common,
        "held_out": options.num_eval_samples if eval_data is None else 0,
        "stride": options.stride,
        "seed": options.seed,
        "sampling_seed": options.seed,
    }
    windows = open_windows(data, model, tokenizer, **own)
    if position is not None:
        tokens = [t for part in position.get("parts", [position]) for t in part["tokens"]]
        if not windows.accepts(position):
            say("Note: the data or the windows are not those of before, so the text starts over")
        elif max(tokens, default=0) >= model.get_input_embeddings().num_embeddings:
            raise TrainingError(
                f"{options.resume_from}: data_state: its tokens are not in the vocabulary of "
                f"{options.base_name}"
            )
        else:
            try:
                windows = open_windows(data, model, tokenizer, **own, start=position)
            except ValueError as error:
                raise TrainingError(f"{options.resume_from}: data_state: {error}") from None
    if eval_data is None:
        return windows, windows.held_out_windows()
    other = open_windows(
        eval_data,
        model,
        tokenizer,
        held_out=options.num_eval_samples,
        # or a run on its base model's text would be evaluated on what it trains on
        sampling_seed=options.seed + 1,
        **common,
    )
    return windows, other.held_out_windows()
