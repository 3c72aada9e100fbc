"""How well a saliency map predicts where people look, and maps to compare with.

The metrics are those of the MIT/Tübingen saliency benchmark (Kümmerer, Wallis & Bethge, "Saliency benchmarking made
easy", ECCV 2018). A map is an array (H, W) of any real type, larger = more salient, of exactly the image's size:
nothing is resized. A fixation is a point (x, y) in pixels from the top left corner of the image; it lies on the pixel
in row floor(y), column floor(x). Every fixation counts, repeated ones as often as they occur.

All metrics give one number for one image, and NaN where there is no fixation to predict (or none of other images to
tell apart from). They raise ValueError for a map that is not two-dimensional, real, finite and non-empty, and for
fixations that are not finite, lie outside the map, or have no two coordinates each.

A constant map scores 0.5 in AUC and shuffled AUC, 0 in NSS and CC, and stands for the uniform density in SIM and KLD.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import correlate1d, gaussian_filter1d, uniform_filter

METRICS = ("auc", "sauc", "nss", "cc", "sim", "kld")
FIXATION_SIGMA = 23.99  # pixels, the benchmark's own blur of fixations
SIGMA_LIMIT = 1e4  # pixels
KLD_FLOOR = 2.2204e-16  # the benchmark's regularisation of KLD
BOOTSTRAP_DRAWS = 1 << 20  # drawn at once
RESIDUAL_SIDE = 64  # Hou & Zhang 2007: the image is seen at this size


class PairedDifference(NamedTuple):
    """Mean of a - b over `count` images, with its confidence interval."""

    mean: float
    low: float
    high: float
    count: int


def auc(saliency: ArrayLike, x: ArrayLike, y: ArrayLike) -> float:
    """Area under the ROC curve, fixations against all pixels of the map (H, W).

    The probability that a fixation has a larger map value than a pixel drawn uniformly, ties counting one half.
    """
    saliency, rows, columns = _check(saliency, x, y)
    return _rank_score(saliency[rows, columns], saliency)


def shuffled_auc(saliency: ArrayLike, x: ArrayLike, y: ArrayLike, other_x: ArrayLike, other_y: ArrayLike) -> float:
    """Area under the ROC curve, fixations of this image against the fixations of all other images.

    `other_x`, `other_y` are in pixels of this image: a fixation x of an image w' wide becomes x · w/w'. A map that
    knows no more than where people look in general, such as a blob in the centre, scores about one half.
    """
    saliency, rows, columns = _check(saliency, x, y)
    negatives = saliency[_pixels(saliency.shape, other_x, other_y)]
    return _rank_score(saliency[rows, columns], negatives)


def nss(saliency: ArrayLike, x: ArrayLike, y: ArrayLike) -> float:
    """Normalised scanpath saliency: mean at the fixations of the map (H, W) with mean 0 and population std 1."""
    saliency, rows, columns = _check(saliency, x, y)
    if not len(rows):
        return np.nan
    values = _standardise(saliency)
    return float(values[rows, columns].mean())


def cc(saliency: ArrayLike, x: ArrayLike, y: ArrayLike, *, sigma: float = FIXATION_SIGMA) -> float:
    """Pearson's correlation over pixels of the map (H, W) with `fixation_map`; 0 where either is constant."""
    saliency, rows, columns = _check(saliency, x, y)
    return _correlation(saliency, _blurred(saliency.shape, rows, columns, sigma))


def sim(saliency: ArrayLike, x: ArrayLike, y: ArrayLike, *, sigma: float = FIXATION_SIGMA) -> float:
    """Similarity: Σ min(p, q) of the map (H, W) and `fixation_map`, both made to sum to 1; 1 is perfect.

    A map with negative values has its minimum subtracted first.
    """
    saliency, rows, columns = _check(saliency, x, y)
    return _intersection(saliency, _blurred(saliency.shape, rows, columns, sigma))


def kld(saliency: ArrayLike, x: ArrayLike, y: ArrayLike, *, sigma: float = FIXATION_SIGMA) -> float:
    """Kullback-Leibler divergence in nats, Σ p log(ε + p/(q + ε)), of `fixation_map` p from the map q (H, W).

    Both are made to sum to 1, a map with negative values has its minimum subtracted first; ε = 2.2204e-16; 0 is
    perfect.
    """
    saliency, rows, columns = _check(saliency, x, y)
    return _divergence(saliency, _blurred(saliency.shape, rows, columns, sigma))


