"""Public data sets of human fixations: downloaded, verified, unpacked into the cache.

| name | images | what is fetched |
|---|---|---|
| osie | 700 of 800×600, 15 people | every image and `fixations.mat` from its authors' repository, at a fixed commit |
| toronto | 120 of 681×511, 20 people | `eyetrackingdata.zip` |
| mit1003 | 1003 of up to 1024 pixels, 15 people | `ALLSTIMULI.zip` and `DATA.zip` |

An archive that was got elsewhere serves too: put it under its own name into the data set's folder of the cache.
"""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from evaluation.fixations import Fixations, read_fixations
from models.errors import UserError
from models.weights.downloads import RemoteFile, cache_folder, fetch
from pipeline import artefacts
from pipeline.progress import Progress

MEMBER_LIMIT = 64 << 20  # bytes that one file of an archive may unpack to
OPTION = "--stimuli DIR --fixations"
_OSIE = (
    "https://raw.githubusercontent.com/NUS-VIP/predicting-human-gaze-beyond-pixels/"
    "63223a0dba3b521861cb7f356ad13400ef4b3d03/data/"
)
_MIT = "people.csail.mit.edu/tjudd/WherePeopleLook/"
_RESEARCH = "for research"
_TORONTO = "www-sop.inria.fr/members/Neil.Bruce/eyetrackingdata.zip"


def _either(address: str) -> tuple[str, str]:
    """The address by https, and by http, which older hosts speak alone; the hash tells what came."""
    return "https://" + address, "http://" + address


@dataclass(frozen=True)
class Dataset:
    """What to fetch, how to unpack it and how to read it.

    files are downloaded under their names, `/` being a folder; unpack gives the place of a member of an archive in
    the data set's folder, or None to leave it; images are the stimuli, as a pattern in that folder, count of them;
    read gets the file or folder called fixations, and the stimuli's sizes by name.
    """

    files: tuple[RemoteFile, ...]
    unpack: Callable[[PurePosixPath], str | None]
    images: str
    count: int
    fixations: str
    read: Callable[[Path, Mapping[str, tuple[int, int]]], Fixations] = read_fixations


def _toronto_member(member: PurePosixPath) -> str | None:
    if member.name == "origfixdata.mat":
        return member.name
    return f"stimuli/{member.name}" if member.parent.name == "Original Image Set" and member.suffix == ".jpg" else None


def _mit1003_member(member: PurePosixPath) -> str | None:
    if member.suffix == ".jpeg":
        return f"stimuli/{member.name}"
    return f"DATA/{member.parent.name}/{member.name}" if member.suffix == ".mat" else None


DATASETS: dict[str, Dataset] = {
    "osie": Dataset(
        (
            RemoteFile("fixations.mat", (_OSIE + "eye/fixations.mat",), "MIT", md5="8efdf6fe66f38b6e70f854c7ff45aa70"),
            # no source states hashes of the images: the commit in the address fixes them
            *(RemoteFile(f"stimuli/{n}.jpg", (f"{_OSIE}stimuli/{n}.jpg",), "MIT") for n in range(1001, 1701)),
        ),
        lambda member: None,
        images="stimuli/*.jpg",
        count=700,
        fixations="fixations.mat",
    ),
    "toronto": Dataset(
        (RemoteFile("eyetrackingdata.zip", _either(_TORONTO), _RESEARCH, md5="38d5c02217060d4d2d1a4649cc632af1"),),
        _toronto_member,
        images="stimuli/*.jpg",
        count=120,
        fixations="origfixdata.mat",
    ),
    "mit1003": Dataset(
        (
            RemoteFile(
                "ALLSTIMULI.zip", _either(_MIT + "ALLSTIMULI.zip"), _RESEARCH, md5="0d7df8b954ecba69b6796e77b9afe4b6"
            ),
            RemoteFile("DATA.zip", _either(_MIT + "DATA.zip"), _RESEARCH, md5="ea19d74ad0a0144428c53e9d75c2d71c"),
        ),
        _mit1003_member,
        images="stimuli/*.jpeg",
        count=1003,
        fixations="DATA",
    ),
}


def obtain(name: str, cache: Path | None = None, **options: Any) -> tuple[list[Path], Path]:
    """Image files, in the order of their names, and fixations of a data set, downloaded and unpacked if need be.

    Whatever an interrupted run brought is kept. `options` go to `models.weights.downloads.fetch`.

    Raises:
        UserError: no host gave a file, an archive is damaged, or another number of images came out of it.
    """
    dataset, folder = DATASETS[name], (cache or cache_folder()) / name
    files, archives = dataset.files, []
    with Progress(len(files), name, "files") as progress:
        for remote in files:
            path = _fetch(remote, folder, options)
            archives += [path] if path.suffix == ".zip" else []
            progress.update()
    for archive in archives:
        _unpack(archive, folder, dataset.unpack)
    images = sorted(folder.glob(dataset.images), key=_place_in_order)
    if len(images) != dataset.count:
        raise UserError(
            f"{folder} has {len(images)} images of {name} instead of {dataset.count}: remove that folder and run again"
        )
    return images, folder / dataset.fixations


def _place_in_order(image: Path) -> tuple[int, str]:
    """Sorts numbers by value, other names by letters."""
    return (int(image.stem) if image.stem.isdecimal() else 0, image.name)


def _fetch(remote: RemoteFile, folder: Path, options: dict[str, Any]) -> Path:
    """One file, with a bar of its own if it is an archive."""
    place = folder / remote.name
    local = replace(remote, name=place.name)
    if place.suffix != ".zip":
        return fetch(local, place.parent, option=OPTION, **options)
    with Progress(None, remote.name, "B") as progress:
        return fetch(local, place.parent, progress=progress.download, option=OPTION, **options)


def _unpack(archive: Path, folder: Path, place: Callable[[PurePosixPath], str | None]) -> None:
    """Write the members that `place` wants; those that stand already, of the right size, are kept.

    Raises:
        UserError: damaged, or a member too large.
    """
    try:
        with zipfile.ZipFile(archive) as opened, Progress(None, archive.name, "files") as progress:
            for member in opened.infolist():
                progress.update()
                inside = PurePosixPath(member.filename)
                skipped = member.is_dir() or inside.name.startswith(".") or {"__MACOSX", ".svn", ".."} & {*inside.parts}
                wanted = None if skipped else place(inside)
                if wanted is None:
                    continue
                if member.file_size > MEMBER_LIMIT:
                    raise UserError(f"{archive}: {member.filename} is too large: give the data set's own archive")
                target = folder / wanted
                if not (target.is_file() and target.stat().st_size == member.file_size):
                    with artefacts.atomic_path(target) as temporary:
                        temporary.write_bytes(opened.read(member))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{archive} is damaged ({error}): remove it and run again") from None
