"""The shell on a terminal: history, completion, a status bar, colour."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.output import ColorDepth
from rich.console import Console
from rich.text import Text

from npt_fast.cli import streams
from npt_fast.cli.shell.command import Context
from npt_fast.cli.shell.commands import COMMANDS
from npt_fast.cli.shell.line import Word, words
from npt_fast.cli.shell.loop import Shell
from npt_fast.config import InjectionTime, SamplingStrategy
from npt_fast.errors import NPTError, TransferError, printable

_CHOICES: dict[str, Sequence[str]] = {
    "-strategy": get_args(SamplingStrategy),
    "-when": get_args(InjectionTime),
    "-pos": ("last", "first", "all"),
}
"""Values of options that can be completed."""
_STYLES = {"✓": "green", "Warning:": "yellow", "No effect:": "yellow", "Error:": "bold red"}


class TerminalOutput:
    """Coloured lines, unless NO_COLOR is set."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def reply(self, line: str, data: dict[str, Any], lines: Sequence[str]) -> None:
        for each in lines:
            self.note(each)

    def error(self, line: str, message: str, where: str) -> None:
        self.note(f"Error: {where}{message}")

    def note(self, line: str) -> None:
        style = next((style for start, style in _STYLES.items() if line.startswith(start)), "")
        if not style and line.endswith(":") and not line.startswith(" "):
            style = "bold"
        self._console.print(Text(printable(line), style=style))


class CommandCompleter(Completer):
    """Completes commands, names on the shelf, options and their values, layers, files."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """Completions of the word before the cursor."""
        text = document.text_before_cursor.lstrip()
        text = text[1:].lstrip() if text[:1] in ("/", "!") else text
        try:
            before = words(text)
        except TransferError:  # an open quote: what is in it is free text
            return
        current = "" if not text or text[-1].isspace() else before.pop().text
        if not before:
            yield from _matching(current, COMMANDS)
            return
        command = COMMANDS.get(before[0].text.lower())
        if command is None:
            return
        previous = before[-1]
        if not previous.quoted and previous.text in command.options:
            yield from _matching(current, _CHOICES.get(previous.text, []))
        elif current.startswith("-"):
            yield from _matching(current, [*command.options, *command.flags])
        elif command.kinds:
            place = _place(before[1:], command.options)
            kind = command.kinds[min(place, len(command.kinds) - 1)].strip("[].")
            if kind in ("FILE", "DIR"):
                yield from self._paths.get_completions(Document(current), event)
            else:
                yield from self._values(kind, current)

    def _values(self, kind: str, current: str) -> Iterable[Completion]:
        session = self._context.session
        if kind == "REST":
            current = re.split(r"[-+*(),=\s]", current)[-1]
        elif kind == "LAYERS":
            current = current.rpartition(",")[2]
        known: dict[str, Iterable[str]] = {
            "NAME": session.state.shelf,
            "A": session.state.shelf,
            "B": session.state.shelf,
            "REST": session.state.shelf,
            "LAYERS": [*map(str, session.available), "all"],
            "TOKEN": [f'"{text}"' for text in session.state.tracked],
            "KEY=VALUE": [f"{key}=" for key in session.state.settings.__dataclass_fields__],
            "COMMAND": COMMANDS,
        }
        yield from _matching(current, known.get(kind, []))


def _matching(start: str, known: Iterable[str]) -> Iterable[Completion]:
    yield from (Completion(word, -len(start)) for word in known if word.startswith(start))


def _place(given: Sequence[Word], options: Sequence[str]) -> int:
    """The number of the next argument: words given, less options and their values."""
    taken = sum(word.is_option + (word.text in options) for word in given if word.is_option)
    return len(given) - taken


def run(shell: Shell, name: str, history: Path) -> None:
    """Read lines from the terminal until ``exit`` or Ctrl-D."""
    prompt: PromptSession[str] = PromptSession(
        input=create_input(streams.stdin()),
        history=_history(history),
        completer=CommandCompleter(shell.context),
        complete_while_typing=False,
        bottom_toolbar=lambda: _bar(shell.context, name),
        color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
    )
    while not shell.left:
        try:
            line = prompt.prompt("> ")
        except KeyboardInterrupt:
            shell.output.note("Use 'exit' to quit")
            continue
        except EOFError:
            shell.output.note("Goodbye!")
            return
        try:
            shell.run_line(line)
        except KeyboardInterrupt:
            shell.output.note("Interrupted")
        except NPTError as error:  # e.g. the log cannot be written
            shell.output.error(line, str(error), "")
    sys.stdout.flush()


def _history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def _bar(context: Context, name: str) -> str:
    session = context.session
    settings = session.state.settings
    parts = [
        name,
        str(session.model.dtype).removeprefix("torch."),
        f"layers {','.join(map(str, session.state.layers))}",
        f"shelf {len(session.state.shelf)}",
        settings.strategy,
    ]
    if settings.strategy != "greedy":
        parts.append(f"temperature {settings.temperature:g}, seed {settings.seed}")
    if session.bakes:
        parts.append(f"baked {session.bakes}")
    return printable(" | ".join(parts))
