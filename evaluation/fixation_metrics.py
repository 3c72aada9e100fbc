"""How well a saliency map predicts where people look.

The metrics follow the MIT/Tübingen saliency benchmark (saliency.tuebingen.ai; definitions as in the Python package
pysaliency 0.2.22, which it runs): every fixation counts, repeats too; maps stay floats; ties count one half.

A map is (H, W), of the image's own size: nothing is resized here. Fixations are arrays x, y (K,) in pixels, floats
allowed, counted from 0 at the left and top edge: (x, y) lies in the pixel of row floor(y) and column floor(x).

| input | auc, shuffled_auc | nss | cc | sim, kld |
|---|---|---|---|---|
| constant map | 0.5 | 0 | 0 | taken as the uniform density |
| no fixations | NaN | NaN | NaN | NaN |
| one fixation | as any other number | | | |
| none on other images | shuffled_auc NaN | – | – | – |
| image of one pixel | 0.5 | 0 | 0 | 1, 0 |

Every metric raises ValueError for a map that is not two-dimensional, is empty or holds NaN or infinities, and for
fixations that are not finite or lie outside the map.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

BLUR_SIGMA = 23.99  # pixels; the benchmark's blur of the fixations for CC, SIM and KLD, whatever the image's size
KLD_EPSILON = 2.2204e-16  # the benchmark's, from the MATLAB code of the MIT benchmark
TRUNCATE = 4.0  # standard deviations after which a Gaussian is cut, as scipy and the benchmark do


@dataclass(frozen=True)
class Case:
    """What a metric reads: a map (H, W) of an image, and the pixels that people fixated there and in other images.

    rows, columns (K,) and other_rows, other_columns (M,) are int64, repeats kept; `sigma` blurs the fixations.
    """

    values: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    other_rows: np.ndarray
    other_columns: np.ndarray
    sigma: float = BLUR_SIGMA

    @classmethod
    def of(
        cls,
        saliency: ArrayLike,
        x: ArrayLike,
        y: ArrayLike,
        other_x: ArrayLike = (),
        other_y: ArrayLike = (),
        sigma: float = BLUR_SIGMA,
    ) -> "Case":
        """From coordinates in pixels; ValueError for a map or fixations that are none."""
        values = _check_map(saliency)
        return cls(values, *_pixels(values.shape, x, y), *_pixels(values.shape, other_x, other_y), sigma)

    @cached_property
    def found(self) -> np.ndarray:
        """The map (K,) where people looked."""
        return self.values[self.rows, self.columns]

    @cached_property
    def target(self) -> np.ndarray:
        """The fixations (H, W) float64, each a Gaussian of mass 1; made once for all metrics."""
        height, width = self.values.shape
        return _blurred_impulses(self.rows, height, self.sigma).T @ _blurred_impulses(self.columns, width, self.sigma)


@dataclass(frozen=True)
class Metric:
    """A score of a map where somebody looked at the image; `title` heads its column.

    `of_people`: it also says how well people predict one another, with the map of the others' fixations.
    """

    title: str
    score: Callable[[Case], float]
    of_people: bool = False

    def __call__(self, case: Case) -> float:
        """The score; NaN where nobody looked."""
        return self.score(case) if case.rows.size else math.nan


def auc(case: Case) -> float:
    """Area under the ROC curve, 0…1, 0.5 = chance: fixated pixels against ALL pixels of the map.

    The probability that the map is higher at a fixation than at a pixel drawn at random.
    """
    return mean_rank(case.found, case.values.ravel())


def shuffled_auc(case: Case) -> float:
    """Shuffled AUC, 0…1: fixated pixels against the pixels fixated in other images, about 0.5 for a mere centre bias.

    All of those are used, repeats too (`fixations_elsewhere` makes them), so the value is deterministic. NaN where
    there are none.
    """
    return mean_rank(case.found, case.values[case.other_rows, case.other_columns])


def nss(case: Case) -> float:
    """Normalised scanpath saliency: mean over the fixations of the map in units of its population std, mean 0."""
    return float(_standardised(case.values)[case.rows, case.columns].mean())


def cc(case: Case) -> float:
    """Pearson correlation, -1…1, of the map with the blurred fixations."""
    return float(np.vdot(_standardised(case.values), _standardised(case.target)) / case.values.size)


def sim(case: Case) -> float:
    """Similarity, 0…1: the mass that the map and the blurred fixations share as densities."""
    return float(np.minimum(_density(case.values), _density(case.target)).sum())


def kld(case: Case) -> float:
    """Kullback-Leibler divergence in nats of the map from the blurred fixations; 0 is best.

    Both are scaled to densities p (map) and q (fixations): Σ q log(ε + q / (p + ε)).
    """
    p, q = _density(case.values), _density(case.target)
    return float((q * np.log(KLD_EPSILON + q / (p + KLD_EPSILON))).sum())


# Every metric of the tables, by its name in files.
METRICS: dict[str, Metric] = {
    "auc": Metric("AUC", auc, of_people=True),
    "sauc": Metric("sAUC", shuffled_auc, of_people=True),
    "nss": Metric("NSS", nss, of_people=True),
    "cc": Metric("CC", cc),
    "sim": Metric("SIM", sim),
    "kld": Metric("KLD", kld),
}


def all_scores(
    saliency: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    other_x: ArrayLike,
    other_y: ArrayLike,
    *,
    sigma: float = BLUR_SIGMA,
) -> dict[str, float]:
    """All metrics of one map, by their names in METRICS."""
    case = Case.of(saliency, x, y, other_x, other_y, sigma)
    return {name: metric(case) for name, metric in METRICS.items()}


def fixations_elsewhere(
    image_index: np.ndarray, x: np.ndarray, y: np.ndarray, sizes: np.ndarray, image: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fixations of all images but one, in pixels of that one: the negatives of `shuffled_auc`.

    Args:
        image_index, x, y: (K,) image, column and row of every fixation of the data set.
        sizes: (N, 2) height and width of every image.
        image: the image to leave out, 0…N-1.

    Returns:
        x, y (M,) float64: the coordinates times w/w' and h/h', w' × h' being the size of their own image.
    """
    elsewhere = image_index != image
    height, width = sizes[image]
    own_height, own_width = np.asarray(sizes, dtype=np.float64)[image_index[elsewhere]].T  # (M,) each
    # A product may round up to the very edge, one past the last pixel.
    scaled_x = np.minimum(x[elsewhere] * (width / own_width), np.nextafter(width, 0.0))
    scaled_y = np.minimum(y[elsewhere] * (height / own_height), np.nextafter(height, 0.0))
    return scaled_x, scaled_y


