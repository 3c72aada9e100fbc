"""A training in a workspace: what it has reached, and how that is kept on disk so that it can go on."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.checkpoints import AFRESH, check_state, read_state, read_tensors, vlm_tensors
from models.descent import MomentumSGD, Schedule
from models.errors import UserError
from models.vlm import VisualLanguageModel
from models.weights.downloads import file_hash
from pipeline import artefacts, distributed
from pipeline.features import Features
from pipeline.language_models import check_projection, merge_checkpoint, merging
from pipeline.training_log import LogLine, measure, merge_log, read_log, rounded


@dataclass(frozen=True)
class TrainingFacts:
    """What, beside the features, determines the weights that a training ends with."""

    num_images: int
    images_sha256: str
    dtype: str
    iterations: int
    batch_size: int
    learning_rate: float
    momentum: float
    decay_at: tuple[int, ...]
    decay_factor: float
    seed: int
    held_out: int
    held_out_names: tuple[str, ...]
    views: int = 1
    random_crop: bool = False
    flip: bool = False
    precision: str = "float32"
    init: Mapping[str, Any] | None = None
    exclude: tuple[str, ...] = ()
    cell: str = "lstm"

    def as_json(self) -> artefacts.Facts:
        """As a checkpoint says it: what is as usual is left out, but for the kind of model."""
        usual = {key: value for key, value in self.usual().items() if key != "cell"}
        facts = {key: value for key, value in vars(self).items() if key not in usual or value != usual[key]}
        return json.loads(json.dumps(facts))

    @classmethod
    def usual(cls) -> artefacts.Facts:
        """The values that go without saying."""
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}


class Run:
    """Training of all layers of a model: what it has reached; its state, log and checkpoint on disk.

    Args:
        root, out: the workspace, the checkpoint to write.
        vlm: the model, initialised, on its device.
        features: that it is trained on.
        facts: with the features they determine the result; a state of others is refused.
        first_iteration: where a run without a state begins in the schedule.

    Attributes:
        iteration: updates that are made.
        log: lines of log.csv of this run.
        losses: by layer, of the updates since the last line.
        quantiles: by layer, of the losses of the held-out images when the last line was written.
    """

    def __init__(
        self,
        root: Path,
        out: Path,
        vlm: VisualLanguageModel,
        features: Features,
        facts: TrainingFacts,
        first_iteration: int = 0,
    ):

        self.root, self.out, self.vlm, self.features, self.facts = root, out, vlm, features, facts
        self.schedule = Schedule(facts.learning_rate, facts.decay_at, facts.decay_factor)
        trained = [p for layer in features.layers for p in vlm.layers[layer].parameters() if p.requires_grad]
        self.optimizer = MomentumSGD(trained, facts.learning_rate, facts.momentum)
        self.state = root / "train_state" / f"{'-'.join(features.layers)}.safetensors"
        self.iteration = first_iteration
        self.log: list[LogLine] = []
        self.losses: dict[str, list[float]] = {layer: [] for layer in features.layers}
        self.quantiles: dict[str, list[float]] = {}
        self.line_time, self.line_iteration = time.monotonic(), first_iteration

    @property
    def is_done(self) -> bool:
        """Whether all updates are made."""
        return self.iteration >= self.facts.iterations

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the updates change, by name; these very tensors."""
        return {f"parameter.{i}": p for i, p in enumerate(self.optimizer.parameters)} | self.optimizer.state()

    def resume(self, overwrite: bool) -> None:
        """Take up the state that an earlier run of the same facts left; with `overwrite` it is removed.

        Raises:
            UserError: the state, or the checkpoint to write to, is of other facts or another projection.
        """
        if found := distributed.first(lambda: self._read_state(overwrite)):
            tensors, self.iteration, self.log, self.losses, self.quantiles = found
            with torch.no_grad():
                for name, value in self.tensors().items():
                    value.copy_(tensors[name])
        self.line_time, self.line_iteration = time.monotonic(), self.iteration

    def _read_state(self, overwrite: bool) -> tuple[dict[str, torch.Tensor], int, list, dict, dict] | None:
        """Tensors, updates, log, losses and quantiles of the state, if there is one; an older one has no quantiles."""
        read_log(self.root / "log.csv")
        if overwrite:
            artefacts.discard(self.state)
        elif self.out.is_file():
            check_projection(self.out, read_tensors(self.out)[1], self._inputs())
        if not self.state.is_file():
            return None
        tensors, noted = read_state(self.state, {"facts": dict, "iteration": int, "log": list, "losses": dict})
        try:
            log = [LogLine.from_row([row[0], *_numbers(row[1:])]) for row in noted["log"]]
            losses = {layer: _numbers(noted["losses"][layer]) for layer in self.losses}
            quantiles = {layer: _numbers(values) for layer, values in noted.get("quantiles", {}).items()}
            done, most, decays = noted["iteration"], noted["facts"]["iterations"], _numbers(noted["facts"]["decay_at"])
            if not (0 <= done <= most and {line.layer for line in log} <= losses.keys() == noted["losses"].keys()):
                raise ValueError("other layers or updates")
            changed = self._conflicts(noted["facts"], done, decays)
        except (AttributeError, KeyError, IndexError, ValueError, TypeError, OverflowError):
            raise UserError(f"{self.state} holds damaged notes of an interrupted run: {AFRESH}") from None
        if changed:
            raise UserError(
                f"{self.state} was made otherwise ({'; '.join(changed)}): use --overwrite or another --root"
            )
        check_state(self.state, tensors, self.tensors())
        return tensors, done, log, losses, quantiles

    def _inputs(self) -> artefacts.Facts:
        provenance = self.features.provenance
        return {key: getattr(provenance, key) for key in ("backbone", "weights_sha256", "projection_sha256")}

    def _conflicts(self, found: artefacts.Facts, done: int, decays: Sequence[int]) -> list[str]:
        """What keeps a state from being continued. More iterations and later decays do not: its past is the same."""
        wanted = {**vars(self.facts), **self._inputs()}
        found = {**TrainingFacts.usual(), **self._inputs(), **found}
        past = [at for at in self.facts.decay_at if at < done]
        if self.facts.iterations >= done and [at for at in decays if at < done] == past:
            found |= {"iterations": self.facts.iterations, "decay_at": self.facts.decay_at}
        return artefacts.differences(json.loads(json.dumps(found)), wanted)

    def add(self, losses: Mapping[str, float]) -> None:
        """Take note of an update that was made, by its losses.

        Raises:
            UserError: they are no longer finite; what was saved before stays.
        """
        if worst := [layer for layer, loss in losses.items() if not math.isfinite(loss)]:
            kept = f"the state after an earlier checkpoint is kept in {self.state}"
            message = (
                f"the loss of {', '.join(worst)} is no longer finite at iteration {self.iteration} with learning rate "
                f"{self.optimizer.lr:g}: use a smaller --learning-rate with --overwrite "
                f"({kept if self.state.is_file() else 'nothing'})"
            )
            raise UserError(message) if distributed.rank() == 0 else distributed.ElsewhereError(message)
        for layer, loss in losses.items():
            self.losses[layer].append(loss)
        self.iteration += 1

    def write_log_lines(self, watched: np.ndarray, device: object) -> None:
        """Log every layer's losses since the last line, and those of some rows: the held-out ones if there are any."""
        now = time.monotonic()
        rate = (self.iteration - self.line_iteration) / (now - self.line_time)
        for layer, losses in self.losses.items():
            found = self.measure(layer, watched, device)
            values = (
                self.optimizer.lr,
                sum(losses) / len(losses),
                found["model"] if self.facts.held_out else float("nan"),
                found["predict nothing"],
                found["repeat last"],
                rate,
            )
            self.log.append(LogLine(layer, self.iteration, *map(rounded, values)))
            self.losses[layer] = []
            print(self.log[-1], flush=True)
        self.line_time, self.line_iteration = time.monotonic(), self.iteration

    def measure(self, layer: str, watched: np.ndarray, device: object) -> dict[str, float]:
        """Losses of a layer on some rows, see `training_log.measure`; if they are held out their quantiles are kept."""
        means, quantiles = measure(self.vlm.layers[layer], self.features.stored[layer], watched, device)
        if self.facts.held_out:
            self.quantiles[layer] = [rounded(value) for value in quantiles]
        return means

    def complete(self, watched: np.ndarray, device: object) -> None:
        """Write anew what a run that is done left unwritten; an older version did not keep quantiles."""
        for layer in self._without_quantiles():
            self.measure(layer, watched, device)
        self.save()

    def _without_quantiles(self) -> list[str]:
        return [layer for layer in self.losses if self.facts.held_out and layer not in self.quantiles]

    def save(self) -> None:
        """Write the state, then merge the layers into the checkpoint, the log and the picture; rank 0 alone does."""
        distributed.first(self._save)

    def _save(self) -> None:
        noted = {"facts": {**self.facts.as_json(), **self._inputs()}, "iteration": self.iteration}
        noted |= {"log": [list(astuple(line)) for line in self.log], "losses": self.losses, "quantiles": self.quantiles}
        artefacts.write_tensors(self.state, self.tensors(), noted)
        with merging(self.root):  # beside the layers of other runs, even concurrent ones
            log = merge_log(self.root / "log.csv", self.log, self.features.layers)
            merge_checkpoint(self.out, vlm_tensors(self.vlm), self.describe(), log, self.root / "figures" / "loss.png")

    def describe(self) -> artefacts.Facts:
        """Configuration of the checkpoint with the training facts of this run's layers."""
        last = {line.layer: line.facts() for line in self.log}
        facts = {**self.facts.as_json(), "iterations_done": self.iteration}
        training = {layer: {**facts, "losses": last.get(layer)} for layer in self.losses}
        for layer, values in self.quantiles.items():
            training[layer]["held_out_quantiles"] = values
        return {**self.features.provenance.facts(), "training": training}

    def is_written(self) -> bool:
        """Whether the checkpoint and what stands beside it hold all that this run has reached."""
        sidecar = artefacts.sidecar_path(self.out)
        if self._without_quantiles() or not self.out.is_file() or not sidecar.is_file():
            return False
        noted = artefacts.read_sidecar(self.out, "train_vlm.py")
        trained = noted.get("training")
        described = json.loads(json.dumps(self.describe()["training"]))
        whole = noted.get("sha256") == file_hash(self.out)
        return whole and isinstance(trained, dict) and all(trained.get(n) == facts for n, facts in described.items())


def _numbers(values: object) -> list[float]:
    """`values` as they are; a TypeError where they are no list of numbers."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise TypeError("no numbers")
    return values
