"""The documents keep their promises: places of formulas, links, length, the install line.

After code has moved, `python -m tests.test_docs` writes the places of docs/METHOD.md anew.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = ROOT / "docs" / "METHOD.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"\[`([\w.]+)` ([\w/]+\.py):(\d+)\]\(\.\./([\w/]+\.py)#L(\d+)\)")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def line_of(symbol: str, path: str) -> int:
    """Where a function, class or constant, `Class.method` included, is defined."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for name in symbol.split("."):
        node = next(n for n in body if name in _names(n))
        body = getattr(node, "body", [])
    return node.lineno


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def text(path: Path) -> str:
    """A document."""
    return path.read_text(encoding="utf-8")


def test_formulas_stand_where_the_method_says() -> None:
    places = PLACE.findall(text(METHOD))
    assert len(places) > 15
    for symbol, path, line, linked, anchor in places:
        where = line_of(symbol, path)
        assert (path, line) == (linked, anchor) and int(line) == where, f"{symbol}: python -m tests.test_docs"


def test_readme_can_be_finished() -> None:
    lines = text(ROOT / "README.md").splitlines()
    assert len(lines) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(text(document)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), link
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(text(file)), link


def _anchors(document: str) -> set[str]:
    """Anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", document, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def write_places() -> None:
    """Put every symbol's present line into docs/METHOD.md."""

    def replaced(match: re.Match) -> str:
        symbol, path = match[1], match[2]
        line = line_of(symbol, path)
        return f"[`{symbol}` {path}:{line}](../{path}#L{line})"

    METHOD.write_text(PLACE.sub(replaced, text(METHOD)), encoding="utf-8")


if __name__ == "__main__":
    write_places()
