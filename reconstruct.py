"""Stage 4: CNN features -> the images that have them.

In:  images whose feature is inverted, or features themselves (.npy), or rows of ROOT/images.npy; ROOT/vlm.safetensors,
     of stage 3.
Out: a folder per input with reconstruction.png and .npy (H, W, 3) float32 RGB, of the best restart; image.png, what
     was inverted; restart-<r>.png of each; snapshots/; curves.csv and curves.png with every term of the loss;
     comparison.png; parameters.json.

    python reconstruct.py photo.jpg --preset alexnet --target pool5 --regularizer vlm
    python reconstruct.py --held-out --regularizer tv
"""

import csv
import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.errors import UserError
from models.randomness import seed_for
from models.regularizers import REGULARIZERS, learning_rate_for, penalties_for
from pipeline import artefacts, networks, options, program
from pipeline.progress import Progress, SafePoints, Terminated

if TYPE_CHECKING:
    import torch

    from models.backbones import Backbone
    from models.descent import MomentumSGD, Schedule
    from models.objective import ReconstructionLoss
    from models.vlm import VisualLanguageModel

WEIGHT_OPTIONS = {"l2": "l2_weight", "tv": "tv_weight"}  # penalty -> its option


@dataclass(frozen=True)
class Source:
    """One thing to invert: an image or feature file, or a row of images.npy."""

    name: str
    path: Path
    row: int | None = None


def descend(
    loss: "ReconstructionLoss",
    pixels: "torch.Tensor",
    optimizer: "MomentumSGD",
    schedule: "Schedule",
    iterations: int,
    callback: Callable[[int, dict[str, float]], None],
    first: int = 0,
) -> None:
    """Minimise `loss` over `pixels` (1, 3, H, W), which `optimizer` changes in place.

    `callback(i, terms)` gets the terms before update `i` (as the original printed them), once it is made.

    Raises:
        UserError: the loss is no longer finite.
    """
    for i in range(first, iterations):
        schedule.prepare(optimizer, i)
        optimizer.zero_grad()
        terms = loss(pixels)
        total = terms["total"].item()
        if not math.isfinite(total):
            raise UserError(
                f"the loss is no longer finite at iteration {i} with learning rate {optimizer.lr:g}: "
                "use a smaller --learning-rate"
            )
        terms["total"].backward()
        optimizer.step()
        callback(i, {name: value.item() for name, value in terms.items()})


def to_picture(backbone: "Backbone", pixels: "torch.Tensor") -> np.ndarray:
    """Mean-subtracted pixels (1, 3, H, W) -> (H, W, 3) uint8 RGB, clipped and truncated as in the original."""
    rgb = backbone.to_rgb(pixels.detach())[0].permute(1, 2, 0)  # (H, W, 3)
    return rgb.cpu().numpy().astype(np.uint8)


def start_pixels(
    backbone: "Backbone", kind: str, statistics: dict[str, dict[str, "torch.Tensor"]], seed: int
) -> "torch.Tensor":
    """What a descent starts from, mean-subtracted pixels (1, 3, h, w); `kind` as in `Regularizer.start`."""
    import torch

    from models import objective

    crop = backbone.architecture.crop
    if kind == "zero":
        return torch.zeros(1, 3, *crop, device=backbone.device)
    if kind == "norm":
        return objective.initial_pixels_of_norm(crop, seed).to(backbone.device)
    return objective.initial_pixels(backbone, statistics["data"]["mean"], statistics["data"]["std"], crop, seed)