def inter_observer(
    x: ArrayLike,
    y: ArrayLike,
    subject: ArrayLike,
    other_x: ArrayLike,
    other_y: ArrayLike,
    height: int,
    width: int,
    *,
    sigma: float = BLUR_SIGMA,
) -> dict[str, float]:
    """How well people predict one another on one image, leaving one subject out, by the metrics that say so.

    The map for a subject is the fixations of all other subjects blurred by `sigma` pixels; it is scored on the
    fixations of that subject, against the same negatives as a model's map (for sauc, other_x and other_y: those of
    everybody on the other images). Returned is the mean over the subjects who looked at the image; NaN for fewer
    than two of them, or if any subject is unknown (negative).
    """
    subject = np.asarray(subject)
    rows, columns = _pixels((height, width), x, y)
    if subject.shape != rows.shape:
        raise ValueError(f"{subject.size} subjects for {rows.size} fixations")
    present = np.unique(subject)
    of_people = {name: metric for name, metric in METRICS.items() if metric.of_people}
    if len(present) < 2 or present[0] < 0:
        return dict.fromkeys(of_people, math.nan)
    others = _pixels((height, width), other_x, other_y)
    by_row = _blurred_impulses(rows, height, sigma)  # (K, H)
    by_column = _blurred_impulses(columns, width, sigma)  # (K, W)
    scores = []
    for left_out in present:
        own = subject == left_out
        prediction = by_row[~own].T @ by_column[~own]  # (H, W)
        case = Case(prediction, rows[own], columns[own], *others, sigma)
        scores.append([metric(case) for metric in of_people.values()])
    return dict(zip(of_people, np.mean(scores, axis=0).tolist(), strict=True))


