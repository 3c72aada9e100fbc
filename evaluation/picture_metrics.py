"""How near a reconstruction is to its original: in pixels, in structure, in the inverted feature, to a classifier."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from models.errors import UserError

SSIM_WINDOW = 11  # pixels: 3.5 σ to either side
BLUR = 4.0  # pixels: σ of the blur that takes fine noise away, which hides all else from `ssim` and `psnr`


def psnr(picture: np.ndarray, original: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures (H, W, 3) in 0-255; NaN for equal ones, where it is infinite."""
    if np.array_equal(picture, original):
        return float("nan")
    return float(peak_signal_noise_ratio(original.astype(np.float64), picture.astype(np.float64), data_range=255))


def ssim(picture: np.ndarray, original: np.ndarray) -> float:
    """Structural similarity of pictures (H, W, 3) in 0-255, mean over channels, with Gaussian windows of σ = 1.5.

    Wang et al. 2004, Sec. III-B: population covariances, K₁ = 0.01, K₂ = 0.03.

    Raises:
        UserError: the pictures are smaller than a window.
    """
    if min(original.shape[:2]) < SSIM_WINDOW:
        height, width = original.shape[:2]
        raise UserError(
            f"pictures of {width}×{height} have no structural similarity, whose window is {SSIM_WINDOW}×{SSIM_WINDOW}: "
            "give larger ones"
        )
    pictures = (original.astype(np.float64), picture.astype(np.float64))
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(*pictures, data_range=255, channel_axis=2, **settings))


def feature_error(feature: np.ndarray, target: np.ndarray) -> float:
    """|φ(x) - φ₀|² / |φ₀|² of features of one shape: 0 when inverted, 1 for a feature of nothing but zeros."""
    feature, target = feature.astype(np.float64), target.astype(np.float64)
    return float(np.square(feature - target).sum() / np.square(target).sum())


def blur(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) after a Gaussian blur of σ = `BLUR` pixels, in float64."""
    return gaussian_filter(picture.astype(np.float64), (BLUR, BLUR, 0))


def colour_correlation(picture: np.ndarray, original: np.ndarray) -> float:
    """Mean over channels of the correlation of pictures (H, W, 3); a flat channel of either counts 0.

    It sees whether what is red, green and blue is so in the right places, not how strongly.
    """
    values = [p.astype(np.float64).reshape(-1, p.shape[2]) for p in (picture, original)]
    centred = [v - v.mean(axis=0) for v in values]
    norms = np.prod([np.linalg.norm(c, axis=0) for c in centred], axis=0)
    products = (centred[0] * centred[1]).sum(axis=0)
    return float(np.divide(products, norms, out=np.zeros_like(norms), where=norms > 1e-9).mean())


@dataclass(frozen=True)
class Comparison:
    """What a score may read.

    Attributes:
        picture, original: (H, W, 3) in 0-255; `blurred`, `blurred_original`: after `blur`.
        feature, target: of the backbone whose feature was inverted.
        probabilities, of_original: (classes,) of the classifier; None where there is none.
    """

    picture: np.ndarray
    original: np.ndarray
    blurred: np.ndarray
    blurred_original: np.ndarray
    feature: np.ndarray
    target: np.ndarray
    probabilities: np.ndarray | None = None
    of_original: np.ndarray | None = None


METRICS: dict[str, Callable[[Comparison], float]] = {
    "feature_error": lambda c: feature_error(c.feature, c.target),
    "ssim": lambda c: ssim(c.picture, c.original),
    "psnr": lambda c: psnr(c.picture, c.original),
    "ssim_blurred": lambda c: ssim(c.blurred, c.blurred_original),
    "psnr_blurred": lambda c: psnr(c.blurred, c.blurred_original),
    "colour_blurred": lambda c: colour_correlation(c.blurred, c.blurred_original),
}
CLASSIFIER_METRICS: dict[str, Callable[[Comparison], float]] = {  # those that need one
    name: lambda c, name=name: agreement(c.probabilities, c.of_original)[name]
    for name in ("top1", "top5", "probability")
}


def agreement(probabilities: np.ndarray, of_original: np.ndarray) -> dict[str, float]:
    """Whether a classifier sees in a picture what it sees in the original; both (classes,).

    Returns:
        `top1`: 1 if the class it finds most likely is the original's; `top5`: 1 if that is among the five most
        likely; `probability`: what it gives to the original's class.
    """
    seen = int(of_original.argmax())
    higher = int((probabilities > probabilities[seen]).sum())
    return {"top1": float(higher == 0), "top5": float(higher < 5), "probability": float(probabilities[seen])}
