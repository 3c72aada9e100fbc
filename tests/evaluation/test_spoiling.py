"""Spoiled copies: each is exactly what it says, and only where it says so."""

import numpy as np
import pytest

from evaluation import spoiling
from evaluation.spoiling import SPOILINGS, Spoiling, copies
from tests.conftest import make_photo

SIZE = (61, 70)
PHOTO, OTHER = make_photo(1, *SIZE), make_photo(2, *SIZE)
REGIONS = [name for name, entry in SPOILINGS.items() if entry.side is not None]
WHOLE = [name for name in SPOILINGS if name not in REGIONS]


def spoiled(name: str, rgb: np.ndarray = PHOTO, image: str = "a", seed: int = 0) -> np.ndarray:
    return copies(rgb, OTHER, image, [name], seed)[name].picture


@pytest.mark.parametrize("name", SPOILINGS)
def test_copies_follow_from_seed_and_names(name: str) -> None:
    first = copies(PHOTO, OTHER, "a", [name], 0)[name]
    again = copies(PHOTO, OTHER, "a", list(reversed(SPOILINGS)), 0)[name]
    assert np.array_equal(first.picture, again.picture) and np.array_equal(first.mask, again.mask)
    assert first.picture.shape == PHOTO.shape
    assert not np.array_equal(first.picture, PHOTO)
    drawn = name.startswith(("noise", "shuffled", "phases", "pasted", "region"))
    for other in ({"seed": 1}, {"image": "b"}):
        assert np.array_equal(first.picture, spoiled(name, **other)) != drawn


@pytest.mark.parametrize("name", REGIONS)
def test_mask_is_what_was_changed(name: str) -> None:
    black, white = np.zeros((*SIZE, 3), np.uint8), np.full((*SIZE, 3), 255, np.uint8)
    changing = Spoiling("", lambda rgb, random, other: other, SPOILINGS[name].side)
    copy = changing.spoil(black, np.random.default_rng(0), white)
    assert np.array_equal(copy.picture[:, :, 0] > 0, copy.mask), "all of a region changes, its feathered rim too"
    side = round(SPOILINGS[name].side * SIZE[0])
    assert copy.mask.sum() == side**2 and copy.mask.any(axis=0).sum() == side == copy.mask.any(axis=1).sum()
    copy = copies(PHOTO, OTHER, "a", [name], 0)[name]
    assert np.array_equal(copy.picture[~copy.mask], PHOTO[~copy.mask])
    assert (copy.picture[copy.mask] != PHOTO[copy.mask]).mean() > 0.5


@pytest.mark.parametrize("seed", range(20))
def test_regions_stay_inside_and_reach_every_edge(seed: int) -> None:
    found = [copies(PHOTO, OTHER, f"{n}", ["pasted 1/2"], seed)["pasted 1/2"].mask for n in range(5)]
    assert {mask.sum() for mask in found} == {30 * 30}
    first = copies(PHOTO, OTHER, "0", ["region blurred"], seed)["region blurred"].mask
    assert first.sum() == 15 * 15


def test_pasted_square_is_the_other_picture_inside_and_blends_at_the_rim() -> None:
    copy = copies(PHOTO, OTHER, "a", ["pasted 1/2"], 0)["pasted 1/2"]
    rows, columns = np.nonzero(copy.mask)
    top, left, side, rim = rows.min(), columns.min(), 30, round(spoiling.FEATHER * 30)
    inner = np.s_[top + rim : top + side - rim, left + rim : left + side - rim]
    assert np.array_equal(copy.picture[inner], OTHER[inner])
    corner = (top, left)
    expected = np.rint((OTHER[corner] + rim * PHOTO[corner].astype(float)) / (rim + 1))
    assert np.array_equal(copy.picture[corner], expected)


