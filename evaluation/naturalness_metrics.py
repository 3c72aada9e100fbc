"""How well a loss tells spoiled copies from originals, and a map the changed region from the rest of its picture."""

import math

import numpy as np
from torch import from_numpy
from torch.nn.functional import interpolate

from evaluation.fixation_metrics import mean_rank
from models.unnaturalness import pad_to

WEIGHTS_AT_ONCE = 1 << 22  # values of the bootstrap's resamples held at a time


def higher(copy: float, original: float) -> float:
    """1 where the copy has the higher loss, 0 where the original has, ½ for a tie; NaN without a copy."""
    return math.nan if math.isnan(copy) else float(np.heaviside(copy - original, 0.5))


def auc_with_interval(
    copies: np.ndarray, originals: np.ndarray, *, confidence: float, resamples: int, seed: int
) -> tuple[float, float, float]:
    """AUC over N images, (N,) losses each, and the ends of its percentile bootstrap interval.

    The AUC is the probability that some copy has a higher loss than some original. Images are drawn with replacement,
    each with its copy and its original; an image that is drawn twice counts as one image, so that a copy is not
    compared with its own original more often than among N images. NaN without images; no interval for fewer than two.
    """
    count = len(copies)
    if not count:
        return math.nan, math.nan, math.nan
    table = np.heaviside(np.subtract.outer(copies, originals), 0.5)  # (N, N): copy n against original m
    if count < 2:
        return float(table.mean()), math.nan, math.nan
    own = np.diag(table)
    generator, found = np.random.default_rng(seed), np.empty(resamples)
    step = max(1, WEIGHTS_AT_ONCE // count)
    for start in range(0, resamples, step):
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start))  # (R, N)
        pairs = count**2 - np.square(drawn).sum(1)  # of two images; 0 where one image fills the sample
        others = ((drawn @ table) * drawn - np.square(drawn) * own).sum(1) / np.where(pairs, pairs, np.nan)
        found[start : start + step] = (drawn @ own / count + (count - 1) * others) / count
    low, high = np.nanquantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(table.mean()), float(low), float(high)


def region_auc(unnaturalness: np.ndarray, mask: np.ndarray, stride: tuple[int, int]) -> float:
    """How well a map (h, w) of a layer with this stride tells the pixels of a region from all others, 0…1, ½ by chance.

    The map is enlarged and placed as `models.unnaturalness.postprocess` does, without power and blur; pixels at the rim
    that it does not reach do not count. NaN where none of the others, or none of the region's, is left.
    """
    values = interpolate(from_numpy(unnaturalness)[None, None], scale_factor=stride, mode="bilinear")[0, 0].numpy()
    values = pad_to(values, *np.minimum(values.shape, mask.shape))  # cropped where the map is larger
    inside = pad_to(mask, *values.shape)
    return mean_rank(values[inside], values[~inside])
