"""The program ``npt-fast``: its verbs, and how it reports every failure."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import FrameType
from typing import Annotated, Any, NamedTuple, NoReturn

from cyclopts import App, CycloptsError, Group, Parameter

import npt_fast as npt
from npt_fast.cli import retired, streams
from npt_fast.cli.output import note, say, shortened, warn
from npt_fast.errors import NPTError, NPTWarning, VerificationError, missing_package


def _snake(name: str) -> str:
    """The spelling of an option in the users' guides; cyclopts takes ``--max-steps`` likewise."""
    return name.lower().strip("_")


def _shown_default(value: Any) -> str | None:
    """What the help shows: nothing for what is off, empty or not given."""
    return None if value is None or value is False or value == () else str(value)


app = App(
    name="npt-fast",
    help="Train, merge, verify and measure Neuro-Plastic Transformer layers.",
    version=lambda: npt.__version__,
    suppress_keyboard_interrupt=False,
    # flags have no --no- form: all are off by default
    default_parameter=Parameter(negative=(), name_transform=_snake, show_default=_shown_default),
)
# as text: --help takes 0.4 s, and importing torch alone would take 4
app.command("npt_fast.cli.merge:merge", name="merge", help="Merge checkpoints into one.")
app.command("npt_fast.cli.export:export", name="export", help="Export a model for serving.")
app.command("npt_fast.cli.push:push", name="push", help="Push a checkpoint to the Hub.")
app.command("npt_fast.cli.serve:serve", name="serve", help="Serve an exported model with vLLM.")
app.command("npt_fast.cli.analyze:analyze", name="analyze", help="Describe checkpoints.")
app.command("npt_fast.cli.train:train", name="train", help="Train NP layers of a model.")
app.command("npt_fast.cli.sample:sample", name="sample", help="Sample a text from a base model.")
app.command("npt_fast.cli.evaluate:evaluate", name="evaluate", help="Measure checkpoints on text.")
app.command("npt_fast.cli.plan:plan", name="plan", help="Plan which layers to convert first.")
app.command("npt_fast.cli.plot:plot", name="plot", help="Draw the curves of training runs.")
app.command("npt_fast.cli.trace:trace", name="trace", help="Find layers that are worth training.")
app.command("npt_fast.cli.compare:compare", name="compare", help="Show what an injection does.")
app.command(
    "npt_fast.cli.sweep:sweep", name="sweep", help="Inject into each layer, at several strengths."
)
app.command("npt_fast.cli.study:study", name="study", help="Measure what injections move.")
app.command("npt_fast.cli.check:check", name="check", help="Score injections against expectations.")
app.command(
    "npt_fast.cli.interact:interact", name="interact", help="Transfer knowledge in a shell."
)
app.command("npt_fast.cli.models:models", name="models", help="Show which layers can be NP layers.")
app.command("npt_fast.cli.env:env", name="env", help="Show versions and devices.")
app.command("npt_fast.cli.verify:verify", name="verify", help="Verify a merged checkpoint.")
app.command("npt_fast.cli.bench:bench", name="bench", help="Time the modulated MLP.")
app.command("npt_fast.cli.kernels:app", name="kernels", help="Compile the kernels without a GPU.")


@app.command(name="--install-completion")
def _install_completion() -> None:
    """Install completion of verbs and options for bash, zsh or fish, whichever is running."""
    from cyclopts.completion.detect import ShellDetectionError

    try:
        script = app.install_completion()
    except (OSError, ShellDetectionError) as error:
        raise NPTError(f"completion cannot be installed: {error}") from error
    say(f"Written to {script}; it works in new shells")


