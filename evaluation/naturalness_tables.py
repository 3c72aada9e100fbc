"""Tables of how well losses and maps tell what was spoiled, by layer, beside the controls."""

import csv
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation import tables
from evaluation.naturalness_metrics import auc_with_interval, higher
from evaluation.naturalness_readers import MODEL, NOTHING, PREDICTORS, RELATIVE

Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]  # by image, title, predictor: see `score_item`
UNTOUCHED = "untouched"
MEASURES = {  # by key in summary.json: the line above a table
    "share": "How often the spoiled copy has the higher loss than its own original (ties count half; chance .5)",
    "auc": "AUC over images: how often some copy has a higher loss than some original (chance .5)",
    "regions": "AUC of the unnaturalness map for the pixels of the region (chance .5); "
    "`untouched`: of the map of the original, for the same pixels",
}


def summarise(scores: Scores, spoilings: Mapping[str, str], seed: int) -> dict[str, Any]:
    """By title and predictor the values of all `MEASURES`, each by spoiling with `intervals`; None without a value."""
    summary: dict[str, Any] = {}
    for title in next(iter(scores.values())):
        for predictor in PREDICTORS:
            of_predictor = {image: of_image[title][predictor] for image, of_image in scores.items()}
            regions = [s for s in spoilings if any(s in found["regions"] for found in of_predictor.values())]
            entry = {
                "share": _means(_shares(of_predictor, spoilings), seed),
                "auc": _aucs(of_predictor, spoilings, seed),
            }
            for measure in ("regions", UNTOUCHED):
                values = {
                    image: {s: found[measure].get(s, math.nan) for s in regions}
                    for image, found in of_predictor.items()
                }
                entry[measure] = _means(values, seed)
            summary.setdefault(title, {})[predictor] = entry
    return summary


def _shares(of_predictor: Mapping[str, Any], spoilings: Mapping[str, str]) -> dict[str, dict[str, float]]:
    return {
        image: {s: higher(found["copies"].get(s, math.nan), found["original"]) for s in spoilings}
        for image, found in of_predictor.items()
    }


def _means(values: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, Any]:
    """Mean over images by spoiling, of values by image and spoiling, with intervals."""
    names = list(next(iter(values.values())))
    return tables.summarise({image: {"": of_image} for image, of_image in values.items()}, "", names, seed)


def _aucs(of_predictor: Mapping[str, Any], spoilings: Mapping[str, str], seed: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"intervals": {}}
    for s in spoilings:
        pairs = [(found["copies"][s], found["original"]) for found in of_predictor.values() if s in found["copies"]]
        losses = np.array(pairs).reshape(-1, 2).T
        settings = {"confidence": tables.CONFIDENCE, "resamples": tables.RESAMPLES, "seed": seed}
        value, *ends = auc_with_interval(*losses, **settings)
        entry[s] = None if math.isnan(value) else value
        entry["intervals"][s] = None if math.isnan(ends[0]) else ends
    return entry


def differences(scores: Scores, spoilings: Mapping[str, str], seed: int) -> list[dict[str, Any]]:
    """Paired differences of the shares with intervals: every layer's language model less each of its controls."""
    found = []
    for title in next(iter(scores.values())):
        shares = {name: _shares({i: s[title][name] for i, s in scores.items()}, spoilings) for name in PREDICTORS}
        paired = {image: {name: shares[name][image] for name in PREDICTORS} for image in scores}
        found += [
            {"model": title, **tables.difference(paired, MODEL, control, list(spoilings), seed)}
            for control in PREDICTORS
            if control != MODEL
        ]
    return found


