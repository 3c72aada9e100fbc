"""Human fixations and saliency maps from files, checked against the images that were looked at.

Formats: CSV; `fixations.mat` of OSIE (Xu et al. 2014); `origfixdata.mat` of Toronto (Bruce & Tsotsos 2005). The data
set MIT1003 publishes raw gaze samples, from which its authors' Matlab code finds the fixations: convert it to CSV.

Coordinates are pixels from the top left corner, as the data sets give them; (x, y) lies on the pixel in row floor(y),
column floor(x). Fixations outside their image are dropped and counted. No file is unpickled, and what a file may make
this module allocate is bounded.
"""

import csv
import os
import struct
import warnings
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.errors import UserError

CSV_COLUMNS = ("image", "subject", "x", "y")
CSV_LIMIT = 1 << 28  # bytes; the largest public data sets have a tenth
UNKNOWN_SUBJECT = -1
ORIENTATION_TAG, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF; these orientations exchange height and width

MAT_LIMIT = 1 << 29  # bytes of one variable, unpacked
MAT_ARRAYS = 1 << 20  # arrays nested in one variable
MAT_DEPTH = 12
MAT_MATRIX, MAT_COMPRESSED = 14, 15  # data types that are not plain numbers
MAT_CELL, MAT_STRUCT, MAT_CHAR, MAT_NUMERIC, MAT_COMPLEX = 1, 2, 4, range(6, 16), 0x0800  # classes, a flag
MAT_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MAT_TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
DAMAGED = (ValueError, struct.error, zlib.error, IndexError, KeyError, OverflowError, MemoryError)