_EXTRAS = {
    **dict.fromkeys(("train", "sample", "evaluate", "plan"), "train"),
    "serve": "serve",
    "interact": "interact",
    "kernels": "kernels",
}
"""Extra of each verb that ``hf`` is not enough for: one installation, not two in turn."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit: 0 done, 1 failed, 2 usage, 3 a check did not pass, 4 out of space."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        signal.signal(signal.SIGTERM, _terminate)
        streams.install()
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        command = _parse(given)
        with streams.quiet() if command.quiet else nullcontext():
            result = command.run()
        code = result if isinstance(result, int) else 0
        if failed := streams.failure(sys.stdout):
            problem = f"not all output could be printed: {failed.strerror}; the work itself is done"
            _exit(code or (4 if failed.errno in streams.NO_SPACE else 1), problem)
    except VerificationError as error:
        _exit(error.exit_code, str(error), *(f"  {line}" for line in shortened(error.problems[1:])))
    except NPTError as error:
        _exit(error.exit_code, str(error))
    except ModuleNotFoundError as error:
        verb = next((word for word in given if word in app), "")
        line = missing_package(error, f"npt-fast {verb}", needs=_EXTRAS.get(verb, "hf"))
        if line is None:
            raise
        _exit(1, line)
    except MemoryError:
        _exit(4, "out of memory")
    except KeyboardInterrupt:
        _exit(130, "interrupted; nothing was left behind")
    except BrokenPipeError:  # `npt-fast ... | head`
        sys.exit(1)
    sys.exit(code)


def let_signals_end_us() -> None:
    """Let signals end the process at once: all work is done, and Python is only cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class _Command(NamedTuple):
    """A verb with its options, and whether notes, warnings and progress are left out."""

    run: Callable[[], object]
    quiet: bool = False


_COMMON = Parameter(group=Group("Options of every verb", sort_key=99), negative=())


@app.meta.default
def _with_common_options(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[str | None, _COMMON, Parameter(metavar="PATH")] = None,
    quiet: Annotated[bool, _COMMON, Parameter(alias="-q")] = False,
) -> _Command:
    """Parse a verb and its options, beside those that every verb has.

    Parameters
    ----------
    config
        YAML file of options, such as max_steps: 400; options that are given count instead.
    quiet
        Print results and errors only: no notes, warnings or progress.
    """
    if config is None:
        return _Command(_parsed(app, words), quiet)
    from npt_fast.cli.config_file import ConfigFile

    file = app.config = ConfigFile(config)
    try:
        with file.named():
            run = _parsed(app, words)
    finally:
        app.config = ()
    return _Command(file.named()(run), quiet)  # what is wrong may be seen when it runs


def _parsed(parser: App, words: Sequence[str]) -> partial[Any]:
    """The function that is named, with its options."""
    function, options, _ = parser.parse_args(words, exit_on_error=False, print_error=False)
    return partial(function, *options.args, **options.kwargs)


def _parse(arguments: list[str]) -> _Command:
    """The verb with its options. All are checked here: what fails later is not a usage error."""
    verbs = [word for word in app.parse_commands(arguments)[0] if not word.startswith("-")]
    if verbs:
        app[verbs[0]].help = None  # shows the docstring; the line above is for the list of verbs
    try:
        arguments, notes = retired.replaced(arguments)
        # options of serve all go to vLLM; help of an unknown verb is a mistake for `app` alone; and
        # `app.meta`, which has --config, --quiet and -q alone, would double the time of parsing
        plain = (
            arguments[:1] == ["serve"]
            or not {"--help", "-h"}.isdisjoint(arguments)
            or not any(word.lstrip("-").lower().startswith(("config", "q")) for word in arguments)
        )
        found = _parsed(app if plain else app.meta, arguments)
        command = found() if found.func is _with_common_options else _Command(found)
    except CycloptsError as error:
        reason = " ".join(str(error).split())
    except ValueError as error:  # of a dataclass of options, or of a retired option
        reason = str(error)
    else:
        for line in () if command.quiet else notes:
            note(f"Note: {line}")
        return command
    lists = "lists its options" if verbs else "lists verbs"
    _exit(2, f"{reason} ({' '.join(['npt-fast', *verbs])} --help {lists})")


def _show_warning(others: Callable[..., None], message: Warning | str, *where: Any) -> None:
    """Print a warning of ours as one line, without the place in the code that it comes from."""
    if isinstance(message, NPTWarning):
        warn(str(message))
    else:
        others(message, *where)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # unwinds the stack, so that temporary files are removed


def _exit(code: int, message: str, *details: str) -> NoReturn:
    print(f"Error: {message}", *details, sep="\n", file=sys.stderr)
    sys.exit(code)
