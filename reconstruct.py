"""Stage 4: a CNN feature -> the image that has it.

In:  the image whose feature is inverted, or the feature itself (.npy); ROOT/vlm.safetensors, of stage 3.
Out: OUT/reconstruction.png and .npy (H, W, 3) float32 RGB, of the best restart; OUT/restart-<r>.png of each;
     OUT/snapshots/; OUT/curves.csv and curves.png with every term of the loss; OUT/comparison.png;
     OUT/parameters.json.

    python reconstruct.py photo.jpg --preset alexnet --target pool5 --regularizer vlm
"""

import csv
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.errors import UserError
from models.randomness import seed_for
from pipeline import artefacts, cli

if TYPE_CHECKING:
    import torch

    from models.backbones import Backbone
    from models.losses import ReconstructionLoss
    from models.optimizer import MomentumSGD

REGULARIZERS = ("vlm", "none")
LEARNING_RATE = 2.0**19  # original code, of pixels in 0-255; its README says 2^20
# The paper's rate diverges or stalls here; measured on the sample photos, 100 iterations (backbone, tap) -> rate.
LEARNING_RATES: dict[tuple[str, str], float] = {}


def default_learning_rate(backbone: str, tap: str) -> float:
    """The rate that works for a tap: the paper's, unless measured otherwise."""
    return LEARNING_RATES.get((backbone, tap), LEARNING_RATE)


def descend(
    loss: "ReconstructionLoss",
    pixels: "torch.Tensor",
    optimizer: "MomentumSGD",
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


class Restart:
    """One descent from its own noise, with its curves, snapshots and resumable state in a folder."""

    def __init__(
        self,
        number: int,
        folder: Path,
        backbone: "Backbone",
        loss: "ReconstructionLoss",
        start: "torch.Tensor",
        lr: float,
        momentum: float,
        facts: artefacts.Facts,
    ):
        from models.optimizer import MomentumSGD

        self.number, self.folder, self.backbone, self.loss = number, folder, backbone, loss
        self.pixels = start.requires_grad_()
        self.optimizer = MomentumSGD([self.pixels], lr, momentum)
        self.curves: list[dict[str, float]] = []
        self.facts = facts
        self.state = folder / f"restart-{number}.state.safetensors"

    def resume(self) -> None:
        """Take up the state of a killed run with the same facts."""
        import torch

        from models.checkpoints import read_tensors

        if not self.state.is_file():
            return
        tensors, noted = read_tensors(self.state)
        if noted.get("facts") != json.loads(json.dumps(self.facts)):
            return
        with torch.no_grad():
            self.pixels.copy_(tensors["pixels"])
            self.optimizer.velocities[0].copy_(tensors["velocity"])
        self.curves = noted["curves"]

    def run(self, iterations: int, snapshot_every: int) -> None:
        """Descend; save a snapshot and the state every `snapshot_every` updates, and at the end or on Ctrl-C."""
        what = f"reconstructing {self.facts['target']} ({self.facts['regularizer']})"
        with cli.Progress(iterations, what, "it", len(self.curves)) as progress:

            def callback(i: int, terms: dict[str, float]) -> None:
                self.curves.append(terms)
                progress.update(note=f"loss {terms['total']:.4f}, feature {terms['feature']:.4f}")
                if (i + 1) % snapshot_every == 0 and i + 1 < iterations:
                    self.snapshot(i + 1)

            try:
                descend(self.loss, self.pixels, self.optimizer, iterations, callback, len(self.curves))
            except (KeyboardInterrupt, cli.Terminated):
                self.snapshot(len(self.curves))
                raise

    def snapshot(self, iteration: int) -> None:
        """Write the picture so far and the state from which the same command goes on."""
        from models.checkpoints import write_tensors
        from pipeline.images import write_png

        folder = self.folder / "snapshots"
        write_png(folder / f"restart-{self.number}-{iteration:05d}.png", to_picture(self.backbone, self.pixels))
        with artefacts.atomic_path(self.state) as temporary:
            tensors = {"pixels": self.pixels, "velocity": self.optimizer.velocities[0]}
            write_tensors(temporary, tensors, {"facts": self.facts, "curves": self.curves})


def write_curves(folder: Path, restarts: list[Restart]) -> None:
    """curves.csv and curves.png of all restarts."""
    from pipeline.figures import reconstruction_curves

    names = ["restart", "iteration", *restarts[0].curves[0]]
    rows = [[r.number, i, *terms.values()] for r in restarts for i, terms in enumerate(r.curves)]
    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    artefacts.write_text(folder / "curves.csv", text.getvalue())
    reconstruction_curves([r.curves for r in restarts], folder / "curves.png")


def get_parser() -> cli.Parser:
    """Options of this stage."""
    parser = cli.stage_parser(__doc__)
    cli.add_weights_options(parser)
    parser.add_argument("input", metavar="IMAGE|FEATURE.npy", help="image to reconstruct, or a stored feature")
    parser.add_argument("--vlm", type=Path, help="checkpoint, also for the statistics (default: ROOT/vlm.safetensors)")
    parser.add_argument(
        "--statistics",
        type=Path,
        help="projection.safetensors of stage 2 with the mean and std of taps that the checkpoint lacks",
    )
    parser.add_argument("--target", default="pool5", metavar="TAP", help="feature to invert (paper: fc8 of AlexNet)")
    parser.add_argument("--regularizer", choices=REGULARIZERS, default="vlm", help="none is the control")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="layers that regularise (default: all weighted)")
    parser.add_argument("--layer-weights", nargs="+", type=cli.non_negative_number, help="λ of --layers, in order")
    parser.add_argument("--iterations", type=cli.positive, default=1000, help="updates (paper: 1000)")
    parser.add_argument(
        "--learning-rate",
        type=cli.positive_number,
        help="of pixels in 0-255 (default: what was measured to work for the tap; paper: 524288)",
    )
    parser.add_argument("--momentum", type=cli.fraction, default=0.9, help="paper: 0.9")
    parser.add_argument("--feature-weight", type=cli.non_negative_number, default=1.0, help="λ₁ (paper: 1)")
    parser.add_argument("--vlm-weight", type=cli.non_negative_number, default=10.0, help="λ₂ (paper: 10)")
    parser.add_argument("--restarts", type=cli.positive, default=1, help="descents from other noise; the best is kept")
    parser.add_argument("--snapshot-every", type=cli.positive, default=100, help="updates between snapshots")
    parser.add_argument(
        "--out", type=Path, help="folder (default: ROOT/reconstructions/<input>-<target>-<regularizer>)"
    )
    return parser


