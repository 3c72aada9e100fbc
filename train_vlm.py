"""Stage 3: projected features -> the visual language model.

In:  ROOT/features/<layer>.npy (N, H, W, D) and ROOT/features/projection.safetensors, of stage 2.
Out: ROOT/vlm.safetensors, the model of all layers trained so far; ROOT/log.csv, a line per layer and interval;
     ROOT/figures/loss.png; ROOT/train_state/, what a killed run needs to go on.

Layers share no parameters: trained in one run or in several, they end up in the same vlm.safetensors.

    python train_vlm.py --preset alexnet --layers conv5 --learning-rate 10 --iterations 3000
"""

import csv
import io
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.errors import UserError
from models.randomness import seed_for, split_images
from pipeline import artefacts, cli

if TYPE_CHECKING:
    import torch

    from models.optimizer import MomentumSGD
    from models.vlm import LayerModel, VisualLanguageModel

PAPER_LAYERS = 6  # layers that the paper trains jointly, over which its loss is the mean
VALIDATION_BATCH = 16
LOG_COLUMNS = (
    "layer",
    "iteration",
    "learning_rate",
    "training_loss",
    "validation_loss",
    "predict_nothing",
    "repeat_last",
    "iterations_per_second",
)


@dataclass(frozen=True)
class Schedule:
    """The training rule. After update `i` of `decay_at` the learning rate falls and the momentum starts anew."""

    iterations: int
    batch_size: int
    learning_rate: float
    momentum: float
    decay_at: tuple[int, ...]
    decay_factor: float
    seed: int

    def rate(self, iteration: int) -> float:
        """Learning rate of update `iteration`, counted from 0."""
        return self.learning_rate * self.decay_factor ** sum(iteration > at for at in self.decay_at)

    def batch(self, iteration: int, images: np.ndarray, views: int = 1, count: int = 0) -> np.ndarray:
        """Rows of update `iteration`, drawn with replacement; depends on the seed and the iteration only.

        Of each image drawn, one of its `views` is taken, `count` rows apart.
        """
        generator = np.random.default_rng(seed_for(self.seed, "batch", iteration))
        drawn = images[generator.integers(0, len(images), self.batch_size)]
        return drawn if views == 1 else drawn + count * generator.integers(0, views, self.batch_size)


