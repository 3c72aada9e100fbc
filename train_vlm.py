"""Stage 3: projected features -> the visual language model.

In:  ROOT/features/<layer>.npy (N, H, W, D) and ROOT/features/projection.safetensors, of stage 2.
Out: ROOT/vlm.safetensors, the model of all layers trained so far; ROOT/log.csv, a line per layer and interval;
     ROOT/figures/loss.png; ROOT/train_state/, what a killed run needs to go on.

Layers share no parameters: trained in one run or in several, at once or in turn, they end up in the same
vlm.safetensors; --merge adds those of other workspaces with the same projection. --init starts from trained weights;
--export writes the checkpoint as float16, as those in models/pretrained/ are.

    python train_vlm.py --preset alexnet --layers conv5 --learning-rate 10 --iterations 3000
    torchrun --nproc-per-node=8 train_vlm.py --preset alexnet
    python train_vlm.py --preset alexnet --merge other/vlm.safetensors
    python train_vlm.py --preset alexnet --export alexnet.safetensors
"""

import csv
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.errors import UserError
from models.randomness import seed_for
from pipeline import artefacts, distributed, networks, options, program
from pipeline.progress import Progress, SafePoints

if TYPE_CHECKING:
    import torch

    from models.descent import MomentumSGD
    from models.vlm import LayerModel, VisualLanguageModel

