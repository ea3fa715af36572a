"""Reports are complete, and nothing in a prompt becomes markup."""

from __future__ import annotations

import dataclasses
import errno
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.config import Injection
from npt_fast.errors import StorageError, TransferError
from npt_fast.transfer.compare import Comparison, Sweep, Token, compare, sweep
from npt_fast.transfer.extract import extract
from npt_fast.transfer.generate import Sampling
from npt_fast.transfer.report import comparison_html, probability_heat, sweep_html, write
from tests.transfer import models

HOSTILE = '<script>alert("x")</script><img src=x onerror=y>&amp;\x00\x1b'
VOID = {"meta", "br", "img"}


class Reader(HTMLParser):
    """Collects tags with attributes, and texts; fails on unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def cells(self) -> list[str]:
        return [text for text in self.text if text.strip()]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    model = models.converted()
    source = extract(model, models.tokenizer, models.SOURCE)
    return compare(
        model, models.tokenizer, source, models.TEXT,
        Injection(position="at:red"), sampling=Sampling(tokens=6), tracked=["a", "<"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept() -> Sweep:
    model = models.converted()
    source = extract(model, models.tokenizer, models.SOURCE)
    return sweep(
        model, models.tokenizer, source, models.TEXT, Injection(), strengths=[0.5, 1], tracked=["<"]
    )


def test_a_comparison_is_all_there(comparison: Comparison) -> None:
    found = Reader(comparison_html(comparison, {"checkpoint": "x"}))
    cells = found.cells()
    for value in (*comparison.kls, *(v for t in comparison.top for v in (t.before, t.after))):
        assert f"{value:.4f}" in cells
    spans = [attributes for tag, attributes in found.tags if tag == "span"]
    assert sum(attributes.get("class") == "hit" for attributes in spans) == 2 * len("red")
    titles = [attributes["title"] for attributes in spans if "title" in attributes]
    assert titles == [f"KL {value:.4f}" for value in comparison.kls]
    assert "base model" not in cells  # nobody measured it
    assert "'<'" in cells and "checkpoint" in cells and "1, 2" in cells


def test_the_base_model_stands_beside_no_injection(comparison: Comparison) -> None:
    """They are two things: without injection, NP layers act."""
    model = models.converted()
    found = compare(
        model, models.tokenizer, extract(model, models.tokenizer, models.SOURCE), models.TEXT,
        Injection(position="at:red"), tracked=["a"], base=True,
    )  # fmt: skip
    with npt.disabled(model), torch.no_grad():
        ids = models.tokenizer(models.TEXT, return_tensors="pt").input_ids
        base = model(ids).logits[0, -1].softmax(-1)
    (a,) = found.tracked
    expected = base[models.tokenizer("a")["input_ids"][-1]].item()
    assert a.base == pytest.approx(expected, rel=1e-4) and a.base != pytest.approx(a.before)
    cells = Reader(comparison_html(found)).cells()
    heads = cells.index("token")
    assert cells[heads : heads + 4] == ["token", "base model", "no injection", "injected"]
    row = cells.index("'a'")
    values = (a.base, a.before, a.after)
    assert cells[row + 1 : row + 4] == [f"{value:.4f}" for value in values]
    assert any("NP layers turned off" in text for text in cells)


def test_small_probabilities_are_visible(swept: Sweep) -> None:
    """Equal factors are equal steps of the colour, and the legend says so."""

    def opacity(style: str) -> float:
        return float(style.rpartition("/ ")[2].rstrip(")"))

    shades = [opacity(probability_heat(p)) for p in (0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1)]
    assert shades == pytest.approx([0, 0, 0, 0.1625, 0.325, 0.4875, 0.65], abs=1e-3)
    assert opacity(probability_heat(float("nan"))) == 0
    found = Reader(sweep_html(swept))
    at = found.text.index("0.0001")
    assert found.text[at : at + 5] == ["0.0001", "0.001", "0.01", "0.1", "1"]


def test_a_sweep_is_all_there(swept: Sweep) -> None:
    found = Reader(sweep_html(swept))
    cells = found.cells()
    assert sum(tag == "table" for tag, _ in found.tags) == 2
    for value in (v for values in (swept.kl, swept.tracked["<"]) for row in values for v in row):
        assert f"{value:.4f}" in cells
    assert {"1", "2", "1, 2", "0.5"} <= set(cells)
    assert f"{swept.no_injection['<']:.4f} without injection" in cells


def test_texts_stay_texts(comparison: Comparison, swept: Sweep) -> None:
    """Prompts, tokens and the head are escaped."""
    head = {"a": "b"}
    plain = [Reader(comparison_html(comparison, head)).tags, Reader(sweep_html(swept, head)).tags]
    token = Token(HOSTILE, 0.5, 0.25)
    changed = dataclasses.replace(
        comparison,
        prompt=[HOSTILE] * len(comparison.prompt),
        injected=[HOSTILE] * len(comparison.injected),
        no_injection_text=HOSTILE,
        generated=[token] * len(comparison.generated),
        top=[dataclasses.replace(t, text=f"{HOSTILE}{i}") for i, t in enumerate(comparison.top)],
    )
    html = [
        comparison_html(changed, {HOSTILE: HOSTILE}),
        sweep_html(
            dataclasses.replace(swept, tracked={HOSTILE: swept.kl}, no_injection={HOSTILE: 0.0}),
            {HOSTILE: HOSTILE},
        ),
    ]
    for document, before in zip(html, plain, strict=True):
        found = Reader(document)
        assert {tag for tag, _ in found.tags} == {tag for tag, _ in before}
        assert "script" not in {tag for tag, _ in found.tags}
        assert not {"onerror", "src", "href"} & {a for _, some in found.tags for a in some}
        assert "\x00" not in document and "\x1b" not in document
        assert '<script>alert("x")</script>' in "".join(found.text)


def test_nothing_is_fetched(comparison: Comparison, swept: Sweep) -> None:
    for html in (comparison_html(comparison), sweep_html(swept)):
        assert html.startswith("<!DOCTYPE html>")
        assert "url(" not in html and "http:" not in html and "https:" not in html
        assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html


def test_values_that_are_not_finite(swept: Sweep) -> None:
    """An injection that destroys the output has a KL of infinity or NaN."""
    broken = dataclasses.replace(swept, kl=[[float("inf"), float("nan")]] * len(swept.kl))
    html = sweep_html(broken)
    assert "/ inf" not in html and "/ nan" not in html and ">inf<" in html and ">nan<" in html


def test_writing(tmp_path: Path, monkeypatch: Any) -> None:
    write("<p>ä</p>", tmp_path / "a.html")
    assert (tmp_path / "a.html").read_bytes() == "<p>ä</p>".encode()
    with pytest.raises(TransferError, match="none"):
        write("", tmp_path / "none" / "a.html")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError):
        write("", tmp_path / "b.html")
