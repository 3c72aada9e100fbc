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
from pipeline import artefacts, distributed, networks, options, program
from pipeline.progress import Progress, SafePoints

if TYPE_CHECKING:
    import torch

    from models.backbones import Backbone
    from models.projection import Moments, Projection

SAVE_EVERY = 60.0  # seconds between two notes of progress on disk
PROJECTED_AT_ONCE = 4  # images; the result is written while it is in the processor's cache
STATE = "statistics.npz"  # of pass 1, while it runs
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
    images: np.ndarray,
    backbone: "Backbone",
    size: int,
    rows: np.ndarray,
    views: Views | None = None,
) -> Iterator:
    """Batches of network input from stored images (N, 256, 256, 3); row k·N + i is view k of image i.

    Yields:
        some of `rows` and their input (B, 3, h, w), cropped to the backbone's size. The mean is subtracted before the
        crop, so a mean image of 256 × 256 is subtracted per pixel.
    """
    import torch

    from models.backbones import centre_crop

    views = views or Views()
    crop = backbone.architecture.crop
    early = views.count == 1 and backbone.mean_image is None  # then a crop of bytes is the same, and less work
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        batch = torch.from_numpy(images[chosen % len(images)]).permute(0, 3, 1, 2)  # (B, 3, 256, 256)
        if early:
            batch = centre_crop(batch, *crop)
        batch = batch.to(torch.float32, memory_format=torch.contiguous_format).to(backbone.device)
        batch = backbone.preprocess(batch)
        if not early:
            numbered = zip(batch, chosen.tolist(), strict=True)
            batch = torch.stack([views.cut(x, *divmod(row, len(images)), *crop) for x, row in numbered])
        yield chosen, batch


@dataclass
class Statistics:
    """What pass 1 collects from the images before `done`: moments of every tap, raw vectors at random positions."""

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
        size = sum(array.nbytes for array in arrays.values())
        with artefacts.atomic_path(path, size) as temporary, temporary.open("wb") as file:
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
                    m.sums.copy_(torch.from_numpy(noted[f"sums.{tap}"]))
                    m.squares.copy_(torch.from_numpy(noted[f"squares.{tap}"]))
                for layer, values in self.samples.items():
                    values[:] = noted[f"samples.{layer}"]
                self.done = int(noted["done"])
        except FileNotFoundError:
            return
        except Exception as error:  # a damaged archive makes numpy and zipfile raise nearly anything
            raise UserError(f"{path} is damaged ({error}): remove it and run again") from None

    def reduce(self) -> None:
        """Put the parts of all ranks together; the samples on rank 0 alone."""
        import torch

        for m in self.moments.values():
            count = distributed.add_up(torch.tensor([m.count]))
            m.count, m.sums, m.squares = int(count), distributed.add_up(m.sums), distributed.add_up(m.squares)
        for layer, values in self.samples.items():
            whole = distributed.gather_rows(values)
            self.samples[layer] = values[:0] if whole is None else whole


def collect_statistics(
    images: np.ndarray,
    backbone: "Backbone",
    layers: list[str],
    others: list[str],
    *,
    rows: np.ndarray,
    pca_positions: int,
    batch_size: int,
    seed: int,
    state: Path,
    facts: artefacts.Facts,
) -> Statistics:
    """Pass 1: moments of `layers` and `others`, and samples of `layers` for PCA.

    Args:
        rows: of the images that are read, the training images.
        state: file where progress is kept while this runs.
    """
    import torch

    from models.projection import Moments, draw_positions, positions_per_image

    architecture = backbone.architecture
    per_image = positions_per_image(len(rows), pca_positions)
    taps = list(dict.fromkeys([*layers, *others]))
    first, stop = distributed.span(len(rows), batch_size)
    floats = (stop - first) * per_image * sum(architecture.channels(layer) for layer in layers)
    artefacts.check_memory("samples at --pca-positions", 4 * floats)
    statistics = Statistics(
        {tap: Moments(architecture.channels(tap)) for tap in taps},
        {c: np.zeros((stop - first, per_image, architecture.channels(c)), np.float32) for c in layers},
        first,
    )
    state, facts = artefacts.rank_path(state), {**facts, "rows": [first, stop]}
    statistics.restore(state, facts)
    batches = network_batches(images, backbone, batch_size, rows[statistics.done : stop])
    progress = Progress(stop - first, "statistics", "images", statistics.done - first)
    with progress, SafePoints() as signals, torch.no_grad():
        for numbers, x in batches:
            done = statistics.done - first
            features = backbone(x, taps)
            for tap, values in features.items():
                statistics.moments[tap].update(values)
            for layer in layers:
                flat = features[layer].flatten(2)  # (B, C, H·W)
                drawn = [draw_positions(seed, layer, i, per_image, flat.shape[2]) for i in numbers.tolist()]
                index = torch.from_numpy(np.stack(drawn)).to(flat.device)[:, None].expand(-1, flat.shape[1], -1)
                sampled = flat.gather(2, index).transpose(1, 2).cpu()  # (B, positions, C)
                statistics.samples[layer][done : done + len(x)] = sampled
            statistics.done += len(x)
            progress.update(len(x))
            if time.monotonic() - statistics.saved > SAVE_EVERY:
                statistics.save(state, facts)
            signals.check(lambda: statistics.save(state, facts))
    if distributed.size() > 1:
        statistics.save(state, facts)  # another rank may fail while this one waits for it
    statistics.reduce()
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