PAPER_LAYERS = 6  # layers that the paper trains jointly, over which its loss is the mean
VALIDATION_BATCH = 16
SAME_PROJECTION = 2e-3  # of values near 1: what float16 and another machine's eigenvectors may change
PRECISIONS = ("float32", "bfloat16")
PROJECTION_FACTS = ("backbone", "weights_sha256", "images_sha256")  # what a projection must state of its making
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
    layers: "Mapping[str, LayerModel]",
    projected: "Mapping[str, torch.Tensor]",
    optimizer: "MomentumSGD",
    *,
    part: float = 1.0,
    precision: str = "float32",
) -> dict[str, float]:
    """One update on projected features (N, D, H, W) by layer; returns the losses before it.

    The loss is the mean over the layers given. Each layer's part is differentiated by itself: they share nothing.
    Of several ranks each gives its share of the batch (N may be 0), and all make the update of the whole batch.

    Args:
        part: this rank's images over the whole batch's.
        precision: of the products; sums, losses, gradients and weights are float32 or better.
    """
    import torch

    optimizer.zero_grad()
    gradients, losses = distributed.GradientSum(), []
    for name, p in projected.items():
        losses.append(0.0)
        if len(p):
            with torch.autocast(p.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext():
                loss = layers[name].loss(p) * part
            losses[-1] = loss.item()
            (loss / len(projected)).backward()
        gradients.start([w for w in layers[name].parameters() if w.requires_grad])
    gradients.finish()
    optimizer.step()
    whole = distributed.add_up(torch.tensor(losses, dtype=torch.float64))
    return dict(zip(projected, whole.tolist(), strict=True))


def check_precision(precision: str, device: "torch.device") -> None:
    """Raise a UserError where a device cannot train an LSTM in a precision."""
    import torch

    from models.vlm import LayerModel

    if precision == "float32":
        return
    try:
        with torch.autocast(device.type, torch.bfloat16):
            loss = LayerModel(16).to(device).loss(torch.ones(1, 16, 3, 3, device=device))
        loss.backward()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--precision {precision} does not work on {device} ({reason}): use float32") from None


def read_batch(features: np.ndarray, images: np.ndarray, device: object) -> "torch.Tensor":
    """Rows of stored features (N, H, W, D) as a float32 tensor (B, D, H, W)."""
    import torch

    rows = artefacts.read_rows(features, images)
    return torch.from_numpy(rows).to(device, torch.float32).permute(0, 3, 1, 2)


def validate(layer: "LayerModel", features: np.ndarray, rows: np.ndarray, device: object) -> dict[str, float]:
    """Mean loss of the model and of the trivial predictors on some rows; ranks share the work."""
    import torch

    from models.vlm import TRIVIAL_PREDICTORS, trivial_losses

    sums = dict.fromkeys(("model", *TRIVIAL_PREDICTORS), 0.0)
    with torch.no_grad():
        for start in distributed.share(range(0, len(rows), VALIDATION_BATCH)):
            chosen = rows[start : start + VALIDATION_BATCH]
            p = read_batch(features, chosen, device)
            for name, value in {"model": layer.loss(p).item(), **trivial_losses(p)}.items():
                sums[name] += value * len(chosen)
    return {name: distributed.total(value) / len(rows) for name, value in sums.items()}


class Run:
    """Training of some layers in a workspace: state, log and checkpoint on disk.

    Args:
        vlm: the model, initialised.
        features: stored features by layer.
        training, held: rows of the images to train on and of those held out.
        configuration: what the checkpoint says of its inputs; with the schedule it determines the result, and a
            state of other inputs or another schedule is refused.
        precision: of `update`.
        first_iteration: where a run without a state begins in the schedule.
    """

    def __init__(
        self,
        root: Path,
        out: Path,
        vlm: "VisualLanguageModel",
        features: dict[str, np.ndarray],
        schedule: Schedule,
        configuration: artefacts.Facts,
        training: np.ndarray,
        held: np.ndarray,
        device: "torch.device",
        precision: str = "float32",
        first_iteration: int = 0,
    ):
        from models.descent import MomentumSGD

        self.root, self.out, self.features, self.schedule = root, out, features, schedule
        self.device, self.precision = device, precision
        self.vlm = vlm.to(device)
        self.names = list(features)
        self.views = configuration["training"].get("views", 1)
        self.count = configuration["training"]["num_images"]
        self.training, self.held = training, held
        self.watched = self.held if len(self.held) else self.training[:VALIDATION_BATCH]
        self.configuration = configuration
        self.facts = {**configuration["training"], **asdict(schedule), "held_out": len(self.held)}
        if precision != "float32":
            self.facts["precision"] = precision
        inputs = ("backbone", "weights_sha256", "projection_sha256")
        self.inputs = {key: configuration[key] for key in inputs}
        self.state = root / "train_state" / f"{'-'.join(self.names)}.safetensors"
        trained = [p for name in self.names for p in self.vlm.layers[name].parameters() if p.requires_grad]
        self.optimizer = MomentumSGD(trained, schedule.learning_rate, schedule.momentum)
        self.iteration = first_iteration
        self.log: list[list] = []
        self.losses: dict[str, list[float]] = {name: [] for name in self.names}

    def resume(self, overwrite: bool) -> None:
        """Take up the state that an earlier run of the same facts left.

        Raises:
            UserError: the state, or the checkpoint to write to, is of other facts or another projection.
        """
        import torch

        found = distributed.first(lambda: self._read_state(overwrite))
        if found is None:
            return
        tensors, noted = found
        with torch.no_grad():
            for i, (p, v) in enumerate(zip(self.optimizer.parameters, self.optimizer.velocities, strict=True)):
                p.copy_(tensors[f"parameter.{i}"])
                v.copy_(tensors[f"velocity.{i}"])
        self.iteration, self.log, self.losses = noted["iteration"], noted["log"], noted["losses"]

    def _read_state(self, overwrite: bool) -> "tuple[dict[str, torch.Tensor], dict] | None":
        """Tensors and notes of the state, if there is one; with `overwrite` it is removed."""
        from models.checkpoints import AFRESH, check_state, read_state, read_tensors

        read_log(self.root / "log.csv")
        if overwrite:
            artefacts.discard(self.state)
        elif self.out.is_file():
            check_projection(self.out, read_tensors(self.out)[1], self.configuration)
        if not self.state.is_file():
            return None
        tensors, noted = read_state(self.state, {"facts": dict, "iteration": int, "log": list, "losses": dict})
        if not self._are_notes(noted):
            raise UserError(f"{self.state} holds damaged notes of an interrupted run: {AFRESH}")
        if changed := self._conflicts(noted["facts"], noted["iteration"]):
            raise UserError(
                f"{self.state} was made otherwise ({'; '.join(changed)}): use --overwrite or another --root"
            )
        shapes = [tuple(p.shape) for p in self.optimizer.parameters]
        check_state(
            self.state, tensors, {f"{kind}.{i}": s for i, s in enumerate(shapes) for kind in ("parameter", "velocity")}
        )
        return tensors, noted

    def _are_notes(self, noted: dict) -> bool:
        """Whether the notes of a state are such as `_save` makes."""
        log, decays, most = noted["log"], noted["facts"].get("decay_at", []), noted["facts"].get("iterations")
        lines = [line[1:] for line in log if isinstance(line, list) and len(line) == len(LOG_COLUMNS)]
        lines += [*noted["losses"].values(), decays, [noted["iteration"]]]
        return (
            len(lines) == len(log) + len(self.names) + 2
            and noted["losses"].keys() == set(self.names)
            and all(line[0] in self.names and type(line[1]) is int for line in log)
            and all(isinstance(line, list) and all(type(value) in (int, float) for value in line) for line in lines)
            and type(most) is int
            and 0 <= noted["iteration"] <= most
        )

    def _conflicts(self, found: artefacts.Facts, done: int) -> list[str]:
        """What keeps a state from being continued. More iterations and later decays do not: its past is the same."""
        usual = {"views": 1, "random_crop": False, "flip": False, "precision": "float32", "init": None}
        found, wanted = {**usual, **self.inputs, **found}, {**usual, **self.facts, **self.inputs}
        past = [at for at in self.schedule.decay_at if at < done]
        if self.schedule.iterations >= done and [at for at in found.get("decay_at", []) if at < done] == past:
            found = {**found, "iterations": self.schedule.iterations, "decay_at": self.schedule.decay_at}
        return artefacts.differences(json.loads(json.dumps(found)), wanted)

    def is_finished(self) -> bool:
        """Whether all updates are made, and the checkpoint and everything beside it holds them."""
        sidecar = artefacts.sidecar_path(self.out)
        if self.iteration < self.schedule.iterations or not self.out.is_file() or not sidecar.is_file():
            return False
        noted = artefacts.read_sidecar(self.out, "train_vlm.py")
        described = json.loads(json.dumps(self.describe()["training"]))
        whole = noted.get("sha256") == artefacts.file_sha256(self.out)
        trained = noted.get("training")
        return whole and isinstance(trained, dict) and all(trained.get(n) == facts for n, facts in described.items())

    def train(self, log_every: int, checkpoint_every: int) -> None:
        """Run the remaining updates.

        Raises:
            UserError: the loss is no longer finite; the last checkpoint stays.
        """
        schedule = self.schedule
        interval_start, interval_first = time.monotonic(), self.iteration
        progress = Progress(schedule.iterations, f"training {' '.join(self.names)}", "it", self.iteration)
        with progress, SafePoints() as signals:
            while self.iteration < schedule.iterations:
                losses = self.step()
                progress.update(note=f"loss {sum(losses.values()) / len(losses):.4f}")
                last = self.iteration == schedule.iterations
                if self.iteration % log_every == 0 or last:
                    seconds = time.monotonic() - interval_start
                    self.write_log_lines((self.iteration - interval_first) / seconds)
                    interval_start, interval_first = time.monotonic(), self.iteration
                if self.iteration % checkpoint_every == 0 or last:
                    self.save()
                signals.check(self.save, distributed.total(signals.caught is not None) > 0)

    def step(self) -> dict[str, float]:
        """One update, of which each rank computes its share of the images; returns the losses by layer."""
        schedule, i = self.schedule, self.iteration
        if i and schedule.rate(i) != schedule.rate(i - 1):
            self.optimizer.reset_momentum()
        self.optimizer.lr = schedule.rate(i)
        rows = schedule.batch(i, self.training, self.views, self.count)
        mine = np.array_split(rows, distributed.size())[distributed.rank()]
        batch = {name: read_batch(f, mine, self.device) for name, f in self.features.items()}
        part = len(mine) / len(rows)
        losses = update(self.vlm.layers, batch, self.optimizer, part=part, precision=self.precision)
        if not all(math.isfinite(loss) for loss in losses.values()):
            message = self._diverged(i, losses)
            raise UserError(message) if distributed.rank() == 0 else distributed.ElsewhereError(message)
        for name, loss in losses.items():
            self.losses[name].append(loss)
        self.iteration += 1
        return losses

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
        """Write the state, then merge the layers into the checkpoint, the log and the picture; rank 0 alone does."""
        distributed.first(self._save)

    def _save(self) -> None:
        tensors = {f"parameter.{i}": p for i, p in enumerate(self.optimizer.parameters)}
        tensors |= {f"velocity.{i}": v for i, v in enumerate(self.optimizer.velocities)}
        facts = {**self.facts, **self.inputs}
        noted = {"facts": facts, "iteration": self.iteration, "log": self.log, "losses": self.losses}
        artefacts.write_tensors(self.state, tensors, noted)
        self.merge()

    def merge(self) -> None:
        """Put this run's layers into the workspace's checkpoint, beside those of other runs, even concurrent ones."""
        from models.checkpoints import vlm_tensors

        with merging(self.root):
            log = merge_log(self.root / "log.csv", self.log, self.names)
            merge_checkpoint(self.out, vlm_tensors(self.vlm), self.describe(), log, self.root / "figures" / "loss.png")

    def describe(self) -> artefacts.Facts:
        """Configuration of the checkpoint with the training facts of this run's layers."""
        last = {line[0]: dict(zip(LOG_COLUMNS[:-1], line, strict=False)) for line in self.log}  # without the speed
        facts = self.facts | {"iterations_done": self.iteration}
        training = {name: {**facts, "losses": last.get(name)} for name in self.names}
        return {**self.configuration, "training": training}


@contextmanager
def merging(root: Path) -> Iterator[None]:
    """Wait until no other process merges layers in a workspace, then keep others out."""
    from filelock import FileLock

    folder = root / "train_state"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "merge.lock"):
        yield


