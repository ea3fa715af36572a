"""A study as a folder of tables, JSON, an HTML page and a picture, and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from npt_fast.errors import TransferError
from npt_fast.pictures.figure import figure_class, png
from npt_fast.report_files import csv_file, json_file, report_folder
from npt_fast.tables import escaped, html_table, markdown_table
from npt_fast.transfer.report import document, probability_heat, probability_scale
from npt_fast.transfer.study_results import ALL, MEASURES, Condition, Interval, Row, Study, Summary

_SHARES = MEASURES[:3]
"""What the terminal shows, where a line has 100 columns."""
_NOTE = (
    "Means over pairs, and 95 % bootstrap intervals over them. A pair has a prompt about one "
    "subject, whose object is “own”, and a text about another subject that is injected at the "
    "prompt's last token."
)


@contextmanager
def study_folder(output: str | Path) -> Iterator[Callable[[Study], None]]:
    """Make a folder, hidden until a study is written to it, as `report_folder` does.

    Args:
        output: Folder to create.

    Yields:
        Writes a study: rows.csv, summary.csv, study.json, study.html, and study.png if there is
        matplotlib.

    Raises:
        TransferError: the folder exists already or cannot be written.
    """
    with report_folder(output, TransferError) as write_files:

        def write(study: Study) -> None:
            summaries = study.summaries()
            files = {
                "rows.csv": _rows_csv(study.rows),
                "summary.csv": _summary_csv(summaries),
                "study.json": json_file(study_json(study, summaries)),
                "study.html": study_html(study, summaries).encode(),
            }
            if find_spec("matplotlib") is not None:
                files["study.png"] = draw(summaries)
            write_files(files)

        yield write


def study_json(study: Study, summaries: Sequence[Summary]) -> dict[str, Any]:
    """Study and summaries as plain data; ``rows`` are in rows.csv as well."""
    means = [
        {
            "relation": summary.relation,
            **summary.condition._asdict(),
            "pairs": summary.pairs,
            "measures": {name: asdict(found) for name, found in summary.measures.items()},
        }
        for summary in summaries
    ]
    return {**asdict(study), "summaries": means}


def study_lines(study: Study) -> Iterator[str]:
    """Markdown tables of at most 100 columns: what is known, all conditions, each relation."""
    summaries = study.summaries()
    heads = ["relation", "known subjects", "pairs", "prompt"]
    yield from markdown_table(
        heads,
        [
            [k.relation[:20], f"{len(k.known)} of {k.subjects}", str(k.pairs), k.prompt[:45]]
            for k in study.known
        ],
    ).splitlines()
    yield ""
    yield "All relations: percent of pairs whose object is on top, with 95 % intervals"
    yield ""
    yield from _share_table(
        ["model", "injected"],
        [([s.condition.how, s.condition.injected], s) for s in summaries if s.relation == ALL],
    )
    main = next((s.condition.how for s in summaries if s.condition.strength is not None), None)
    if main is None:
        return
    yield ""
    yield f"Each relation, {main}"
    yield ""
    yield from _share_table(
        ["relation", "injected"],
        [
            ([s.relation[:20], s.condition.injected], s)
            for s in summaries
            if s.relation != ALL and s.condition.how == main
        ],
    )


def _share_table(heads: Sequence[str], rows: Sequence[tuple[list[str], Summary]]) -> list[str]:
    body = [
        [*cells, str(s.pairs), *(_percent(s.measures.get(name)) for name in _SHARES)]
        for cells, s in rows
    ]
    return markdown_table([*heads, "pairs", "own", "source's", "other's"], body).splitlines()


def _percent(found: Interval | None) -> str:
    if found is None:
        return "-"
    mean, low, high = (100 * v for v in (found.mean, found.low, found.high))
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def study_html(study: Study, summaries: Sequence[Summary]) -> str:
    """A page without scripts: a table of all conditions for each relation and for all together."""
    head = {
        "NP layers": ", ".join(map(str, study.layers)),
        "reading": study.reading,
        "seed": str(study.seed),
    }
    sections = [f"<p>{_NOTE}</p>", f'<p class="note">{probability_scale()}</p>']
    known = {known.relation: known for known in study.known}
    for name in dict.fromkeys((ALL, *known)):
        sections.append(f"<h2>{escaped(name)}</h2>")
        if name != ALL:
            found = known[name]
            sections.append(
                f'<p class="note">{escaped(found.prompt)}: the base model knows '
                f"{len(found.known)} of {found.subjects} subjects; {found.pairs} pairs</p>"
            )
        rows = [_html_row(s) for s in summaries if s.relation == name]
        if rows:
            sections.append(html_table(["model", "injected", "pairs", *MEASURES], rows))
    return document("What injections move", head, sections)


def _html_row(summary: Summary) -> list[str]:
    cells = [
        f"<th>{escaped(summary.condition.how)}</th>",
        f"<td>{escaped(summary.condition.injected)}</td>",
        f"<td>{summary.pairs}</td>",
    ]
    for name in MEASURES:
        found = summary.measures.get(name)
        if found is None:
            cells.append("<td></td>")
        else:
            cells.append(
                f'<td style="{probability_heat(found.mean)}">{found.mean:.3f}<br>'
                f"{found.low:.3f} to {found.high:.3f}</td>"
            )
    return cells


def _rows_csv(rows: Sequence[Row]) -> bytes:
    names = [field.name for field in fields(Row)]
    return csv_file(names, [[getattr(row, name) for name in names] for row in rows])


def _summary_csv(summaries: Sequence[Summary]) -> bytes:
    return csv_file(
        ["relation", *Condition._fields, "pairs", "measure", *(f.name for f in fields(Interval))],
        [
            [s.relation, *s.condition, s.pairs, name, *astuple(found)]
            for s in summaries
            for name, found in s.measures.items()
        ],
    )


def draw(summaries: Sequence[Summary]) -> bytes:
    """Bars with intervals: all conditions over all pairs, and the first injection by relation.

    Returns:
        A picture as PNG.

    Raises:
        NPTError: matplotlib is missing.
    """
    Figure = figure_class()
    whole = [s for s in summaries if s.relation == ALL]
    how = next((s.condition.how for s in whole if s.condition.strength is not None), "base patched")
    names = list(dict.fromkeys(s.relation for s in summaries))
    figure = Figure(figsize=(11, 9), layout="constrained")
    above, below = figure.subplots(2, 1)
    _bars(
        above,
        [f"{s.condition.how}\n{s.condition.injected}" for s in whole],
        [(name, [s.measures.get(name) for s in whole]) for name in _SHARES],
    )
    above.tick_params("x", rotation=90)
    above.set_title("all relations", loc="left")
    main = {(s.relation, s.condition.injected): s for s in summaries if s.condition.how == how}
    series = [
        (
            f"{injected}: {measure}",
            [
                main[name, injected].measures.get(measure) if (name, injected) in main else None
                for name in names
            ],
        )
        for injected, measure in (
            ("same relation", _SHARES[1]),
            ("other relation", _SHARES[1]),
            ("other relation", _SHARES[2]),
            ("unrelated", _SHARES[1]),
        )
    ]
    _bars(below, names, series)
    below.set_title(how, loc="left")
    return png(figure)


def _bars(
    axes: Any, labels: Sequence[str], series: Sequence[tuple[str, Sequence[Interval | None]]]
) -> None:
    """Groups of bars with error bars; what was not measured has no bar."""
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series):
        there = [(place, value) for place, value in enumerate(values) if value is not None]
        axes.bar(
            [place + (number - (len(series) - 1) / 2) * width for place, _ in there],
            [value.mean for _, value in there],
            width,
            yerr=[
                [max(0.0, value.mean - value.low) for _, value in there],
                [max(0.0, value.high - value.mean) for _, value in there],
            ],
            capsize=2,
            label=name,
        )
    axes.set_xticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of pairs")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
