"""Saliency maps that need no model, to compare with."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.scaling import area_means

SPECTRAL_SIZE = 64  # side of the image whose spectrum is taken, Hou & Zhang (2007), Sec. 2.3


@dataclass(frozen=True)
class Baseline:
    """A row of the tables; `always`: without being asked.

    `make` gives the map (H, W) of an image (H, W, 3) uint8. Instead `predictor`, of the detector, may read the layer of
    every model: a row beside each.
    """

    about: str
    make: Callable[[np.ndarray], np.ndarray] | None = None
    always: bool = False
    predictor: str | None = None


def centre_gaussian(height: int, width: int) -> np.ndarray:
    """The centre bias alone: (height, width) float64 in 0…1, a Gaussian whose std is a quarter of each side."""
    vertical, horizontal = (
        np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 4)) ** 2) for size in (height, width)
    )
    return np.outer(vertical, horizontal)


def spectral_residual(rgb: np.ndarray, blur: float = 0.03) -> np.ndarray:
    """Spectral residual saliency (Hou & Zhang, CVPR 2007, Eq. 7-10) of (H, W, 3) uint8: (H, W) float64, not scaled.

    The grey image is averaged down to 64×64; of its log amplitude spectrum the 3×3 mean is taken away; the result,
    back in the image domain with the phase kept, is squared, blurred by `blur` times the side (0: not at all) and
    enlarged bilinearly. A constant image gives 0 everywhere.

    Raises:
        ValueError: not (H, W, 3) uint8, or a negative blur.
    """
    rgb = np.asarray(rgb)
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
        raise ValueError(f"an image (H, W, 3) uint8 is needed, not {rgb.shape} {rgb.dtype}")
    if not (math.isfinite(blur) and blur >= 0):
        raise ValueError(f"blur must not be negative, not {blur}")
    from scipy.ndimage import gaussian_filter, uniform_filter

    height, width = rgb.shape[:2]
    grey = rgb @ np.array([0.299, 0.587, 0.114])  # (H, W), ITU-R BT.601
    if np.ptp(grey) == 0:
        return np.zeros((height, width))
    small = area_means(grey, SPECTRAL_SIZE, SPECTRAL_SIZE)  # (64, 64)
    spectrum = np.fft.fft2(small)
    amplitude = np.abs(spectrum)
    log_amplitude = np.log(np.maximum(amplitude, np.finfo(float).eps * amplitude.max()))  # zeros have no logarithm
    residual = log_amplitude - uniform_filter(log_amplitude, 3, mode="nearest")
    squared = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    if blur:
        squared = gaussian_filter(squared, blur * SPECTRAL_SIZE)
    return _linear_weights(SPECTRAL_SIZE, height) @ squared @ _linear_weights(SPECTRAL_SIZE, width).T  # (H, W)


def _linear_weights(cells: int, size: int) -> np.ndarray:
    """(size, cells): linear interpolation between the centres of `cells` cells, at the centres of `size` pixels."""
    centres = ((np.arange(size) + 0.5) * (cells / size) - 0.5).clip(0, cells - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(cells)))


BASELINES: dict[str, Baseline] = {
    "centre-gaussian": Baseline(
        "Gaussian at the image's centre, standard deviation a quarter of its sides",
        lambda rgb: centre_gaussian(*rgb.shape[:2]),
        always=True,
    ),
    "spectral-residual": Baseline("spectral residual (Hou & Zhang 2007), blur 0.03", spectral_residual, always=True),
    "spectral-residual-raw": Baseline("spectral residual without blur", lambda rgb: spectral_residual(rgb, blur=0)),
    "feature-contrast": Baseline(
        "Σ over channels of |F - blurred F|, as in DeepFeat (Mahdi, Qin & Crosby 2019)", predictor="feature-contrast"
    ),
    "rarity": Baseline("how improbable a feature is in its image: surprise that predicts nothing", predictor="rarity"),
    "uniform": Baseline("a constant map: chance", lambda rgb: np.zeros(rgb.shape[:2])),
}