def merge_checkpoint(
    out: Path, tensors: "Mapping[str, torch.Tensor]", configuration: artefacts.Facts, log: list[list], picture: Path
) -> None:
    """Put the layers of `configuration["training"]` into the checkpoint `out`, beside those it holds already.

    A checkpoint of another projection is replaced (`check_projection` refused it before the training). The sidecar,
    which states the sha256 of the checkpoint, comes last.
    """
    from models.checkpoints import merge_layers, read_tensors
    from pipeline.figures import loss_curves

    training = configuration["training"]
    if out.is_file():
        earlier, noted = read_tensors(out)
        if noted.get("projection_sha256") == configuration["projection_sha256"]:
            tensors = merge_layers(earlier, tensors, list(training))
            training = noted["training"] | training
    layers = [name for name in configuration["all_layers"] if name in training]
    configuration = {**configuration, "training": {name: training[name] for name in layers}, "layers": layers}
    artefacts.write_tensors(out, tensors, configuration)
    loss_curves(log, picture)
    described = {**configuration, "sha256": artefacts.file_sha256(out), "versions": program.versions()}
    artefacts.write_json(artefacts.sidecar_path(out), described)


def check_projection(path: Path, noted: artefacts.Facts, wanted: artefacts.Facts) -> None:
    """Raise a UserError if the layers of a checkpoint stand on another projection than `wanted`."""
    if changed := artefacts.differences(noted, {key: wanted[key] for key in ("backbone", "projection_sha256")}):
        raise UserError(
            f"{path} is of another projection ({'; '.join(changed)}): use another --root or --out, or --overwrite "
            "to replace it"
        )