def score(
    saliency: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    other_x: ArrayLike = (),
    other_y: ArrayLike = (),
    *,
    sigma: float = FIXATION_SIGMA,
    metrics: Iterable[str] = METRICS,
) -> dict[str, float]:
    """Several of METRICS for one map, by name; what the single functions give, with the shared work done once."""
    saliency, rows, columns = _check(saliency, x, y)
    names = list(metrics)
    if unknown := set(names) - set(METRICS):
        raise ValueError(f"no metric is called {', '.join(sorted(unknown))}: choose from {', '.join(METRICS)}")
    blurred = {"cc": _correlation, "sim": _intersection, "kld": _divergence}
    density = _blurred(saliency.shape, rows, columns, sigma) if blurred.keys() & set(names) else None
    result = {}
    for name in names:
        if name in blurred:
            result[name] = blurred[name](saliency, density)
        elif name == "sauc":
            result[name] = shuffled_auc(saliency, x, y, other_x, other_y)
        else:
            result[name] = {"auc": auc, "nss": nss}[name](saliency, x, y)
    return result


def fixation_map(height: int, width: int, x: ArrayLike, y: ArrayLike, *, sigma: float = FIXATION_SIGMA) -> np.ndarray:
    """Fixations counted per pixel and blurred with a Gaussian: (height, width) float64, all zero without fixations.

    The same to rounding as `scipy.ndimage.gaussian_filter` (reflection at the borders, cut at 4 σ), but made as a
    product of the two one-dimensional blurs at the fixated rows and columns alone, about 20 times faster.

    Args:
        sigma: standard deviation in pixels, above 0 and at most 10,000.
    """
    return _blurred((height, width), *_pixels((height, width), x, y), sigma)


def inter_observer(
    height: int,
    width: int,
    x: ArrayLike,
    y: ArrayLike,
    subject: ArrayLike,
    other_x: ArrayLike = (),
    other_y: ArrayLike = (),
    *,
    sigma: float = FIXATION_SIGMA,
    metrics: Iterable[str] = METRICS,
) -> dict[str, float]:
    """How well people predict each other on one image: an upper reference for maps that do not know who looks.

    The map of a subject is `fixation_map` of all other subjects, scored on the subject's own fixations; the result
    is the mean over the subjects who looked at the image. Fixations of an unknown subject (negative) are left out.
    NaN with fewer than two subjects.
    """
    x, y, subject = np.asarray(x, np.float64), np.asarray(y, np.float64), np.asarray(subject)
    if not x.shape == y.shape == subject.shape:
        raise ValueError(f"x, y and subject have shapes {x.shape}, {y.shape} and {subject.shape}, not the same")
    known = subject >= 0
    x, y, subject = x[known], y[known], subject[known]
    people, names = np.unique(subject), list(metrics)
    if len(people) < 2:
        return dict.fromkeys(names, np.nan)
    scores = []
    for person in people:
        own = subject == person
        saliency = fixation_map(height, width, x[~own], y[~own], sigma=sigma)
        scores.append(score(saliency, x[own], y[own], other_x, other_y, sigma=sigma, metrics=names))
    return {name: float(np.mean([one[name] for one in scores])) for name in names}


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean: images are drawn with replacement (Efron 1979).

    Args:
        values: one number per image; NaN, an image without a score, is left out.
        confidence: probability that the interval holds the mean, between 0 and 1.
        resamples: how many times the images are drawn.

    Returns:
        low and high; NaN with fewer than two images.
    """
    values = np.asarray(values, np.float64).ravel()
    values = values[~np.isnan(values)]
    if not 0 < confidence < 1 or resamples < 1 or not np.isfinite(values).all():
        raise ValueError("an interval needs finite values, 0 < confidence < 1 and resamples > 0")
    if len(values) < 2:
        return np.nan, np.nan
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, BOOTSTRAP_DRAWS // len(values))
    for start in range(0, resamples, step):
        part = means[start : start + step]
        part[:] = values[generator.integers(len(values), size=(len(part), len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_difference(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Mean of a - b over the images that both have a score for, and its bootstrap interval.

    Args:
        a, b: image -> score; NaN is no score.
    """
    differences = np.array([a[image] - b[image] for image in sorted(a.keys() & b.keys())], np.float64)
    differences = differences[~np.isnan(differences)]
    interval = bootstrap_interval(differences, confidence=confidence, resamples=resamples, seed=seed)
    return PairedDifference(float(differences.mean()) if len(differences) else np.nan, *interval, len(differences))


