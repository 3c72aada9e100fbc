"""Image files of every odd kind, made here: what is to be read, and what is to be refused and why."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from tests.conftest import make_photo

HEIGHT, WIDTH = 70, 90
RGB = make_photo(0, HEIGHT, WIDTH)
PHOTO = Image.fromarray(RGB)
GREY = np.asarray(PHOTO.convert("L"))
EXIF_ORIENTATION = 0x0112


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes | None, *chunks: bytes) -> bytes:
    """A PNG of raw rows, each with its filter byte; without rows a black one, packed as it is made."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    if rows is None:
        packer, row = zlib.compressobj(9), bytes(1 + (width * channels * depth + 7) // 8)
        packed = b"".join(packer.compress(row * 100) for _ in range(height // 100)) + packer.flush()
    else:
        packed = zlib.compress(rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def png_16_bits() -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB.astype(np.uint16) * 257)
    return png(WIDTH, HEIGHT, 16, 2, rows)


def transparent_palette() -> bytes:
    image = PHOTO.quantize(200)
    return encoded(image, "PNG", transparency=bytes(range(200)))


def oriented(orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return encoded(PHOTO, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))


def lab() -> bytes:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return encoded(ImageCms.applyTransform(PHOTO, to_lab), "TIFF")


def tiff_float(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.float32)), "TIFF")


def bomb_tiff() -> bytes:
    """A header alone, of 30,000 × 30,000 pixels."""
    tags = {256: 30_000, 257: 30_000, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 30_000, 279: 900_000_000}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def bomb_gif() -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 40_000, 40_000, 0, 0, 0) + b"\x2c" + bytes(8) + b"\0\x02\x02\x4c\x01\0;"


def bomb_of_text() -> bytes:
    return png(2, 2, 8, 0, bytes(6), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000))))


def postscript() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 70\n(started) (w) file closefile showpage\n%%EOF\n"


def iptc_with_postscript() -> bytes:
    """IPTC whose picture is PostScript, which Pillow would open anew."""

    def field(record: int, number: int, content: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, number, len(content)) + content

    fields = field(3, 60, b"\1\0") + field(3, 65, b"\0") + field(3, 20, b"\0\x5a") + field(3, 30, b"\0\x46")
    return fields + field(3, 120, b"\5") + field(8, 10, postscript())


def broken_profile(form: str) -> bytes:
    return encoded(PHOTO, form, icc_profile=b"no profile" * 20, **({"quality": 95} if form == "JPEG" else {}))


def broken_png_profile() -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in RGB)
    return png(WIDTH, HEIGHT, 8, 2, rows, chunk(b"iCCP", b"name\0\0not deflated"))


def broken_exif() -> bytes:
    return encoded(PHOTO, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 30)


def broken_tags() -> bytes:
    """A TIFF whose further tags point beyond the file, of which Pillow would warn."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270] = "x" * 300
    content = bytearray(encoded(PHOTO, "TIFF", tiffinfo=tags))
    at = content.find(struct.pack("<HHI", 270, 2, 301))
    content[at + 8 : at + 12] = struct.pack("<I", 0x7FFFFFFF)
    return bytes(content)


FRAMES = {"save_all": True, "append_images": [Image.fromarray(make_photo(i, HEIGHT, WIDTH)) for i in (1, 2)]}
GREYS = np.repeat(GREY[:, :, None], 3, axis=2)

READABLE: dict[str, tuple[bytes, np.ndarray, float]] = {  # content, pixels, greatest mean difference from them
    "wrong extension.png": (encoded(PHOTO, "WEBP", lossless=True), RGB, 0),
    "1 bit.png": (encoded(Image.fromarray(RGB[:, :, 0] > 128), "PNG"), None, 0),
    "16 bits grey.png": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), GREYS, 0),
    "16 bits colour.png": (png_16_bits(), RGB, 0),
    "16 bits.tif": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), GREYS, 0),
    "transparent palette.png": (transparent_palette(), RGB, 6),
    "transparent.png": (encoded(PHOTO.convert("RGBA"), "PNG"), RGB, 0),
    "grey with alpha.png": (encoded(PHOTO.convert("LA"), "PNG"), GREYS, 0),
    "animated.gif": (encoded(PHOTO, "GIF", **FRAMES), RGB, 12),
    "animated.webp": (encoded(PHOTO, "WEBP", lossless=True, **FRAMES), RGB, 0),
    "animated.png": (encoded(PHOTO, "PNG", **FRAMES), RGB, 0),
    "pages.tif": (encoded(PHOTO, "TIFF", **FRAMES), RGB, 0),
    "several.jpg": (encoded(PHOTO, "MPO", quality=95, **FRAMES), RGB, 4),
    "cmyk.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG", quality=95), RGB, 12),
    "cmyk.tif": (encoded(PHOTO.convert("CMYK"), "TIFF"), RGB, 2),
    "ycbcr.tif": (encoded(PHOTO.convert("YCbCr"), "TIFF"), RGB, 2),
    "lab.tif": (lab(), RGB, 2),
    "turned.jpg": (oriented(6, "JPEG"), np.rot90(RGB, -1), 4),
    "upside down.tif": (oriented(3, "TIFF"), np.rot90(RGB, 2), 0),
    "mirrored.webp": (oriented(2, "WEBP"), RGB[:, ::-1], 14),
    "broken exif.jpg": (broken_exif(), RGB, 4),
    "broken profile.png": (broken_png_profile(), RGB, 0),
    "broken profile.jpg": (broken_profile("JPEG"), RGB, 4),
    "broken profile.tif": (broken_profile("TIFF"), RGB, 0),
    "broken profile.webp": (broken_profile("WEBP"), RGB, 14),
}
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "is an empty file"),
    "text.png": (b"no picture", "is not an image"),
    "noise.jpg": (np.random.default_rng(0).bytes(5000), "is not an image"),
    "start.jpg": (b"\xff\xd8\xff\xe0" + bytes(100), "image"),
    "cut.png": (encoded(PHOTO, "PNG")[:3000], "is damaged"),
    "cut.jpg": (encoded(PHOTO, "JPEG")[:1000], "is damaged"),
    "float.tif": (tiff_float(GREY / 255), "nothing says which are black and white"),
    "float with nan.tif": (tiff_float(np.where(GREY > 300, 0, np.nan)), "nothing says which are black and white"),
    "huge floats.tif": (tiff_float(np.full((HEIGHT, WIDTH), -3e38)), "nothing says which are black and white"),
    "cut.tif": (encoded(PHOTO, "TIFF")[:9000], "is damaged"),
    "cut packed.tif": (encoded(PHOTO, "TIFF", compression="tiff_lzw")[:9000], "is not an image"),
    "cut.webp": (encoded(PHOTO, "WEBP", lossless=True)[:3000], "is damaged"),
    "broken tags.tif": (broken_tags(), "is not an image"),
    "cut.gif": (encoded(PHOTO, "GIF")[:2000], "is damaged"),
    "bomb.png": (png(30_000, 30_000, 1, 0, None), "is too large"),
    "smaller bomb.png": (png(12_000, 8_000, 1, 0, None), "is too large (12000×8000 pixels"),
    "bomb.tif": (bomb_tiff(), "is too large"),
    "bomb.gif": (bomb_gif(), "is too large"),
    "bomb of text.png": (bomb_of_text(), "is damaged"),
    "program.jpg": (postscript(), "is not an image"),
    "program inside.jpg": (iptc_with_postscript(), "is not an image"),
}