def default_decays(iterations: int) -> tuple[int, ...]:
    """After one, two and three quarters of the run: 5000, 10000, 15000 for the paper's 20001 updates."""
    return tuple((iterations - 1) * quarter // 4 for quarter in (1, 2, 3))


def update(
    layers: "Mapping[str, LayerModel]", projected: "Mapping[str, torch.Tensor]", optimizer: "MomentumSGD"
) -> dict[str, float]:
    """One update on projected features (N, D, H, W) by layer; returns the losses before it.

    The loss is the mean over the layers given. Each layer's part is differentiated by itself: they share nothing.
    """
    optimizer.zero_grad()
    losses = {}
    for name, p in projected.items():
        loss = layers[name].loss(p)
        losses[name] = loss.item()
        (loss / len(projected)).backward()
    optimizer.step()
    return losses


def read_batch(features: np.ndarray, images: np.ndarray, device: object) -> "torch.Tensor":
    """Rows of stored features (N, H, W, D) as a float32 tensor (B, D, H, W)."""
    import torch

    return torch.from_numpy(features[images]).to(device, torch.float32).permute(0, 3, 1, 2)


def validate(layer: "LayerModel", features: np.ndarray, images: np.ndarray, device: object) -> dict[str, float]:
    """Mean loss of the model and of the trivial predictors on some images."""
    import torch

    from models.vlm import trivial_losses

    sums: dict[str, float] = {}
    with torch.no_grad():
        for start in range(0, len(images), VALIDATION_BATCH):
            chosen = images[start : start + VALIDATION_BATCH]
            p = read_batch(features, chosen, device)
            for name, value in {"model": layer.loss(p).item(), **trivial_losses(p)}.items():
                sums[name] = sums.get(name, 0.0) + value * len(chosen)
    return {name: value / len(images) for name, value in sums.items()}


class Run:
    """Training of some layers in a workspace: state, log and checkpoint on disk.

    Args:
        vlm: the model, initialised.
        features: stored features by layer.
        facts: everything that determines the result; a state with other facts is refused.
    """

    def __init__(
        self,
        root: Path,
        out: Path,
        vlm: "VisualLanguageModel",
        features: dict[str, np.ndarray],
        schedule: Schedule,
        configuration: artefacts.Facts,
        held_out: int,
        device: object,
    ):
        from models.optimizer import MomentumSGD

        self.root, self.out, self.features, self.schedule, self.device = root, out, features, schedule, device
        self.vlm = vlm.to(device)
        self.names = list(features)
        self.views = configuration["training"].get("views", 1)
        self.count = configuration["training"]["num_images"]
        self.training, self.held = split_images(self.count, held_out, schedule.seed)
        self.watched = self.held if len(self.held) else self.training[:VALIDATION_BATCH]
        self.configuration = configuration
        self.facts = {**configuration["training"], **asdict(schedule), "held_out": len(self.held)}
        self.state = root / "train_state" / f"{'-'.join(self.names)}.safetensors"
        trained = [p for name in self.names for p in self.vlm.layers[name].parameters() if p.requires_grad]
        self.optimizer = MomentumSGD(trained, schedule.learning_rate, schedule.momentum)
        self.iteration = 0
        self.log: list[list] = []
        self.losses: dict[str, list[float]] = {name: [] for name in self.names}

    def resume(self, overwrite: bool) -> None:
        """Take up the state that an earlier run of the same facts left."""
        import torch

        from models.checkpoints import read_tensors

        if overwrite:
            self.state.unlink(missing_ok=True)
        if not self.state.is_file():
            return
        tensors, noted = read_tensors(self.state)
        found, done = noted.get("facts", {}), noted["iteration"]
        if changed := self._conflicts(found, done):
            raise UserError(
                f"{self.state} was made otherwise ({'; '.join(changed)}): use --overwrite or another --root"
            )
        with torch.no_grad():
            for i, (p, v) in enumerate(zip(self.optimizer.parameters, self.optimizer.velocities, strict=True)):
                p.copy_(tensors[f"parameter.{i}"])
                v.copy_(tensors[f"velocity.{i}"])
        self.iteration, self.log, self.losses = noted["iteration"], noted["log"], noted["losses"]

    def _conflicts(self, found: artefacts.Facts, done: int) -> list[str]:
        """What keeps a state from being continued. More iterations and later decays do not: its past is the same."""
        past = [at for at in self.schedule.decay_at if at < done]
        if self.schedule.iterations >= done and [at for at in found.get("decay_at", []) if at < done] == past:
            found = {**found, "iterations": self.schedule.iterations, "decay_at": self.schedule.decay_at}
        return artefacts.differences(json.loads(json.dumps(found)), self.facts)

    def train(self, log_every: int, checkpoint_every: int) -> None:
        """Run the remaining updates.

        Raises:
            UserError: the loss is no longer finite; the last checkpoint stays.
        """
        schedule = self.schedule
        interval_start, interval_first = time.monotonic(), self.iteration
        with cli.Progress(schedule.iterations, f"training {' '.join(self.names)}", "it", self.iteration) as progress:
            while self.iteration < schedule.iterations:
                i = self.iteration
                if i and schedule.rate(i) != schedule.rate(i - 1):
                    self.optimizer.reset_momentum()
                self.optimizer.lr = schedule.rate(i)
                images = schedule.batch(i, self.training, self.views, self.count)
                batch = {name: read_batch(f, images, self.device) for name, f in self.features.items()}
                losses = update(self.vlm.layers, batch, self.optimizer)
                if not all(math.isfinite(loss) for loss in losses.values()):
                    raise UserError(self._diverged(i, losses))
                for name, loss in losses.items():
                    self.losses[name].append(loss)
                self.iteration += 1
                progress.update(note=f"loss {sum(losses.values()) / len(losses):.4f}")
                last = self.iteration == schedule.iterations
                if self.iteration % log_every == 0 or last:
                    seconds = time.monotonic() - interval_start
                    self.write_log_lines((self.iteration - interval_first) / seconds)
                    interval_start, interval_first = time.monotonic(), self.iteration
                if self.iteration % checkpoint_every == 0 or last:
                    self.save()

    def _diverged(self, iteration: int, losses: dict[str, float]) -> str:
        worst = ", ".join(name for name, loss in losses.items() if not math.isfinite(loss))
        kept = f"the state after an earlier checkpoint is kept in {self.state}" if self.state.is_file() else "nothing"
        return (
            f"the loss of {worst} is no longer finite at iteration {iteration} with learning rate "
            f"{self.optimizer.lr:g}: use a smaller --learning-rate with --overwrite ({kept})"
        )

    def write_log_lines(self, rate: float) -> None:
        """Log mean training loss since the last line, validation loss and trivial losses of every layer."""
        for name in self.names:
            training = sum(self.losses[name]) / len(self.losses[name])
            self.losses[name] = []
            values = validate(self.vlm.layers[name], self.features[name], self.watched, self.device)
            held = values["model"] if len(self.held) else float("nan")
            nothing, repeat = values["predict nothing"], values["repeat last"]
            line = [name, self.iteration, self.optimizer.lr, training, held, nothing, repeat, rate]
            self.log.append([v if isinstance(v, str | int) else float(f"{v:.6g}") for v in line])
            print(
                f"iteration {self.iteration} {name}: loss {training:.4f}, held out {held:.4f} "
                f"(predict nothing {nothing:.4f}, repeat last {repeat:.4f}), "
                f"learning rate {self.optimizer.lr:g}, {rate:.2f} it/s",
                flush=True,
            )

    def save(self) -> None:
        """Write the state, then merge the layers into the checkpoint, the log and the picture."""
        from models.checkpoints import write_tensors

        tensors = {f"parameter.{i}": p for i, p in enumerate(self.optimizer.parameters)}
        tensors |= {f"velocity.{i}": v for i, v in enumerate(self.optimizer.velocities)}
        noted = {"facts": self.facts, "iteration": self.iteration, "log": self.log, "losses": self.losses}
        with artefacts.atomic_path(self.state) as temporary:
            write_tensors(temporary, tensors, noted)
        self.merge()

    def merge(self) -> None:
        """Put this run's layers into the workspace's checkpoint, beside those of other runs, even concurrent ones."""
        from filelock import FileLock

        with FileLock(self.root / "train_state" / "merge.lock"):
            self._merge()

    def _merge(self) -> None:
        from models.checkpoints import merge_layers, read_tensors, vlm_tensors, write_tensors
        from pipeline.figures import loss_curves

        tensors, configuration = vlm_tensors(self.vlm), self.describe()
        if self.out.is_file():
            earlier, noted = read_tensors(self.out)
            if noted.get("projection_sha256") == configuration["projection_sha256"]:
                tensors = merge_layers(earlier, tensors, self.names)
                configuration["training"] = noted["training"] | configuration["training"]
        configuration["layers"] = [n for n in configuration["all_layers"] if n in configuration["training"]]
        with artefacts.atomic_path(self.out) as temporary:
            write_tensors(temporary, tensors, configuration)
        artefacts.write_json(artefacts.sidecar_path(self.out), {**configuration, "versions": cli.versions()})
        log = merge_log(self.root / "log.csv", self.log, self.names)
        loss_curves(log, self.root / "figures" / "loss.png")

    def describe(self) -> artefacts.Facts:
        """Configuration of the checkpoint with the training facts of this run's layers."""
        last = {line[0]: dict(zip(LOG_COLUMNS[:-1], line, strict=False)) for line in self.log}  # without the speed
        facts = self.facts | {"iterations_done": self.iteration}
        training = {name: {**facts, "losses": last.get(name)} for name in self.names}
        return {**self.configuration, "training": training}


def merge_log(path: Path, lines: list[list], names: list[str]) -> list[list]:
    """Replace the lines of some layers in log.csv; returns all lines, ordered by layer and iteration."""
    others = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        others = [[row[0], int(row[1]), *map(float, row[2:])] for row in rows if row and row[0] not in names]
    merged = sorted([*others, *lines], key=lambda line: (line[0], line[1]))
    text = io.StringIO()
    csv.writer(text).writerows([LOG_COLUMNS, *merged])
    artefacts.write_text(path, text.getvalue())
    return merged


def open_features(folder: Path, layers: list[str] | None) -> tuple[dict[str, np.ndarray], dict, dict]:
    """Stored features by layer, the tensors and the facts of their projection.

    Raises:
        UserError: a layer is missing, unfinished, or was projected otherwise.
    """
    from models.checkpoints import read_tensors

    path = folder / "projection.safetensors"
    artefacts.read_sidecar(path, "extract_features.py")
    tensors, configuration = read_tensors(path)
    for layer in layers or []:
        if layer not in configuration["layers"]:
            there = ", ".join(configuration["layers"])
            raise UserError(f"{folder} has no features of {layer}: choose from {there}, or run extract_features.py")
    digest = artefacts.file_sha256(path)
    features = {}
    views = []
    for layer in layers or configuration["layers"]:
        features[layer], facts = artefacts.open_array(folder / f"{layer}.npy", "extract_features.py")
        views.append({key: facts[key] for key in ("views", "random_crop", "flip") if key in facts})
        if facts.get("projection_sha256") != digest:
            raise UserError(
                f"{folder / layer}.npy belongs to another projection: rerun extract_features.py --overwrite"
            )
    if len({len(f) for f in features.values()}) > 1 or any(other != views[0] for other in views):
        raise UserError(f"{folder} holds features of differing images or views: rerun extract_features.py --overwrite")
    return features, tensors, {**configuration, "projection_sha256": digest, "views": views[0]}


def get_parser() -> cli.Parser:
    """Options of this stage."""
    parser = cli.stage_parser(__doc__)
    parser.add_argument("--features", type=cli.folder, help="folder of stage 2 (default: ROOT/features)")
    parser.add_argument("--out", type=cli.writable_file, help="checkpoint to write (default: ROOT/vlm.safetensors)")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="layers to train now (default: all extracted)")
    parser.add_argument("--iterations", type=cli.positive, default=20_001, help="updates (original code: 20001)")
    parser.add_argument("--batch-size", type=cli.positive, default=16, help="images (paper: 16 AlexNet, 1 VGG)")
    parser.add_argument(
        "--learning-rate",
        type=cli.positive_number,
        help="of the mean loss over the layers of this run (default: the paper's trajectory, 10 for AlexNet and 20 "
        "for VGG over six layers, scaled by layers/6 for fewer)",
    )
    parser.add_argument("--momentum", type=cli.fraction, default=0.9, help="paper: 0.9")
    parser.add_argument(
        "--decay-at",
        type=cli.positive,
        nargs="*",
        help="updates after which the learning rate falls and the momentum is reset "
        "(default: quarters of the run; paper: 5000 10000 15000)",
    )
    parser.add_argument("--decay-factor", type=cli.positive_number, default=0.1, help="paper: 0.1")
    parser.add_argument("--held-out", type=cli.natural, default=50, help="images for the validation loss (paper: none)")
    parser.add_argument("--log-every", type=cli.positive, default=100, help="updates between log lines")
    parser.add_argument("--checkpoint-every", type=cli.positive, default=1000, help="original code: 1000")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args = cli.parse_args(get_parser(), argv, "train_vlm")
    features, tensors, facts = open_features(args.features or args.root / "features", args.layers)
    if args.learning_rate is None:
        args.learning_rate = args.joint_learning_rate * len(features) / PAPER_LAYERS
    decays = default_decays(args.iterations) if args.decay_at is None else tuple(sorted(args.decay_at))
    schedule = Schedule(
        args.iterations,
        args.batch_size,
        args.learning_rate,
        args.momentum,
        decays,
        args.decay_factor,
        args.seed,
    )
    device = cli.pick_device(args.device)
    cli.announce(args, device)
    run = Run(
        args.root,
        args.out or args.root / "vlm.safetensors",
        build_model(tensors, list(features), args.seed),
        features,
        schedule,
        describe_inputs(facts, features),
        args.held_out,
        device,
    )
    run.resume(args.overwrite)
    if run.iteration == schedule.iterations and run.out.is_file():
        print(f"{run.out}: {', '.join(features)} finished {run.iteration} iterations: nothing to do")
        return
    if run.iteration:
        print(f"going on after iteration {run.iteration}")
    run.train(args.log_every, args.checkpoint_every)
    print(f"{run.out}: {', '.join(features)} trained for {run.iteration} iterations")