def read_log(path: Path) -> list[list]:
    """Lines of log.csv, values as numbers; none where there is no file.

    Raises:
        UserError: it is something else, or was damaged by hand.
    """
    if not path.is_file():
        return []
    number = 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        lines = []
        for number, row in enumerate(rows, start=1):
            if number == 1 and tuple(row) == LOG_COLUMNS or not row:
                continue
            layer, iteration, *values = row
            if number == 1 or len(row) != len(LOG_COLUMNS):
                raise ValueError("other columns")
            lines.append([layer, int(iteration), *map(float, values)])
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is not the log of a training (line {number}: {error}): remove it, nothing needs it"
        ) from None
    return lines


def merge_log(path: Path, lines: list[list], names: list[str]) -> list[list]:
    """Replace the lines of some layers in log.csv; returns all lines, ordered by layer and iteration."""
    others = [line for line in read_log(path) if line[0] not in names]
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
    from models.checkpoints import listed_layers, read_tensors

    path = folder / "projection.safetensors"
    names = artefacts.read_sidecar(path, "extract_features.py").get("names")
    tensors, configuration = read_tensors(path)
    there = listed_layers(configuration, path)
    if missing := [key for key in PROJECTION_FACTS if not isinstance(configuration.get(key), str)]:
        raise UserError(f"{path} does not state {missing[0]}: rerun extract_features.py --overwrite")
    if not isinstance(names, list) or not isinstance(configuration.get("held_out"), list):
        raise UserError(f"{path} does not say which images it is of: rerun extract_features.py --overwrite")
    for layer in layers or []:
        if layer not in there:
            there = ", ".join(there)
            raise UserError(f"{folder} has no features of {layer}: choose from {there}, or run extract_features.py")
    digest = artefacts.file_sha256(path)
    features = {}
    views = []
    for layer in layers or there:
        features[layer], facts = artefacts.open_array(folder / f"{layer}.npy", "extract_features.py")
        views.append({key: facts[key] for key in ("views", "random_crop", "flip") if key in facts})
        if facts.get("projection_sha256") != digest:
            raise UserError(
                f"{folder / layer}.npy belongs to another projection: rerun extract_features.py --overwrite"
            )
        check_features(
            folder / f"{layer}.npy", features[layer], views[-1], tensors.get(f"{layer}.projection.components")
        )
    if len({len(f) for f in features.values()}) > 1 or any(other != views[0] for other in views):
        raise UserError(f"{folder} holds features of differing images or views: rerun extract_features.py --overwrite")
    return features, tensors, {**configuration, "projection_sha256": digest, "views": views[0], "names": names}


