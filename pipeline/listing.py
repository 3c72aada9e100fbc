"""Which files count as images: one listing for all stages and for the evaluation."""

from collections.abc import Iterator
from pathlib import Path

from pipeline import decoding, ownership
from pipeline.paths import IS_FOLDER, problem_of

NO_IMAGE = "is no image, by its name and its first bytes"
HEAD = 32  # bytes that tell a format


def walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files below a folder in order, each with what speaks against it ('' for an image, as far as its start shows).

    Hidden files are left out, and what this program wrote, unless there is nothing else. Links to folders are
    followed, each folder is read once.

    Raises:
        OSError: the folder itself cannot be read.
    """
    found = list(_below(folder, ours_too=False))
    if not any(not problem for _, problem in found):
        found = list(_below(folder, ours_too=True)) or found
    yield from sorted(found)


def images_below(folder: Path) -> list[Path]:
    """The images of `walk`, and what looks like one by its name but cannot be: opening it will say why."""
    return [path for path, problem in walk(folder) if not problem or has_extension(path.name)]


def has_extension(name: str) -> bool:
    """Whether a name ends like that of an image."""
    return Path(name).suffix.lower() in decoding.extensions()


def _below(folder: Path, ours_too: bool) -> Iterator[tuple[Path, str]]:
    seen, waiting = set(), [folder]
    while waiting:
        parent = waiting.pop()
        try:
            status = parent.stat()
            inside = [] if (status.st_dev, status.st_ino) in seen else list(parent.iterdir())
        except OSError as error:
            if parent == folder:
                raise
            yield parent, f"cannot be read: {str(error.strerror).lower()}"
            continue
        seen.add((status.st_dev, status.st_ino))
        ours = frozenset() if ours_too else ownership.written(parent)
        for path in inside:
            if path.name.startswith(".") or ownership.is_written(path.name, ours):
                continue
            if (problem := problem_of(path)) == IS_FOLDER:
                waiting.append(path)
            else:
                yield path, problem or ("" if _is_image(path) else NO_IMAGE)


def _is_image(path: Path) -> bool:
    if has_extension(path.name):
        return True
    try:
        with path.open("rb") as file:
            return decoding.starts_like_image(file.read(HEAD))
    except OSError:
        return False
