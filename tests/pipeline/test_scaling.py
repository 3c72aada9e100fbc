"""Area averaging: against ImageMagick's `-scale`, which the authors' code called, and against plain sums."""

from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest

from pipeline.scaling import area_means, area_scale

VECTORS = Path(__file__).parents[1] / "reference" / "scale.npz"
CASES = ("down_75x100", "down_47x63", "tall_90x33", "up_20x30", "mixed_20x63", "same_32x32")


@pytest.mark.parametrize("case", CASES)
def test_imagemagick(case: str) -> None:
    with np.load(VECTORS) as vectors:
        source, expected = vectors[f"{case}_in"], vectors[f"{case}_out"]
    found = area_scale(source, *expected.shape[:2])
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert (found == expected).mean() >= 0.995
    assert np.abs(found.astype(int) - expected).max() <= 1


def exact_mean(values: np.ndarray, row: int, column: int, height: int, width: int) -> Fraction:
    """Mean of the rectangle of output pixel (row, column), by rational arithmetic."""
    h, w = values.shape
    top, bottom = Fraction(row * h, height), Fraction((row + 1) * h, height)
    left, right = Fraction(column * w, width), Fraction((column + 1) * w, width)
    total = Fraction(0)
    for y in range(floor(top), h):
        for x in range(floor(left), w):
            tall, wide = min(bottom, y + 1) - max(top, y), min(right, x + 1) - max(left, x)
            if tall > 0 and wide > 0:
                total += int(values[y, x]) * tall * wide
    return total / ((bottom - top) * (right - left))


@pytest.mark.parametrize("size", [(7, 9, 4, 5), (5, 4, 5, 9), (3, 3, 8, 2), (1, 6, 3, 3), (40, 2, 33, 1)])
def test_every_pixel_is_the_floor_of_the_exact_mean(size: tuple[int, int, int, int]) -> None:
    h, w, height, width = size
    source = np.random.default_rng(sum(size)).integers(0, 256, (h, w, 3), dtype=np.uint8)
    source[:, : w // 2] = 255  # means that are whole numbers must not fall below
    found = area_scale(source, height, width)
    for channel in range(3):
        expected = [
            [floor(exact_mean(source[..., channel], r, c, height, width)) for c in range(width)] for r in range(height)
        ]
        assert np.array_equal(found[..., channel], expected)


def test_constants_and_sums_are_kept() -> None:
    for value in (0, 1, 128, 255):
        assert (area_scale(np.full((333, 517, 3), value, np.uint8), 256, 256) == value).all()
    grey = np.random.default_rng(0).normal(size=(70, 51))
    assert area_means(grey, 64, 64).shape == (64, 64)
    assert area_means(grey, 64, 64).mean() == pytest.approx(grey.mean(), abs=1e-12)