def check_features(path: Path, features: np.ndarray, views: artefacts.Facts, components: "torch.Tensor | None") -> None:
    """Raise a UserError where stored features cannot be what stage 2 writes of a projection (D, C)."""
    if components is None or components.ndim != 2:
        raise UserError(f"the projection of {path} is missing: rerun extract_features.py --overwrite")
    fits = features.ndim == 4 and features.dtype in (np.float32, np.float16) and min(features.shape) > 0
    if not fits or features.shape[3] != len(components) or min(features.shape[1:3]) < 2:
        raise UserError(
            f"{path} is {features.dtype} {features.shape}, not float (N, H, W, {len(components)}) as its projection "
            "gives: rerun extract_features.py --overwrite"
        )
    count = views.get("views", 1)
    if type(count) is not int or count < 1 or len(features) % count:
        raise UserError(
            f"{path} holds {len(features)} rows, its sidecar says {artefacts.SHORT.repr(count)} views of each image: "
            "rerun extract_features.py --overwrite"
        )


def get_parser() -> options.Parser:
    """Options of this stage."""
    parser = options.stage_parser(__doc__)
    parser.add_argument("--features", type=options.folder, help="folder of stage 2 (default: ROOT/features)")
    parser.add_argument("--out", type=options.writable_file, help="checkpoint to write (default: ROOT/vlm.safetensors)")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="layers to train now (default: all extracted)")
    parser.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="train nothing: add the layers of checkpoints that were trained elsewhere on the same projection",
    )
    parser.add_argument(
        "--export", type=options.writable_file, metavar="FILE", help="train nothing: write the checkpoint as float16"
    )
    parser.add_argument(
        "--init",
        type=options.readable_file,
        metavar="FILE",
        help="checkpoint whose weights the training starts from (paper: N(0, 0.01²))",
    )
    parser.add_argument(
        "--from-iteration",
        type=options.natural,
        default=0,
        help="with --init: the place in the schedule where its weights stand; the momentum begins at zero",
    )
    parser.add_argument("--iterations", type=options.positive, default=20_001, help="updates (original code: 20001)")
    parser.add_argument("--batch-size", type=options.positive, default=16, help="images (paper: 16 AlexNet, 1 VGG)")
    parser.add_argument(
        "--learning-rate",
        type=options.positive_number,
        help="of the mean loss over the layers of this run (default: the paper's trajectory, 10 for AlexNet and 20 "
        "for VGG over six layers, scaled by layers/6 for fewer)",
    )
    parser.add_argument("--momentum", type=options.fraction, default=0.9, help="paper: 0.9")
    parser.add_argument(
        "--decay-at",
        type=options.positive,
        nargs="*",
        help="updates after which the learning rate falls and the momentum is reset "
        "(default: quarters of the run; paper: 5000 10000 15000)",
    )
    parser.add_argument("--decay-factor", type=options.positive_number, default=0.1, help="paper: 0.1")
    parser.add_argument(
        "--held-out",
        type=options.count_or_file,
        metavar="COUNT|FILE",
        help="images for the validation loss: how many, or a text file of their names (default: those that stage 2 "
        "kept from statistics and PCA; paper: none)",
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="images, by name, that are not trained on either"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="bfloat16: mixed precision, for CUDA and CPUs that have it (paper: float32)",
    )
    parser.add_argument("--log-every", type=options.positive, default=100, help="updates between log lines")
    parser.add_argument("--checkpoint-every", type=options.positive, default=1000, help="original code: 1000")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args = options.parse_args(get_parser(), argv, "train_vlm")
    args.out = args.out or args.root / "vlm.safetensors"
    if args.merge:
        program.announce(args)
        with artefacts.claim(args.out):
            merge_files(args.merge, args.out, args.root, args.overwrite)
        return
    if args.export:
        program.announce(args)
        export(args.out, args.export)
        return
    if args.from_iteration and not args.init:
        raise UserError("--from-iteration tells where the weights of --init stand: give both, or neither")
    if args.from_iteration >= args.iterations:
        raise UserError(f"--from-iteration {args.from_iteration} leaves nothing of --iterations {args.iterations}")
    device = networks.pick_device(args.device)
    with distributed.group(device):
        features, tensors, facts = open_features(args.features or args.root / "features", args.layers)
        with artefacts.claim(*(args.root / "train_state" / name for name in features)):
            train(args, features, tensors, facts, device)