def markdown(summary: Mapping[str, Any]) -> str:
    """All tables, a section for each layer, after what each spoiling is and where the measure fails."""
    percent = f"{summary['confidence']:.0%} bootstrap intervals over images"
    counts = f"{summary['images']} images" + (
        f" and {summary['reconstructed']} reconstructed ones" if summary["reconstructed"] else ""
    )
    parts = [f"Naturalness of {counts} and their spoiled copies, with {percent}."]
    parts.append("\n".join(f"- {name}: {about}" for name, about in PREDICTORS.items()))
    parts += [failures(summary), gains(summary)]
    for title, of_title in summary["models"].items():
        parts += [f"### {title}", summary["about"][title]]
        for measure, line in MEASURES.items():
            rows = [s for s in summary["spoilings"] if of_title[MODEL][measure].get(s) is not None]
            if rows:
                parts += [f"{line}.", _table(of_title, measure, rows)]
    parts.append("\n".join(f"- {name}: {about}" for name, about in summary["spoilings"].items()))
    return "\n\n".join(parts) + "\n"


def _table(of_title: Mapping[str, Any], measure: str, rows: list[str]) -> str:
    """A line for each spoiling, a column for each predictor."""
    head = ["spoiled copy", *PREDICTORS]
    lines = [[s, *(tables.cells(of_title[name][measure], [s])[0] for name in PREDICTORS)] for s in rows]
    if measure == "regions":
        lines += [
            [f"{s}, {UNTOUCHED}", *(tables.cells(of_title[name][UNTOUCHED], [s])[0] for name in PREDICTORS)]
            for s in rows
        ]
    return tables.table(head, lines)


def failures(summary: Mapping[str, Any]) -> str:
    """Where the language models' losses do not say what they should, by the shares' intervals, in plain words."""
    lines = []
    columns = [(t, name, of_title[name]) for t, of_title in summary["models"].items() for name in (MODEL, RELATIVE)]
    for title, predictor, found in columns:
        shares = found["share"]
        ends = {s: shares["intervals"][s] for s in summary["spoilings"] if shares["intervals"][s]}
        harmless = [s for s in ends if s in summary["harmless"]]
        below = [s for s, (_, high) in ends.items() if high < 0.5 and s not in harmless]
        unclear = [s for s, (low, high) in ends.items() if low <= 0.5 <= high and s not in harmless]
        moved = [s for s in harmless if not ends[s][0] <= 0.5 <= ends[s][1]]
        said = [
            f"{what} {', '.join(names)}"
            for what, names in (
                ("calls *more* natural than the original:", below),
                ("cannot tell from the original:", unclear),
                ("tells from the original, though it is as natural:", moved),
            )
            if names
        ]
        lines.append(f"- {title}, {predictor}, {'; '.join(said) or 'fails nowhere'}")
    return "Where the measure fails (the interval of the share lies below .5, or holds it):\n\n" + "\n".join(lines)


def gains(summary: Mapping[str, Any]) -> str:
    """Which copies the language models tell more often than the energy of the same features does, in plain words."""
    lines = []
    for pair in (pair for pair in summary["differences"] if pair["second"] == NOTHING):
        ends = {s: found for s, found in pair["intervals"].items() if found}
        more, less = [s for s in ends if ends[s][0] > 0], [s for s in ends if ends[s][1] < 0]
        lines.append(f"- {pair['model']}: more on {', '.join(more) or 'none'}; less on {', '.join(less) or 'none'}")
    return (
        f"Where the language model has a higher or a lower share than {NOTHING} (the interval of the paired "
        "difference leaves 0 out):\n\n" + "\n".join(lines)
    )


def scores_csv(scores: Scores, spoilings: Mapping[str, str]) -> str:
    """A line for each image, layer, predictor and spoiling: both losses and, of a region, the map's AUC."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "model", "predictor", "spoiling", "loss_original", "loss_copy", "region_auc", UNTOUCHED])
    for image, of_image in scores.items():
        for title, of_title in of_image.items():
            for predictor, found in of_title.items():
                for s in (s for s in spoilings if s in found["copies"]):
                    values = [found["original"], found["copies"][s], found["regions"].get(s), found[UNTOUCHED].get(s)]
                    numbers = ["" if v is None or math.isnan(v) else f"{v:.6g}" for v in values]
                    writer.writerow([image, title, predictor, s, *numbers])
    return text.getvalue()
