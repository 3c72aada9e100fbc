"""Where training images come from: tars, folders, list files, sample photos that packages carry.

A source is a sorted list of `Entry`, each of which opens as bytes. Nothing is ever unpacked to disk: an image
inside a tar, or inside a tar in a tar, is a range of bytes of the outer file.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np

from models.errors import UserError
from models.randomness import seed_for
from models.weights.contents import other_kind_of
from pipeline import decoding, listing, ownership, tars
from pipeline.images import MOST_BYTES, check_bytes, read_rgb
from pipeline.paths import WIDE, native_name, problem_of, read_text, user_path
from pipeline.presets import SAMPLES
from pipeline.program import printable

SAMPLE_PHOTOS = {  # package -> files inside it
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": tuple(
        f"data/{name}"
        for name in (
            "astronaut.png",
            "chelsea.png",
            "coffee.png",
            "rocket.jpg",
            "camera.png",
            "motorcycle_left.png",
        )
    ),
}
ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"Rar!", b"7z\xbc\xaf")
COMPRESSED = (b"\x1f\x8b", b"\x1f\x9d", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
MOST_CROPS = 1_000_000
SAMPLE_CROPS = 256  # where no number is given
SMALLEST_CROP = 0.35  # of a photo's shorter side
EXPECTED = (
    "give a folder of images (flat, or one folder per class), an uncompressed tar of them "
    "(ILSVRC2012_img_val.tar), a tar of such tars (ILSVRC2012_img_train.tar), or a text file of paths, one a line"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One image: a name, and the bytes `offset … offset + size` of a file; size -1 means to its end.

    `problem` is set where it is known without reading that this is no image.
    """

    name: str
    path: Path
    offset: int = 0
    size: int = -1
    problem: str = ""

    def read(self) -> np.ndarray:
        """Decode to (H, W, 3) uint8; a UserError says why not."""
        if self.problem:
            raise UserError(f"{self.name} {self.problem}")
        if self.size < 0:
            return read_rgb(self.path, self.name)
        check_bytes(self.size, self.name)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return read_rgb(io.BytesIO(file.read(self.size)), self.name)


@dataclass(frozen=True)
class Crop:
    """A square crop of a sample photo, positions drawn from a seed."""

    name: str
    path: Path
    seed: int
    number: int

    def read(self) -> np.ndarray:
        """Decode and crop to (S, S, 3) uint8."""
        rgb = read_rgb(self.path)
        height, width = rgb.shape[:2]
        generator = np.random.default_rng(seed_for(self.seed, "crop", self.number))
        side = round(min(height, width) * generator.uniform(SMALLEST_CROP, 1))
        top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
        return rgb[top : top + side, left : left + side]