def read_target(args, backbone: "Backbone", tap: str) -> "tuple[torch.Tensor, np.ndarray | None]":
    """The feature to invert (1, …) and the image it is of, (h, w, 3) uint8, if it was given as an image."""
    import torch

    from pipeline.images import fit_to, read_rgb

    path = Path(args.input)
    if path.suffix == ".npy":
        try:
            feature = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} is not a readable .npy array ({error}): give another feature") from None
        if feature.dtype.kind != "f" or not np.isfinite(feature).all():
            raise UserError(f"{path} holds {feature.dtype} values or NaN: give finite floats")
        feature = torch.from_numpy(feature.astype(np.float32))
        dims = 2 if tap in backbone.architecture.fully_connected else 4
        feature = feature if feature.ndim == dims else feature[None]
        return feature.to(backbone.device), None
    rgb = fit_to(read_rgb(path), *backbone.architecture.crop)
    x = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float().to(backbone.device)
    with torch.no_grad():
        return backbone(backbone.preprocess(x), [tap])[tap], rgb


def build_loss(args, backbone: "Backbone", target: "torch.Tensor") -> "tuple[ReconstructionLoss, dict]":
    """The objective that the options describe, and the statistics of the checkpoint."""
    from models.checkpoints import load_vlm
    from models.losses import ReconstructionLoss, default_layer_weights

    vlm, configuration = load_vlm(args.vlm or args.root / "vlm.safetensors")
    statistics = vlm.statistics
    if args.statistics is not None:
        statistics = read_statistics(args.statistics, backbone.architecture.name) | statistics
    if configuration["backbone"] != backbone.architecture.name:
        raise UserError(
            f"the language model reads {configuration['backbone']}, not {backbone.architecture.name}: "
            "give another --vlm or --backbone"
        )
    for tap in ("data", args.target):
        if tap not in statistics:
            there = ", ".join(sorted(statistics))
            raise UserError(
                f"the checkpoint has no statistics of {tap} (it has {there}): "
                f"run extract_features.py --statistics {tap} and give its projection.safetensors with --statistics"
            )
    weights = default_layer_weights(backbone.architecture)
    if args.layers:
        unknown = [layer for layer in args.layers if layer not in vlm.layers]
        if unknown:
            raise UserError(f"the language model has no layer {unknown[0]}: choose from {', '.join(vlm.layers)}")
        values = args.layer_weights or [weights.get(layer, 1.0) for layer in args.layers]
        if len(values) != len(args.layers):
            raise UserError(f"--layer-weights has {len(values)} values for {len(args.layers)} --layers: give one each")
        weights = dict(zip(args.layers, values, strict=True))
    loss = ReconstructionLoss(
        backbone,
        args.target,
        target,
        statistics[args.target]["std"].to(backbone.device),
        vlm.freeze().to(backbone.device) if args.regularizer == "vlm" else None,
        feature_weight=args.feature_weight,
        vlm_weight=args.vlm_weight,
        layer_weights=weights,
    )
    return loss, statistics