class Restart:
    """One descent from its own noise, with its curves, snapshots and resumable state in a folder."""

    def __init__(
        self,
        number: int,
        folder: Path,
        backbone: "Backbone",
        loss: "ReconstructionLoss",
        start: "torch.Tensor",
        facts: artefacts.Facts,
    ):
        from models.descent import MomentumSGD, Schedule

        self.number, self.folder, self.backbone, self.loss = number, folder, backbone, loss
        self.pixels = start.requires_grad_()
        self.optimizer = MomentumSGD([self.pixels], facts["learning_rate"], facts["momentum"])
        self.schedule = Schedule(facts["learning_rate"], tuple(facts["decay_at"]))
        self.curves: list[dict[str, float]] = []
        self.facts = facts
        self.state = folder / f"restart-{number}.state.safetensors"

    def resume(self) -> None:
        """Take up the state of a killed run with the same facts."""
        import torch

        from models.checkpoints import AFRESH, check_state, read_state

        if not self.state.is_file():
            return
        tensors, noted = read_state(self.state, {"facts": dict, "curves": list})
        if noted["facts"] != json.loads(json.dumps(self.facts)):
            return
        check_state(self.state, tensors, dict.fromkeys(("pixels", "velocity"), tuple(self.pixels.shape)))
        if not are_curves(noted["curves"], self.facts["iterations"]):
            raise UserError(f"{self.state} holds damaged curves: {AFRESH}")
        with torch.no_grad():
            self.pixels.copy_(tensors["pixels"])
            self.optimizer.velocities[0].copy_(tensors["velocity"])
        self.curves = noted["curves"]

    def run(self, snapshot_every: int) -> None:
        """Descend to the end; save a snapshot and the state every `snapshot_every` updates, and on Ctrl-C."""
        iterations = self.facts["iterations"]
        what = f"reconstructing {self.facts['target']} ({self.facts['regularizer']})"
        progress = Progress(iterations, what, "it", len(self.curves))
        with progress, SafePoints() as signals:

            def callback(i: int, terms: dict[str, float]) -> None:
                self.curves.append(terms)
                progress.update(note=f"loss {terms['total']:.4f}, feature {terms['feature']:.4f}")
                if (i + 1) % snapshot_every == 0 and i + 1 < iterations:
                    self.snapshot(i + 1)
                signals.check(lambda: self.snapshot(i + 1))  # pixels, velocity and curves agree only here

            descend(self.loss, self.pixels, self.optimizer, self.schedule, iterations, callback, len(self.curves))

    def snapshot(self, iteration: int) -> None:
        """Write the picture so far and the state from which the same command goes on."""
        from models.checkpoints import write_tensors
        from pipeline.images import write_png

        folder = self.folder / "snapshots"
        write_png(folder / f"restart-{self.number}-{iteration:05d}.png", to_picture(self.backbone, self.pixels))
        with artefacts.atomic_path(self.state) as temporary:
            tensors = {"pixels": self.pixels, "velocity": self.optimizer.velocities[0]}
            write_tensors(temporary, tensors, {"facts": self.facts, "curves": self.curves})


def are_curves(curves: list, most: int) -> bool:
    """Whether these are the terms of at most so many updates, by the same names."""
    names = curves[0].keys() if curves and isinstance(curves[0], dict) else set()
    return len(curves) <= most and all(
        isinstance(terms, dict)
        and terms.keys() == names
        and {"total", "feature"} <= names
        and all(type(value) in (int, float) for value in terms.values())
        for terms in curves
    )


def write_curves(folder: Path, restarts: list[Restart]) -> None:
    """curves.csv and curves.png of all restarts."""
    from pipeline.figures import reconstruction_curves

    names = ["restart", "iteration", *restarts[0].curves[0]]
    rows = [[r.number, i, *terms.values()] for r in restarts for i, terms in enumerate(r.curves)]
    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    artefacts.write_text(folder / "curves.csv", text.getvalue())
    reconstruction_curves([r.curves for r in restarts], folder / "curves.png")


