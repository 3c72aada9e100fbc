"""Pictures in and out: every mode that Pillow opens becomes 8-bit RGB."""

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from models.errors import UserError
from pipeline.artefacts import write_bytes

STORED_SIZE = 256  # side of the training images (paper's code)


def read_rgb(source: Path | BinaryIO, name: str | None = None) -> np.ndarray:
    """An image as (H, W, 3) uint8 RGB.

    Grey is replicated to three channels, alpha is dropped, 16-bit and float images are scaled to 8 bits, palettes
    and CMYK are converted, EXIF orientation is applied; of an animation the first frame is read.

    Raises:
        UserError: not an image, damaged, or more pixels than Pillow's decompression-bomb limit.
    """
    name = name or str(source)
    if isinstance(source, Path) and not source.is_file():
        what = "is a folder" if source.is_dir() else "does not exist"
        raise UserError(f"{name} {what}: give an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(source) as image:
                return to_rgb_array(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image that Pillow can open: give a JPEG, PNG, TIFF, WebP, …") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name} is too large ({error}): scale it down first") from None
    except MemoryError:
        raise UserError(f"{name} does not fit into memory: scale it down first") from None
    except PermissionError:
        raise UserError(f"{name} cannot be read: permission denied") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise UserError(f"{name} is damaged ({type(error).__name__}: {error}): give another file") from None


def list_images(paths: list[str]) -> dict[str, Path]:
    """Image files by output name; a folder stands for all files right inside it that Pillow may open.

    Raises:
        UserError: nothing there.
    """
    extensions = Image.registered_extensions()
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix.lower() in extensions and p.is_file())
        else:
            files.append(path)
    if not files:
        raise UserError(f"{', '.join(paths)} holds no images: give image files or a folder of them")
    stems = [file.stem for file in files]
    names = [file.stem if stems.count(file.stem) == 1 else file.name for file in files]
    return {
        name if names.count(name) == 1 else f"{file.parent.name}-{file.name}": file
        for name, file in zip(names, files, strict=True)
    }


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as (H, W, 3) uint8 RGB.

    differs from the original: it read palette indices as grey and CMYK as RGB, and failed on grey with alpha.
    """
    if image.mode.startswith(("I", "F")):
        return np.repeat(_to_bytes(np.asarray(image))[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # palettes may carry transparency, dropped below
    return np.asarray(image.convert("RGB"))  # (H, W, 3)


def _to_bytes(grey: np.ndarray) -> np.ndarray:
    """Grey values of 16 bits, 32 bits or floats -> uint8; floats within 0-1 are taken as fractions of white."""
    values = np.nan_to_num(grey.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if grey.dtype.kind == "f":
        scale = 255.0 if values.max(initial=0) <= 1 else 1.0
    else:
        scale = 1 / 257 if grey.dtype.itemsize == 2 or values.max(initial=0) > 255 else 1.0
    return (values * scale + 0.5).clip(0, 255).astype(np.uint8)


def resize_to_square(rgb: np.ndarray, size: int = STORED_SIZE) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) by area averaging, ignoring the aspect ratio (paper's code)."""
    return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BOX))


def limit_side(rgb: np.ndarray, max_side: int | None) -> np.ndarray:
    """Shrink (H, W, 3) uint8 so that its longer side is at most `max_side`, keeping the aspect ratio."""
    height, width = rgb.shape[:2]
    if not max_side or max(height, width) <= max_side:
        return rgb
    scale = max_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8 as PNG, atomically."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def fit_to(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """The central part of (H, W, 3) uint8 with the right aspect ratio, resized to (height, width, 3).

    Unchanged where the image has that size already.
    """
    if rgb.shape[:2] == (height, width):
        return rgb
    return np.asarray(ImageOps.fit(Image.fromarray(rgb), (width, height), Image.Resampling.BICUBIC))
