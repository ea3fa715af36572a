"""``npt-fast interact``"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import Parameter

import npt_fast as npt
from npt_fast.cli import streams
from npt_fast.cli.arguments import (
    CheckpointText,
    LayerOptions,
    ModelOptions,
    PathText,
    ReadingOptions,
)
from npt_fast.cli.output import warn
from npt_fast.config import Residual
from npt_fast.errors import NPTError, TransferError, VerificationError
from npt_fast.hf.tokenizer import Reading

if TYPE_CHECKING:
    from npt_fast.cli.shell.loop import Shell
    from npt_fast.transfer.journal import Journal
    from npt_fast.transfer.session import Session


@Parameter(name="*")
@dataclass(frozen=True)
class InteractOptions:
    """Options of `interact`.

    Attributes:
        checkpoint: Checkpoint directory, weights file, or ORG/REPO on the Hub.
        base: The base model.
        loading: Which layers of the checkpoint are loaded, and how.
        reading: How texts become tokens; the command set changes it.
        script: File of commands, one per line, to run instead of reading the terminal or stdin.
        json: Print one JSON object per command.
        keep_going: Continue after a command of a script or of stdin has failed.
        log: File to log the session to; a new one in the state folder if not given.
        replay: Log to run again, on its own model and checkpoint if none are given.
        exact: Exit with 3 at the first result that differs from the log.
    """

    checkpoint: CheckpointText | None = None
    _: KW_ONLY
    base: ModelOptions = field(default_factory=ModelOptions)
    loading: LayerOptions = field(default_factory=LayerOptions)
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    script: PathText | None = None
    json: bool = False
    keep_going: bool = False
    log: PathText | None = None
    replay: PathText | None = None
    exact: Annotated[bool, Parameter(name="--assert")] = False

    def __post_init__(self) -> None:
        if self.replay is not None and (self.script or self.log):
            raise ValueError("--replay runs a log and writes none; leave out --script and --log")
        if self.replay is not None and self.reading != ReadingOptions():
            raise ValueError("--replay reads texts as its log says; leave the option out")
        if self.exact and self.replay is None:
            raise ValueError("--assert needs --replay")


class UsageError(NPTError):
    """A required option is missing."""

    exit_code = 2


_NOTHING = InteractOptions()


def interact(options: InteractOptions = _NOTHING) -> int:
    """Extract, combine and inject knowledge with commands, in a shell or a script.

    npt-fast interact --checkpoint experiments/merged_11_13 --layers 11,13

    If stdin is not a terminal, lines are read from it until one fails. The command help lists
    all commands.
    """
    from npt_fast.cli.shell.command import Context
    from npt_fast.cli.shell.commands.scripts import read_script
    from npt_fast.cli.shell.loop import JsonOutput, PlainOutput, Shell

    if options.checkpoint is None and options.replay is None:
        raise UsageError("--checkpoint is missing (npt-fast interact --help lists the options)")
    terminal = options.script is None and options.replay is None and _is_terminal()
    if terminal:  # what is missing is said now, not after a minute of loading
        import npt_fast.cli.shell.terminal  # noqa: F401
    script = None if options.script is None else read_script(options.script)
    if options.replay is not None:
        return _replay(options)
    session = _session(options, options.checkpoint or "", options.reading)
    journal = _journal(options, session)
    output = JsonOutput() if options.json else PlainOutput()
    shell = Shell(Context(session), output, journal, keep_going=options.keep_going)
    try:
        if terminal:
            return _converse(options, shell)
        shell.run_lines(streams.stdin() if script is None else script)
    finally:
        if journal is not None:
            journal.close()
    return 1 if shell.failed else 0


def _converse(options: InteractOptions, shell: Shell) -> int:
    from npt_fast.cli.shell import terminal
    from npt_fast.transfer.journal import state_folder

    session = shell.context.session
    if not options.json:
        shell.output = terminal.TerminalOutput()
        for line in _banner(session):
            shell.output.note(line)
        if shell.journal is not None:
            shell.output.note(f"Log: {shell.journal.path}")
        shell.output.note("help lists the commands, Tab completes, Ctrl-D leaves")
    name = Path(session.model.config.name_or_path).name
    terminal.run(shell, name, state_folder() / "history")
    return 0


def _banner(session: Session) -> list[str]:
    lines = ["Knowledge transfer", f"  Model: {type(session.model).__name__}"]
    lines += [
        f"  Layer {layer.layer}: {layer.architecture.modulation}, "
        f"{layer.architecture.num_ranks} ranks of {layer.architecture.rank}"
        for layer in npt.status(session.model)
    ]
    return [*lines, f"  Device: {session.model.device}"]


def _replay(options: InteractOptions) -> int:
    from npt_fast.cli.shell.command import Context
    from npt_fast.cli.shell.loop import JsonOutput, PlainOutput, Shell
    from npt_fast.cli.shell.replay import replay
    from npt_fast.transfer import journal

    path = str(options.replay)
    header, entries = journal.read(path)
    checkpoint = options.checkpoint or header.get("checkpoint")
    model = options.base.model_name or header.get("model_name")
    if not isinstance(checkpoint, str) or not isinstance(model, str):
        raise TransferError(
            f"{path}: does not name a checkpoint and a model; give --checkpoint and --model_name"
        )
    try:
        # logs of before do not say: they added no special tokens
        reading = Reading(
            special_tokens=header.get("special_tokens", False), chat=header.get("chat", False)
        )
    except ValueError as error:
        raise TransferError(f"{path}, line 1: {error}") from None
    if header.get("residual") not in (None, *get_args(Residual)):
        raise TransferError(f"{path}, line 1: residual must be removed or kept")
    loading = replace(options.loading, residual=options.loading.residual or header.get("residual"))
    if options.base.trust_remote_code and options.base.model_name is None:
        raise TransferError(
            f"{path}: names the base model {model}; to run its code, repeat the name (--model_name)"
        )
    base = replace(options.base, model_name=model)
    options = replace(options, base=base, loading=loading)
    session = _session(options, checkpoint, reading, header.get("layers"))
    output = JsonOutput() if options.json else PlainOutput()
    try:
        output.note(replay(Shell(Context(session), output), path, header, entries))
    except VerificationError as error:
        if options.exact:
            raise
        warn(f"{error}: {error.problems[0]}")
    return 0


def _session(
    options: InteractOptions, checkpoint: str, reading: Reading, layers: Any = None
) -> Session:
    from npt_fast.transfer.session import Session

    opened = options.loading.open(checkpoint)
    base = options.base.named([opened])
    with _waiting(f"Loading model from {base.model_name}..."):
        model, tokenizer = base.load([opened])
        options.loading.load(model, opened, layers)
    return Session(model, tokenizer, reading)


@contextmanager
def _waiting(message: str) -> Iterator[None]:
    """Show a spinner on a terminal, or print a line elsewhere; both on stderr."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with console.status(message):
            yield
    else:
        print(message, file=sys.stderr, flush=True)
        yield


def _journal(options: InteractOptions, session: Session) -> Journal | None:
    from npt_fast.transfer import journal

    header = {
        "npt_fast": npt.__version__,
        "model_name": session.model.config.name_or_path,
        "checkpoint": options.checkpoint,
        **session.description(),
    }
    if options.loading.residual is not None:
        header["residual"] = options.loading.residual
    try:
        return journal.Journal(options.log or journal.default_path(), header)
    except TransferError as error:
        if options.log is not None:
            raise
        warn(f"this session is not logged: {error}")
        return None


def _is_terminal() -> bool:
    return streams.stdin().isatty() and sys.stdout.isatty()