def list_images(source: str | Sequence[str], num_images: int | None, seed: int) -> list[Entry] | list[Crop]:
    """All images of one or more sources sorted by name, or a reproducible subset of `num_images`, still sorted.

    Where there are fewer, all are taken. Of several sources, names begin with the source's, see `source_labels`.

    Args:
        source: path of a folder, tar or list file, or `samples`; or some of these.

    Raises:
        UserError: nothing there, not readable, no images.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if sources == [SAMPLES]:
        return _sample_crops(num_images or SAMPLE_CROPS, seed)
    if len(sources) == 1:
        entries = _entries_of(sources[0])
    else:
        entries = [
            replace(entry, name=f"{label}/{entry.name}")
            for label, place in source_labels(sources).items()
            for entry in (_sample_crops(SAMPLE_CROPS, seed) if place == SAMPLES else _entries_of(place))
        ]
    good = [i for i, entry in enumerate(entries) if not getattr(entry, "problem", "")]
    if num_images is not None and num_images < len(good):
        chosen = np.random.default_rng(seed_for(seed, "subset")).choice(len(good), num_images, replace=False)
        left_out = set(good) - {good[i] for i in chosen}
        entries = [entry for i, entry in enumerate(entries) if i not in left_out]
    return entries


def source_labels(sources: Sequence[str]) -> dict[str, str]:
    """Sources by a short name: the file's or folder's without extension, with a number where two have the same."""
    labels: dict[str, str] = {}
    for source in sources:
        stem = printable(Path(source).resolve().stem)
        number = sum(label == stem or label.startswith(f"{stem}-") for label in labels)
        labels[f"{stem}-{number + 1}" if number else stem] = source
    return dict(sorted(labels.items()))


def count_by_source(source: str | Sequence[str], entries: Sequence["Entry | Crop"]) -> dict[str, int]:
    """How many of the entries that `list_images` gave are of each source, by its name."""
    sources = [source] if isinstance(source, str) else list(source)
    if len(sources) == 1:
        return {Path(sources[0]).name: len(entries)}
    counts = dict.fromkeys(source_labels(sources), 0)
    for entry in entries:
        counts[entry.name.partition("/")[0]] += 1
    return counts


def _entries_of(source: str) -> list[Entry]:
    """All images of one folder, tar or list file, sorted by name."""
    path = user_path(source)
    ownership.reading(path)
    if not path.exists():
        raise UserError(f"{source} does not exist: {EXPECTED}")
    try:
        if path.is_dir():
            entries = list(_folder_entries(path))
        elif not path.is_file():  # a pipe would be waited for
            raise UserError(f"{source} is no regular file: {EXPECTED}")
        elif _is_tar(path):
            entries = list(_tar_entries(path))
        else:
            entries = list(_list_entries(path))
    except PermissionError as error:
        raise UserError(f"{error.filename or source} cannot be read: permission denied") from None
    if not entries:
        raise UserError(f"{source} holds no files: {EXPECTED}")
    ownership.reading(*{entry.path for entry in entries})
    entries.sort(key=lambda e: (e.name, e.offset))
    _mark_duplicates(entries)
    return entries


def _mark_duplicates(entries: list[Entry]) -> None:
    """Of sorted entries of one name and file the last counts, as for tar itself."""
    for i, (entry, following) in enumerate(zip(entries, entries[1:], strict=False)):
        if (entry.name, entry.path) == (following.name, following.path):
            twice = "is overwritten by a later member" if entry.size >= 0 or entry.problem else "is listed twice"
            entries[i] = Entry(entry.name, entry.path, entry.offset, problem=twice)


def _folder_entries(folder: Path) -> Iterator[Entry]:
    """What `listing.walk` finds below a folder."""
    for path, problem in listing.walk(folder):
        yield Entry(_label(path, folder), path, problem=problem)


def _label(path: Path, folder: Path) -> str:
    return printable(path.relative_to(folder).as_posix())


def _list_entries(path: Path) -> Iterator[Entry]:
    """Paths of a text file, one a line, relative to the file's own folder; also lines of Caffe's lists.

    Raises:
        UserError: the file is neither a list nor anything else that is read.
    """
    lines = read_text(path, "surrogateescape").splitlines()
    found = [_line_entry(path.parent, line.strip()) for line in lines if line.strip() and not line.lstrip()[0] == "#"]
    if found and all(entry.problem for entry in found):
        odd = any("\udc80" <= c <= "\udcff" for line in lines for c in line)
        if kind := other_kind_of(path) or ("neither a tar nor a text file" if odd else None):
            raise UserError(f"{path} is {kind}: {EXPECTED}")
    yield from found


def _line_entry(folder: Path, line: str) -> Entry:
    """The image that a line means: as it stands, or without quotes, a comment, Caffe's label, or other slashes."""
    meant = [line]
    for change in (
        lambda text: re.sub(r"\s+#.*$", "", text),
        lambda text: re.sub(r"([\s,;]+-?\d+(\.\d+)?)+$", "", text),
        lambda text: text[1:-1] if text[:1] in "\"'" and text[:1] == text[-1:] and len(text) > 1 else text,
        lambda text: text.replace("\\", "/"),
        os.path.expanduser,
    ):
        meant += [changed for text in meant if (changed := change(text).strip()) and changed not in meant]
    files = {text: folder / native_name(text) for text in meant}
    there = next((text for text, file in files.items() if not problem_of(file)), line)
    return Entry(printable(there), files[there], problem=problem_of(files[there]))