def train(args, features: dict[str, np.ndarray], tensors: dict, facts: dict, device: "torch.device") -> None:
    """Train the layers of `features` as the options say, from where an earlier run stopped."""
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
    program.announce(args, device)
    check_precision(args.precision, device)
    vlm, configuration = build_model(tensors, list(features), args.seed), describe_inputs(facts, features)
    training, held = split(args.held_out, args.exclude, facts, args.seed)
    if not len(training):
        raise UserError("nothing is left to train on: hold out or --exclude fewer images")
    configuration["training"]["held_out_names"] = [facts["names"][row] for row in held]
    if args.exclude:
        configuration["training"]["exclude"] = args.exclude
    if args.init:
        init = {"sha256": start_from(args.init, vlm, configuration), "iteration": args.from_iteration}
        configuration["training"]["init"] = init
    run = Run(
        args.root,
        args.out,
        vlm,
        features,
        schedule,
        configuration,
        training,
        held,
        device,
        args.precision,
        args.from_iteration,
    )
    run.resume(args.overwrite)
    if run.iteration == schedule.iterations:
        if distributed.first(run.is_finished):
            print(f"{run.out}: {', '.join(features)} finished {run.iteration} iterations: nothing to do")
            return
        distributed.first(run.merge)
    elif run.iteration > args.from_iteration:
        print(f"going on after iteration {run.iteration}")
    run.train(args.log_every, args.checkpoint_every)
    print(f"{run.out}: {', '.join(features)} trained for {run.iteration} iterations")


