"""One way from what a user wrote to a path: for reading, writing, locking and recording."""

import os
from pathlib import Path

from models.errors import UserError


def user_path(text: str | Path) -> Path:
    """The path that a user means, with the home folder in place of a leading `~`, also where no shell put it there.

    Raises:
        UserError: an empty text, or nobody is called so, or there is no home folder.
    """
    if not str(text).strip():
        raise UserError("an empty path leads nowhere")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{str(text)[:80]!r} cannot be used: {error}") from None


def real(path: Path) -> Path:
    """The one absolute path of a place, however it was spelled: without links, `.` and `..`; it need not exist yet."""
    return Path(os.path.realpath(path))


def beside(path: Path, prefix: str, suffix: str) -> Path:
    """A hidden companion of a place, in the folder that holds it; the top folder holds its own."""
    place = real(path)
    return place.parent / f"{prefix}{place.name}{suffix}"
