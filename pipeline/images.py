"""Pictures in and out: every mode that Pillow opens becomes 8-bit RGB.

Image files are not trusted. What cannot be read costs one UserError, whatever the file; Pillow's warnings are not
printed; decoding takes memory for the pixels that its limit allows, and no program is started for any format.
"""

import hashlib
import io
import logging
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from models.errors import UserError
from models.weights.contents import other_kind
from pipeline import array_files, artefacts, decoding, listing, ownership
from pipeline.paths import IS_EMPTY, native_name, problem_of, real, user_path, utf8_name
from pipeline.program import printable
from pipeline.scaling import area_scale

STORED_SIZE = 256  # side of the training images (paper's code)
MOST_BYTES = 1 << 30  # of an image file, more than any within Pillow's limit of pixels needs
LARGE = 20_000_000  # pixels from which on images are decoded one after the other, however many threads there are
PNG_LEVEL = 1  # of zlib, for speed
LONGEST_NAME = 200  # bytes of an output's name: file systems allow 255, and suffixes follow

warnings.filterwarnings("ignore", module=r"PIL\.")  # here, since doing so around each call is not safe with threads
logging.getLogger("PIL").addHandler(logging.NullHandler())
_one_large_image = threading.Lock()
MOST_TOLD = 3  # of images that are odd
_told: set[str] = set()


def read_rgb(source: Path | BinaryIO, name: str | None = None) -> np.ndarray:
    """An image as (H, W, 3) uint8 RGB.

    Grey is replicated to three channels, alpha is dropped, 16 bits are scaled to 8, floats and other numbers by the
    range of --range, palettes, CMYK and LAB are converted, colour profiles are ignored; of an
    animation the first frame is read. An image with
    EXIF orientation is turned upright, as every viewer shows it (differs from the original, which left it as stored).

    Raises:
        UserError: not an image, damaged, of no known range, or more pixels than Pillow's decompression-bomb limit.
    """
    name = printable(name or str(source))
    if isinstance(source, Path):
        check_file(source, name)
    try:
        with (
            decoding.open_image(source) as image,
            _one_large_image if image.width * image.height > LARGE else nullcontext(),
        ):
            rgb, note = decoding.decode(image)
            tell(name, note)
            return rgb
    except UserError as error:
        raise UserError(f"{name} {error}") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is {_instead(source)}: give a JPEG, PNG, TIFF, WebP, …") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large ({error}): scale it down first") from None
    except MemoryError:
        raise UserError(f"{name} does not fit into memory: scale it down first") from None
    except PermissionError:
        raise UserError(f"{name} cannot be read: permission denied") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = printable(" ".join(str(error).split()))[:200]
        raise UserError(f"{name} is damaged ({type(error).__name__}: {reason}): give another file") from None


def _instead(source: Path | BinaryIO) -> str:
    """What a file is that cannot be opened as an image."""
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        file.seek(0)
        kind = other_kind(file.read(256))
    return kind if kind and not kind.endswith("image") else "not an image that Pillow can open"


def tell(name: str, what: str) -> None:
    """Say on standard error what is odd with an image, once for each, and not for more than `MOST_TOLD`."""
    if what and name not in _told and len(_told) <= MOST_TOLD:
        _told.add(name)
        more = len(_told) > MOST_TOLD
        print("note: further images are so too" if more else f"note: {name} {what}", file=sys.stderr, flush=True)


