"""One way from what a user wrote to a path: for reading, writing, locking and recording."""

import os
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """The path that a user means, with the home folder in place of a leading `~`, also where no shell put it there.

    Raises:
        ValueError: nobody is called so, or there is no home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def real(path: Path) -> Path:
    """The one absolute path of a place, however it was spelled: without links, `.` and `..`; it need not exist yet."""
    return Path(os.path.realpath(path))


def beside(path: Path, prefix: str, suffix: str) -> Path:
    """A hidden companion of a place, in the folder that holds it; the top folder holds its own."""
    place = real(path)
    return place.parent / f"{prefix}{place.name}{suffix}"
