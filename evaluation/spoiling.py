"""Spoiled copies of pictures: less natural in a known way, in whole or in a region.

To add one, add an entry to `SPOILINGS`: what it is, and a function of a picture (H, W, 3) uint8, a random generator
and another picture of that size, which gives the changed picture (H, W, 3). With a `side` it is done to a square.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from models.randomness import seed_for

FEATHER = 1 / 8  # of a region's side: how wide its edges blend into the picture
REGION = 1 / 4  # of a picture's shorter side: the square of those kinds that have one size only
Change = Callable[[np.ndarray, np.random.Generator, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Spoiling:
    """One way to spoil a picture.

    Attributes:
        about: what it does, for the table.
        change: see the module.
        side: of the square that is changed, in parts of the picture's shorter side; None for all of it.
        harmless: the copy is as natural as its original: the control of the measure.
    """

    about: str
    change: Change
    side: float | None = None
    harmless: bool = False

    def spoil(self, rgb: np.ndarray, random: np.random.Generator, other: np.ndarray) -> "Copy":
        """The spoiled copy of a picture (H, W, 3) uint8; `other` is another one of the same size."""
        if self.side is None:
            return Copy(self.change(rgb, random, other))
        side = max(1, round(self.side * min(rgb.shape[:2])))
        top, left = (int(random.integers(size - side + 1)) for size in rgb.shape[:2])
        square = np.s_[top : top + side, left : left + side]
        weight = feathered(side)[:, :, None]
        mixed = weight * self.change(rgb[square], random, other[square]) + (1 - weight) * rgb[square]
        picture, mask = rgb.copy(), np.zeros(rgb.shape[:2], bool)
        picture[square], mask[square] = to_bytes(mixed), True
        return Copy(picture, mask)


@dataclass(frozen=True)
class Copy:
    """A spoiled picture (H, W, 3), uint8 or float32 in 0-255, and which pixels (H, W) were changed; None for all."""

    picture: np.ndarray
    mask: np.ndarray | None = None


def copies(rgb: np.ndarray, other: np.ndarray, name: str, wanted: list[str], seed: int) -> dict[str, Copy]:
    """Some spoiled copies of a picture by their names in `SPOILINGS`.

    What is drawn follows from the seed, the picture's name and the spoiling's alone.
    """
    return {
        spoiling: SPOILINGS[spoiling].spoil(rgb, np.random.default_rng(seed_for(seed, spoiling, name)), other)
        for spoiling in wanted
    }


def feathered(side: int) -> np.ndarray:
    """Weights (side, side) of a changed square: 1 inside, falling linearly over `FEATHER` of it at every edge."""
    width = max(1, round(FEATHER * side))
    from_edge = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
    line = np.minimum(1, from_edge / (width + 1))
    return np.minimum.outer(line, line)


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Rounded and clipped to 0-255, uint8."""
    return np.rint(values).clip(0, 255).astype(np.uint8)


def noisy(rgb: np.ndarray, random: np.random.Generator, _: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian noise added to every value."""
    return to_bytes(rgb + random.normal(0, sigma, rgb.shape))


def blurred(rgb: np.ndarray, _: np.random.Generator, __: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of `sigma` pixels, the picture mirrored at its edges."""
    from scipy.ndimage import gaussian_filter

    return to_bytes(gaussian_filter(rgb.astype(np.float64), (sigma, sigma, 0)))


def compressed(rgb: np.ndarray, _: np.random.Generator, __: np.ndarray, quality: int) -> np.ndarray:
    """What a JPEG file of this quality keeps."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))


def shuffled(rgb: np.ndarray, random: np.random.Generator, _: np.ndarray, grid: int) -> np.ndarray:
    """`grid` × `grid` equal patches in another order, none at its place; what a division leaves over stays at the rim.

    The picture is returned as it is where it has fewer pixels than patches along a side.
    """
    height, width = (size // grid for size in rgb.shape[:2])
    top, left = ((size - grid * part) // 2 for size, part in zip(rgb.shape[:2], (height, width), strict=True))
    inner = np.s_[top : top + grid * height, left : left + grid * width]
    patches = rgb[inner].reshape(grid, height, grid, width, 3).swapaxes(1, 2).reshape(grid**2, height, width, 3)
    order = np.arange(grid**2)
    while (order == np.arange(grid**2)).any():
        order = random.permutation(grid**2)
    picture = rgb.copy()
    moved = patches[order].reshape(grid, grid, height, width, 3).swapaxes(1, 2)
    picture[inner] = moved.reshape(grid * height, grid * width, 3)
    return picture


def phase_randomised(rgb: np.ndarray, random: np.random.Generator, _: np.ndarray) -> np.ndarray:
    """Every spatial frequency moved by a phase of its own, the same in all channels: (H, W, 3) float32.

    The amplitude spectrum and the channels' relations stay. Values are neither clipped nor rounded, which would change
    the spectrum, and may leave 0-255.
    """
    noise = np.fft.rfft2(random.normal(size=rgb.shape[:2]))
    turn = noise / np.abs(noise)
    turn[0, 0] = 1  # the mean stays
    spectrum = np.fft.rfft2(rgb.astype(np.float64), axes=(0, 1)) * turn[:, :, None]
    return np.fft.irfft2(spectrum, rgb.shape[:2], axes=(0, 1)).astype(np.float32)


def _still(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A change that draws nothing and needs no other picture."""
    return lambda rgb, random, other: change(rgb)


upside_down = _still(lambda rgb: rgb[::-1])

SPOILINGS: dict[str, Spoiling] = {
    **{f"noise {s}": Spoiling(f"Gaussian noise, σ {s} grey levels", partial(noisy, sigma=s)) for s in (5, 10, 25)},
    **{f"blur {s}": Spoiling(f"Gaussian blur, σ {s} pixels", partial(blurred, sigma=s)) for s in (1, 2, 4)},
    "jpeg 10": Spoiling("JPEG of quality 10", partial(compressed, quality=10)),
    **{
        f"shuffled {g}×{g}": Spoiling(f"{g}×{g} patches in another order", partial(shuffled, grid=g)) for g in (2, 4, 8)
    },
    "upside down": Spoiling("top and bottom exchanged", upside_down),
    "mirrored": Spoiling(
        "left and right exchanged: a control, as natural as the original", _still(lambda rgb: rgb[:, ::-1]), None, True
    ),
    "inverted": Spoiling("every value v becomes 255 - v", _still(lambda rgb: 255 - rgb)),
    "channels": Spoiling("red and blue exchanged", _still(lambda rgb: rgb[:, :, ::-1])),
    "phases": Spoiling("phases of the spatial frequencies drawn anew, amplitudes kept", phase_randomised),
    **{
        f"pasted 1/{n}": Spoiling(
            f"a square of 1/{n} of the side from another picture, edges feathered",
            lambda rgb, random, other: other,
            1 / n,
        )
        for n in (8, 4, 2)
    },
    "region upside down": Spoiling("a square of 1/4 of the side upside down, edges feathered", upside_down, REGION),
    "region blurred": Spoiling(
        "a square of 1/4 of the side blurred, σ 4 pixels, edges feathered", partial(blurred, sigma=4), REGION
    ),
}
