"""Human fixations in: CSV files, and the MATLAB files of the OSIE, Toronto and MIT1003 data sets.

Coordinates are pixels from the left and top edge and are kept as the file states them (no shift from MATLAB's count
from 1, as in the MIT/Tübingen benchmark). What a reader does with

- a fixation outside its image (x not in [0, width) or y not in [0, height)): dropped, counted in `outside`;
- a coordinate NaN or infinite, as trackers write lost samples: dropped, counted in `not_finite`;
- a fixation on an image that is not among the stimuli: left out, counted in `unknown`, so that a subset of the images
  can be evaluated; if no image at all is known, it raises;
- an image without fixations: kept, its scores are NaN;
- repeated fixations: kept.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.fixation_metrics import fixations_elsewhere
from evaluation.fixation_tables import UNKNOWN_SUBJECT, Row, csv_rows
from evaluation.gaze import fixation_centres
from evaluation.matlab import NAME_LENGTH, cells_of, field_of, read_matlab
from models.errors import UserError
from pipeline.decoding import open_image, upright_size
from pipeline.images import read_rgb
from pipeline.names import Names
from pipeline.paths import native_name, utf8_name

TABLES = (".csv", ".tsv", ".txt")


@dataclass(frozen=True, eq=False)
class Fixations:
    """Fixations on a set of images.

    names: N images; sizes (N, 2) int64, height and width; image_index (K,) int64, the image of each fixation in
    0…N-1; x, y (K,) float64 in pixels, inside their image; subject (K,) int64, -1 unknown. outside, not_finite and
    unknown count what the reader left out (see the module). The arrays are read-only.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    image_index: np.ndarray
    x: np.ndarray
    y: np.ndarray
    subject: np.ndarray
    outside: int = 0
    not_finite: int = 0
    unknown: int = 0

    def __post_init__(self) -> None:
        for array in (self.sizes, self.image_index, self.x, self.y, self.subject):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.x)

    def of_image(self, image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y and subject (K',) of one image, in the order of the file."""
        own = self.image_index == image
        return self.x[own], self.y[own], self.subject[own]

    def elsewhere(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """x, y (M,) of all fixations on all other images, scaled to this one: the negatives of the shuffled AUC."""
        return fixations_elsewhere(self.image_index, self.x, self.y, self.sizes, image)

    def images_without(self) -> tuple[str, ...]:
        """Names of the images that nobody looked at."""
        counts = np.bincount(self.image_index, minlength=len(self.names))
        return tuple(name for name, count in zip(self.names, counts, strict=True) if not count)


def image_sizes(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """File name -> (height, width) as `read_rgb` gives them, from the headers alone.

    Raises:
        UserError: not an image, two files of one name, or none.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for file in files:
        name = utf8_name(file.name)
        if name in sizes:
            raise UserError(f"two stimuli are called {name}: fixations name images by file name, so rename one")
        sizes[name] = _image_size(file)
    if not sizes:
        raise UserError("no stimuli: give image files or a folder of them")
    return sizes


def _image_size(file: Path) -> tuple[int, int]:
    try:
        with open_image(file) as image:
            return upright_size(image)
    except Exception:  # a header that Pillow chokes on: the reader of images says what is wrong
        height, width = read_rgb(file).shape[:2]
        return height, width


def read_fixations(path: Path, stimuli: Mapping[str, tuple[int, int]]) -> Fixations:
    """Fixations from a .csv file, OSIE's or Toronto's .mat file or MIT1003's folder, told apart by name and content.

    Raises:
        UserError: as the four readers, or another kind of file.
    """
    if path.is_dir():
        return _collect(path, _mit1003_rows(path, stimuli), stimuli)
    if path.suffix.lower() in TABLES:
        return read_csv(path, stimuli)
    if path.suffix.lower() != ".mat":
        raise UserError(
            f"{path} is not a table of fixations: give a .csv file, OSIE's or Toronto's .mat file, or MIT1003's "
            "unpacked folder DATA"
        )
    variables = read_matlab(path, ("fixations", "white"))
    if "fixations" in variables:
        return _collect(path, _osie_rows(path, variables["fixations"]), stimuli)
    if "white" in variables:
        return _collect(path, _toronto_rows(path, variables["white"], stimuli), stimuli)
    raise UserError(
        f"{path} holds neither the variable fixations (OSIE) nor white (Toronto): give one of these, or a .csv file"
    )


def read_csv(path: Path, stimuli: Mapping[str, tuple[int, int]]) -> Fixations:
    """Fixations from a table with a header and the columns image, x, y and, where it is known, subject.

    Columns are parted by commas, semicolons, tabs or bars, and named in upper or lower case; others are ignored. Where
    they are not parted by commas, 1,5 is 1.5. The text is UTF-8, or UTF-16 with a mark at its start.

    Args:
        path: the file. image: file name of a stimulus, see `Names`; subject: any name, nothing, NA or -1 where
            unknown; x, y: pixels, nothing, NA or a dot where lost. A duration_ms may be there: every fixation counts
            the same, as in the benchmark.
        stimuli: image name -> (height, width); its order gives the image indices.

    Raises:
        UserError: no such file, not a text table, a column missing or twice, a number that is none, no image known.
    """
    return _collect(path, csv_rows(path), stimuli)


def _collect(path: Path, rows: Iterable[Row], stimuli: Mapping[str, tuple[int, int]]) -> Fixations:
    """Rows -> Fixations: image names looked up, lost and outside fixations left out and counted.

    Raises:
        UserError: no rows, or no row of a known image.
    """
    names = list(stimuli)
    sizes = np.array(list(stimuli.values()), dtype=np.int64).reshape(-1, 2)
    index = Names(names)
    kept: list[tuple[int, int, float, float]] = []
    example, unknown = "", 0
    for image, subject, x, y in rows:
        number = index.find(image)
        if number is None:
            example, unknown = image, unknown + 1
        else:
            kept.append((number, subject, x, y))
    if not kept:
        if not unknown:
            raise UserError(f"{path} holds no fixations: give another file")
        raise UserError(
            f"{path} names none of the {len(names)} stimuli (but {example[:60]!r}): give the images it means"
        )
    image_index, subject = np.array([row[:2] for row in kept], dtype=np.int64).T  # (K,) each
    x, y = np.array([row[2:] for row in kept], dtype=np.float64).T
    finite = np.isfinite(x) & np.isfinite(y)
    height, width = sizes[image_index].T
    inside = finite & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return Fixations(
        names=tuple(names),
        sizes=sizes,
        image_index=image_index[inside],
        x=x[inside],
        y=y[inside],
        subject=subject[inside],
        outside=int((finite & ~inside).sum()),
        not_finite=int((~finite).sum()),
        unknown=unknown,
    )


def _osie_rows(path: Path, images: Any) -> Iterator[Row]:
    """Fixations of OSIE (Xu et al., Journal of Vision 2014), its `fixations.mat`: all people, numbered from 0.

    Variable `fixations`: a cell array of structures per image: `img`, the file name, and `subjects`, a cell array of
    structures with `fix_x`, `fix_y` (and `fix_duration`, not used).
    """
    for image in cells_of(path, images, "fixations"):
        name = field_of(path, image, "img", str)
        for number, person in enumerate(cells_of(path, field_of(path, image, "subjects", list), "subjects")):
            x, y = (field_of(path, person, field, np.ndarray).ravel() for field in ("fix_x", "fix_y"))
            if x.size != y.size:
                raise UserError(f"{path}: {x.size} fix_x and {y.size} fix_y for {name[:60]!r}: give OSIE's own file")
            for column, row in zip(x.tolist(), y.tolist(), strict=True):
                yield name, number, float(column), float(row)


def _toronto_rows(path: Path, maps: Any, stimuli: Mapping[str, tuple[int, int]]) -> Iterator[Row]:
    """Fixations of Toronto (Bruce & Tsotsos, NIPS 2005), its `origfixdata.mat`; the subjects are unknown.

    Variable `white`: a cell array of binary maps (H, W), the n-th (from 1) of the image `n.jpg`. A pixel that is not 0
    is one fixation, at the pixel's own row and column.
    """
    names = list(stimuli)
    index = Names(names)
    for number, values in enumerate(cells_of(path, maps, "white"), start=1):
        if not isinstance(values, np.ndarray) or values.ndim != 2 or np.isnan(values).any():
            raise UserError(f"{path}: map {number} is not a binary map: give Toronto's own file")
        place = index.find(str(number))
        if place is not None and tuple(stimuli[names[place]]) != values.shape:
            height, width = stimuli[names[place]]
            raise UserError(
                f"{path}: map {number} has {values.shape[1]}×{values.shape[0]} pixels and {names[place]} "
                f"{width}×{height}: give the images at their own size"
            )
        for row, column in np.argwhere(values != 0).tolist():
            yield str(number), UNKNOWN_SUBJECT, float(column), float(row)


def _mit1003_rows(folder: Path, stimuli: Mapping[str, tuple[int, int]]) -> Iterator[Row]:
    """Fixations of MIT1003 (Judd et al., ICCV 2009) from its raw gaze, the unpacked `DATA.zip`.

    `<subject>/<image>.mat` holds a variable called as the image (its first 63 letters) with the field `DATA` and in
    that `eyeData` (T, 2 or more): x and y of every sample. People are numbered in the order of their folders' names.
    The first fixation of each trial, on the cross shown before, is left out, as its authors do.
    """
    people = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "_")))
    for number, person in enumerate(people):
        for name in stimuli:
            path = person / native_name(f"{Path(name).stem}.mat")
            if not path.is_file():
                continue
            variable = path.stem[:NAME_LENGTH]
            trial = field_of(path, read_matlab(path, (variable,)), variable, dict)
            gaze = field_of(path, field_of(path, trial, "DATA", dict), "eyeData", np.ndarray)
            if gaze.ndim != 2 or gaze.shape[1] < 2:
                raise UserError(f"{path}: eyeData is not a table of x and y: give MIT1003's own file")
            for x, y in fixation_centres(gaze[:, :2])[1:].tolist():
                yield name, number, x, y
