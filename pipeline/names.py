"""Names of files that mean one file although they are written differently, and that never mean two."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

from pipeline.paths import utf8_name


def composed(name: str) -> str:
    """One form of letters with accents: some systems store é as e and an accent."""
    return unicodedata.normalize("NFC", name)


def same_case(name: str) -> str:
    """`composed`, without regard to upper and lower case."""
    return composed(composed(name).casefold())


FORMS: tuple[Callable[[str], str], ...] = (str, composed, same_case)  # the nearest first


class Names:
    """Finds places in a list of file names.

    A name means the file that is called so; else that whose name differs by the form of accents or by upper and lower
    case; else, in the same order, that which is called so without its extension. Where two files answer equally well
    it means neither.

    Args:
        stems: whether a name without extension is taken for that of a file.
    """

    def __init__(self, names: Sequence[str], stems: bool = True):
        names = [utf8_name(name) for name in names]
        ways = [names, [PurePosixPath(name).stem for name in names]] if stems else [names]
        self._tables = [(form, _places(map(form, texts))) for texts in ways for form in FORMS]

    def find(self, name: str) -> int | None:
        """The place of the file that is meant; folders before the name, of any system, do not count."""
        name = utf8_name(name).replace("\\", "/").rpartition("/")[2]
        for form, places in self._tables:
            if found := places.get(form(name)):
                return found[0] if len(found) == 1 else None
        return None


def _places(names: Iterable[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return places
