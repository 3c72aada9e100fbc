"""Stage 2: images.npy and a CNN -> the projection of every layer, and its projected features.

In:  ROOT/images.npy (N, 256, 256, 3) uint8, of stage 1.
Out: ROOT/features/projection.safetensors: per layer the channels' mean and std, and the principal components kept;
     mean and std also of `data`, the last pooling and the fully connected layers, for reconstruction.
     ROOT/features/<layer>.npy (N, H, W, D) float32 or float16, standardised and projected; with --views K
     (K·N, H, W, D), row k·N + i being view k of image i.

The images are read twice: once for the statistics, of the centre crops, once to write the features.

    python extract_features.py --preset alexnet --layers conv5
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.errors import UserError
from models.randomness import seed_for
from pipeline import artefacts, cli

if TYPE_CHECKING:
    import torch

    from models.backbones import Backbone
    from models.projection import Moments, Projection

SAVE_EVERY = 60.0  # seconds between two notes of progress on disk
RECONSTRUCTION_TARGETS = ("pool5", "fc6", "fc7", "fc8")


@dataclass(frozen=True)
class Views:
    """The views of each image that become rows. View 0 is the centre crop; the others are drawn, from the seed."""

    count: int = 1
    random_crop: bool = False
    flip: bool = False
    seed: int = 0

    def facts(self) -> artefacts.Facts:
        """What a sidecar says of them: nothing where there is the centre crop alone."""
        return {} if self.count == 1 else {"views": self.count, "random_crop": self.random_crop, "flip": self.flip}

    def cut(self, x: "torch.Tensor", view: int, image: int, height: int, width: int) -> "torch.Tensor":
        """View `view` (3, height, width) of a preprocessed image (3, H, W), the `image`-th of the workspace."""
        from models.backbones import centre_crop

        if view == 0:
            return centre_crop(x, height, width)
        # differs from the paper: it trains on centre crops alone
        generator = np.random.default_rng(seed_for(self.seed, "view", view, image))
        top, left = (int(generator.integers(0, room + 1)) for room in (x.shape[1] - height, x.shape[2] - width))
        mirrored = bool(generator.integers(0, 2))
        x = x[:, top : top + height, left : left + width] if self.random_crop else centre_crop(x, height, width)
        return x.flip(2) if self.flip and mirrored else x


def network_batches(
    images: np.ndarray, backbone: "Backbone", size: int, first: int, views: Views | None = None
) -> Iterator:
    """Batches of network input from stored images (N, 256, 256, 3), from row `first` on.

    Yields:
        the index of the first row and the input (B, 3, h, w), cropped to the backbone's size. The mean is subtracted
        before the crop, so a mean image of 256 × 256 is subtracted per pixel.
    """
    import torch

    views = views or Views()
    crop = backbone.architecture.crop
    for start in range(first, views.count * len(images), size):
        rows = np.arange(start, min(start + size, views.count * len(images)))
        batch = torch.from_numpy(images[rows % len(images)]).to(backbone.device)
        batch = backbone.preprocess(batch.permute(0, 3, 1, 2).float())  # (B, 3, 256, 256)
        yield (
            start,
            torch.stack(
                [views.cut(x, *divmod(row, len(images)), *crop) for x, row in zip(batch, rows.tolist(), strict=True)]
            ),
        )


@dataclass
class Statistics:
    """What pass 1 collects: moments of every tap, and raw feature vectors at random positions."""

    moments: dict[str, "Moments"]
    samples: dict[str, np.ndarray]
    done: int = 0
    saved: float = field(default_factory=time.monotonic)

    def save(self, path: Path, facts: artefacts.Facts) -> None:
        """Note the state on disk so that a killed run can go on."""
        arrays = {f"samples.{layer}": values for layer, values in self.samples.items()}
        for tap, m in self.moments.items():
            arrays |= {f"sums.{tap}": m.sums.numpy(), f"squares.{tap}": m.squares.numpy()}
            arrays[f"count.{tap}"] = np.array(m.count)
        arrays["done"] = np.array(self.done)
        arrays["facts"] = np.array(json.dumps(facts))
        with artefacts.atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        self.saved = time.monotonic()

    def restore(self, path: Path, facts: artefacts.Facts) -> None:
        """Take up the state of a killed run with the same facts, if there is one."""
        import torch

        try:
            with np.load(path, allow_pickle=False) as noted:
                if str(noted["facts"]) != json.dumps(facts):
                    return
                for tap, m in self.moments.items():
                    m.count = int(noted[f"count.{tap}"])
                    m.sums, m.squares = (torch.from_numpy(noted[f"{name}.{tap}"]) for name in ("sums", "squares"))
                for layer, values in self.samples.items():
                    values[:] = noted[f"samples.{layer}"]
                self.done = int(noted["done"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it and run again") from None


def collect_statistics(
    images: np.ndarray,
    backbone: "Backbone",
    layers: list[str],
    others: list[str],
    *,
    pca_positions: int,
    batch_size: int,
    seed: int,
    state: Path,
    facts: artefacts.Facts,
) -> Statistics:
    """Pass 1: moments of `layers` and `others`, and samples of `layers` for PCA.

    Args:
        state: file where progress is kept while this runs.
    """
    import torch

    from models.projection import Moments, draw_positions, positions_per_image

    architecture = backbone.architecture
    per_image = positions_per_image(len(images), pca_positions)
    taps = list(dict.fromkeys([*layers, *others]))
    floats = len(images) * per_image * sum(architecture.channels(layer) for layer in layers)
    artefacts.check_memory("samples at --pca-positions", 4 * floats)
    statistics = Statistics(
        {tap: Moments(architecture.channels(tap)) for tap in taps},
        {c: np.zeros((len(images), per_image, architecture.channels(c)), np.float32) for c in layers},
    )
    statistics.restore(state, facts)
    with cli.Progress(len(images), "statistics", "images", statistics.done) as progress, torch.no_grad():
        for start, x in network_batches(images, backbone, batch_size, statistics.done):
            features = backbone(x, taps)
            for tap, values in features.items():
                statistics.moments[tap].update(values)
            for layer in layers:
                flat = features[layer].flatten(2)  # (B, C, H·W)
                drawn = [draw_positions(seed, layer, i, per_image, flat.shape[2]) for i in range(start, start + len(x))]
                index = torch.from_numpy(np.stack(drawn)).to(flat.device)[:, None].expand(-1, flat.shape[1], -1)
                statistics.samples[layer][start : start + len(x)] = flat.gather(2, index).transpose(1, 2).cpu()
            statistics.done = start + len(x)
            progress.update(len(x))
            if time.monotonic() - statistics.saved > SAVE_EVERY:
                statistics.save(state, facts)
    return statistics


def fit_projections(statistics: Statistics, layers: list[str]) -> "dict[str, Projection]":
    """Fit the projection of every layer; constant channels are reported."""
    import torch

    from models.projection import Projection

    projections = {}
    for layer in layers:
        moments = statistics.moments[layer]
        std, constant = moments.guarded_std()
        if constant:
            print(f"{layer}: channels {constant} are constant, their standard deviation counts as 1", flush=True)
        samples = torch.from_numpy(statistics.samples[layer]).flatten(0, 1)  # (n, C)
        standardised = (samples - moments.mean.float()) / std.float()
        projections[layer] = Projection.fit(moments.mean, std, standardised.numpy())
    return projections


def projection_tensors(projections: "dict[str, Projection]", statistics: Statistics) -> "dict[str, torch.Tensor]":
    """Tensors of projection.safetensors: `<layer>.projection.<part>` and `statistics.<tap>.<mean|std>`."""
    tensors = {}
    for layer, projection in projections.items():
        tensors |= {f"{layer}.projection.{name}": value for name, value in projection.state_dict().items()}
    for tap, moments in statistics.moments.items():
        std, _ = moments.guarded_std()
        tensors |= {f"statistics.{tap}.mean": moments.mean.float(), f"statistics.{tap}.std": std.float()}
    return tensors


def write_features(
    images: np.ndarray,
    backbone: "Backbone",
    projections: "dict[str, Projection]",
    folder: Path,
    *,
    dtype: str,
    batch_size: int,
    views: Views,
    facts: artefacts.Facts,
) -> None:
    """Pass 2: project every layer and write `folder`/<layer>.npy (views·N, H, W, D)."""
    import torch

    architecture = backbone.architecture
    rows = views.count * len(images)
    shapes = {layer: (rows, *architecture.grid(layer, *architecture.crop), p.size) for layer, p in projections.items()}
    sizes = {layer: int(np.prod(shape)) * np.dtype(dtype).itemsize for layer, shape in shapes.items()}
    for layer, shape in shapes.items():
        print(f"  {layer}: {shape} {dtype}, {artefacts.format_bytes(sizes[layer])}")
    here = [folder / f"{layer}.npy{artefacts.PARTIAL}" for layer in sizes]
    artefacts.check_disk(folder, sum(sizes.values()) - sum(p.stat().st_size for p in here if p.is_file()))
    writers = {
        layer: artefacts.ArrayWriter(folder / f"{layer}.npy", shape, dtype, {**facts, "layer": layer})
        for layer, shape in shapes.items()
    }
    done = min(writer.done for writer in writers.values())
    marked = time.monotonic()
    projections = {layer: p.to(backbone.device) for layer, p in projections.items()}
    with cli.Progress(rows, "features", "images", done) as progress, torch.no_grad():
        for start, x in network_batches(images, backbone, batch_size, done, views):
            for layer, features in backbone(x, list(projections)).items():
                projected = projections[layer](features).permute(0, 2, 3, 1)  # (B, H, W, D)
                writers[layer].array[start : start + len(x)] = projected.cpu().numpy()
            progress.update(len(x))
            if time.monotonic() - marked > SAVE_EVERY:
                for writer in writers.values():
                    writer.mark(start + len(x))
                marked = time.monotonic()
    for writer in writers.values():
        writer.finish(versions=cli.versions())


def get_parser() -> cli.Parser:
    """Options of this stage."""
    parser = cli.stage_parser(__doc__)
    cli.add_weights_options(parser)
    parser.add_argument("--images", type=cli.readable_file, help="images of stage 1 (default: ROOT/images.npy)")
    parser.add_argument("--out", type=cli.writable_folder, help="folder to write to (default: ROOT/features)")
    parser.add_argument("--backbone", default="alexnet", help="CNN (default: the preset's)")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="taps to model (default: the backbone's six)")
    parser.add_argument(
        "--statistics",
        nargs="*",
        metavar="TAP",
        help="further taps whose mean and std are measured, as targets of reconstruction "
        "(default: those of pool5, fc6, fc7, fc8 that the weights reach)",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="float16 halves the files")
    parser.add_argument("--batch-size", type=cli.positive, default=16, help="images per forward pass")
    parser.add_argument("--limit", type=cli.positive, help="use the first images only")
    parser.add_argument(
        "--views", type=cli.positive, default=1, help="of each image; the first is the centre crop (paper: 1)"
    )
    parser.add_argument("--random-crop", action="store_true", help="the other views are crops drawn from the image")
    parser.add_argument("--flip", action="store_true", help="half of the other views are mirrored")
    parser.add_argument(
        "--pca-positions",
        type=cli.positive,
        default=100_000,
        help="positions that PCA is fitted on, spread over all images (original code: 100000)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args = cli.parse_args(get_parser(), argv, "extract_features")
    folder = args.out or args.root / "features"
    if (args.views > 1) != (args.random_crop or args.flip):
        raise UserError("--views 2 or more goes together with --random-crop, --flip or both: give both or neither")
    images, source = artefacts.open_array(args.images or args.root / "images.npy", "prepare_images.py")
    images = images[: args.limit]
    device = cli.pick_device(args.device)
    cli.announce(args, device)
    backbone, weights = cli.load_backbone(args, args.backbone, [*(args.layers or []), *(args.statistics or [])], device)
    layers = list(dict.fromkeys(args.layers or backbone.architecture.vlm_layers))
    backbone.architecture.check_maps(layers)
    others = args.statistics
    if others is None:
        others = [tap for tap in RECONSTRUCTION_TARGETS if tap in backbone.available_taps]
    facts = {
        "stage": "extract_features",
        "backbone": backbone.architecture.name,
        "weights_sha256": weights.sha256,
        "images_sha256": source["content_sha256"],
        "num_images": len(images),
        "pca_positions": args.pca_positions,
        "seed": args.seed,
    }
    run(images, backbone, layers, ["data", *others], folder, facts, args, weights.source)


def run(images, backbone, layers, others, folder, facts, args, source) -> None:
    """Both passes, each skipped where its artefacts stand."""
    from models.checkpoints import read_tensors, write_tensors
    from models.projection import Projection

    path = folder / "projection.safetensors"
    collected = {**facts, "layers": layers, "statistics": sorted({*layers, *others})}
    if artefacts.is_finished(path, collected, args.overwrite):
        print(f"{path} is finished")
        tensors, _ = read_tensors(path)
    else:
        state = folder / "statistics.npz"
        if args.overwrite:
            state.unlink(missing_ok=True)
        statistics = collect_statistics(
            images,
            backbone,
            layers,
            others,
            pca_positions=args.pca_positions,
            batch_size=args.batch_size,
            seed=args.seed,
            state=state,
            facts=collected,
        )
        tensors = projection_tensors(fit_projections(statistics, layers), statistics)
        with artefacts.atomic_path(path) as temporary:
            write_tensors(temporary, tensors, {"layers": layers, "weights": source, **collected})
        artefacts.write_json(artefacts.sidecar_path(path), {**collected, "versions": cli.versions()})
        state.unlink(missing_ok=True)
    projections = {
        layer: Projection(**{n: tensors[f"{layer}.projection.{n}"] for n in ("mean", "std", "components", "pca_mean")})
        for layer in layers
    }
    views = Views(args.views, args.random_crop, args.flip, args.seed)
    facts = {**facts, "projection_sha256": artefacts.file_sha256(path), "dtype": args.dtype, **views.facts()}
    missing = {
        layer: p
        for layer, p in projections.items()
        if not artefacts.is_finished(folder / f"{layer}.npy", {**facts, "layer": layer}, args.overwrite)
    }
    if not missing:
        print(f"{folder}: features of {', '.join(layers)} are finished: nothing to do")
        return
    options = {"dtype": args.dtype, "batch_size": args.batch_size, "views": views}
    write_features(images, backbone, missing, folder, **options, facts=facts)
    print(f"{folder}: features of {', '.join(missing)} written")


if __name__ == "__main__":
    sys.exit(cli.run(main))
