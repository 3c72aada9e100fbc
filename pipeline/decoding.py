"""From an image file to upright 8-bit RGB: the one place that knows an image's size, orientation and range."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms

from models.errors import UserError
from pipeline import parsers

# Pillow has Ghostscript run EPS, also inside IPTC; old versions unpack FITS without limit; the others have no decoder.
REFUSED_FORMATS = ("EPS", "IPTC", "FITS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")
STRIP = 1 << 20  # values converted at a time
ORIENTATION, BITS, SAMPLE_FORMAT = 274, 258, 339  # tags of TIFF and EXIF
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # of pixels (H, W, 3), by orientation
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
SIGNATURES = (  # of formats that Pillow reads, or could
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xffO\xffQ",
)

Range = tuple[float, float]


@cache
def formats() -> tuple[str, ...]:
    """What may be opened, in the order in which Pillow tries."""
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name not in REFUSED_FORMATS)


@cache
def extensions() -> frozenset[str]:
    """Extensions of the formats that may be opened, lower case."""
    readable = {*formats(), "MPO"}
    return frozenset(
        e for e, form in Image.registered_extensions().items() if form in readable and form in {*Image.OPEN, "MPO"}
    )


def starts_like_image(head: bytes) -> bool:
    """Whether a file's first bytes are those of an image, whatever the file is called."""
    return head.startswith(SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:8] == b"ftyp"


def open_image(source: Path | BinaryIO) -> Image.Image:
    """An image whose pixels are not read yet.

    Raises:
        nearly anything; DecompressionBombError above Pillow's limit of pixels, also where Pillow itself only warns.
    """
    image = Image.open(source, formats=formats())
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        size = f"{image.width}×{image.height} pixels"
        raise Image.DecompressionBombError(f"{size}, {Image.MAX_IMAGE_PIXELS} at most")
    return image


def orientation(image: Image.Image) -> int:
    """EXIF's orientation of an image that was opened and not loaded yet, 1 where it has none that means anything."""
    try:
        value = int((image.tag_v2 if image.format == "TIFF" else image.getexif()).get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # EXIF data that cannot be read say nothing of an orientation
        return 1
    return value if value in TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width that `decode` will give."""
    turned = hasattr(image, "_tile_size")  # Pillow from 11.1 on: a TIFF's size is that after its turn
    width, height = image.size
    return (width, height) if orientation(image) in SIDEWAYS and not turned else (height, width)


def decode(image: Image.Image) -> tuple[np.ndarray, str]:
    """The pixels of an opened image, upright, (H, W, 3) uint8, and what is to be said of them, '' mostly."""
    turn, size, deep_colours = orientation(image), upright_size(image), _of_deep_colours(image)
    image.load()
    if turn != 1 and image.format == "TIFF" and ORIENTATION not in image.tag_v2:
        turn = 1  # Pillow turned it while loading
    rgb = to_rgb_array(image)
    rgb = np.ascontiguousarray(TURNS[turn](rgb)) if turn != 1 else rgb
    if rgb.shape[:2] != size:
        raise ValueError(f"{rgb.shape[1]}×{rgb.shape[0]} pixels, its header says {size[1]}×{size[0]}")
    return rgb, unused_bits(image, deep_colours, rgb)


def known_range(image: Image.Image) -> Range | None:
    """Black and white of an image of more than 8 bits, as its format says; None where no format says it.

    16 bits without sign reach from 0 to 65535, other bits of a TIFF to what they can hold; floats, signed numbers and
    32 bits may hold anything.
    """
    if image.mode.startswith("F"):
        return None
    tags = getattr(image, "tag_v2", {})
    bits, signed = tags.get(BITS, 16), tags.get(SAMPLE_FORMAT, 1)
    bits, signed = (v[0] if isinstance(v, tuple) else v for v in (bits, signed))
    if image.mode == "I" and image.format not in ("PNG", "PPM", "JPEG2000", None) and not (tags and bits <= 16):
        return None
    return (0.0, float(2**bits - 1)) if bits <= 16 and signed == 1 else None


def _of_deep_colours(image: Image.Image) -> bool:
    """Whether an opened image, not loaded yet, holds 16 bits of each colour, of which Pillow gives the upper 8."""
    raw = [tile[3] for tile in image.tile[:1]]
    return image.mode == "RGB" and "16" in str(raw)


def unused_bits(image: Image.Image, deep_colours: bool, rgb: np.ndarray) -> str:
    """A word where 16 bits come out nearly black, as they do where they hold 10 to 14; '' elsewhere."""
    dark = "has 16 bits and no value above {}, so it looks dark: "
    if deep_colours and 0 < (largest := int(rgb.max())) < 64:
        return dark.format(largest * 256 + 255) + "save it with 8 bits"
    if parsers.image_range or not image.mode.startswith("I") or known_range(image) != (0.0, 65535.0):
        return ""
    largest = int(np.asarray(image).max())
    bits = next((bits for bits in (10, 12, 14) if 255 < largest < 1 << bits), None)
    return "" if bits is None else dark.format(largest) + f"--range 0 {2**bits - 1} if it means {bits} bits"


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as (H, W, 3) uint8 RGB, as it is stored.

    differs from the original: it read palette indices as grey and CMYK as RGB, and failed on grey with alpha.

    Raises:
        UserError: the range of its values is known neither from its format nor by --range.
    """
    if image.mode.startswith(("I", "F")):
        values = parsers.image_range or known_range(image)
        if values is None:
            what = "floats" if image.mode.startswith("F") else "integers of 32 bits or with a sign"
            raise UserError(f"holds {what}, and nothing says which are black and white: give --range LOW HIGH")
        grey = np.asarray(image)
        if image.mode == "I" and getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, (2,)) in (1, (1,)):
            grey = grey.view(np.uint32)  # Pillow has no mode for it
        return np.repeat(_to_bytes(grey, *values)[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # palettes may carry transparency, dropped below
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return np.asarray(image.convert("RGB"))  # (H, W, 3)


def _to_bytes(grey: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers of any kind -> uint8, `low` becomes 0 and `high` 255; what is not finite becomes 0."""
    flat = grey.reshape(-1)
    result = np.empty(len(flat), np.uint8)
    for start in range(0, len(flat), STRIP):
        strip = flat[start : start + STRIP].astype(np.float64)
        values = ((strip - low) * (255 / (high - low)) + 0.5).clip(0, 255)
        values[~np.isfinite(strip)] = 0
        result[start : start + len(strip)] = values.astype(np.uint8)
    return result.reshape(grey.shape)
