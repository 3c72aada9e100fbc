"""How near a reconstruction is to its original: in pixels, in structure, in the inverted feature, to a classifier."""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from models.errors import UserError

SSIM_WINDOW = 11  # pixels: 3.5 σ to either side


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


def agreement(probabilities: np.ndarray, of_original: np.ndarray) -> dict[str, float]:
    """Whether a classifier sees in a picture what it sees in the original; both (classes,).

    Returns:
        `top1`: 1 if the class it finds most likely is the original's; `top5`: 1 if that is among the five most
        likely; `probability`: what it gives to the original's class.
    """
    seen = int(of_original.argmax())
    higher = int((probabilities > probabilities[seen]).sum())
    return {"top1": float(higher == 0), "top5": float(higher < 5), "probability": float(probabilities[seen])}
