"""Fixations from a table of text, of the kinds that spreadsheets, trackers and their programs write."""

import csv
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from models.errors import UserError
from models.weights.contents import other_kind_of
from pipeline.paths import problem_of, read_text

UNKNOWN_SUBJECT = -1
COLUMNS = ("image", "subject", "x", "y")
SEPARATORS = (",", ";", "\t", "|")
LOST = ("", "na", "n/a", "nan", "null", "none", ".", "-")  # what trackers and their programs write for no number
UNKNOWN = (*LOST, str(UNKNOWN_SUBJECT))
Row = tuple[str, int, float, float]  # image, subject, x, y


def csv_rows(path: Path) -> Iterator[Row]:
    """One row per line of the table; a UserError names the line."""
    if problem := problem_of(path) or (kind := other_kind_of(path)) and f"is {kind}":
        raise UserError(f"{path} {problem}: give a table of fixations with the columns {', '.join(COLUMNS)}")
    try:
        rows = list(_table_rows(path, io.StringIO(read_text(path), newline="")))
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"{path} is not a table of comma-separated values in UTF-8 ({error}): mend it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    numbers = _subject_numbers({subject for _, subject, _, _ in rows})
    return ((image, numbers[subject], x, y) for image, subject, x, y in rows)


def _table_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, str, float, float]]:
    """Image, subject ('' where unknown), x and y of every line."""
    before, separator, header, lines = _header(iter(lines))
    places = _columns(path, header)
    table = csv.reader(lines, strict=True, delimiter=separator)
    for cells in table:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}, line {table.line_num + before}"
        if len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} values under {len(header)} columns: mend the line")
        found = {name: cells[place].strip() for name, place in places.items()}
        subject = found.get("subject", "")
        x, y = (_pixels(where, name, found[name], separator) for name in ("x", "y"))
        yield found["image"], "" if subject.lower() in UNKNOWN else subject, x, y


def _header(lines: Iterator[str]) -> tuple[int, str, list[str], Iterator[str]]:
    """How many lines it took, the separator, the columns' names in lower case, and the other lines.

    A first line `sep=;`, as spreadsheets write it, is passed over: the header tells as much.
    """
    before, line = 0, ""
    for line in lines:
        before += 1
        if line.strip() and not line.lower().startswith("sep="):
            break
    found = {}
    for separator in SEPARATORS:
        header = [name.strip().lower() for name in next(csv.reader([line], delimiter=separator), [])]
        found[separator] = header
    best = max(SEPARATORS, key=lambda separator: len({*COLUMNS} & {*found[separator]}))
    return before, best, found[best], lines


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    """Places of the columns by name."""
    missing = [name for name in COLUMNS if name not in header and name != "subject"]
    if missing:
        raise UserError(
            f"{path} lacks the column {', '.join(missing)}: its first line must name image, x, y and may name subject, "
            f"parted by commas, semicolons, tabs or bars; it is {', '.join(header)[:80]!r}"
        )
    twice = [name for name in COLUMNS if header.count(name) > 1]
    if twice:
        raise UserError(f"{path} has the column {twice[0]} twice: leave one out")
    return {name: header.index(name) for name in COLUMNS if name in header}


def _pixels(where: str, name: str, cell: str, separator: str) -> float:
    """A coordinate, NaN where it was lost."""
    if cell.lower() in LOST:
        return math.nan
    try:
        return float(cell if separator == "," else cell.replace(",", "."))
    except ValueError:
        raise UserError(f"{where}: {name} {cell[:40]!r} is not a number: give pixels, or NaN if lost") from None


def _subject_numbers(subjects: set[str]) -> dict[str, int]:
    """A number for each: its own where all are whole numbers, else its place in order; -1 where unknown ('')."""
    known = sorted(subjects - {""})
    own = all(subject.isdecimal() and str(int(subject)) == subject and len(subject) < 19 for subject in known)
    numbers = {subject: int(subject) if own else place for place, subject in enumerate(known)}
    return {"": UNKNOWN_SUBJECT, **numbers}