def uniform(height: int, width: int) -> np.ndarray:
    """The map that knows nothing: (height, width) float64 of ones."""
    return np.ones((height, width))


def centre_gaussian(height: int, width: int) -> np.ndarray:
    """The centre bias of photographs alone: a Gaussian with a std of a quarter of each side, (height, width), 0…1."""
    vertical, horizontal = (np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 4)) ** 2) for n in (height, width))
    return np.outer(vertical, horizontal)


def spectral_residual(rgb: np.ndarray, blur: float = 0.03) -> np.ndarray:
    """Spectral-residual saliency (Hou & Zhang, CVPR 2007) of (H, W, 3) uint8 RGB: map (H, W) float64, from 0 up.

    What the log amplitude spectrum of the image at 64×64 has beyond its own 3×3 average, transformed back with the
    image's phase, smoothed, squared, enlarged. The choices that the paper leaves open are OpenCV's
    (`StaticSaliencySpectralResidual`): grey rounded to bytes, bilinear sampling, a 5×5 Gaussian with σ = 8 before
    the square (the paper has σ = 8 after it), maximum 1 before the enlargement.

    Args:
        blur: std of a last Gaussian blur as a fraction of height and width; 0 for none.
    """
    rgb = np.asarray(rgb)
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
        raise ValueError(f"an image is (H, W, 3) uint8, not {rgb.shape} {rgb.dtype}")
    if not 0 <= blur <= 1:
        raise ValueError(f"blur is a fraction of the image's sides, not {blur}")
    height, width = rgb.shape[:2]
    grey = np.rint(rgb @ np.array([0.299, 0.587, 0.114]))  # (H, W)
    small = np.rint(_bilinear(RESIDUAL_SIDE, height) @ grey @ _bilinear(RESIDUAL_SIDE, width).T)  # (64, 64)
    if small.min() == small.max():
        return np.zeros((height, width))  # one colour: nothing stands out
    spectrum = np.fft.fft2(small)
    amplitude = np.abs(spectrum)
    logarithm = np.log(np.maximum(amplitude, amplitude.max() * np.finfo(np.float64).eps))
    residual = logarithm - uniform_filter(logarithm, 3, mode="mirror")
    signal = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum))))
    kernel = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 8**2))
    for axis in (0, 1):
        signal = correlate1d(signal, kernel / kernel.sum(), axis=axis, mode="mirror")
    signal = signal**2 / (signal**2).max()
    enlarge = [_bilinear(n, RESIDUAL_SIDE) for n in (height, width)]  # (H, 64), (W, 64)
    if blur:  # the blur is linear and separable: it may act on the enlargement itself
        enlarge = [gaussian_filter1d(m, blur * n, axis=0) for m, n in zip(enlarge, (height, width), strict=True)]
    return enlarge[0] @ signal @ enlarge[1].T  # (H, W)


def _bilinear(size: int, source: int) -> np.ndarray:
    """Matrix (size, source) that samples a signal of `source` values at `size` places, centres aligned, no filter."""
    position = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
    left = position.astype(np.intp)
    matrix = np.zeros((size, source))
    matrix[np.arange(size), left] = 1 - (position - left)
    matrix[np.arange(size), np.minimum(left + 1, source - 1)] += position - left
    return matrix