def read_statistics(path: Path, backbone: str) -> dict[str, dict]:
    """Mean and std by tap of a projection.safetensors of stage 2."""
    from models.checkpoints import read_tensors

    tensors, configuration = read_tensors(path)
    if configuration.get("backbone") != backbone:
        raise UserError(f"{path} belongs to {configuration.get('backbone')}, not {backbone}: give another --statistics")
    statistics: dict[str, dict] = {}
    for name, value in tensors.items():
        if name.startswith("statistics."):
            _, tap, key = name.split(".")
            statistics.setdefault(tap, {})[key] = value
    return statistics


def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args = cli.parse_args(get_parser(), argv, "reconstruct")
    path = Path(args.input)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give an image or a .npy feature")
    backbone_name = cli.checkpoint_backbone(args.vlm or args.root / "vlm.safetensors")
    if args.learning_rate is None:
        args.learning_rate = default_learning_rate(backbone_name, args.target)
    device = cli.pick_device(args.device)
    cli.announce(args, device)
    out = args.out or args.root / "reconstructions" / f"{path.stem}-{args.target}-{args.regularizer}"
    backbone, weights = cli.load_backbone(args, backbone_name, [args.target], device)
    target, rgb = read_target(args, backbone, args.target)
    loss, statistics = build_loss(args, backbone, target)
    facts = {
        "stage": "reconstruct",
        "input_sha256": artefacts.file_sha256(path),
        "backbone": backbone_name,
        "weights_sha256": weights.sha256,
        "vlm_sha256": artefacts.file_sha256(args.vlm or args.root / "vlm.safetensors"),
        "target": args.target,
        "regularizer": args.regularizer,
        "layer_weights": loss.layer_weights,
        **{k: getattr(args, k) for k in ("feature_weight", "vlm_weight", "learning_rate", "momentum")},
        **{k: getattr(args, k) for k in ("iterations", "restarts", "seed")},
    }
    if artefacts.is_finished(out / "reconstruction.npy", facts, args.overwrite):
        print(f"{out} is finished: nothing to do")
        return
    restarts = []
    for number in range(args.restarts):
        data = statistics["data"]
        crop = backbone.architecture.crop
        noise_seed = seed_for(args.seed, "noise", number)
        start = initial_pixels(backbone, data, crop, noise_seed)
        restart = Restart(number, out, backbone, loss, start, args.learning_rate, args.momentum, facts)
        if not args.overwrite:
            restart.resume()
        restarts.append(restart)
        try:
            restart.run(args.iterations, args.snapshot_every)
        except (KeyboardInterrupt, cli.Terminated):
            if any(r.curves for r in restarts):
                save(out, [r for r in restarts if r.curves], rgb)
            raise
    save(out, restarts, rgb)
    finish(out, restarts, facts)


def initial_pixels(backbone: "Backbone", data: dict, crop: tuple[int, int], seed: int) -> "torch.Tensor":
    """The noise that a descent starts from, (1, 3, h, w)."""
    from models import losses

    return losses.initial_pixels(backbone, data["mean"], data["std"], crop, seed)


def save(out: Path, restarts: list[Restart], rgb: np.ndarray | None) -> None:
    """Pictures and curves of what there is, finished or interrupted."""
    from pipeline.figures import picture_row
    from pipeline.images import write_png

    best = min(restarts, key=lambda r: r.curves[-1]["total"])
    picture = to_picture(best.backbone, best.pixels)
    for r in restarts:
        write_png(out / f"restart-{r.number}.png", to_picture(r.backbone, r.pixels))
    write_png(out / "reconstruction.png", picture)
    write_curves(out, restarts)
    titled = {} if rgb is None else {"image": rgb}
    picture_row({**titled, f"{best.facts['target']}, {best.facts['regularizer']}": picture}, out / "comparison.png")


def finish(out: Path, restarts: list[Restart], facts: artefacts.Facts) -> None:
    """Write the float result, the parameters and the sidecar, and drop the states."""
    best = min(restarts, key=lambda r: r.curves[-1]["total"])
    result = best.backbone.to_rgb(best.pixels.detach())[0].permute(1, 2, 0).cpu().numpy()
    artefacts.write_array(out / "reconstruction.npy", result)
    last = {"best_restart": best.number, "losses": best.curves[-1]}
    artefacts.write_json(out / "parameters.json", {**facts, **last, "versions": cli.versions()})
    described = {"shape": list(result.shape), "dtype": str(result.dtype), **facts, **last}
    artefacts.write_json(artefacts.sidecar_path(out / "reconstruction.npy"), described)
    for restart in restarts:
        restart.state.unlink(missing_ok=True)
    terms = ", ".join(f"{name} {value:.4f}" for name, value in best.curves[-1].items())
    print(f"{out}/reconstruction.png: {terms}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
