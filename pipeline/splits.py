"""Which images are trained on, and which are held out to measure by."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import numpy as np

from models.errors import UserError
from models.randomness import split_images
from pipeline.paths import read_text
from pipeline.program import printable


def choose_held_out(wanted: int | Path, names: Sequence[str], seed: int) -> list[int]:
    """Sorted rows of the images to hold out.

    Args:
        wanted: how many, drawn from the seed (never more than a tenth), or a text file of names, one a line.
        names: of all images, in order.

    Raises:
        UserError: the file cannot be read as text, or names what is not there.
    """
    if isinstance(wanted, int):
        return split_images(len(names), wanted, seed)[1].tolist()
    try:
        lines = read_text(wanted).splitlines()
    except UnicodeError:
        raise UserError(f"{wanted} is no text file: give names of images to hold out, one a line") from None
    return rows_of([line.strip() for line in lines if line.strip()], names, str(wanted))


def split_for_statistics(wanted: int | Path, names: Sequence[str], seed: int) -> tuple[list[int], np.ndarray]:
    """Sorted rows of the images to hold out, see `choose_held_out`, and of the others.

    Raises:
        UserError: there are no others.
    """
    held = choose_held_out(wanted, names, seed)
    if len(held) == len(names):
        raise UserError(f"--held-out leaves none of the {len(names)} images to train on: hold fewer out")
    return held, np.setdiff1d(np.arange(len(names)), held)


def split_for_training(
    wanted: int | Path | None, exclude: Sequence[str], names: Sequence[str], kept: Sequence[str], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows of the images to train on and of those to measure by.

    Args:
        wanted: as in `choose_held_out`; None: those that were `kept` from the statistics.
        exclude: shell patterns of names that are neither.

    Raises:
        UserError: as `choose_held_out`, `rows_of` and `rows_matching`, or nothing is left to train on.
    """
    held = rows_of(kept, names, "the projection") if wanted is None else choose_held_out(wanted, names, seed)
    if leaked := {names[row] for row in held} - set(kept):
        print(f"note: statistics and PCA were fitted on {len(leaked)} of the {len(held)} held-out images", flush=True)
    left = sorted(set(range(len(names))) - set(held) - set(rows_matching(exclude, names)))
    if not left:
        raise UserError("nothing is left to train on: hold out or --exclude fewer images")
    return np.array(left, int), np.array(held, int)


def rows_of(wanted: Sequence[str], names: Sequence[str], where: str) -> list[int]:
    """Sorted rows of the images that `wanted` names, in full or by the last part of their path.

    Raises:
        UserError: a name is of no image, or of several; `where` says whose name it is.
    """
    whole = {name: [row] for row, name in enumerate(names)}
    last: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        last.setdefault(PurePosixPath(name).name, []).append(row)
    rows = set()
    for name in wanted:
        found = whole.get(name) or last.get(PurePosixPath(name).name, [])
        if len(found) != 1:
            what = "none" if not found else f"{len(found)}"
            raise UserError(f"{where} names {printable(name)!r}, which {what} of the {len(names)} images is called")
        rows.add(found[0])
    return sorted(rows)


def rows_matching(patterns: Sequence[str], names: Sequence[str]) -> list[int]:
    """Rows of the images whose name, or its last part, matches one of some shell patterns.

    Raises:
        UserError: a pattern that no name matches.
    """
    rows: set[int] = set()
    for pattern in patterns:
        found = {
            row
            for row, name in enumerate(names)
            if fnmatchcase(name, pattern) or fnmatchcase(PurePosixPath(name).name, pattern)
        }
        if not found:
            raise UserError(f"no image is called like {pattern!r}, the first is {names[0]!r}: give another --exclude")
        rows |= found
    return sorted(rows)