def _check(saliency: ArrayLike, x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The map as an array, and rows and columns of its fixations."""
    saliency = np.asarray(saliency)
    if saliency.ndim != 2 or not saliency.size or saliency.dtype.kind not in "biuf":
        raise ValueError(f"a map is a real (H, W) array, not {saliency.shape} {saliency.dtype}")
    if not (np.isfinite(saliency.min()) and np.isfinite(saliency.max())):
        raise ValueError("the map has values that are not finite")
    return saliency, *_pixels(saliency.shape, x, y)


def _pixels(shape: tuple[int, ...], x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of fixations on a map (H, W)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"fixations are two lists of the same length, not arrays {x.shape} and {y.shape}")
    height, width = shape
    outside = np.count_nonzero(~((x >= 0) & (x < width) & (y >= 0) & (y < height)))
    if outside:
        raise ValueError(f"{outside} of {len(x)} fixations are not within the map of {width}×{height} pixels")
    return y.astype(np.intp), x.astype(np.intp)


def _rank_score(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Mann-Whitney: how often a positive exceeds a negative, ties one half; exact counts, rounded once.

    Sorting all negatives is as fast as anything exact here: numpy sorts numbers with vector instructions.
    """
    if not positives.size or not negatives.size:
        return np.nan
    ordered = np.sort(negatives, axis=None)
    below = int(np.searchsorted(ordered, positives, side="left").sum())
    up_to = int(np.searchsorted(ordered, positives, side="right").sum())
    return (below + up_to) / (2 * positives.size * negatives.size)


def _scale(values: np.ndarray) -> np.ndarray:
    """As float64 with a largest absolute value of 1, so that sums and squares neither overflow nor vanish."""
    values = values.astype(np.float64)
    largest = max(-values.min(), values.max())
    return values / largest if largest else values


def _standardise(values: np.ndarray) -> np.ndarray:
    """Mean 0, population std 1; zeros for a constant map, whatever rounding does to its mean."""
    values = _scale(values)
    if values.min() == values.max():
        return np.zeros(values.shape)
    return (values - values.mean()) / values.std()


def _density(values: np.ndarray) -> np.ndarray:
    """Made non-negative and to sum to 1; uniform where that leaves nothing."""
    values = _scale(values)
    values = values - min(values.min(), 0.0)
    total = values.sum()
    return values / total if total else np.full(values.shape, 1 / values.size)


def _correlation(saliency: np.ndarray, fixated: np.ndarray) -> float:
    """CC of two maps; NaN where the second is empty."""
    if not fixated.any():
        return np.nan
    return float((_standardise(saliency) * _standardise(fixated)).mean())


def _intersection(saliency: np.ndarray, fixated: np.ndarray) -> float:
    """SIM of two maps; NaN where the second is empty."""
    if not fixated.any():
        return np.nan
    return float(np.minimum(_density(saliency), _density(fixated)).sum())


def _divergence(saliency: np.ndarray, fixated: np.ndarray) -> float:
    """KLD of the second map from the first; NaN where the second is empty."""
    if not fixated.any():
        return np.nan
    p, q = _density(fixated), _density(saliency)
    return float((p * np.log(KLD_FLOOR + p / (q + KLD_FLOOR))).sum())


def _blurred(shape: tuple[int, ...], rows: np.ndarray, columns: np.ndarray, sigma: float) -> np.ndarray:
    """Blurred counts (H, W) = (H, r) (r, c) (c, W), r and c the rows and columns that have fixations."""
    used_rows, row = np.unique(rows, return_inverse=True)
    used_columns, column = np.unique(columns, return_inverse=True)
    counts = np.zeros((len(used_rows), len(used_columns)))
    np.add.at(counts, (row, column), 1)
    return _impulses(used_rows, shape[0], sigma).T @ counts @ _impulses(used_columns, shape[1], sigma)


def _impulses(positions: np.ndarray, length: int, sigma: float) -> np.ndarray:
    """Gaussian-blurred unit impulses (n, length), the signal reflected at its ends (d c b a | a b c d | d c b a)."""
    if not 0 < sigma <= SIGMA_LIMIT:
        raise ValueError(f"sigma is in pixels, above 0 and at most {SIGMA_LIMIT:.0f}, not {sigma}")
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    period = 2 * length  # of the reflected signal, in which the impulse at p recurs at -1 - p
    folded = np.bincount(offsets % period, weights=kernel / kernel.sum(), minlength=period)
    place = np.arange(length)
    p = positions[:, None]
    return folded[(place - p) % period] + folded[(place + p + 1) % period]  # (n, length)
