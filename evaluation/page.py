"""report.html of an evaluation: its tables, sortable, its pictures, and what was compared."""

import json
import re
from pathlib import Path
from typing import Any

from pipeline.artefacts import write_text
from pipeline.images import read_rgb
from pipeline.report import Group, Picture, Report, Table, render
from pipeline.report_parts import fact_text

TITLES = {
    "fixations": "Saliency maps against human fixations",
    "reconstruction": "Reconstructions against their originals",
    "naturalness": "Spoiled images against their originals",
}
MOST_PICTURES = 12


def write_page(out: Path, command: str) -> None:
    """OUT/report.html from table.md, summary.json and the pictures beside them; nothing where it would be the same."""
    path, page = out / "report.html", render(report(out, command))
    if not path.is_file() or path.read_text(encoding="utf-8") != page:
        write_text(path, page)


def report(out: Path, command: str) -> Report:
    """What the page of a command shows, read from the files in `out`."""
    notes, tables, meanings = parse_tables((out / "table.md").read_text(encoding="utf-8"))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    pictures = [
        Picture(path.stem, path.stem.replace("-", " "), read_rgb(path), f"{path.stem.replace('-', ' ')}, as a picture")
        for path in sorted(out.glob("*.png"))[:MOST_PICTURES]
    ]
    told: dict[str, Any] = {key: fact_text(value) for key, value in summary.items() if key not in _SHOWN}
    return Report(
        TITLES[command],
        lead=notes,
        tables=tables,
        groups=[Group("Pictures", pictures, wide=True)] if pictures else [],
        facts={
            "what names mean": meanings,
            "what was compared": told,
            "versions": {k: fact_text(v) for k, v in summary["versions"].items()},
        },
    )


_SHOWN = ("models", "differences", "versions", "confidence")


def _meanings(block: str) -> dict[str, str]:
    """A list of `- name: meaning`."""
    items = (line.removeprefix("- ").partition(": ") for line in block.splitlines())
    return {name: meaning for name, _, meaning in items}


def parse_tables(markdown: str) -> tuple[list[str], list[Table], dict[str, str]]:
    """Paragraphs that belong to no table, the tables, and what names mean, of what `evaluation.tables` wrote.

    A table's title is the heading above it, and the paragraph above it up to its first comma, bracket or full stop;
    the whole paragraph is its note.
    """
    notes: list[str] = []
    tables: list[Table] = []
    meanings: dict[str, str] = {}
    heading, before = "", ""
    for block in markdown.strip().split("\n\n"):
        if block.startswith("#"):
            heading = block.lstrip("# ") + ": "
        elif block.startswith("- "):
            if notes and notes[-1].endswith(":"):  # a list of what the paragraph announces
                notes += [line.removeprefix("- ").replace("*", "") for line in block.splitlines()]
            else:
                meanings |= _meanings(block)
        elif block.startswith("|"):
            head, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in block.splitlines()]
            above = notes.pop() if notes and notes[-1] == before else "Scores"
            tables.append(Table(heading + re.split(r"[,.(]", above)[0].strip(" :"), head, rows, above))
        else:
            notes.append(block)
        before = block
    return notes, tables, meanings
