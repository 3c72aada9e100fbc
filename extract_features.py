"""Stage 2: images.npy and a CNN -> the projection of every layer, and its projected features.

In:  ROOT/images.npy (N, 256, 256, 3) uint8, of stage 1.
Out: ROOT/features/projection.safetensors: per layer the channels' mean and std, and the principal components kept;
     mean and std also of `data`, the last pooling and the fully connected layers, for reconstruction. All are of the
     training images alone: those that --held-out keeps for measuring are listed with the projection.
     ROOT/features/<layer>.npy (N, H, W, D) float32 or float16, standardised and projected; with --views K
     (K·N, H, W, D), row k·N + i being view k of image i.

The images are read twice: once for the statistics, of the centre crops, once to write the features.

    python extract_features.py --preset alexnet --layers conv5
    torchrun --nproc-per-node=8 extract_features.py --preset alexnet
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.weights.downloads import file_hash
from pipeline import artefacts, distributed, locks, options, program
from pipeline.images import open_stored
from pipeline.progress import Progress, SafePoints
from pipeline.splits import split_for_statistics

if TYPE_CHECKING:
    from models.backbones import Backbone
    from models.projection import Projection
    from pipeline.features import FeatureFiles
    from pipeline.tap_statistics import TapStatistics
    from pipeline.views import Views

PROJECTED_AT_ONCE = 4  # images; what is projected is still in the processor's cache


def collect_statistics(
    images: np.ndarray,
    backbone: "Backbone",
    layers: Sequence[str],
    others: Sequence[str],
    *,
    rows: np.ndarray,
    pca_positions: int,
    batch_size: int,
    seed: int,
    state: Path,
    facts: artefacts.Facts,
) -> "TapStatistics":
    """Pass 1: moments of `layers` and `others`, and samples of `layers` for PCA; of all ranks on rank 0.

    Args:
        images: (N, 256, 256, 3) uint8.
        layers, others: names of taps.
        rows: of the images that are read, the training images.
        pca_positions: positions sampled of each layer, about; spread over all images, drawn from `seed`.
        state: file where progress is kept while this runs; one of other `facts` is ignored.
    """
    from models.projection import draw_positions, positions_per_image
    from pipeline import features, tap_statistics, views

    crop, per_image = backbone.architecture.crop, positions_per_image(len(rows), pca_positions)
    grids = {layer: int(np.prod(backbone.architecture.grid(layer, *crop))) for layer in layers}
    first, stop = distributed.span(len(rows), batch_size)
    statistics = tap_statistics.TapStatistics.empty(backbone.architecture, layers, others, stop - first, per_image)
    state, facts = artefacts.rank_path(state), {**facts, "rows": [first, stop]}
    statistics.restore(state, facts)
    batches = views.network_batches(images, backbone, batch_size, rows[first + statistics.done : stop])
    progress = Progress(stop - first, "statistics", "images", statistics.done)
    with progress, SafePoints(features.SAVE_EVERY) as signals:
        for numbers, x in batches:
            taps = backbone(x, list(statistics.moments))
            drawn = {
                layer: np.stack([draw_positions(seed, layer, i, per_image, grid) for i in numbers.tolist()])
                for layer, grid in grids.items()
            }
            statistics.add(taps, drawn)
            progress.update(len(x))
            signals.check(lambda: statistics.save(state, facts))
    if distributed.size() > 1:
        statistics.save(state, facts)  # another rank may fail while this one waits for it
    statistics.reduce()
    return statistics


def write_features(
    images: np.ndarray,
    backbone: "Backbone",
    projections: "Mapping[str, Projection]",
    files: "FeatureFiles",
    *,
    batch_size: int,
    views: "Views",
) -> None:
    """Pass 2: project every layer of every view of the images (N, 256, 256, 3), and write it to `files`."""
    import torch.nn.functional as F

    from models.projection import fold_deepest
    from pipeline.features import SAVE_EVERY
    from pipeline.views import network_batches

    backbone, folded = fold_deepest(backbone, projections)
    products = {layer: [t.to(backbone.device) for t in p.as_product()] for layer, p in projections.items()}
    batches = network_batches(images, backbone, batch_size, np.arange(files.done, files.stop), views)
    progress = Progress(files.stop - files.first, "features", "images", files.done - files.first)
    with files, progress, SafePoints(SAVE_EVERY) as signals:
        for _, x in batches:
            projected = {}
            for layer, features in backbone(x, list(products)).items():
                weight, offset = products[layer]  # (D, C), (D,)
                parts = features.split(PROJECTED_AT_ONCE)
                if layer != folded:
                    parts = [F.conv2d(part, weight[:, :, None, None], offset) for part in parts]
                projected[layer] = [part.permute(0, 2, 3, 1) for part in parts]  # (b, H, W, D)
            files.put(projected)
            progress.update(len(x))
            signals.check(files.note)
        files.finish()


def get_parser() -> options.Parser:
    """Options; those without a default here take the preset's."""
    parser = options.stage_parser(__doc__)
    options.add_weights_options(parser)
    parser.inputs("--images", type=options.readable_file, help="images of stage 1 (default: ROOT/images.npy)")
    parser.output("--out", type=options.writable_folder, help="folder to write to (default: ROOT/features)")
    parser.model("--backbone", help="CNN: of this project, or any classification network of torchvision")
    parser.model("--list-layers", action="store_true", help="print the backbone's taps and end")
    parser.model("--layers", nargs="+", metavar="LAYER", help="taps to model")
    parser.model(
        "--statistics",
        nargs="*",
        metavar="TAP",
        help="further taps whose mean and std are measured, as targets of reconstruction "
        "(default: those behind the deepest layer that the weights reach)",
    )
    parser.model("--dtype", choices=("float32", "float16"), help="of the features; float16 halves the files")
    parser.descent("--batch-size", type=options.positive, help="images per forward pass")
    parser.inputs("--limit", type=options.positive, help="use the first images only")
    parser.inputs(
        "--held-out",
        type=options.count_or_file,
        metavar="COUNT|FILE",
        help="images that are kept from statistics, PCA and training, to measure by: how many, or a text file of "
        "their names",
    )
    parser.model(
        "--pca-positions", type=options.positive, help="positions that PCA is fitted on, spread over all images"
    )
    parser.inputs("--views", type=options.positive, help="of each image; the first is the centre crop")
    parser.inputs("--random-crop", action="store_true", help="the other views are crops drawn from the image")
    parser.inputs("--flip", action="store_true", help="half of the other views are mirrored")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the inputs, describe the results, make what of them is missing."""
    args = options.parse_args(get_parser(), argv, "extract_features")
    from pipeline import features, networks, tap_statistics, views

    if args.list_layers:
        return networks.print_taps(args.backbone)
    seen = views.Views.checked(args.views, args.random_crop, args.flip, args.seed)
    device = networks.prepare_device(args.device)
    folder = args.out or args.root / "features"
    with distributed.group(device), locks.claim(folder):
        images, source = open_stored(args.images or args.root / "images.npy")
        images, names = images[: args.limit], source["names"][: args.limit]
        held_out, training = split_for_statistics(args.held_out, names, args.seed)
        program.announce(vars(args), device)
        taps = [*(args.layers or []), *(args.statistics or [])]
        choice = networks.WeightsChoice(args.weights, args.mean_image, args.cache, args.seed)
        backbone, weights = networks.load_backbone(choice, args.backbone, taps, device)
        backbone = networks.lay_out(backbone)
        layers = list(dict.fromkeys(args.layers or backbone.architecture.vlm_layers))
        backbone.architecture.check_maps(layers)
        facts = {
            "stage": "extract_features",
            "backbone": backbone.architecture.name,
            **networks.weights_facts(backbone, weights),
            "images_sha256": source["content_sha256"],
            "num_images": len(images),
            "held_out": [names[row] for row in held_out],
            "pca_positions": args.pca_positions,
            "seed": args.seed,
        }
        if args.overwrite:  # all, before any is made: what is killed in between leaves nothing that looks whole
            distributed.first(lambda: features.clear(folder, layers))
        others = ["data", *(backbone.available_targets if args.statistics is None else args.statistics)]
        path = folder / "projection.safetensors"
        noted = {**facts, "layers": layers, "statistics": sorted({*layers, *others})}
        if distributed.first(lambda: artefacts.reuse(path, noted, False)):
            print(f"{path} is finished")
        else:
            statistics = collect_statistics(
                images,
                backbone,
                layers,
                others,
                rows=training,
                pca_positions=args.pca_positions,
                batch_size=args.batch_size,
                seed=args.seed,
                state=folder / features.STATE,
                facts=noted,
            )
            about = {"weights": weights.source, "sources": source.get("sources"), "names": names}
            distributed.first(lambda: tap_statistics.write_projections(path, statistics, noted, about))
        distributed.first(lambda: artefacts.discard(folder / features.STATE))
        projections = distributed.first(lambda: tap_statistics.read_projections(path, layers))
        facts |= {"projection_sha256": distributed.first(lambda: file_hash(path)), "dtype": args.dtype}
        wanted = {
            n: features.feature_facts(len(images), backbone, n, p.size, seen, facts) for n, p in projections.items()
        }
        missing = distributed.first(lambda: features.unfinished(folder, wanted))
        if not missing:
            print(f"{folder}: features of {', '.join(layers)} are finished: nothing to do")
            return
        features.check_room(folder, missing)
        files = features.FeatureFiles(folder, missing, distributed.span(len(images) * seen.count, args.batch_size))
        projections = {layer: projections[layer] for layer in files.writers}
        write_features(images, backbone, projections, files, batch_size=args.batch_size, views=seen)
        print(f"{folder}: features of {', '.join(missing)} written")


if __name__ == "__main__":
    sys.exit(program.run(main))
