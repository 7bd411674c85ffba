"""The documents: every link leads somewhere, every heading that one names is there, and lines are of 120 at most."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("*.md", "docs/**/*.md", "benchmarks/*.md", "examples/**/*.md")
DOCUMENTS = sorted(path for folder in FOLDERS for path in ROOT.glob(folder))
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False})
LONG = re.compile(r"\||!?\[[^]]*\]\([^)]*\)")
"""What cannot be broken: a row of a table, a link."""


def tokens(document: Path) -> list[Token]:
    return MARKDOWN.parse(document.read_text(encoding="utf-8"))


def links(document: Path) -> list[str]:
    """Where a document's links and pictures lead, outside the web."""
    inner = [child for token in tokens(document) for child in token.children or []]
    found = [str(child.attrs.get("href") or child.attrs.get("src") or "") for child in inner]
    return [link for link in found if link and not re.match(r"[a-z]+:", link)]


def anchors(document: Path) -> set[str]:
    """The names of a document's headings, as GitHub makes them."""
    made = tokens(document)
    headings = [after.content for token, after in pairwise(made) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_documents() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/design.md"} <= {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert sum(len(links(document)) for document in DOCUMENTS) > 50


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for link in links(document):
        place, _, heading = link.partition("#")
        target = (document.parent / place).resolve() if place else document
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_of_120_at_most(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    lines = re.sub(r"(?ms)^```.*?^```", lambda code: "\n" * code[0].count("\n"), text).splitlines()  # what was printed
    assert not [f"line {number}" for number, line in enumerate(lines, 1) if len(line) > 120 and not LONG.search(line)]