def feature_facts(
    images: np.ndarray, backbone: "Backbone", layer: str, size: int, views: Views, facts: artefacts.Facts
) -> artefacts.Facts:
    """What the features of a layer with `size` components must state."""
    architecture = backbone.architecture
    shape = [len(images) * views.count, *architecture.grid(layer, *architecture.crop), size]
    return {"shape": shape, **facts, "layer": layer, **views.facts()}


def write_features(
    images: np.ndarray,
    backbone: "Backbone",
    projections: "dict[str, Projection]",
    folder: Path,
    *,
    batch_size: int,
    views: Views,
    facts: dict[str, artefacts.Facts],
) -> None:
    """Pass 2: project every layer and write `folder`/<layer>.npy (N·K, H, W, D); `facts` of each by layer."""
    import torch
    import torch.nn.functional as F

    sizes = {layer: int(np.prod(f["shape"])) * np.dtype(f["dtype"]).itemsize for layer, f in facts.items()}
    for layer, f in facts.items():
        print(f"  {layer}: {tuple(f['shape'])} {f['dtype']}, {artefacts.format_bytes(sizes[layer])}")
    here = [folder / f"{layer}.npy{artefacts.PARTIAL}" for layer in sizes]
    there = sum(p.stat().st_size for p in here if p.is_file())
    distributed.first(lambda: artefacts.check_disk(folder, sum(sizes.values()) - there))
    first, stop = distributed.span(len(images) * views.count, batch_size)
    writers = {
        layer: artefacts.ArrayWriter(folder / f"{layer}.npy", tuple(f["shape"]), f["dtype"], f, (first, stop))
        for layer, f in facts.items()
    }
    done = min(writer.done for writer in writers.values())

    def mark(rows: int) -> None:
        for writer in writers.values():
            writer.mark(rows)

    marked = time.monotonic()
    products = {layer: [t.to(backbone.device) for t in p.as_product()] for layer, p in projections.items()}
    batches = network_batches(images, backbone, batch_size, np.arange(done, stop), views)
    progress = Progress(stop - first, "features", "images", done - first)
    with progress, SafePoints() as signals, torch.no_grad():
        for _, x in batches:
            for layer, features in backbone(x, list(products)).items():
                weight, offset = products[layer]
                for i, part in enumerate(features.split(PROJECTED_AT_ONCE)):
                    p = F.conv2d(part, weight[:, :, None, None], offset).permute(0, 2, 3, 1)  # (b, H, W, D)
                    writers[layer].put(done + i * PROJECTED_AT_ONCE, p.cpu().numpy())
            done += len(x)
            progress.update(len(x))
            if time.monotonic() - marked > SAVE_EVERY:
                mark(done)
                marked = time.monotonic()
            signals.check(lambda: mark(done))  # noqa: B023 (called at once)
    if distributed.size() > 1:
        mark(stop)
    for writer in writers.values():
        writer.finish(versions=program.versions())


def get_parser() -> options.Parser:
    """Options of this stage."""
    parser = options.stage_parser(__doc__)
    options.add_weights_options(parser)
    parser.add_argument("--images", type=options.readable_file, help="images of stage 1 (default: ROOT/images.npy)")
    parser.add_argument("--out", type=options.writable_folder, help="folder to write to (default: ROOT/features)")
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
    parser.add_argument("--batch-size", type=options.positive, default=16, help="images per forward pass")
    parser.add_argument("--limit", type=options.positive, help="use the first images only")
    parser.add_argument(
        "--held-out",
        type=options.count_or_file,
        default=50,
        metavar="COUNT|FILE",
        help="images that are kept from statistics, PCA and training, to measure by: how many, or a text file of "
        "their names (paper: none)",
    )
    parser.add_argument(
        "--pca-positions",
        type=options.positive,
        default=100_000,
        help="positions that PCA is fitted on, spread over all images (original code: 100000)",
    )
    parser.add_argument(
        "--views", type=options.positive, default=1, help="of each image; the first is the centre crop (paper: 1)"
    )
    parser.add_argument("--random-crop", action="store_true", help="the other views are crops drawn from the image")
    parser.add_argument("--flip", action="store_true", help="half of the other views are mirrored")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args = options.parse_args(get_parser(), argv, "extract_features")
    if (args.views > 1) != (args.random_crop or args.flip):
        raise UserError("--views 2 or more goes together with --random-crop, --flip or both: give both or neither")
    device = networks.pick_device(args.device)
    folder = args.out or args.root / "features"
    with distributed.group(device), artefacts.claim(folder):
        extract(args, folder, device)


