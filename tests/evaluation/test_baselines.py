"""Maps that need no model."""

import math

import numpy as np
import pytest

from evaluation import baselines
from evaluation.fixation_metrics import Case, auc


def test_centre_gaussian():
    blob = baselines.centre_gaussian(81, 41)
    assert blob.shape == (81, 41) and blob[40, 20] == blob.max() == 1
    np.testing.assert_allclose(blob, blob[::-1, ::-1])
    assert blob[0, 20] == pytest.approx(math.exp(-0.5 * (40 / (81 / 4)) ** 2))
    assert blob[40, 0] == pytest.approx(math.exp(-0.5 * (20 / (41 / 4)) ** 2))


def test_spectral_residual_finds_the_odd_patch():
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:120, :160]
    grey = 128 + 60 * np.sin(columns * 0.5) * np.sin(rows * 0.5) + generator.normal(0, 2, (120, 160))
    grey[20:32, 100:116] = 250
    rgb = np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    saliency = baselines.spectral_residual(rgb)
    assert saliency.shape == (120, 160) and saliency.dtype == np.float64 and saliency.min() >= 0
    row, column = np.unravel_index(saliency.argmax(), saliency.shape)
    assert 14 <= row <= 38 and 94 <= column <= 122
    assert auc(Case.of(saliency, [108], [26])) > 0.97
    raw = baselines.spectral_residual(rgb, blur=0)
    assert raw.std() / raw.mean() > saliency.std() / saliency.mean()


def test_spectral_residual_edge_cases():
    assert not baselines.spectral_residual(np.full((30, 50, 3), 77, np.uint8)).any()
    for shape in ((1, 1, 3), (5, 200, 3), (64, 64, 3)):
        image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
        assert np.isfinite(baselines.spectral_residual(image)).all()
    checkers = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    assert np.isfinite(baselines.spectral_residual(checkers)).all()  # most of its spectrum is 0
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            baselines.spectral_residual(bad)
    with pytest.raises(ValueError, match="blur"):
        baselines.spectral_residual(checkers, blur=-0.1)


def test_resizing_weights_keep_constants_and_means():
    for size in (1, 50, 64, 200):
        np.testing.assert_allclose(baselines._linear_weights(64, size).sum(1), 1)
    enlarged = baselines._linear_weights(4, 8) @ np.arange(4)
    np.testing.assert_allclose(enlarged, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
