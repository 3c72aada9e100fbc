"""Where training images come from: tars, folders, list files, sample photos that packages carry.

A source is a sorted list of `Entry`, each of which opens as bytes. Nothing is ever unpacked to disk: an image
inside a tar, or inside a tar in a tar, is a range of bytes of the outer file.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np

from models.errors import UserError
from models.randomness import seed_for
from pipeline.images import read_rgb
from pipeline.presets import SAMPLES

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
MOST_CROPS = 1_000_000
SMALLEST_CROP = 0.35  # of a photo's shorter side
EXPECTED = (
    "give a folder of images (flat, or one folder per class), an uncompressed tar of them "
    "(ILSVRC2012_img_val.tar), a tar of such tars (ILSVRC2012_img_train.tar), or a text file of paths, one a line"
)


@dataclass(frozen=True)
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


def list_images(source: str, num_images: int | None, seed: int) -> list[Entry] | list[Crop]:
    """All images of a source sorted by name, or a reproducible subset of `num_images`, still sorted.

    Where there are fewer, all are taken.

    Args:
        source: path of a folder, tar or list file, or `samples`.

    Raises:
        UserError: nothing there, not readable, no images.
    """
    if source == SAMPLES:
        return _sample_crops(num_images or 256, seed)
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source} does not exist: {EXPECTED}")
    try:
        if path.is_dir():
            entries = list(_folder_entries(path))
        elif _is_tar(path):
            entries = list(_tar_entries(path))
        else:
            entries = list(_list_entries(path))
    except PermissionError as error:
        raise UserError(f"{error.filename or source} cannot be read: permission denied") from None
    if not entries:
        raise UserError(f"{source} holds no files: {EXPECTED}")
    entries = _mark_duplicates(sorted(entries, key=lambda e: (e.name, e.offset)))
    if num_images is not None and num_images < len(entries):
        chosen = np.random.default_rng(seed_for(seed, "subset")).choice(len(entries), num_images, replace=False)
        entries = [entries[i] for i in sorted(chosen)]
    return entries


def _mark_duplicates(entries: list[Entry]) -> list[Entry]:
    """Of members of one tar with the same name the last counts, as for tar itself."""
    marked = []
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        again = following is not None and following.name == entry.name and following.path == entry.path
        marked.append(Entry(entry.name, entry.path, problem="is overwritten by a later member") if again else entry)
    return marked


def _printable(name: str) -> str:
    """A file name that can be written as UTF-8, whatever bytes it has."""
    return name.encode("utf-8", "backslashreplace").decode()


def _folder_entries(folder: Path) -> Iterator[Entry]:
    """Regular files below a folder, hidden ones aside; links to folders are followed once."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        identity = os.path.realpath(parent)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            path = Path(parent) / name
            if not name.startswith("."):
                label = _printable(path.relative_to(folder).as_posix())
                yield Entry(label, path, problem="" if path.is_file() else "is not a regular file")


def _raise(error: OSError) -> None:
    raise error


def _list_entries(path: Path) -> Iterator[Entry]:
    """Paths of a text file, one a line, relative to the file's own folder."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, MemoryError):
        raise UserError(f"{path} is neither a tar nor a text file: {EXPECTED}") from None
    for line in lines:
        if line.strip() and not line.startswith("#"):
            file = path.parent / line.strip()
            yield Entry(line.strip(), file, problem="" if file.is_file() else "does not exist")


def _is_tar(path: Path) -> bool:
    """Whether a file starts like a tar; a compressed one is refused, since it could only be read by unpacking."""
    with path.open("rb") as file:
        head = file.read(512)
    if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head[:6] == b"\xfd7zXZ\x00":
        raise UserError(f"{path} is compressed: uncompress it first, images inside gain nothing from it")
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _tar_entries(path: Path) -> Iterator[Entry]:
    with path.open("rb") as file:
        size = path.stat().st_size
        yield from _tar_members(file, path, prefix="", start=0, size=size, depth=0)


def _tar_members(file: BinaryIO, path: Path, prefix: str, start: int, size: int, depth: int) -> Iterator[Entry]:
    """Members of a tar that is the bytes `start … start + size` of `file`, tars right inside it included."""
    window = _Window(file, start, size)
    try:
        with tarfile.open(fileobj=window, mode="r:", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile remembers every member; a million of them is a lot
                name = prefix + _printable(member.name)
                offset = start + member.offset_data
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    yield Entry(name, path, problem="is a link, device or sparse file")
                elif member.offset_data + member.size > size:
                    yield Entry(name, path, problem="is cut off: the tar is truncated")
                elif member.name.endswith(".tar") and depth == 0:
                    yield from _tar_members(file, path, f"{name}/", offset, member.size, depth + 1)
                else:
                    yield Entry(name, path, offset, member.size)
    except tarfile.TarError as error:
        yield Entry(f"{prefix or path.name}", path, problem=f"is a damaged tar ({error}); members after it are lost")


class _Window(io.RawIOBase):
    """A read-only view of a range of bytes of a file."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence])
        return self.position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        count = left if count is None or count < 0 else min(count, left)
        self.file.seek(self.start + self.position)
        data = self.file.read(count)
        self.position += len(data)
        return data


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
        exists = entry.path.is_file()
        size = entry.size if entry.size >= 0 else (entry.path.stat().st_size if exists else -1)
        digest.update(f"{entry.name}\n{entry.offset}\n{size}\n{entry.problem}\n".encode())
    return digest.hexdigest()