Stimuli = dict[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Fixations:
    """Fixations of several people on several images, sorted by image.

    Args:
        names: file names of all images, sorted, those without fixations included.
        sizes: height and width of each, (N, 2) int64.
        image_index: which image, (M,) int64, ascending.
        x, y: pixels, (M,) float64, inside the image.
        subject: a number for each person, (M,) int64; -1 where unknown.
        dropped: how many further fixations lay outside their image.
        ignored: how many further fixations were on images that are not there.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    image_index: np.ndarray
    x: np.ndarray
    y: np.ndarray
    subject: np.ndarray
    dropped: int = 0
    ignored: int = 0

    def of(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y and subject of the fixations on one image, in the file's order; empty where it has none."""
        start, end = np.searchsorted(self.image_index, [index, index + 1])
        return self.x[start:end], self.y[start:end], self.subject[start:end]

    def others(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """x and y of the fixations on all other images, scaled to this image's size; repeats are kept."""
        start, end = np.searchsorted(self.image_index, [index, index + 1])
        keep = np.r_[0:start, end : len(self.image_index)]
        size = self.sizes[index]
        scaled = []
        for side, values in ((1, self.x), (0, self.y)):
            factor = size[side] / self.sizes[self.image_index[keep], side]
            scaled.append(np.minimum(values[keep] * factor, np.nextafter(size[side], 0)))  # rounding may reach the edge
        return scaled[0], scaled[1]


def list_stimuli(folder: Path) -> Stimuli:
    """Height and width of all images below a folder, by path relative to it, sorted; only headers are read.

    Sizes are those of the image as `pipeline.images.read_rgb` gives it: turned as its EXIF orientation says.

    Raises:
        UserError: no folder, no images, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of the images that people looked at")
    extensions = Image.registered_extensions()
    paths = [Path(parent) / name for parent, _, files in os.walk(folder) for name in files]
    names = {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if path.suffix.lower() in extensions and not path.name.startswith(".")
    }
    if not names:
        raise UserError(f"{folder} holds no images: give the folder of the images that people looked at")
    return {name: _image_size(names[name]) for name in sorted(names)}


def _image_size(path: Path) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                turned = image.getexif().get(ORIENTATION_TAG) in TURNED
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise UserError(f"{path} cannot be read as an image ({type(error).__name__}): mend or remove it") from None
    return (width, height) if turned else (height, width)


def read_fixations(path: Path, stimuli: Stimuli, *, ignore_unknown: bool = False) -> Fixations:
    """Fixations of a .csv, or of a .mat of OSIE (variable `fixations`) or Toronto (`white`).

    Args:
        stimuli: what `list_stimuli` gives.
        ignore_unknown: count fixations on images that are not among the stimuli instead of refusing them.

    Raises:
        UserError: as `read_csv`, `read_osie` and `read_toronto`; none of these formats.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return read_csv(path, stimuli, ignore_unknown=ignore_unknown)
    if path.suffix.lower() != ".mat":
        raise UserError(f"{path} is neither .csv nor .mat: give a CSV with the columns {', '.join(CSV_COLUMNS)}")
    found = {name for name, _ in _mat_variables(path)}
    for variable, read in (("fixations", read_osie), ("white", read_toronto)):
        if variable in found:
            return read(path, stimuli, ignore_unknown=ignore_unknown)
    raise UserError(f"{path} has no variable 'fixations' (OSIE) or 'white' (Toronto): convert it to CSV")


def read_csv(path: Path, stimuli: Stimuli, *, ignore_unknown: bool = False) -> Fixations:
    """Fixations of a comma-separated file in UTF-8 with a header line.

    The columns image, subject, x, y are read in any order, others (duration_ms) are passed over. `image` is a path
    relative to the folder of stimuli; `subject` is any label, empty or -1 where unknown; x and y are finite numbers.

    Raises:
        UserError: not readable as such, with the line; an image not among the stimuli; no fixation inside an image.
    """
    path = Path(path)
    _check_file(path, CSV_LIMIT)
    points = _Points(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, (image, subject, x, y) in _csv_rows(path, file):
                points.add(image, subject.strip(), _number(path, line, "x", x), _number(path, line, "y", y))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error}): export it as one") from None
    return points.finish(stimuli, ignore_unknown)


def _csv_rows(path: Path, file: Any) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and the four fields of CSV_COLUMNS."""
    reader = csv.reader(file, strict=True)
    header = [name.strip() for name in next(reader, [])]
    for column in CSV_COLUMNS:
        if header.count(column) != 1:
            what = "no" if column not in header else "more than one"
            raise UserError(
                f"{path} has {what} column {column!r} in its first line: "
                f"give a comma-separated file with the columns {', '.join(CSV_COLUMNS)}"
            )
    places = [header.index(column) for column in CSV_COLUMNS]
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise UserError(f"{path} line {reader.line_num} has {len(row)} fields, its header {len(header)}: mend it")
        yield reader.line_num, [row[place] for place in places]


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value) or "_" in text:  # Python reads 1_0 as 10
        raise UserError(f"{path} line {line}: {column} is {text[:40]!r}, not a finite number: mend or remove the line")
    return value


def read_osie(path: Path, stimuli: Stimuli, *, ignore_unknown: bool = False) -> Fixations:
    """Fixations of OSIE's `fixations.mat`: a cell per image with `img` and a cell `subjects` of fix_x, fix_y.

    Subjects are numbered by their place in the cell.

    Raises:
        UserError: not such a file; an image not among the stimuli; no fixation inside an image.
    """
    path = Path(path)
    points = _Points(path)
    try:
        for image in _mat_variable(path, "fixations"):
            (image,) = image
            for number, (person,) in enumerate(image["subjects"]):
                x, y = np.ravel(person["fix_x"]), np.ravel(person["fix_y"])
                if not isinstance(image["img"], str) or x.shape != y.shape or not np.isfinite([x, y]).all():
                    raise ValueError(f"image {len(points.images)}, subject {number}: no name, or no finite x and y")
                for one in zip(x.tolist(), y.tolist(), strict=True):
                    points.add(image["img"], str(number), *one)
    except (*DAMAGED, TypeError) as error:
        raise UserError(f"{path} is not OSIE's fixations.mat ({_brief(error)}): download it again") from None
    return points.finish(stimuli, ignore_unknown)


def read_toronto(path: Path, stimuli: Stimuli, *, ignore_unknown: bool = False) -> Fixations:
    """Fixations of Toronto's `origfixdata.mat`: in the cell `white` a binary map for each of 1.jpg, 2.jpg, …

    Who looked is not known, and two fixations on one pixel are one.

    Raises:
        UserError: not such a file; a map not of its image's size; an image not among the stimuli.
    """
    path = Path(path)
    points = _Points(path)
    try:
        for number, fixated in enumerate(_mat_variable(path, "white"), 1):
            name = f"{number}.jpg"
            if not isinstance(fixated, np.ndarray) or fixated.ndim != 2 or not np.isfinite(fixated).all():
                raise ValueError(f"map {number} is no map")
            if name in stimuli and fixated.shape != stimuli[name]:
                raise UserError(f"{path}: map {number} is {fixated.shape}, {name} {stimuli[name]}: use Toronto's images")
            for row, column in zip(*np.nonzero(fixated), strict=True):
                points.add(name, "", float(column), float(row))
    except (*DAMAGED, TypeError) as error:
        raise UserError(f"{path} is not Toronto's origfixdata.mat ({_brief(error)}): download it again") from None
    return points.finish(stimuli, ignore_unknown)


def read_map(path: Path, height: int, width: int) -> np.ndarray:
    """A saliency map (height, width) for an image of that size: `.npy` of real numbers, or a grey image file.

    Raises:
        UserError: not readable, another size (nothing is resized), in colour, or with values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give one map per image")
    saliency = _read_npy(path) if path.suffix.lower() == ".npy" else _read_grey(path)
    if saliency.shape != (height, width):
        raise UserError(f"{path} is {saliency.shape}, its image ({height}, {width}): make maps of the image's size")
    saliency = np.array(saliency)
    if not np.isfinite(saliency).all():
        raise UserError(f"{path} has values that are not finite: mend the map")
    return saliency


def _read_npy(path: Path) -> np.ndarray:
    """A memory map, so that only the header is read before the shape is known to be right."""
    try:
        saliency = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an array ({_brief(error)}): write it with numpy.save") from None
    if not isinstance(saliency, np.ndarray) or saliency.dtype.kind not in "biuf":
        raise UserError(f"{path} holds no real numbers: write the map with numpy.save")
    return saliency


def _read_grey(path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                saliency = np.asarray(image if image.mode[0] in "LIF1" else image.convert("RGB"))
    except Exception as error:  # as above
        raise UserError(f"{path} cannot be read as an image ({_brief(error)}): give .npy or grey PNG maps") from None
    if saliency.ndim == 3 and saliency.shape[2] == 3 and (saliency == saliency[:, :, :1]).all():
        return saliency[:, :, 0]
    if saliency.ndim == 3 and saliency.shape[2] == 2:  # grey with alpha
        return saliency[:, :, 0]
    if saliency.ndim != 2:
        raise UserError(f"{path} is a colour image, not a map: give .npy or grey PNG maps")
    return saliency


class _Points:
    """Fixations while they are read, 32 bytes each."""

    def __init__(self, path: Path):
        self.path = path
        self.images: dict[str, int] = {}
        self.people: dict[str, int] = {"": UNKNOWN_SUBJECT, str(UNKNOWN_SUBJECT): UNKNOWN_SUBJECT}
        self.image, self.subject, self.x, self.y = array("q"), array("q"), array("d"), array("d")

    def add(self, image: str, subject: str, x: float, y: float) -> None:
        """One fixation; an empty subject is unknown."""
        self.image.append(self.images.setdefault(image, len(self.images)))
        self.subject.append(self.people.setdefault(subject, len(self.people) - 2))
        self.x.append(x)
        self.y.append(y)

    def finish(self, stimuli: Stimuli, ignore_unknown: bool) -> Fixations:
        """All of them, checked against the stimuli."""
        if not self.image:
            raise UserError(f"{self.path} holds no fixations: give another file")
        names = tuple(sorted(stimuli))
        number = {name: index for index, name in enumerate(names)}
        unknown = [name for name in self.images if name not in number]
        if unknown and not (ignore_unknown and len(unknown) < len(self.images)):
            raise UserError(
                f"{self.path} names {len(unknown)} images that are not among the stimuli, such as {unknown[0][:80]!r} "
                f"(the first stimulus is {names[0]!r}): give the folder that holds them"
            )
        sizes = np.array([stimuli[name] for name in names], np.int64)
        image = np.array([number.get(name, -1) for name in self.images], np.int64)[np.frombuffer(self.image, np.int64)]
        x, y = np.frombuffer(self.x), np.frombuffer(self.y)
        height, width = sizes[image].T
        inside = (image >= 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
        ignored = int(np.count_nonzero(image < 0))
        if not inside.any():
            raise UserError(f"{self.path}: none of {len(x)} fixations lies within its image: x and y must be pixels")
        order = np.flatnonzero(inside)
        order = order[np.argsort(image[order], kind="stable")]
        columns = image[order], x[order], y[order], np.frombuffer(self.subject, np.int64)[order]
        for column in (sizes, *columns):
            column.setflags(write=False)
        return Fixations(names, sizes, *columns, dropped=len(x) - len(order) - ignored, ignored=ignored)


def _check_file(path: Path, limit: int) -> None:
    """Raise a UserError unless there is a file of at most `limit` bytes."""
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give a file of fixations")
    if path.stat().st_size > limit:
        raise UserError(f"{path} is larger than {limit >> 20} MiB: give a file of fixations")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


# MATLAB 5-7 files. scipy.io.loadmat trusts the sizes that a file declares; the reader below takes what the two data
# sets consist of (cells, structs, numbers, text), and allocates no more than the file has bytes for.


def _mat_variable(path: Path, name: str) -> Any:
    """A variable of a .mat: an array, a string, a list (cell, in column order) or a list of dicts (struct).

    Raises:
        UserError: no such file or variable.
        ValueError, struct.error, zlib.error, …: damaged, or over the limits of this module.
    """
    for found, reader in _mat_variables(path):
        if found == name:
            return reader.value()
    raise UserError(f"{path} has no variable {name!r}: give another file")


def _mat_variables(path: Path) -> Iterator[tuple[str, "_MatReader"]]:
    """Names of all variables, with what reads them."""
    _check_file(path, MAT_LIMIT)
    data = memoryview(path.read_bytes())
    order = {b"IM": "<", b"MI": ">"}.get(bytes(data[126:128]))
    if bytes(data[:10]) == b"MATLAB 7.3" or bytes(data[:4]) == b"\x89HDF":
        raise UserError(f"{path} is a MATLAB 7.3 file: save it again with -v7, or convert it to CSV")
    if order is None:
        raise UserError(f"{path} is not a MATLAB 5-7 file: give another file")
    at = 128
    try:
        while at < len(data):
            kind, payload, at = _mat_element(data, at, order)
            if kind == MAT_COMPRESSED:
                at -= -len(payload) % 8  # compressed elements alone are not padded
                head = zlib.decompressobj().decompress(payload, 1024)
                reader = _MatReader(memoryview(head)[8:], order, payload)
            else:
                reader = _MatReader(payload, order)
            yield reader.name, reader
    except DAMAGED as error:
        raise UserError(f"{path} is a damaged MATLAB file ({_brief(error)}): download it again") from None


def _mat_element(data: memoryview, at: int, order: str) -> tuple[int, memoryview, int]:
    """Type and bytes of the element at a place, and the place of the next."""
    (kind,) = struct.unpack_from(f"{order}I", data, at)
    if kind >> 16:  # at most four bytes, packed into the tag
        start, count, following = at + 4, kind >> 16, at + 8
        if count > 4:
            raise ValueError("an element of impossible size")
    else:
        (count,) = struct.unpack_from(f"{order}I", data, at + 4)
        start = at + 8
        following = start + count + -count % 8
    if start + count > len(data):
        raise ValueError("the file is cut off")
    return kind & 0xFFFF, data[start : start + count], following