def split(
    held_out: int | Path | None, exclude: list[str], facts: artefacts.Facts, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows of the training and of the held-out images.

    Args:
        held_out: how many, or a file of their names; None: those that were kept from the statistics.
        exclude: shell patterns of names that are neither.
    """
    from pipeline.splits import choose_held_out, rows_matching, rows_of

    names, kept = facts["names"], facts["held_out"]
    held = rows_of(kept, names, "the projection") if held_out is None else choose_held_out(held_out, names, seed)
    if leaked := [names[row] for row in held if names[row] not in set(kept)]:
        print(f"note: statistics and PCA were fitted on {len(leaked)} of the {len(held)} held-out images", flush=True)
    out = np.union1d(np.array(held, int), np.array(rows_matching(exclude, names), int))
    return np.setdiff1d(np.arange(len(names)), out), np.array(held, int)


def merge_files(files: list[Path], out: Path, root: Path, overwrite: bool) -> None:
    """Add the layers of other checkpoints, trained on the same projection, to `out`; what is there stays.

    Raises:
        UserError: another projection, or a layer that two of the files hold with other weights (`overwrite`: the
            last one counts).
    """
    import torch

    from models.checkpoints import load_vlm, read_tensors, vlm_tensors

    for path in files:
        vlm, configuration = load_vlm(path)
        with merging(root):
            if out.is_file():
                earlier, noted = read_tensors(out)
                check_projection(path, configuration, noted)
                for name, value in () if overwrite else vlm_tensors(vlm).items():
                    if name in earlier and not torch.equal(earlier[name], value):
                        raise UserError(
                            f"{path} and {out} hold other weights of {name.split('.')[0]}: "
                            "use --overwrite to take the former"
                        )
            log = merge_log(root / "log.csv", [], [])
            merge_checkpoint(out, vlm_tensors(vlm), configuration, log, root / "figures" / "loss.png")
        print(f"{out}: {', '.join(vlm.layers)} of {path}")


def start_from(path: Path, vlm: "VisualLanguageModel", configuration: artefacts.Facts) -> str:
    """Give a model the weights of a checkpoint, whose sha256 is returned; the projections stay.

    Raises:
        UserError: another backbone, a layer that it lacks, or a projection that differs by more than rounding.
    """
    import torch

    from models.checkpoints import load_vlm

    trained, noted = load_vlm(path)
    if changed := artefacts.differences(noted, {"backbone": configuration["backbone"]}):
        raise UserError(f"{path} does not fit ({'; '.join(changed)}): give another --init")
    for name, layer in vlm.layers.items():
        if name not in trained.layers:
            raise UserError(f"{path} has no layer {name}: give another --init, or other --layers")
        ours, theirs = vlm.projections[name].state_dict(), trained.projections[name].state_dict()
        for part, value in ours.items():
            tolerance = SAME_PROJECTION * max(1.0, float(value.abs().max()))
            if value.shape != theirs[part].shape or not torch.allclose(value, theirs[part], rtol=0, atol=tolerance):
                raise UserError(
                    f"{path} was trained on another projection of {name}: extract the features of the same images, "
                    "or give another --init"
                )
        layer.load_state_dict(trained.layers[name].state_dict())
    return artefacts.file_sha256(path)


def export(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint with all weights as float16; means and deviations stay float32."""
    import torch

    from models.checkpoints import load_vlm, vlm_tensors

    vlm, configuration = load_vlm(checkpoint)
    artefacts.write_tensors(out, vlm_tensors(vlm, torch.float16), {**configuration, "dtype": "float16"})
    print(f"{out}: {', '.join(vlm.layers)} of {checkpoint} as float16")


def build_model(tensors: dict, layers: list[str], seed: int) -> "VisualLanguageModel":
    """A model with the projections of stage 2 and freshly drawn weights."""
    from models.checkpoints import take_projection, take_statistics
    from models.vlm import VisualLanguageModel

    tensors, source = dict(tensors), "projection.safetensors"
    projections = {layer: take_projection(tensors, layer, source) for layer in layers}
    vlm = VisualLanguageModel(projections, take_statistics(tensors, source))
    vlm.initialise(seed)
    return vlm


def describe_inputs(facts: dict, features: dict[str, np.ndarray]) -> artefacts.Facts:
    """What a checkpoint says about the features it was trained on."""
    shared = ("backbone", "weights", "weights_sha256", "images_sha256", "projection_sha256")
    first = next(iter(features.values()))
    count = len(first) // facts["views"].get("views", 1)
    training = {"num_images": count, "images_sha256": facts["images_sha256"], "dtype": str(first.dtype)}
    training |= facts["views"]
    shared = (*shared, "sources") if facts.get("sources") else shared
    return {**{key: facts.get(key) for key in shared}, "all_layers": facts["layers"], "training": training}


if __name__ == "__main__":
    sys.exit(program.run(main))
