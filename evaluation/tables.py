"""Scores of several models on the same images: means with intervals, paired differences, tables."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # by image, model and metric


def column(scores: Scores, model: str, metric: str) -> np.ndarray:
    """Scores (N,) of one model by image; NaN where there is none."""
    return np.array([of_image[model][metric] for of_image in scores.values()])


def summarise(scores: Scores, model: str, metrics: Sequence[str], seed: int) -> dict[str, Any]:
    """Mean over images by metric, and `intervals` by metric from a bootstrap; None where there is no score."""
    from evaluation.fixation_metrics import bootstrap_interval

    means: dict[str, Any] = {}
    intervals = {}
    for metric in metrics:
        values = column(scores, model, metric)
        values = values[~np.isnan(values)]
        means[metric] = float(values.mean()) if values.size else None
        intervals[metric] = _numbers(bootstrap_interval(values, confidence=CONFIDENCE, resamples=RESAMPLES, seed=seed))
    return {**means, "intervals": intervals}


def difference(scores: Scores, first: str, second: str, metrics: Sequence[str], seed: int) -> dict[str, Any]:
    """Mean of `first` - `second` over the same images by metric, and `intervals`."""
    from evaluation.fixation_metrics import paired_difference

    entry: dict[str, Any] = {"first": first, "second": second, "intervals": {}}
    for metric in metrics:
        pair = (column(scores, model, metric) for model in (first, second))
        mean, *interval = paired_difference(*pair, confidence=CONFIDENCE, resamples=RESAMPLES, seed=seed)
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
