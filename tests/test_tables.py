"""How results are shown in a line and in notebooks."""

from __future__ import annotations

from dataclasses import dataclass

from npt_fast.tables import Report, html_table
from tests.transfer.models import random_modulation
from tests.transfer.test_report import HOSTILE


@dataclass(repr=False, slots=True)
class Result(Report):
    name: str

    @property
    def facts(self) -> dict[str, object]:
        return {"name": self.name, "steps": 3}


def test_a_report_is_a_line_and_a_table() -> None:
    assert repr(Result("a")) == "<Result name: a; steps: 3>"
    assert Result("a")._repr_html_() == (
        "<table><tr><th>Result</th><th></th></tr><tr><th>name</th><td>a</td></tr>"
        "<tr><th>steps</th><td>3</td></tr></table>"
    )


def test_names_are_untrusted() -> None:
    shown = Result(f"a\nb\x1b[31m{HOSTILE}")
    assert len(repr(shown).splitlines()) == 1 and "\x1b" not in repr(shown)
    html = shown._repr_html_()
    assert "<script" not in html and "<img" not in html and "\x1b" not in html
    assert html.count("<td>") == 2
    assert html_table(["<b>"], []) == "<table><tr><th>&lt;b&gt;</th></tr></table>"


def test_a_modulation_is_a_table_of_its_layers() -> None:
    modulation = random_modulation()
    html = modulation._repr_html_()
    assert html.count("<tr>") == 3 and "<th>1</th><td>gate, up, down</td><td>2</td>" in html
    assert f"<td>{modulation.magnitude(2):.4g}</td>" in html