def get_parser() -> options.Parser:
    """Options of this stage."""
    parser = options.stage_parser(__doc__)
    options.add_weights_options(parser)
    parser.add_argument(
        "inputs", nargs="*", metavar="IMAGE|FOLDER|FEATURE.npy", help="images to reconstruct, or stored features"
    )
    parser.add_argument(
        "--images", type=options.readable_file, help="images of stage 1 for --rows (default: ROOT/images.npy)"
    )
    parser.add_argument("--rows", type=options.natural, nargs="+", metavar="ROW", help="reconstruct these of --images")
    parser.add_argument("--held-out", action="store_true", help="reconstruct the rows that training held out")
    parser.add_argument(
        "--vlm", type=options.readable_file, help="checkpoint, also for the statistics (default: ROOT/vlm.safetensors)"
    )
    parser.add_argument(
        "--statistics",
        type=options.readable_file,
        help="projection.safetensors of stage 2 with the mean and std of taps that the checkpoint lacks",
    )
    parser.add_argument("--target", default="pool5", metavar="TAP", help="feature to invert (paper: fc8 of AlexNet)")
    parser.add_argument(
        "--restarts", type=options.positive, default=1, help="descents from other noise; the best is kept"
    )
    parser.add_argument("--snapshot-every", type=options.positive, default=100, help="updates between snapshots")
    parser.add_argument(
        "--out",
        type=options.writable_folder,
        help="folder, for several inputs one that holds a folder for each "
        "(default: ROOT/reconstructions/<input>-<target>-<regularizer>)",
    )
    add_objective_options(parser)
    return parser


def add_objective_options(parser: options.Parser) -> None:
    """Options of the loss and its descent."""
    weight = options.non_negative_number
    parser.add_argument(
        "--regularizer",
        choices=tuple(REGULARIZERS),
        default="vlm",
        help="vlm is the paper, none its control, l2 Simonyan's, tv Mahendran & Vedaldi's, each with its own descent",
    )
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="layers that regularise (default: all weighted)")
    parser.add_argument("--layer-weights", nargs="+", type=weight, help="λ of --layers, in order")
    parser.add_argument("--feature-weight", type=weight, default=1.0, help="λ₁ (paper: 1)")
    parser.add_argument("--vlm-weight", type=weight, default=10.0, help="λ₂ (paper: 10)")
    parser.add_argument("--l2-weight", type=weight, help="λ of the norm in l2")
    parser.add_argument("--tv-weight", type=weight, help="λ of total variation in tv and vlm+tv (tv: by depth)")
    parser.add_argument(
        "--iterations", dest="updates", type=options.positive, help="(default: the preset's, paper: 1000; l2, tv: 400)"
    )
    parser.add_argument(
        "--learning-rate",
        type=options.positive_number,
        help="of pixels in 0-255 (default: the authors', or what works for the tap; paper: 524288)",
    )
    parser.add_argument(
        "--decay-at",
        type=options.natural,
        nargs="*",
        metavar="ITERATION",
        help="divide the rate by ten and forget the momentum after these, counted from 0 (default: never; l2, tv: "
        "after 1/4 and 3/4)",
    )
    parser.add_argument("--momentum", type=options.fraction, default=0.9, help="paper: 0.9")


def resolve_defaults(args, backbone: str) -> None:
    """Fill in what depends on regulariser, backbone and tap.

    Raises:
        UserError: an option that the regulariser does not have.
    """
    regularizer = REGULARIZERS[args.regularizer]
    args.iterations = args.updates or regularizer.iterations or args.iterations  # `iterations` is the preset's
    if args.learning_rate is None:
        args.learning_rate = learning_rate_for(args.regularizer)
    if args.decay_at is None:
        after = (round(part * args.iterations) - 1 for part in regularizer.decay_at)
        args.decay_at = [at for at in after if at >= 0]
    args.penalties = penalties_for(args.regularizer, args.target)
    for name, option in WEIGHT_OPTIONS.items():
        value = getattr(args, option)
        if value is not None and name not in args.penalties:
            raise UserError(f"--{option.replace('_', '-')} means nothing to --regularizer {args.regularizer}: drop it")
        if value is not None:
            args.penalties[name] = value
    if not regularizer.vlm:
        args.vlm_weight = 0.0
    if regularizer.start == "zero" and args.restarts > 1:
        raise UserError(f"every descent of {args.regularizer} starts from the same image: use --restarts 1")


