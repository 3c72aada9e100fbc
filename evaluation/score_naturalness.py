"""What naturalness is worth: whether spoiled copies have higher losses, and maps point at spoiled regions.

In:  images of stage 1 (--images), of which those are taken that the checkpoints held out, or a folder of any images,
     which are scaled as stage 1 does; checkpoints (--vlm) with all their layers; results of reconstruct.py
     (--reconstructions), which count as spoiled copies of what they were made from.
Out: OUT/scores.csv, a line per image, layer, predictor and copy; OUT/summary.json and OUT/table.md, with 95 % intervals
     over images; OUT/regions-<layer>.png, eight images with a spoiled region and the maps of it.

    python evaluate.py naturalness --images out/alexnet/images.npy --vlm out/alexnet/vlm.safetensors
    python evaluate.py naturalness photos/ --layer conv5 --spoilings "noise 25" "pasted 1/4"
    torchrun --nproc-per-node=8 evaluate.py naturalness photos/

Scores of every layer: how often a copy has a higher loss than its own original; AUC over images; AUC of the map for the
pixels of the region. Beside the language model stands its loss relative to predicting nothing. Controls in every table:
predict nothing, repeat last, the language model on a random CNN; among the copies, the mirrored one.

Where it can fail: the loss is what cannot be predicted, not what is wrong. A blurred copy is *more* predictable than
its original, so layers that see the detail call it more natural; what leaves a layer's features weak (dark, flat,
smooth) lowers its loss; and a reconstruction that was made with language models descended on this very loss. The table
says for every layer which copies it fails on, and where it tells more than predicting nothing does.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation import naturalness_tables, tables
from evaluation.journal import is_shown, score_all, text_sha256, write_results
from evaluation.naturalness_metrics import region_auc
from evaluation.naturalness_readers import common_held_out, load_readers
from evaluation.spoiling import SPOILINGS
from models.errors import UserError
from pipeline import artefacts, distributed, locks, networks, options, program
from pipeline.networks import shipped_checkpoints

if TYPE_CHECKING:
    from evaluation.naturalness_pictures import Item
    from evaluation.naturalness_readers import Reader
    from evaluation.spoiling import Copy
    from pipeline.detector import Checkpoint

RECONSTRUCTED = "reconstructed "  # before the names of images that reconstruct.py inverted
Spoilings = dict[str, str]  # what each is, by name
PICTURED = 8  # images in the pictures


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options, but for those that every command has."""
    add = parser.add_argument
    add("folder", nargs="?", type=options.folder, help="images of any size, instead of --images")
    add("--images", type=options.readable_file, help="images.npy of stage 1: those that every layer held out are taken")
    add("--limit", type=options.positive, help="take so many images (default: all)")
    add("--vlm", type=options.readable_file, nargs="+", help="checkpoints (default: those in models/pretrained)")
    add("--layer", nargs="+", help="layers (default: all that the checkpoints have)")
    add(
        "--spoilings",
        nargs="+",
        choices=tuple(SPOILINGS),
        default=list(SPOILINGS),
        metavar="NAME",
        help=f"copies to make (default: all: {', '.join(SPOILINGS)})",
    )
    add("--reconstructions", type=options.folder, nargs="+", default=[], help="folders of results of reconstruct.py")
    options.add_weights_options(parser)
    options.add_image_options(parser)
    add(
        "--out", type=options.writable_folder, default=Path("out/naturalness"), help="folder (default: out/naturalness)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate; a finished evaluation is shown again, an interrupted one goes on. Ranks share the images."""
    device = networks.prepare_device(args.device)
    with distributed.group(device), locks.claim(args.out):
        from pipeline.detector import Checkpoint

        program.announce(args, device)

        def prepare() -> "tuple[list[Reader], list[Item], Spoilings]":
            paths = args.vlm or shipped_checkpoints()
            checkpoints = [Checkpoint.load(path, device) for path in dict.fromkeys(paths)]
            items, spoilings = collect(
                args.folder, args.images, args.limit, checkpoints, args.spoilings, args.reconstructions, args.seed
            )
            return load_readers(checkpoints, args.layer, networks.WeightsChoice.of(args), device), items, spoilings

        evaluate(*distributed.together(prepare), args.out, args.seed, args.overwrite)
    return 0


def collect(
    folder: Path | None,
    images: Path | None,
    limit: int | None,
    checkpoints: "Sequence[Checkpoint]",
    wanted: list[str],
    reconstructions: Sequence[Path],
    seed: int,
) -> "tuple[list[Item], Spoilings]":
    """What is to be scored, and all spoilings in it with what each is.

    Raises:
        UserError: no images are given, or in two ways, or too few.
    """
    from evaluation import naturalness_pictures as pictures

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
    readers: "list[Reader]", items: "list[Item]", spoilings: Spoilings, out: Path, seed: int, overwrite: bool
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


def score_item(readers: "list[Reader]", item: "Item") -> dict[str, dict[str, Any]]:
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
    readers: "list[Reader]",
    items: "list[Item]",
    spoilings: Spoilings,
    scores: "naturalness_tables.Scores",
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


def draw_regions(out: Path, readers: "list[Reader]", items: "list[Item]", scores: "naturalness_tables.Scores") -> None:
    """A picture for each layer: eight images with a spoiled region, every kind in turn, and the maps over them."""
    from pipeline.figures import picture_grid

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
            picture_grid(of_title, out / f"regions-{title}.png", column=2.4)


def picture_rows(
    reader: "Reader", original: np.ndarray, kind: str, copy: "Copy", scores: Mapping[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """By title the original, its copy and the maps over that, the region's rim drawn, under titles with their AUC."""
    from models.unnaturalness import postprocess
    from pipeline.figures import overlay

    rows: dict[str, dict[str, np.ndarray]] = {}
    for title, predictor, _, maps in reader.read([copy.picture]):
        row = rows.setdefault(title, {"original": original, kind: outlined(copy.picture, copy.mask)})
        heat = overlay(copy.picture, postprocess(maps[0], *copy.mask.shape, reader.stride(title), blur=0))
        row[f"{predictor}\nAUC {scores[title][predictor]['regions'][kind]:.2f}"] = outlined(heat, copy.mask)
    return rows


def outlined(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) with the rim of a region (H, W) in cyan."""
    from scipy.ndimage import binary_erosion

    picture = rgb.copy()
    picture[mask & ~binary_erosion(mask, iterations=2)] = (0, 255, 255)
    return picture