def build_model(tensors: dict, layers: list[str], seed: int) -> "VisualLanguageModel":
    """A model with the projections of stage 2 and freshly drawn weights."""
    from models.checkpoints import PROJECTION_PARTS
    from models.projection import Projection
    from models.vlm import VisualLanguageModel

    projections = {
        layer: Projection(**{part: tensors[f"{layer}.projection.{part}"] for part in PROJECTION_PARTS})
        for layer in layers
    }
    statistics: dict[str, dict] = {}
    for name, value in tensors.items():
        if name.startswith("statistics."):
            _, tap, key = name.split(".")
            statistics.setdefault(tap, {})[key] = value
    vlm = VisualLanguageModel(projections, statistics)
    vlm.initialise(seed)
    return vlm


def describe_inputs(facts: dict, features: dict[str, np.ndarray]) -> artefacts.Facts:
    """What a checkpoint says about the features it was trained on."""
    shared = ("backbone", "weights", "weights_sha256", "images_sha256", "projection_sha256")
    first = next(iter(features.values()))
    count = len(first) // facts["views"].get("views", 1)
    training = {"num_images": count, "images_sha256": facts["images_sha256"], "dtype": str(first.dtype)}
    training |= facts["views"]
    return {**{key: facts.get(key) for key in shared}, "all_layers": facts["layers"], "training": training}


if __name__ == "__main__":
    sys.exit(cli.run(main))