def _is_tar(path: Path) -> bool:
    """Whether a file starts like a tar; a compressed one is refused, since it could only be read by unpacking."""
    with path.open("rb") as file:
        head = file.read(tars.BLOCK)
    if head.startswith(ARCHIVES):
        raise UserError(f"{path} is an archive (zip, rar or 7z): unpack it and give the folder")
    if decoding.starts_like_image(head):
        raise UserError(f"{path} is a single image: {EXPECTED}")
    if head.startswith(COMPRESSED):
        raise UserError(f"{path} is compressed: uncompress it first, images inside gain nothing from it")
    if tars.is_tar(head):
        return True
    binary = b"\0" in head and not head.startswith(WIDE)
    if binary or path.stat().st_size > MOST_BYTES:  # before all of it is read as text
        raise UserError(f"{path} is neither a tar nor a text file: {EXPECTED}")
    return False


def _tar_entries(path: Path) -> Iterator[Entry]:
    with path.open("rb") as file:
        yield from _tar_members(file, path, prefix="", start=0, size=path.stat().st_size)


def _tar_members(file: BinaryIO, path: Path, prefix: str, start: int, size: int) -> Iterator[Entry]:
    """Members of a tar that is the bytes `start … start + size` of `file`, tars right inside it included."""
    try:
        for member in tars.members(file, start, size):
            name = prefix + printable(member.name)
            if not member.regular:
                yield Entry(name, path, member.offset, problem="is a link, device or sparse file")
            elif member.offset + member.size > start + size:
                yield Entry(name, path, member.offset, problem="is cut off: the tar is truncated")
            elif not member.size:
                yield Entry(name, path, member.offset, problem="is empty")
            elif member.name.endswith(".tar") and not prefix:
                yield from _tar_members(file, path, f"{name}/", member.offset, member.size)
            elif not listing.has_extension(name) and not _starts_like_image(file, member.offset):
                yield Entry(name, path, member.offset, member.size, problem=listing.NO_IMAGE)
            else:
                yield Entry(name, path, member.offset, member.size)
    except tars.TarError as error:
        where = prefix.rstrip("/") or printable(path.name)
        yield Entry(where, path, start + size, problem=f"is a damaged tar ({error}): members after that are lost")


def _starts_like_image(file: BinaryIO, offset: int) -> bool:
    file.seek(offset)
    return decoding.starts_like_image(file.read(listing.HEAD))


def sample_photos() -> list[Path]:
    """The photos that scikit-learn and scikit-image carry, as files."""
    photos = []
    for package, names in SAMPLE_PHOTOS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"the sample photos need the package {package}: pip install -r requirements.txt")
        photos += [path for name in names if (path := Path(spec.origin).parent / name).is_file()]
    if not photos:
        raise UserError("the installed scikit-learn and scikit-image carry no sample photos: give --source PATH")
    return photos


def _sample_crops(count: int, seed: int) -> list[Crop]:
    if count > MOST_CROPS:
        raise UserError(f"{count} crops are too many of a few sample photos: give --num-images {MOST_CROPS} at most")
    photos = sample_photos()
    crops = [Crop(f"{photos[i % len(photos)].stem}-{i:05d}", photos[i % len(photos)], seed, i) for i in range(count)]
    return sorted(crops, key=lambda crop: crop.name)


def fingerprint(entries: list[Entry] | list[Crop]) -> str:
    """sha256 over names, positions and sizes of all entries: notices another source without reading the images."""
    digest = hashlib.sha256()
    for entry in entries:
        if isinstance(entry, Crop):
            digest.update(f"{entry.name}\n{entry.seed}\n".encode())
            continue
        size = entry.size if entry.size >= 0 or entry.problem else entry.path.stat().st_size
        digest.update(f"{entry.name}\n{entry.offset}\n{size}\n{entry.problem}\n".encode())
    return digest.hexdigest()
