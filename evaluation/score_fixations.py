"""How well saliency maps predict where people look: scores by image, tables and examples (`evaluate.py fixations`)."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import tables
from evaluation.datasets import DATASETS, obtain
from evaluation.fixation_metrics import METRICS, all_scores, inter_observer
from evaluation.fixations import Fixations, image_sizes, read_fixations
from evaluation.journal import is_shown, score_all, text_sha256, whole_images, write_results
from evaluation.map_sources import Row, Source
from models.errors import UserError
from models.weights.downloads import file_hash
from pipeline import artefacts, distributed, figures, listing, ownership, program
from pipeline.images import read_rgb
from pipeline.paths import utf8_name

OBSERVERS = "inter-observer"
Scores = dict[str, dict[str, float]]  # by row and metric, of one image


@dataclass(frozen=True)
class Looks:
    """Images and where people looked in them; why others of the folder are left out, by file."""

    images: list[Path]
    fixations: Fixations
    unreadable: dict[Path, str] = field(default_factory=dict)


def evaluate(
    sources: Sequence[Source], looks: Looks, out: Path, stated: artefacts.Facts, overwrite: bool = False
) -> None:
    """Score all rows of the sources, unless that is finished, and write the results.

    Args:
        stated: options that determine the results, `seed` among them: an evaluation with others is refused.
    """
    rows = {name: row for source in sources for name, row in source.rows.items()}
    rows[OBSERVERS] = Row("ceiling", "fixations of all other people, blurred, as the map of each person")
    facts = {
        "stage": "fixations",
        "images": text_sha256("".join(map(file_hash, looks.images))),
        "fixations": fixations_sha256(looks.fixations),
        "models": list(rows),
        "sources": text_sha256(json.dumps([source.facts for source in sources])),
        **stated,
    }
    if is_shown(out, facts, overwrite):
        return
    numbers = {name: number for number, name in enumerate(looks.fixations.names)}

    def score(name: str) -> Scores:
        """Scores of one image by all rows of all sources."""
        image = looks.images[numbers[name]]
        rgb = read_rgb(image)
        maps = {row: values for source in sources for row, values in source.maps(image, rgb).items()}
        return score_image(maps, looks.fixations, numbers[name])

    scores = score_all(list(numbers), score, out, facts, overwrite)
    distributed.first(lambda: write(out, rows, scores, looks, sources, facts))


def read_data(
    dataset: str | None,
    cache: Path | None = None,
    stimuli: Path | None = None,
    fixations: Path | None = None,
    skip: int = 0,
    limit: int | None = None,
) -> Looks:
    """Images and fixations of a data set (a key of DATASETS), or of a folder and a file; says what was left out.

    Raises:
        UserError: nothing given, both ways given, or nothing usable found.
    """
    if (dataset is None) == (stimuli is None or fixations is None):
        raise UserError("give either --dataset, or both --stimuli DIR and --fixations FILE")
    if dataset:
        (images, path), read = obtain(dataset, cache), DATASETS[dataset].read
    else:
        path, read = fixations, read_fixations
        if not stimuli.is_dir():
            raise UserError(f"{stimuli} is not a folder: give the folder of the images with --stimuli")
        images = listing.images_below(stimuli)
    images, unreadable = whole_images(images[skip:][:limit])
    ownership.reading(path, *images)
    found = read(path, image_sizes(images))
    without = found.images_without()
    print(
        f"{len(images)} images, {len(found)} fixations; left out: "
        + (f"{len(unreadable)} images that cannot be read, " if unreadable else "")
        + f"{found.outside} outside their image, "
        f"{found.not_finite} lost, {found.unknown} of other images; images without fixations: {len(without)}"
    )
    if len(without) == len(images):
        raise UserError(f"{path} has no usable fixation on these images: give others")
    return Looks(images, found, unreadable)


def fixations_sha256(fixations: Fixations) -> str:
    """Hash of everything that a metric reads of them."""
    digest = hashlib.sha256("\n".join(fixations.names).encode("utf-8", "surrogateescape"))
    for array in (fixations.sizes, fixations.image_index, fixations.x, fixations.y, fixations.subject):
        digest.update(array.tobytes())
    return digest.hexdigest()


def score_image(maps: Mapping[str, np.ndarray], fixations: Fixations, number: int) -> Scores:
    """All metrics of all maps (H, W) of image `number`, and how well people predict one another there."""
    x, y, subject = fixations.of_image(number)
    elsewhere = fixations.elsewhere(number)
    height, width = fixations.sizes[number].tolist()
    scores = {}
    for name, values in maps.items():
        if values.shape != (height, width):
            raise AssertionError(f"the map of {name} is {values.shape}, its image ({height}, {width})")
        scores[name] = all_scores(values, x, y, *elsewhere)
    observers = inter_observer(x, y, subject, *elsewhere, height, width)
    scores[OBSERVERS] = {metric: observers.get(metric, math.nan) for metric in METRICS}
    return scores


def differences(scores: Mapping[str, Scores], rows: Mapping[str, Row], seed: int) -> list[dict[str, Any]]:
    """Paired differences with intervals: every model against its controls, the baselines and the models after it."""
    models = [name for name, row in rows.items() if row.kind == "model"]
    baselines = [name for name, row in rows.items() if row.kind == "baseline"]
    return [
        tables.difference(scores, first, second, tuple(METRICS), seed)
        for place, first in enumerate(models)
        for second in (*rows[first].controls, *baselines, *models[place + 1 :])
    ]


def write(
    out: Path,
    rows: Mapping[str, Row],
    scores: Mapping[str, Scores],
    looks: Looks,
    sources: Sequence[Source],
    facts: artefacts.Facts,
) -> None:
    """All files of OUT, from the scores by image."""
    fixations, metrics, seed = looks.fixations, tuple(METRICS), facts["seed"]
    counts = [len(fixations.of_image(number)[0]) for number in range(len(looks.images))]
    summary = {
        "images": len(looks.images),
        "images_scored": sum(count > 0 for count in counts),
        "fixations": len(fixations),
        "left_out": {key: getattr(fixations, key) for key in ("outside", "not_finite", "unknown")},
        "unreadable": {utf8_name(file.name): problem for file, problem in looks.unreadable.items()},
        "confidence": tables.CONFIDENCE,
        "models": {
            name: {"kind": row.kind, "about": row.about, **tables.summarise(scores, name, metrics, seed)}
            for name, row in rows.items()
        },
        "differences": differences(scores, rows, seed),
        "sources": [source.facts for source in sources],
        "versions": program.versions(),
    }

    def draw() -> None:
        for name, row in rows.items():
            if row.kind == "model":
                draw_examples(out / f"examples-{name}.png", name, row, scores, looks, sources)

    write_results(
        out,
        facts,
        scores=tables.scores_csv(scores, metrics, {"image": list(scores), "fixations": counts}),
        table=markdown(summary),
        summary=summary,
        pictures=draw,
        what=f"examples of {len(looks.images)} images",
    )


def markdown(summary: dict[str, Any]) -> str:
    """Both tables, aligned, and what each row is."""
    scored = f"{summary['images_scored']} images, {summary['fixations']} fixations"
    names = [metric.title for metric in METRICS.values()]
    about = "\n".join(f"- {name}: {values['about']}" for name, values in summary["models"].items())
    return "\n\n".join([*tables.tables(summary, tuple(METRICS), scored, names), about]) + "\n"


def draw_examples(
    path: Path,
    name: str,
    row: Row,
    scores: Mapping[str, Scores],
    looks: Looks,
    sources: Sequence[Source],
) -> None:
    """Best, median and worst image of a model by AUC: photo, its map and those of its controls, fixations as dots."""
    values = tables.column(scores, name, "auc")
    order = [int(i) for i in np.argsort(-values, kind="stable") if not math.isnan(values[i])]
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    pictures, points = [], []
    for rank, number in chosen.items():
        rgb = read_rgb(looks.images[number])
        own = [source for source in sources if {name, *row.controls} & source.rows.keys()]
        maps = {key: values for source in own for key, values in source.maps(looks.images[number], rgb).items()}
        image = looks.fixations.names[number]
        own_scores = scores[image]
        titles = {key: key.replace("/", "\n") + f"\nAUC {own_scores[key]['auc']:.3f}" for key in (name, *row.controls)}
        photo = {f"{rank} of {len(order)}\n{program.printable(image)}": rgb}
        pictures.append(photo | {title: maps[key] for key, title in titles.items()})
        points.append(looks.fixations.of_image(number)[:2])
    figures.picture_grid(pictures, path, points)
