"""One way from what a user wrote to a path: for reading, writing, locking and recording."""

import codecs
import os
import stat
from pathlib import Path

from models.errors import UserError

IS_FOLDER, IS_EMPTY = "is a folder", "is empty"
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # marks at the start of UTF-16


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


def utf8_name(name: str) -> str:
    """A file's name as UTF-8 tells it, whatever letters the locale takes its bytes for."""
    try:
        return os.fsencode(name).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # letters that the locale has not, so it was not read from a folder
        return name


def native_name(name: str) -> str:
    """The other way: what the locale takes the bytes of `utf8_name` for."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def real(path: Path) -> Path:
    """The one absolute path of a place, however it was spelled: without links, `.` and `..`; it need not exist yet."""
    return Path(os.path.realpath(path))


def beside(path: Path, prefix: str, suffix: str) -> Path:
    """A hidden companion of a place, in the folder that holds it; the top folder holds its own."""
    place = real(path)
    return place.parent / f"{prefix}{place.name}{suffix}"


def problem_of(path: Path) -> str:
    """Why a path is no file with contents, as far as that is known without opening it; empty where it may be one."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read: {(getattr(error, 'strerror', None) or str(error)).lower()}"
    if stat.S_ISDIR(status.st_mode):
        return IS_FOLDER
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    return "" if status.st_size else IS_EMPTY


def read_text(path: Path, errors: str = "strict") -> str:
    """What a user's text file says: UTF-8, or UTF-16 with a mark at its start; a mark is no part of it.

    Raises:
        OSError, or UnicodeError as `errors` says.
    """
    content = path.read_bytes()
    if content.startswith(WIDE):
        return content.decode("utf-16", "strict" if errors == "strict" else "replace")
    return content.decode("utf-8-sig", errors)