def list_sources(args, configuration: dict) -> tuple[list[Source], list[str]]:
    """What is to be inverted, in order, and a line for every input that gives nothing.

    Raises:
        UserError: nothing to invert, or rows that are not there.
    """
    from pipeline.images import list_images, open_stored, output_name

    files, problems = list_images(args.inputs) if args.inputs else ({}, [])
    sources = [Source(name, path) for name, path in files.items()]
    if args.rows or args.held_out:
        path = args.images or args.root / "images.npy"
        images, facts = open_stored(path)
        rows = [*(args.rows or []), *(held_out_rows(configuration, facts) if args.held_out else [])]
        for row in dict.fromkeys(rows):
            if row >= len(images):
                raise UserError(f"{path} has no row {row}: it holds {len(images)} images")
            name = output_name(f"{row:05d}-{Path(facts['names'][row]).stem}")
            sources.append(Source(name if name not in files else f"row-{name}", path, row))
    if not sources:
        raise UserError("nothing to reconstruct: give images, --rows or --held-out")
    return sources, problems


def held_out_rows(configuration: dict, images: artefacts.Facts) -> list[int]:
    """Rows of images.npy that no layer of the checkpoint was trained on, though its training knew them.

    Raises:
        UserError: there are none, the layers were split differently, or the images are not there.
    """
    from pipeline.splits import rows_of

    splits = [facts.get("held_out_names") for facts in configuration["training"].values()]
    if not splits or any(split != splits[0] for split in splits):
        raise UserError("the layers of the checkpoint were trained on different splits: name rows with --rows")
    held = splits[0]
    if not isinstance(held, list) or not all(isinstance(name, str) for name in held):
        raise UserError("the checkpoint does not say which images it held out: name rows with --rows")
    if not held:
        raise UserError("training held no images out: name rows with --rows")
    return rows_of(held, images["names"], "the checkpoint")


