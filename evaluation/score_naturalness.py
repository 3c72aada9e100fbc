"""What naturalness is worth: scores of spoiled copies, tables and pictures (`evaluate.py naturalness`)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion

from evaluation import naturalness_pictures as pictures
from evaluation import naturalness_tables, tables
from evaluation.journal import is_shown, score_all, text_sha256, write_results
from evaluation.naturalness_metrics import region_auc
from evaluation.naturalness_pictures import Item
from evaluation.naturalness_readers import Reader, common_held_out
from evaluation.spoiling import SPOILINGS, Copy
from models.errors import UserError
from pipeline import artefacts, distributed, figures, options, program
from pipeline.detector import Checkpoint, Postprocess

RECONSTRUCTED = "reconstructed "  # before the names of images that reconstruct.py inverted
Spoilings = dict[str, str]  # what each is, by name
PICTURED = 8  # images in the pictures


def collect(
    folder: Path | None,
    images: Path | None,
    limit: int | None,
    checkpoints: Sequence[Checkpoint],
    wanted: list[str],
    reconstructions: Sequence[Path],
    seed: int,
) -> tuple[list[Item], Spoilings]:
    """What is to be scored, and all spoilings in it with what each is.

    Raises:
        UserError: no images are given, or in two ways, or too few.
    """
    if folder is not None and images is not None:
        raise UserError("a folder of images and --images were given: give one of them")
    if folder is None and images is None and not reconstructions:
        raise UserError("give a folder of images, --images FILE or --reconstructions FOLDER")
    items, about = pictures.reconstruction_items(reconstructions)
    if folder is None and images is None:
        return items, about
    found = (
        pictures.pictures_inside(folder) if folder else pictures.stored_pictures(images, common_held_out(checkpoints))
    )
    spoiled = pictures.items_of(found[:limit], wanted, seed)
    return spoiled + items, {name: SPOILINGS[name].about for name in wanted} | about


def evaluate(
    readers: list[Reader], items: list[Item], spoilings: Spoilings, out: Path, seed: int, overwrite: bool
) -> None:
    """Score the items, unless that is finished, and write the results."""
    facts = {
        "stage": "naturalness",
        "images": text_sha256(json.dumps([[item.name, item.digest] for item in items])),
        "spoilings": spoilings,
        "readers": [reader.facts for reader in readers],
        "seed": seed,
        **options.image_facts(),
    }
    if is_shown(out, facts, overwrite):
        return
    by_name = {item.name: item for item in items}
    scores = score_all(list(by_name), lambda name: score_item(readers, by_name[name]), out, facts, overwrite)
    distributed.first(lambda: write(readers, items, spoilings, scores, facts, out))


def score_item(readers: list[Reader], item: Item) -> dict[str, dict[str, Any]]:
    """By title and predictor: `original`, its loss; `copies`, theirs by spoiling; of those with a region the AUC of the
    copy's map for its pixels, `regions`, and that of the original's map for the same pixels, `untouched`.
    """
    scores: dict[str, dict[str, Any]] = {}
    for reader in readers:
        original, copies = item.make(reader.crop)
        masks = {name: copy.mask for name, copy in copies.items() if copy.mask is not None}
        for title, predictor, losses, maps in reader.read([original, *(copy.picture for copy in copies.values())]):
            of_copies = dict(zip(copies, maps[1:], strict=True))
            stride = reader.stride(title)
            scores.setdefault(title, {})[predictor] = {
                "original": losses[0],
                "copies": dict(zip(copies, losses[1:].tolist(), strict=True)),
                "regions": {s: region_auc(of_copies[s], mask, stride) for s, mask in masks.items()},
                "untouched": {s: region_auc(maps[0], mask, stride) for s, mask in masks.items()},
            }
    return scores


def write(
    readers: list[Reader],
    items: list[Item],
    spoilings: Spoilings,
    scores: naturalness_tables.Scores,
    facts: artefacts.Facts,
    out: Path,
) -> None:
    """All files of OUT, from the scores by item."""
    spoiled = sum(not name.startswith(RECONSTRUCTED) for name in scores)
    summary = {
        "images": spoiled,
        "reconstructed": len(scores) - spoiled,
        "confidence": tables.CONFIDENCE,
        "spoilings": spoilings,
        "harmless": [name for name in spoilings if name in SPOILINGS and SPOILINGS[name].harmless],
        "about": {t: f"CNN weights: {r.weights}" for r in readers if not r.random for t in r.titles.values()},
        "models": naturalness_tables.summarise(scores, spoilings, facts["seed"]),
        "differences": naturalness_tables.differences(scores, spoilings, facts["seed"]),
        "readers": facts["readers"],
        "versions": program.versions(),
    }
    write_results(
        out,
        facts,
        scores=naturalness_tables.scores_csv(scores, spoilings),
        table=naturalness_tables.markdown(summary),
        summary=summary,
        pictures=lambda: draw_regions(out, readers, items, scores),
        what=f"pictures of {len(scores)} images",
    )


def draw_regions(out: Path, readers: list[Reader], items: list[Item], scores: naturalness_tables.Scores) -> None:
    """A picture for each layer: eight images with a spoiled region, every kind in turn, and the maps over them."""
    for reader in (reader for reader in readers if not reader.random):
        rows: dict[str, list[dict[str, np.ndarray]]] = {}
        for item in items:
            original, copies = item.make(reader.crop)
            kinds = [name for name, copy in copies.items() if copy.mask is not None]
            number = max(map(len, rows.values()), default=0)
            if not kinds or number == PICTURED:
                break
            kind = kinds[number % len(kinds)]
            for title, row in picture_rows(reader, original, kind, copies[kind], scores[item.name]).items():
                rows.setdefault(title, []).append(row)
        for title, of_title in rows.items():
            figures.picture_grid(of_title, out / f"regions-{title}.png", column=2.4)


def picture_rows(
    reader: Reader, original: np.ndarray, kind: str, copy: Copy, scores: Mapping[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """By title the original, its copy and the maps over that, the region's rim drawn, under titles with their AUC."""
    rows: dict[str, dict[str, np.ndarray]] = {}
    for title, predictor, _, maps in reader.read([copy.picture]):
        row = rows.setdefault(title, {"original": original, kind: outlined(copy.picture, copy.mask)})
        heat = figures.overlay(copy.picture, Postprocess(blur=0.0)(maps[0], *copy.mask.shape, reader.stride(title)))
        row[f"{predictor}\nAUC {scores[title][predictor]['regions'][kind]:.2f}"] = outlined(heat, copy.mask)
    return rows


def outlined(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) with the rim of a region (H, W) in cyan."""
    picture = rgb.copy()
    picture[mask & ~binary_erosion(mask, iterations=2)] = (0, 255, 255)
    return picture