def extract(args, folder: Path, device: "torch.device") -> None:
    """Read the inputs, describe the results, make what of them is missing."""
    from models.checkpoints import PROJECTION_PARTS
    from models.projection import Projection
    from pipeline.images import open_stored
    from pipeline.splits import choose_held_out

    images, source = open_stored(args.images or args.root / "images.npy")
    images, names = images[: args.limit], source["names"][: args.limit]
    held_out = choose_held_out(args.held_out, names, args.seed)
    if len(held_out) == len(images):
        raise UserError(f"--held-out leaves none of the {len(images)} images to train on: hold fewer out")
    program.announce(args, device)
    backbone, weights = networks.load_backbone(
        args, args.backbone, [*(args.layers or []), *(args.statistics or [])], device
    )
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
    if args.overwrite:  # all of it, before any of it is made: what is killed in between leaves nothing that looks whole
        distributed.first(lambda: invalidate(folder, layers))
    about = {"weights": weights.source, "sources": source.get("sources"), "names": names}
    tensors = find_projections(images, backbone, layers, folder, facts, args, about, held_out)
    projections = {
        layer: Projection(**{n: tensors[f"{layer}.projection.{n}"] for n in PROJECTION_PARTS}) for layer in layers
    }
    digest = distributed.first(lambda: artefacts.file_sha256(folder / "projection.safetensors"))
    facts |= {"projection_sha256": digest, "dtype": args.dtype}
    views = Views(args.views, args.random_crop, args.flip, args.seed)
    wanted = {name: feature_facts(images, backbone, name, p.size, views, facts) for name, p in projections.items()}
    missing = distributed.first(
        lambda: [name for name, f in wanted.items() if not artefacts.is_finished(folder / f"{name}.npy", f, False)]
    )
    if not missing:
        print(f"{folder}: features of {', '.join(layers)} are finished: nothing to do")
        return
    projections, wanted = ({name: values[name] for name in missing} for values in (projections, wanted))
    write_features(images, backbone, projections, folder, batch_size=args.batch_size, views=views, facts=wanted)
    print(f"{folder}: features of {', '.join(missing)} written")


def invalidate(folder: Path, layers: list[str]) -> None:
    """Declare the projection and the features of some layers unfinished, and drop every state."""
    artefacts.discard(folder / STATE)
    for name in ("projection.safetensors", *(f"{layer}.npy" for layer in layers)):
        artefacts.is_finished(folder / name, {}, overwrite=True)


def find_projections(
    images: np.ndarray,
    backbone: "Backbone",
    layers: list[str],
    folder: Path,
    facts: artefacts.Facts,
    args,
    about: artefacts.Facts,
    held_out: list[int],
) -> "dict[str, torch.Tensor]":
    """Tensors of projection.safetensors, which pass 1 makes where it is missing."""
    from models.checkpoints import read_tensors

    path, state = folder / "projection.safetensors", folder / STATE
    others = args.statistics
    if others is None:
        others = [tap for tap in RECONSTRUCTION_TARGETS if tap in backbone.available_taps]
    others = ["data", *others]
    collected = {**facts, "layers": layers, "statistics": sorted({*layers, *others})}
    if distributed.first(lambda: artefacts.is_finished(path, collected, False)):
        print(f"{path} is finished")
    else:
        statistics = collect_statistics(
            images,
            backbone,
            layers,
            others,
            rows=np.setdiff1d(np.arange(len(images)), held_out),
            pca_positions=args.pca_positions,
            batch_size=args.batch_size,
            seed=args.seed,
            state=state,
            facts=collected,
        )

        def write() -> None:
            tensors = projection_tensors(fit_projections(statistics, layers), statistics)
            shared = {key: about[key] for key in ("weights", "sources")}
            artefacts.write_tensors(path, tensors, {"layers": layers, **shared, **collected})
            artefacts.write_json(artefacts.sidecar_path(path), {**collected, **about, "versions": program.versions()})

        distributed.first(write)
    distributed.first(lambda: artefacts.discard(state))
    return distributed.first(lambda: read_tensors(path)[0])


if __name__ == "__main__":
    sys.exit(program.run(main))