def readable(files: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The files that can be decoded to their end, and why the others cannot."""

    def refusal(file: Path) -> str:
        try:
            read_rgb(file)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1) or 1) as pool:
        found = dict(zip(files, pool.map(refusal, files), strict=True))
    return [file for file in files if not found[file]], {file: problem for file, problem in found.items() if problem}


def check_file(path: Path, name: str | None = None) -> None:
    """Raise a UserError where `path` is no file that an image could be, before anything is opened."""
    name = name or printable(str(path))
    if problem_of(path) not in ("", IS_EMPTY):
        raise UserError(f"{name} {problem_of(path)}: give another file")
    check_bytes(path.stat().st_size, name)
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {str(error.strerror).lower()}") from None


def check_bytes(size: int, name: str) -> None:
    """Raise a UserError where a file is larger than any image that could be read."""
    if size > MOST_BYTES:
        raise UserError(f"{name} has {artefacts.format_bytes(size)}, more than any image needs: give another file")


def list_images(
    paths: list[str], suffixes: tuple[str, ...] = (), out: Path | None = None
) -> tuple[dict[str, Path], list[str]]:
    """Image files by output name, see `output_names`; a folder stands for the images below it, see `listing`.

    Files that an earlier run wrote right into `out` are left out, as in a folder, unless there is nothing else.

    Returns:
        the files, and a line for every path that gave none.

    Raises:
        UserError: nothing there.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in map(user_path, paths):
        try:
            found = listing.images_below(path) if path.is_dir() else [path]
        except OSError as error:
            problems.append(f"{printable(str(path))} cannot be read: {str(error.strerror).lower()}")
            continue
        if not found:
            problems.append(f"{printable(str(path))} holds no images: give image files or a folder of them")
        files += found
    if not files:
        raise UserError("; ".join(problems))
    if out is not None:
        ours = ownership.written(out)
        others = [f for f in files if real(f.parent) != real(out) or not ownership.is_written(f.name, ours)]
        files = others or files
    ownership.reading(*files)
    return output_names(files, suffixes, out), problems


def output_names(files: list[Path], suffixes: tuple[str, ...] = (), out: Path | None = None) -> dict[str, Path]:
    """Files by a name for their results: the stem where that will do, else the name, else folders and name.

    No two results meet, even where upper and lower case count the same, nor where `suffixes` follow a name; so two
    files of one name in different folders get different names. No picture of this name in the folder `out` is an
    input. See `output_name` for what else is changed.
    """
    files = list(dict.fromkeys(files))
    levels = [0] * len(files)

    def clashes(name: str) -> bool:
        written = [name + ending for ending in ("", *suffixes)]
        return any(taken[n.casefold()] > 1 or (out and ownership.is_read(out / f"{n}.png")) for n in written)

    while True:
        names = [_name_at(file, level) for file, level in zip(files, levels, strict=True)]
        taken = Counter((name + ending).casefold() for name in names for ending in ("", *suffixes))
        clashing = [i for i, name in enumerate(names) if clashes(name)]
        if not clashing:
            return dict(zip(names, files, strict=True))
        for i in clashing:
            levels[i] += 1


def _name_at(file: Path, level: int) -> str:
    if level == 0:
        return output_name(file.stem)
    parts = [part for part in file.parts if part not in (file.anchor, "..")]
    if level <= len(parts):
        return output_name("-".join(parts[-level:]))
    return output_name(file.name, str(file) + "/" * (level - len(parts) - 1))


def output_name(text: str, hashed: str = "") -> str:
    """`text` as the name of an output: printable, of LONGEST_NAME bytes at most.

    Where it had to be changed for that, or where `hashed` is given, a hash follows that tells names apart.
    """
    name = utf8_name(text)
    clean = "".join(c if c.isprintable() else "_" for c in name)
    if clean == name and len(clean.encode()) <= LONGEST_NAME and not hashed:
        return text
    digest = hashlib.sha256(utf8_name(hashed or text).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return native_name(f"{clean.encode()[:LONGEST_NAME].decode('utf-8', 'ignore')}-{digest}")


def open_stored(path: Path) -> tuple[np.ndarray, artefacts.Facts]:
    """The images of stage 1 (N, 256, 256, 3) uint8, memory-mapped, and their facts.

    Raises:
        UserError: as `array_files.open_array`, or the array or the facts are not those of stage 1.
    """
    images, facts = array_files.open_array(path, "prepare_images.py")
    if images.dtype != np.uint8 or images.shape[1:] != (STORED_SIZE, STORED_SIZE, 3) or not len(images):
        raise UserError(
            f"{path} is {images.dtype} {images.shape}, not uint8 (N, {STORED_SIZE}, {STORED_SIZE}, 3): "
            "give the images.npy of prepare_images.py"
        )
    names = facts.get("names")
    whole = isinstance(names, list) and len(names) == len(images) and all(isinstance(name, str) for name in names)
    if not whole or not isinstance(facts.get("content_sha256"), str):
        raise UserError(
            f"{artefacts.sidecar_path(path)} lacks the images' names or hash: run prepare_images.py again "
            "with --overwrite"
        )
    return images, facts


def limit_side(rgb: np.ndarray, max_side: int | None) -> np.ndarray:
    """Shrink (H, W, 3) uint8 so that its longer side is at most `max_side`, keeping the aspect ratio, by area."""
    height, width = rgb.shape[:2]
    if not max_side or max(height, width) <= max_side:
        return rgb
    scale = max_side / max(height, width)
    return area_scale(rgb, max(1, round(height * scale)), max(1, round(width * scale)))


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8 as PNG, atomically."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=PNG_LEVEL)
    artefacts.write_bytes(path, buffer.getvalue())


def fit_to(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """The central part of (H, W, 3) uint8 with the right aspect ratio, resized to (height, width, 3).

    Unchanged where the image has that size already.
    """
    if rgb.shape[:2] == (height, width):
        return rgb
    return np.asarray(ImageOps.fit(Image.fromarray(rgb), (width, height), Image.Resampling.BICUBIC))
