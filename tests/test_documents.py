"""What the repository cites exists: sections of the design document, files, headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "cli", "docs", "examples", "kernels", "npt_fast", "tests")
# of documents that are not in the repository
GONE = re.compile(r"\b(SPEC|KERNELS|DESIGN|MERGE|STYLE|UX)\b(\s|\.md)")
CITATION = re.compile(r"\bdesign\.md#([\w-]*)")
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)


def sources() -> list[Path]:
    """Everything that people write; `npt_fast/cli` and the other links are found once."""
    return sorted(
        path
        for folder in (ROOT.glob("*"), *((ROOT / name).rglob("*") for name in FOLDERS))
        for path in folder
        if path.suffix in (".py", ".md", ".sh", ".toml", ".cff") or path.name == "Makefile"
        if path.is_file() and not path.is_relative_to(ROOT / "tests" / "data")
    )


def anchors(document: str) -> set[str]:
    """Names under which GitHub and mkdocs reach the headings of a Markdown text."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", document), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def unresolved(text: str, design: set[str]) -> list[str]:
    """Citations in a text that lead nowhere."""
    return [
        *(match.group() for match in GONE.finditer(text)),
        *(match.group() for match in CITATION.finditer(text) if match.group(1) not in design),
    ]


SOURCES = sources()
SECTIONS = anchors((ROOT / "docs" / "design.md").read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_citations_resolve(path: Path) -> None:
    if path != Path(__file__):  # which has planted ones
        assert unresolved(path.read_text(), SECTIONS) == []


@pytest.mark.parametrize(
    "planted",
    ["SPEC\x205.4", "(SPEC\n    2.3)", "see MERGE\x2emd", "(design.md#nowhere)", "design.md# "],
)
def test_a_citation_that_leads_nowhere_is_found(planted: str) -> None:
    assert unresolved(f"after {planted}, design.md#layer", SECTIONS) != []


def test_every_section_has_content() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    empty = re.findall(r"^## (.*)\n+(?=## |\Z)", text, re.M)
    assert empty == []


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.suffix == ".md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_of_documents_resolve(path: Path) -> None:
    text = FENCED.sub("", path.read_text())
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):  # of the web
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{path}: {link}"
