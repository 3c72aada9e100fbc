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

from models.errors import UserError
from pipeline import artefacts, distributed, networks, options, program
from pipeline.progress import Progress, SafePoints
from pipeline.views import Views, network_batches

if TYPE_CHECKING:
    from models.backbones import Backbone
    from models.projection import Projection
    from pipeline.features import FeatureFiles
    from pipeline.tap_statistics import TapStatistics

STATE = "statistics.npz"  # of pass 1, while it runs
PROJECTED_AT_ONCE = 4  # images; what is projected is still in the processor's cache
RECONSTRUCTION_TARGETS = ("pool5", "fc6", "fc7", "fc8")


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
        rows: of the images that are read, the training images.
        pca_positions: positions sampled of each layer, about; spread over all images, drawn from `seed`.
        state: file where progress is kept while this runs; one of other `facts` is ignored.
    """
    import torch

    from models.projection import draw_positions, positions_per_image
    from pipeline.tap_statistics import TapStatistics

    crop, per_image = backbone.architecture.crop, positions_per_image(len(rows), pca_positions)
    grids = {layer: int(np.prod(backbone.architecture.grid(layer, *crop))) for layer in layers}
    first, stop = distributed.span(len(rows), batch_size)
    statistics = TapStatistics.empty(backbone.architecture, layers, others, stop - first, per_image)
    state, facts = artefacts.rank_path(state), {**facts, "rows": [first, stop]}
    statistics.restore(state, facts)
    batches = network_batches(images, backbone, batch_size, rows[first + statistics.done : stop])
    progress = Progress(stop - first, "statistics", "images", statistics.done)
    with progress, SafePoints() as signals, torch.no_grad():
        for numbers, x in batches:
            taps = backbone(x, list(statistics.moments))
            drawn = {
                layer: np.stack([draw_positions(seed, layer, i, per_image, grid) for i in numbers.tolist()])
                for layer, grid in grids.items()
            }
            statistics.add(taps, drawn)
            progress.update(len(x))
            statistics.save(state, facts, now=False)
            signals.check(lambda: statistics.save(state, facts))
    if distributed.size() > 1:
        statistics.save(state, facts)  # another rank may fail while this one waits for it
    statistics.reduce()
    return statistics


def fit_projections(statistics: "TapStatistics") -> "dict[str, Projection]":
    """The projection of every layer that was sampled: its moments, and PCA of the standardised samples.

    Constant channels are reported.
    """
    import torch

    from models.projection import Projection

    projections = {}
    for layer, sampled in statistics.samples.items():
        moments = statistics.moments[layer]
        std, constant = moments.guarded_std()
        if constant:
            print(f"{layer}: channels {constant} are constant, their standard deviation counts as 1", flush=True)
        samples = torch.from_numpy(sampled).flatten(0, 1)  # (n, C)
        standardised = (samples - moments.mean.float()) / std.float()
        projections[layer] = Projection.fit(moments.mean, std, standardised.numpy())
    return projections


def make_projections(
    path: Path,
    images: np.ndarray,
    backbone: "Backbone",
    layers: Sequence[str],
    others: Sequence[str],
    *,
    rows: np.ndarray,
    batch_size: int,
    facts: artefacts.Facts,
    about: artefacts.Facts,
) -> None:
    """Pass 1 and the PCA of its samples -> projection.safetensors, unless it is finished.

    Args:
        facts: that determine it, `pca_positions` and `seed` among them; a file of others is refused.
        about: that is noted beside them.
    """
    from pipeline.tap_statistics import projection_tensors

    facts = {**facts, "layers": layers, "statistics": sorted({*layers, *others})}
    if distributed.first(lambda: artefacts.is_finished(path, facts, False)):
        print(f"{path} is finished")
    else:
        drawn = {"pca_positions": facts["pca_positions"], "seed": facts["seed"]}
        statistics = collect_statistics(
            images,
            backbone,
            layers,
            others,
            rows=rows,
            batch_size=batch_size,
            state=path.with_name(STATE),
            facts=facts,
            **drawn,
        )

        def write() -> None:
            tensors = projection_tensors(fit_projections(statistics), statistics.moments)
            shared = {key: about[key] for key in ("weights", "sources")}
            artefacts.write_tensors(path, tensors, {**shared, **facts})
            artefacts.write_json(artefacts.sidecar_path(path), {**facts, **about, "versions": program.versions()})

        distributed.first(write)
    distributed.first(lambda: artefacts.discard(path.with_name(STATE)))


def write_features(
    images: np.ndarray,
    backbone: "Backbone",
    projections: "Mapping[str, Projection]",
    files: "FeatureFiles",
    *,
    batch_size: int,
    views: Views,
) -> None:
    """Pass 2: project every layer of every view of the images (N, 256, 256, 3), and write it to `files`."""
    import torch
    import torch.nn.functional as F

    products = {layer: [t.to(backbone.device) for t in p.as_product()] for layer, p in projections.items()}
    batches = network_batches(images, backbone, batch_size, np.arange(files.done, files.stop), views)
    progress = Progress(files.stop - files.first, "features", "images", files.done - files.first)
    with files, progress, SafePoints() as signals, torch.no_grad():
        for _, x in batches:
            projected = {}
            for layer, features in backbone(x, list(products)).items():
                weight, offset = products[layer]  # (D, C), (D,)
                parts = (F.conv2d(part, weight[:, :, None, None], offset) for part in features.split(PROJECTED_AT_ONCE))
                projected[layer] = [part.permute(0, 2, 3, 1) for part in parts]  # (b, H, W, D)
            files.put(projected)
            progress.update(len(x))
            files.note(now=False)
            signals.check(files.note)
        files.finish()


def invalidate(folder: Path, layers: Sequence[str]) -> None:
    """Declare the projection and the features of some layers unfinished, and drop every state."""
    artefacts.discard(folder / STATE)
    for name in ("projection.safetensors", *(f"{layer}.npy" for layer in layers)):
        artefacts.is_finished(folder / name, {}, overwrite=True)


def get_parser() -> options.Parser:
    """Options; those without a default here take the preset's."""
    parser = options.stage_parser(__doc__)
    options.add_weights_options(parser)
    parser.add_argument("--images", type=options.readable_file, help="images of stage 1 (default: ROOT/images.npy)")
    parser.add_argument("--out", type=options.writable_folder, help="folder to write to (default: ROOT/features)")
    parser.add_argument("--backbone", help="CNN")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="taps to model")
    parser.add_argument(
        "--statistics",
        nargs="*",
        metavar="TAP",
        help="further taps whose mean and std are measured, as targets of reconstruction "
        f"(default: those of {', '.join(RECONSTRUCTION_TARGETS)} that the weights reach)",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), help="of the features; float16 halves the files")
    parser.add_argument("--batch-size", type=options.positive, help="images per forward pass")
    parser.add_argument("--limit", type=options.positive, help="use the first images only")
    parser.add_argument(
        "--held-out",
        type=options.count_or_file,
        metavar="COUNT|FILE",
        help="images that are kept from statistics, PCA and training, to measure by: how many, or a text file of "
        "their names",
    )
    parser.add_argument(
        "--pca-positions", type=options.positive, help="positions that PCA is fitted on, spread over all images"
    )
    parser.add_argument("--views", type=options.positive, help="of each image; the first is the centre crop")
    parser.add_argument("--random-crop", action="store_true", help="the other views are crops drawn from the image")
    parser.add_argument("--flip", action="store_true", help="half of the other views are mirrored")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the inputs, describe the results, make what of them is missing."""
    args = options.parse_args(get_parser(), argv, "extract_features")
    if (args.views > 1) != (args.random_crop or args.flip):
        raise UserError("--views 2 or more goes together with --random-crop, --flip or both: give both or neither")
    device = networks.pick_device(args.device)
    folder = args.out or args.root / "features"
    with distributed.group(device), artefacts.claim(folder):
        from pipeline.features import FeatureFiles, check_room, feature_facts, unfinished
        from pipeline.images import open_stored
        from pipeline.splits import choose_held_out
        from pipeline.tap_statistics import read_projections

        images, source = open_stored(args.images or args.root / "images.npy")
        images, names = images[: args.limit], source["names"][: args.limit]
        held_out = choose_held_out(args.held_out, names, args.seed)
        if len(held_out) == len(images):
            raise UserError(f"--held-out leaves none of the {len(images)} images to train on: hold fewer out")
        program.announce(args, device)
        taps = [*(args.layers or []), *(args.statistics or [])]
        backbone, weights = networks.load_backbone(args, args.backbone, taps, device)
        if device.type == "cpu":
            import torch

            backbone = backbone.to(memory_format=torch.channels_last)  # measured: alexnet 12 %, vgg16 20 % less time
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
            distributed.first(lambda: invalidate(folder, layers))
        others = args.statistics
        if others is None:
            others = [tap for tap in RECONSTRUCTION_TARGETS if tap in backbone.available_taps]
        path = folder / "projection.safetensors"
        make_projections(
            path,
            images,
            backbone,
            layers,
            ["data", *others],
            rows=np.setdiff1d(np.arange(len(images)), held_out),
            batch_size=args.batch_size,
            facts=facts,
            about={"weights": weights.source, "sources": source.get("sources"), "names": names},
        )
        projections = distributed.first(lambda: read_projections(path, layers))
        facts |= {"projection_sha256": distributed.first(lambda: artefacts.file_sha256(path)), "dtype": args.dtype}
        views = Views(args.views, args.random_crop, args.flip, args.seed)
        wanted = {n: feature_facts(len(images), backbone, n, p.size, views, facts) for n, p in projections.items()}
        missing = distributed.first(lambda: unfinished(folder, wanted))
        if not missing:
            print(f"{folder}: features of {', '.join(layers)} are finished: nothing to do")
            return
        check_room(folder, missing)
        files = FeatureFiles(folder, missing, distributed.span(len(images) * views.count, args.batch_size))
        projections = {layer: projections[layer] for layer in missing}
        write_features(images, backbone, projections, files, batch_size=args.batch_size, views=views)
        print(f"{folder}: features of {', '.join(missing)} written")


if __name__ == "__main__":
    sys.exit(program.run(main))