def test_feather_is_symmetric_and_never_zero() -> None:
    for side in (1, 2, 3, 8, 31):
        weight = spoiling.feathered(side)
        assert weight.shape == (side, side) and weight.min() > 0 and weight.max() <= 1
        assert np.array_equal(weight, weight[::-1]) and np.array_equal(weight, weight.T)
    assert spoiling.feathered(16)[8, 8] == 1 and spoiling.feathered(16)[8, 0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("sigma", [5, 10, 25])
def test_noise_has_its_deviation(sigma: int) -> None:
    grey = np.full((100, 120, 3), 128, np.uint8)
    noise = spoiled(f"noise {sigma}", grey).astype(float) - 128
    assert noise.std() == pytest.approx(sigma, rel=0.02) and abs(noise.mean()) < 0.5
    assert abs(np.corrcoef(noise[:, :, 0].ravel(), noise[:, :, 1].ravel())[0, 1]) < 0.03
    assert spoiled("noise 25", np.zeros((9, 9, 3), np.uint8)).dtype == np.uint8


@pytest.mark.parametrize("sigma", [1, 2, 4])
def test_blur_of_a_point_is_a_gaussian(sigma: int) -> None:
    point = np.zeros((65, 65, 3), np.uint8)
    point[32, 32, 1] = 255
    expected = 255 * np.exp(-(np.arange(-32, 33) ** 2) / (2 * sigma**2)) / (np.sqrt(2 * np.pi) * sigma)
    found = spoiled(f"blur {sigma}", point)
    central = np.exp(-0.5 * np.add.outer(*2 * [(np.arange(-32, 33) / sigma) ** 2]))
    np.testing.assert_allclose(found[:, :, 1], 255 * central / central.sum(), atol=0.6)
    assert not found[:, :, ::2].any() and expected.sum() == pytest.approx(255, rel=1e-3)


@pytest.mark.parametrize("grid", [2, 4, 8])
def test_shuffling_permutes_the_patches(grid: int) -> None:
    height, width = SIZE[0] // grid, SIZE[1] // grid
    top, left = (SIZE[0] - grid * height) // 2, (SIZE[1] - grid * width) // 2
    numbers = np.arange(grid**2)

    def patch(rgb: np.ndarray, number: int) -> bytes:
        row, column = divmod(number, grid)
        y, x = top + row * height, left + column * width
        return rgb[y : y + height, x : x + width].tobytes()

    copy = spoiled(f"shuffled {grid}×{grid}")
    before, after = ([patch(rgb, n) for n in numbers] for rgb in (PHOTO, copy))
    assert sorted(before) == sorted(after)
    assert not any(a == b for a, b in zip(before, after, strict=True)), "none stays"
    rim = np.ones(SIZE, bool)
    rim[top : top + grid * height, left : left + grid * width] = False
    assert np.array_equal(copy[rim], PHOTO[rim])


def test_phases_keep_the_amplitude_spectrum_the_mean_and_the_channels_relations() -> None:
    for size in (SIZE, (24, 24), (24, 31)):
        photo = make_photo(5, *size)
        copy = spoiled("phases", photo)
        before, after = (np.fft.fft2(rgb.astype(float), axes=(0, 1)) for rgb in (photo, copy))
        np.testing.assert_allclose(np.abs(after), np.abs(before), rtol=1e-3, atol=np.abs(before).max() * 1e-6)
        np.testing.assert_allclose(copy.mean(axis=(0, 1)), photo.mean(axis=(0, 1)), rtol=1e-4)
        cross_before, cross_after = (f[:, :, 0] * f[:, :, 1].conj() for f in (before, after))
        np.testing.assert_allclose(cross_after, cross_before, atol=np.abs(cross_before).max() * 1e-6)
        assert abs(np.corrcoef(copy.ravel(), photo.ravel())[0, 1]) < 0.9


def test_reflections_and_exchanges_undo_themselves() -> None:
    for name in ("mirrored", "upside down", "inverted", "channels"):
        assert np.array_equal(spoiled(name, spoiled(name)), PHOTO)
    assert np.array_equal(spoiled("mirrored")[:, 0], PHOTO[:, -1])
    assert np.array_equal(spoiled("upside down")[0], PHOTO[-1])
    assert np.array_equal(spoiled("inverted").astype(int) + PHOTO, np.full(PHOTO.shape, 255))
    assert np.array_equal(spoiled("channels")[..., 0], PHOTO[..., 2])


def test_region_upside_down_turns_the_square_itself() -> None:
    copy = copies(PHOTO, OTHER, "a", ["region upside down"], 0)["region upside down"]
    rows, columns = np.nonzero(copy.mask)
    square = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    inner = np.s_[2:-2, 2:-2]
    assert np.array_equal(copy.picture[square][inner], PHOTO[square][::-1][inner])


def test_jpeg_is_coarse_and_one_copy_alone_is_harmless() -> None:
    smooth = make_photo(3, 64, 64)
    error = np.abs(spoiled("jpeg 10", smooth).astype(int) - smooth)
    assert 1 < error.mean() < 20
    assert [name for name, entry in SPOILINGS.items() if entry.harmless] == ["mirrored"]
    assert len(WHOLE) == 15 and len(REGIONS) == 5