def read_source(source: Source, backbone: "Backbone", tap: str) -> "tuple[torch.Tensor, np.ndarray | None, str]":
    """The feature to invert (1, …), the image it is of, (h, w, 3) uint8, if there is one, and the input's sha256."""
    import torch

    from models.backbones import centre_crop
    from pipeline.images import check_file, fit_to, read_rgb

    crop = backbone.architecture.crop
    if source.row is not None:
        stored = np.array(np.load(source.path, mmap_mode="r")[source.row])
        x = centre_crop(torch.from_numpy(stored).permute(2, 0, 1)[None], *crop)  # (1, 3, h, w)
        digest = artefacts.hash_rows(stored)
    else:
        check_file(source.path)
        digest = artefacts.file_sha256(source.path)
        if source.path.suffix == ".npy":
            return read_feature(source.path, backbone, tap), None, digest
        x = torch.from_numpy(fit_to(read_rgb(source.path), *crop).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        feature = backbone(backbone.preprocess(x.float().to(backbone.device)), [tap])[tap]
    return feature, x[0].permute(1, 2, 0).numpy(), digest


def read_feature(path: Path, backbone: "Backbone", tap: str) -> "torch.Tensor":
    """A stored feature with a leading axis of one; a UserError says why not."""
    import torch

    try:
        stored = artefacts.map_array(path)
    except ValueError as error:
        raise UserError(f"{path} is not a readable .npy array ({error}): give another feature") from None
    dims = 2 if tap in backbone.architecture.fully_connected else 4
    fits = stored.dtype.kind == "f" and stored.ndim in (dims - 1, dims) and stored.size
    with np.errstate(over="ignore"):
        feature = stored.astype(np.float32) if fits else None
    if feature is None or not np.isfinite(feature).all():
        raise UserError(f"{path} is {stored.dtype} {stored.shape}, or holds NaN: give finite floats of {tap}")
    tensor = torch.from_numpy(feature)
    return (tensor if tensor.ndim == dims else tensor[None]).to(backbone.device)


def layer_weights(args, backbone: "Backbone", layers: list[str]) -> dict[str, float]:
    """λ of each layer's language model; a UserError names what does not fit."""
    from models.objective import default_layer_weights

    weights = default_layer_weights(backbone.architecture)
    if not args.layers:
        return weights
    unknown = [layer for layer in args.layers if layer not in layers]
    if unknown:
        raise UserError(f"the language model has no layer {unknown[0]}: choose from {', '.join(layers)}")
    values = args.layer_weights or [weights.get(layer, 1.0) for layer in args.layers]
    if len(values) != len(args.layers):
        raise UserError(f"--layer-weights has {len(values)} values for {len(args.layers)} --layers: give one each")
    return dict(zip(args.layers, values, strict=True))


def read_all_statistics(args, vlm: "VisualLanguageModel", backbone: str) -> dict[str, dict[str, "torch.Tensor"]]:
    """Mean and std by tap, of the checkpoint and of --statistics; a UserError if those needed are missing."""
    statistics = vlm.statistics
    if args.statistics is not None:
        statistics = read_statistics(args.statistics, backbone) | statistics
    needed = ("data", args.target) if not REGULARIZERS[args.regularizer].relative else ()
    for tap in needed:
        if tap not in statistics:
            there = ", ".join(sorted(statistics))
            raise UserError(
                f"the checkpoint has no statistics of {tap} (it has {there}): "
                f"run extract_features.py --statistics {tap} and give its projection.safetensors with --statistics"
            )
    return {tap: statistics[tap] for tap in needed}


def read_statistics(path: Path, backbone: str) -> dict[str, dict]:
    """Mean and std by tap of a projection.safetensors of stage 2."""
    from models.checkpoints import check_channels, read_tensors, take_statistics

    tensors, configuration = read_tensors(path)
    if configuration.get("backbone") != backbone:
        raise UserError(f"{path} belongs to {configuration.get('backbone')}, not {backbone}: give another --statistics")
    statistics = take_statistics(tensors, path)
    check_channels({tap: len(values["mean"]) for tap, values in statistics.items()}, backbone, path)
    return statistics


def main(argv: list[str] | None = None) -> int:
    """Run the stage; 2 if one of several inputs could not be reconstructed."""
    args = options.parse_args(get_parser(), argv, "reconstruct")
    from models.checkpoints import load_vlm

    checkpoint = args.vlm or args.root / "vlm.safetensors"
    vlm, configuration = load_vlm(checkpoint)
    sources, problems = list_sources(args, configuration)
    resolve_defaults(args, configuration["backbone"])
    device = networks.pick_device(args.device)
    program.announce(args, device)
    backbone, weights = networks.load_backbone(args, configuration["backbone"], [args.target], device)
    statistics = read_all_statistics(args, vlm, configuration["backbone"])
    regularizer = REGULARIZERS[args.regularizer]
    facts = {
        "stage": "reconstruct",
        "backbone": configuration["backbone"],
        "weights_sha256": weights.sha256,
        "vlm_sha256": artefacts.file_sha256(checkpoint) if regularizer.vlm else None,
        "statistics_sha256": artefacts.hash_rows([v.numpy() for s in statistics.values() for v in s.values()]),
        "layer_weights": layer_weights(args, backbone, list(vlm.layers)) if regularizer.vlm else {},
        **{key: getattr(args, key) for key in ("target", "regularizer", "feature_weight", "vlm_weight", "penalties")},
        **{key: getattr(args, key) for key in ("learning_rate", "decay_at", "momentum", "iterations")},
        **{key: getattr(args, key) for key in ("restarts", "seed")},
    }
    reader = vlm.freeze().to(device) if regularizer.vlm else None
    failed = len(problems)
    for problem in problems:
        print(f"reconstruct.py: {problem}", file=sys.stderr)
    for number, source in enumerate(sources, start=1):
        if len(sources) > 1:
            print(f"{number}/{len(sources)} {source.name}", flush=True)
        try:
            out = output_folder(args, source)
            with artefacts.claim(out):
                reconstruct(args, source, out, backbone, reader, statistics, facts)
        except Exception as error:
            line = program.explanation(error)
            if line is None or len(sources) == 1 or isinstance(error, artefacts.NoRoomError):
                raise
            failed += 1
            print(f"reconstruct.py: {source.name}: {line}", file=sys.stderr)
    return 2 if failed else 0


def output_folder(args, source: Source) -> Path:
    """Where the results of one input go."""
    if args.out is None:
        return args.root / "reconstructions" / f"{source.name}-{args.target}-{args.regularizer}"
    single = len(args.inputs) == 1 and not (args.rows or args.held_out or Path(args.inputs[0]).is_dir())
    return args.out if single else args.out / source.name


def reconstruct(
    args,
    source: Source,
    out: Path,
    backbone: "Backbone",
    vlm: "VisualLanguageModel | None",
    statistics: dict[str, dict[str, "torch.Tensor"]],
    facts: artefacts.Facts,
) -> None:
    """All restarts of one input, and what they leave in `out`; nothing where that is finished."""
    from models.objective import ReconstructionLoss

    target, rgb, digest = read_source(source, backbone, args.target)
    facts = {"input": source.name, "input_sha256": digest, **facts}
    if artefacts.is_finished(out / "reconstruction.npy", facts, args.overwrite):
        for state in out.glob("restart-*.state.safetensors*"):  # killed just before it removed them
            state.unlink()
        print(f"{out} is finished: nothing to do")
        return
    regularizer = REGULARIZERS[args.regularizer]
    loss = ReconstructionLoss(
        backbone,
        args.target,
        target,
        None if regularizer.relative else statistics[args.target]["std"].to(backbone.device),
        vlm,
        feature_weight=args.feature_weight,
        vlm_weight=args.vlm_weight,
        layer_weights=facts["layer_weights"],
        penalties=args.penalties,
    )
    restarts: list[Restart] = []
    for number in range(args.restarts):
        start = start_pixels(backbone, regularizer.start, statistics, seed_for(args.seed, "noise", number))
        restart = Restart(number, out, backbone, loss, start, facts)
        if not args.overwrite:
            restart.resume()
        restarts.append(restart)
        try:
            restart.run(args.snapshot_every)
        except (KeyboardInterrupt, Terminated):
            if any(r.curves for r in restarts):
                save(out, [r for r in restarts if r.curves], rgb)
            raise
    save(out, restarts, rgb)
    finish(out, restarts, facts)


def save(out: Path, restarts: list[Restart], rgb: np.ndarray | None) -> None:
    """Pictures and curves of what there is, finished or interrupted."""
    from pipeline.figures import picture_row
    from pipeline.images import write_png

    best = min(restarts, key=lambda r: r.curves[-1]["total"])
    picture = to_picture(best.backbone, best.pixels)
    for r in restarts:
        write_png(out / f"restart-{r.number}.png", to_picture(r.backbone, r.pixels))
    write_png(out / "reconstruction.png", picture)
    if rgb is not None:
        write_png(out / "image.png", rgb)
    write_curves(out, restarts)
    titled = {} if rgb is None else {"image": rgb}
    picture_row({**titled, f"{best.facts['target']}, {best.facts['regularizer']}": picture}, out / "comparison.png")


def finish(out: Path, restarts: list[Restart], facts: artefacts.Facts) -> None:
    """Write the float result, the parameters and the sidecar, and drop the states."""
    best = min(restarts, key=lambda r: r.curves[-1]["total"])
    result = best.backbone.to_rgb(best.pixels.detach())[0].permute(1, 2, 0).cpu().numpy()
    artefacts.write_array(out / "reconstruction.npy", result)
    last = {"best_restart": best.number, "losses": best.curves[-1]}
    artefacts.write_json(out / "parameters.json", {**facts, **last, "versions": program.versions()})
    described = {"shape": list(result.shape), "dtype": str(result.dtype), **facts, **last}
    artefacts.write_json(artefacts.sidecar_path(out / "reconstruction.npy"), described)
    for restart in restarts:
        restart.state.unlink(missing_ok=True)
    terms = ", ".join(f"{name} {value:.4f}" for name, value in best.curves[-1].items())
    print(f"{out}/reconstruction.png: {terms}")


if __name__ == "__main__":
    sys.exit(program.run(main))
