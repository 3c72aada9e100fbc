"""Scores of several models on the same images: means with intervals, paired differences, tables."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
RESAMPLES = 10_000
MEANS_AT_ONCE = 1 << 20  # values drawn at a time by the bootstrap
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # by image, model and metric


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over images (Efron & Tibshirani 1993, Sec. 13.3).

    Args:
        values: (N,) one score per image; NaN (an image without fixations) is left out.
        confidence: probability covered, between 0 and 1.
        resamples: number of samples of N images drawn with replacement.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        lower and upper end; NaN for fewer than two scores, which say nothing about the spread.

    Raises:
        ValueError: infinite scores, or a setting out of range.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite or NaN")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence {confidence} must be between 0 and 1, and resamples {resamples} at least 1")
    if len(values) < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, MEANS_AT_ONCE // len(values))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        means[start : start + count] = values[generator.integers(len(values), size=(count, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_difference(
    first: ArrayLike, second: ArrayLike, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of first - second over the same images, with the ends of its `bootstrap_interval`.

    An image for which either score is NaN is left out; all three are NaN where none is left.

    Raises:
        ValueError: unequal lengths, infinite scores, or a setting out of range.
    """
    first, second = (np.asarray(scores, dtype=np.float64).ravel() for scores in (first, second))
    if first.shape != second.shape:
        raise ValueError(f"{first.size} and {second.size} scores cannot be paired")
    if np.isinf(first).any() or np.isinf(second).any():
        raise ValueError("scores must be finite or NaN")
    differences = first - second
    differences = differences[~np.isnan(differences)]
    low, high = bootstrap_interval(differences, confidence=confidence, resamples=resamples, seed=seed)
    return float(differences.mean()) if differences.size else math.nan, low, high


def column(scores: Scores, model: str, metric: str) -> np.ndarray:
    """Scores (N,) of one model by image; NaN where there is none."""
    return np.array([of_image[model][metric] for of_image in scores.values()])


def summarise(scores: Scores, model: str, metrics: Sequence[str], seed: int) -> dict[str, Any]:
    """Mean over images by metric, and `intervals` by metric from a bootstrap; None where there is no score."""
    means: dict[str, Any] = {}
    intervals = {}
    for metric in metrics:
        values = column(scores, model, metric)
        values = values[~np.isnan(values)]
        means[metric] = float(values.mean()) if values.size else None
        intervals[metric] = _numbers(bootstrap_interval(values, seed=seed))
    return {**means, "intervals": intervals}


def difference(scores: Scores, first: str, second: str, metrics: Sequence[str], seed: int) -> dict[str, Any]:
    """Mean of `first` - `second` over the same images by metric, and `intervals`."""
    entry: dict[str, Any] = {"first": first, "second": second, "intervals": {}}
    for metric in metrics:
        pair = (column(scores, model, metric) for model in (first, second))
        mean, *interval = paired_difference(*pair, seed=seed)
        entry[metric] = None if math.isnan(mean) else mean
        entry["intervals"][metric] = _numbers(interval)
    return entry


def _numbers(interval: Sequence[float]) -> list[float] | None:
    return None if any(math.isnan(end) for end in interval) else list(interval)


def scores_csv(scores: Scores, metrics: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> str:
    """A line per image and model: `columns` (name -> a value per image), model, the metrics; empty without a score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "model", *metrics])
    for of_image, *facts in zip(scores.values(), *columns.values(), strict=True):
        for model, values in of_image.items():
            numbers = ("" if math.isnan(values[metric]) else f"{values[metric]:.6f}" for metric in metrics)
            writer.writerow([*facts, model, *numbers])
    return text.getvalue()


def cells(values: Mapping[str, Any], metrics: Sequence[str], signed: bool = False) -> list[str]:
    """`0.836 [0.825, 0.846]` by metric, of what `summarise` or `difference` returned."""
    style = "+.3f" if signed else ".3f"
    texts = []
    for metric in metrics:
        mean, interval = values[metric], values["intervals"][metric]
        ends = f" [{interval[0]:{style}}, {interval[1]:{style}}]" if interval else ""
        texts.append("–" if mean is None else f"{mean:{style}}{ends}")
    return texts


def tables(
    summary: Mapping[str, Any], metrics: Sequence[str], over: str, names: Sequence[str] | None = None
) -> list[str]:
    """The means of a summary's `models` and its `differences`, in Markdown, each under a line that says what it is.

    Args:
        over: what the means are taken over, e.g. "50 images".
        names: of the metrics, as heads of columns (default: the metrics).
    """
    names = names or metrics
    percent = f"{summary['confidence']:.0%} bootstrap intervals over images"
    means = [[name, *cells(values, metrics)] for name, values in summary["models"].items()]
    parts = [f"Mean over {over}, with {percent}.", table(["model", *names], means)]
    if summary["differences"]:
        pairs = [[f"{d['first']} − {d['second']}", *cells(d, metrics, signed=True)] for d in summary["differences"]]
        parts += [f"Paired differences, with {percent}.", table(["first − second", *names], pairs)]
    return parts


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, texts)) for texts in zip(head, *lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in (head, rule, *lines)
    )
