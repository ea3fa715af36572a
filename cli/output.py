"""What verbs print: JSON, reports, the guide's verification block, sizes, a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from npt_fast.checkpoint.certificate import Certificate, Closeness, worst_of
from npt_fast.errors import printable
from npt_fast.schema import finite
from npt_fast.tables import markdown_table

if TYPE_CHECKING:
    from npt_fast.checkpoint.examination import VerifyReport
    from npt_fast.transfer.compare import Comparison, Sweep

Found = TypeVar("Found", "Comparison", "Sweep")


def say(text: str = "") -> None:
    """Print a line; control characters that come from a checkpoint are escaped."""
    print(printable(text))


def print_json(value: Any) -> None:
    """Print one JSON document; NaN and infinity, which JSON does not have, become null."""
    # allow_nan=False: NaN would print as something that JSON readers refuse
    print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def certificate_lines(found: Certificate) -> Iterator[str]:
    """Lines of a table of all texts: the one like the training text, and those of other kinds."""
    data = found.data or "held-out text"
    # the end of a path says more, and a line has 80 columns
    texts = {data if len(data) <= 28 else f"...{data[-25:]}": found.held_out, **found.texts}
    rows = [(name, f"{text.tokens:,}", *_figures(text)) for name, text in texts.items()]
    if found.texts:
        tokens = sum(text.tokens for text in found.texts.values())
        worst = Closeness(tokens, **worst_of(found.texts.values()))
        rows.append(("worst of other kinds", f"{tokens:,}", *_figures(worst)))
    for line in markdown_table(("text", "tokens", "KL, nats", "ratio"), rows).splitlines():
        yield f"  {line}"


def _figures(text: Closeness) -> Iterator[str]:
    yield figure(text.kl)
    yield figure(text.perplexity_ratio)


def figure(value: float | None) -> str:
    """A figure of a certificate, None if it is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def note(line: str) -> None:
    """Print a line on stderr that needs no attention."""
    print(printable(line), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    print(printable(f"Warning: {message}"), file=sys.stderr)


def show_report(
    facts: Mapping[str, Any],
    found: Found,
    lines: Callable[[Found], Iterable[str]],
    page: Callable[[Found, Mapping[str, str]], str],
    *,
    html: str | None,
    json: bool,
) -> None:
    """Show what an injection did: a page if `html` is a path, and JSON or lines.

    Args:
        facts: What was injected, and how: values of JSON, and how texts are read.
        found: A dataclass with the results.
        lines: Renders the results as lines.
        page: Renders the results and the facts as HTML.
        html: File for the page.
        json: Print JSON in place of lines.
    """
    from npt_fast.hf.tokenizer import Reading
    from npt_fast.transfer.report import write

    texts = {name: str(value) for name, value in facts.items()}
    if html is not None:
        write(page(found, texts), html)
    if json:
        data = {name: asdict(v) if isinstance(v, Reading) else v for name, v in facts.items()}
        print_json({**data, **asdict(found)})
        return
    for name, text in texts.items():
        say(f"{name.capitalize()}: {text}")
    for line in lines(found):
        say(line)


def size(count: int) -> str:
    """A number of bytes for people: ``"8.3 MB"``."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def print_verification(report: VerifyReport) -> None:
    """Print what was checked, then the guide's block, word for word if everything passed."""
    line = f"Read back {report.tensors} tensors, {size(report.bytes_read)}"
    counts = {
        "bit-equal to their sources": report.compared,
        "equal to recorded digests": report.digests_matched,
        "CRCs match": report.crcs_matched,
    }
    if report.passed:
        line += "".join(f"; {count} {what}" for what, count in counts.items() if count)
    say(line)
    for note in report.notes:
        say(f"Note: {note}")
    say("Verification Results:")
    say(f"  Expected layers: {report.expected_layers}")
    say(f"  Found layers: {report.found_layers}")
    say(f"  Checkpoint has {report.checkpoint_keys} keys")
    for line in shortened(report.problems):
        say(f"  {line}")
    say("✓ Verification passed!" if report.passed else "✗ Verification failed!")


def shortened(lines: list[str], limit: int = 20) -> list[str]:
    """The first `limit` lines and how many more there are; ``--json`` shows all."""
    more = len(lines) - limit
    return lines if more <= 0 else [*lines[:limit], f"... and {more} more"]


@contextmanager
def progress_bar(
    unit: Literal["bytes", "tokens", "counts"] = "bytes",
) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on a terminal while there is work; None elsewhere: logs stay clean."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    figures = {
        "bytes": (DownloadColumn(), TransferSpeedColumn()),
        "tokens": (MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn()),
        "counts": (MofNCompleteColumn(), TimeRemainingColumn()),
    }
    columns = (TextColumn("{task.description}"), BarColumn(), *figures[unit])
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def show(activity: str, done: int, total: int) -> None:
        if activity not in tasks:
            tasks[activity] = bar.add_task(activity, total=total)
        bar.start()
        bar.update(tasks[activity], completed=done, total=total)
        if bar.finished:  # what follows may print lines of its own
            bar.stop()

    try:
        yield show
    finally:
        bar.stop()