def _blurred_impulses(positions: np.ndarray, size: int, sigma: float) -> np.ndarray:
    """(K, size): row k is a unit impulse at positions[k] after a Gaussian blur mirrored at both ends.

    Equal to scipy's `gaussian_filter`, which cuts after 4 standard deviations. A Gaussian is a column times a row, so
    fixations are blurred by one matrix product of their impulses.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"the blur's standard deviation must be positive, not {sigma}")
    radius = int(TRUNCATE * sigma + 0.5)
    by_distance = np.exp(-0.5 * (np.arange(radius + 2) / sigma) ** 2)
    by_distance[radius + 1] = 0  # stands for every distance beyond the cut
    by_distance /= by_distance[0] + 2 * by_distance[1:].sum()
    cells = np.arange(size)
    blurred = np.zeros((len(positions), size))
    periods = radius // (2 * size) + 1
    for shift in range(-periods, periods + 1):
        for source in (positions, -1 - positions):  # … c b a | a b c … | … c b a: a mirror, then period 2 size
            distance = np.abs(cells - (source[:, None] + 2 * size * shift))  # (K, size)
            if distance.size and distance.min() <= radius:
                blurred += by_distance[np.minimum(distance, radius + 1)]
    return blurred


def _check_map(saliency: ArrayLike) -> np.ndarray:
    """The map as (H, W) float32 or float64.

    Raises:
        ValueError: not two-dimensional, empty, not real numbers, or NaN or infinities in it.
    """
    values = np.asarray(saliency)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a map (H, W) is needed, not an array of shape {values.shape}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"a map of real numbers is needed, not of {values.dtype}")
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the map holds NaN or infinities")
    return values


def _pixels(shape: Sequence[int], x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns (K,) int64 of fixations in an image of shape (H, W).

    Raises:
        ValueError: unequal lengths, coordinates not finite, or outside.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"fixations need x and y of one length, not of shapes {x.shape} and {y.shape}")
    height, width = shape
    outside = ~((x >= 0) & (x < width) & (y >= 0) & (y < height))  # NaN is outside too
    if outside.any():
        raise ValueError(f"{outside.sum()} of {x.size} fixations lie outside the map of {width}×{height} pixels")
    return y.astype(np.int64), x.astype(np.int64)


def mean_rank(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Mean over the positives of the share of negatives below, ties one half: the area under the ROC curve."""
    if not positives.size or not negatives.size:
        return math.nan
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    not_above = np.searchsorted(ordered, positives, side="right")
    return float((below + not_above).mean() / (2 * ordered.size))


def _rescaled(values: np.ndarray) -> np.ndarray:
    """float64; extreme values times a power of two, which is exact, so that no square over- or underflows."""
    values = values.astype(np.float64, copy=False)
    exponent = int(np.frexp(max(values.max(), -values.min()))[1])
    return values if abs(exponent) < 300 else np.ldexp(values, -exponent)


def _standardised(values: np.ndarray) -> np.ndarray:
    """Mean 0, population std 1, float64; a constant map becomes 0."""
    if values.max() == values.min():  # its std need not round to 0
        return np.zeros(values.shape)
    values = _rescaled(values)
    values = values - values.mean()
    return values / values.std()


def _density(values: np.ndarray) -> np.ndarray:
    """Scaled to sum 1; a map with negative values is first shifted to minimum 0, and 0 everywhere becomes uniform."""
    values = _rescaled(values)
    if values.min() < 0:
        values = values - values.min()
    total = values.sum()
    return values / total if total > 0 else np.full(values.shape, 1 / values.size)
