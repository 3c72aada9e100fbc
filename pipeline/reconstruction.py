"""What reconstruct.py asks for and leaves: objective and descent with all settings, resumable restarts, results."""

import csv
import io
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backbones import Backbone, find_architecture
from models.checkpoints import AFRESH, check_state, read_state, write_tensors
from models.descent import OPTIMIZERS, STARTS, Descent, Image, MomentumSGD, Schedule
from models.errors import UserError
from models.objective import (
    REGULARIZERS,
    ReconstructionLoss,
    default_layer_weights,
    descent_for,
    penalties_for,
)
from models.randomness import seed_for
from models.vlm import VisualLanguageModel
from pipeline import array_files, artefacts, figures, images, ownership, program
from pipeline.targets import Statistics, sample_energies

OUTPUTS = tuple(
    "reconstruction.png reconstruction.npy image.png comparison.png curves.csv curves.png parameters.json".split()
)
SETTING_OPTIONS = {"exponent": "--frequency-exponent", "decorrelate": "--decorrelate"}


@dataclass(frozen=True)
class Objective:
    """What is minimised, as `ReconstructionLoss` has it; every field is a fact of the result."""

    target: str
    regularizer: str
    feature_weight: float
    vlm_weight: float
    energy_weight: float
    layer_weights: dict[str, float]
    penalties: dict[str, float]


def choose_objective(
    regularizer: str,
    target: str,
    backbone: str,
    trained: list[str],
    *,
    layers: list[str] | None,
    layer_weights: list[float] | None,
    feature_weight: float,
    vlm_weight: float,
    energy_weight: float,
    penalties: dict[str, float | None],
) -> Objective:
    """The objective of a regulariser with what was asked for in place of its defaults.

    Args:
        trained: layers that have a language model.
        layers, layer_weights: that regularise, with their λ in order; None for all and the default.
        penalties: λ by name; None for the default.

    Raises:
        UserError: a penalty is not part of the regulariser, or layers and their weights do not fit.
    """
    chosen = penalties_for(regularizer, target)
    asked = {name: weight for name, weight in penalties.items() if weight is not None}
    if strange := sorted(asked.keys() - chosen.keys()):
        raise UserError(f"--{strange[0]}-weight means nothing to --regularizer {regularizer}: drop it")
    by_layer: dict[str, float] = {}
    if REGULARIZERS[regularizer].vlm:
        by_layer = choose_layer_weights(backbone, trained, layers, layer_weights)
    else:
        vlm_weight = energy_weight = 0.0
    return Objective(target, regularizer, feature_weight, vlm_weight, energy_weight, by_layer, chosen | asked)


def choose_layer_weights(
    backbone: str, trained: list[str], layers: list[str] | None, weights: list[float] | None
) -> dict[str, float]:
    """λ of each layer's language model: the default, or of the `layers` asked for, in order."""
    default = default_layer_weights(find_architecture(backbone))
    if not layers:
        return default
    unknown = [layer for layer in layers if layer not in trained]
    if unknown:
        raise UserError(f"the language model has no layer {unknown[0]}: choose from {', '.join(trained)}")
    values = weights or [default.get(layer, 1.0) for layer in layers]
    if len(values) != len(layers):
        raise UserError(f"--layer-weights has {len(values)} values for {len(layers)} --layers: give one each")
    return dict(zip(layers, values, strict=True))


def choose_descent(
    name: str, regularizer: str, decay_at: list[int] | None, settings: dict[str, Any], **values: float | None
) -> tuple[Descent, Schedule]:
    """The descent of a name in `DESCENTS` with what was asked for in place of its defaults, and its schedule.

    Args:
        decay_at: updates, counted from 0, after which the rate falls.
        settings: of its parametrisation.
        values: its other attributes. None stands for the default everywhere.

    Raises:
        UserError: its parametrisation has no such setting, or its start no noise.
    """
    default = descent_for(name, regularizer)
    settings = {key: value for key, value in settings.items() if value is not None}
    if strange := sorted(settings.keys() - default.settings.keys()):
        raise UserError(f"{SETTING_OPTIONS[strange[0]]} means nothing to --descent {name}: drop it")
    if default.start == "zero" and values["noise"] is not None:
        raise UserError(f"--start-noise means nothing to {regularizer} with --descent {name}: drop it")
    changed = {key: value for key, value in values.items() if value is not None}
    descent = replace(default, settings={**default.settings, **settings}, **changed)
    decays = descent.decays(descent.iterations) if decay_at is None else decay_at
    return descent, Schedule(descent.learning_rate, tuple(decays))


def taps_measured(objective: Objective, descent: Descent) -> list[str]:
    """Taps whose mean and std the descent's start and the feature's error need."""
    relative = REGULARIZERS[objective.regularizer].relative
    return [*(["data"] if descent.start == "data" else []), *([] if relative else [objective.target])]


@dataclass(frozen=True)
class Task:
    """Everything that the reconstructions of one run share.

    Attributes:
        vlm: frozen language models; read only where the regulariser has them.
        statistics: those of `taps_measured`.
        name: of the descent.
    """

    backbone: Backbone
    vlm: VisualLanguageModel
    statistics: Statistics
    objective: Objective
    name: str
    descent: Descent
    schedule: Schedule
    seed: int

    @cached_property
    def energies(self) -> dict[str, float]:
        """Mean square of projected features by layer, where the objective weighs it; measured when first asked for."""
        weighed = [n for n in self.objective.layer_weights if self.objective.energy_weight and n in self.vlm.layers]
        return sample_energies(self.backbone, self.vlm, weighed) if weighed else {}

    def loss(self, target: Tensor) -> ReconstructionLoss:
        """The objective for a feature (1, C) or (1, C, H, W)."""
        wanted, regularizer = self.objective, REGULARIZERS[self.objective.regularizer]
        return ReconstructionLoss(
            self.backbone,
            wanted.target,
            target,
            None if regularizer.relative else self.statistics[wanted.target]["std"].to(self.backbone.device),
            self.vlm if regularizer.vlm else None,
            feature_weight=wanted.feature_weight,
            vlm_weight=wanted.vlm_weight,
            layer_weights=wanted.layer_weights,
            penalties=wanted.penalties,
            in_turn=self.descent.in_turn,
            energy_weight=wanted.energy_weight,
            energies=self.energies,
        )

    def start(self, number: int) -> Image:
        """What restart `number` varies, at its start; its noise follows from the seed."""
        descent, seed = self.descent, seed_for(self.seed, "noise", number)
        pixels = STARTS[descent.start](self.backbone, self.statistics.get("data", {}), descent.noise, seed)
        return descent.image(pixels, self.backbone.architecture.bgr)

    def optimizer(self, image: Image) -> MomentumSGD:
        """The descent's optimiser over an image's parameters, at the first rate."""
        kind = OPTIMIZERS[self.descent.optimizer]
        return kind(image.parameters, self.schedule.learning_rate, self.descent.momentum)

    def restart(self, number: int, folder: Path, facts: artefacts.Facts) -> "Restart":
        """Restart `number` at its start, of which `facts` are all that determines the result."""
        image = self.start(number)
        return Restart(number, folder, self.backbone, image, self.optimizer(image), facts)

    def facts(self, weights_sha256: str, vlm_sha256: str) -> artefacts.Facts:
        """What a result depends on besides its input; on the language models only where they regularise.

        The energies are left out: they follow from the rest.
        """
        tensors = [value.numpy() for of_tap in self.statistics.values() for value in of_tap.values()]
        return {
            "stage": "reconstruct",
            "backbone": self.backbone.architecture.name,
            "weights_sha256": weights_sha256,
            "vlm_sha256": vlm_sha256 if REGULARIZERS[self.objective.regularizer].vlm else None,
            "statistics_sha256": array_files.hash_rows(tensors),
            **asdict(self.objective),
            "descent": self.name,
            **self.descent.values(self.schedule.decay_at),
            **self.descent.settings,
            "seed": self.seed,
        }


class Restart:
    """One descent from its own noise: image, optimiser, curves, snapshots and resumable state in a folder.

    Args:
        number: which of them.
        facts: all that determines the result; a state of others is not taken up.
    """

    def __init__(
        self,
        number: int,
        folder: Path,
        backbone: Backbone,
        image: Image,
        optimizer: MomentumSGD,
        facts: artefacts.Facts,
    ):
        self.number, self.folder, self.backbone, self.facts = number, folder, backbone, facts
        self.image, self.optimizer = image, optimizer
        self.curves: list[dict[str, float]] = []
        self.state = folder / f"restart-{number}.state.safetensors"

    def tensors(self) -> dict[str, Tensor]:
        """All that the updates change, by name; these very tensors."""
        return {f"image.{i}": p for i, p in enumerate(self.image.parameters)} | self.optimizer.state()

    def resume(self) -> None:
        """Take up the state of a killed run with the same facts."""
        if not self.state.is_file():
            return
        found, noted = read_state(self.state, {"facts": dict, "curves": list})
        if noted["facts"] != json.loads(json.dumps(self.facts)):
            return
        check_state(self.state, found, self.tensors())
        if not are_curves(noted["curves"], self.facts["iterations"]):
            raise UserError(f"{self.state} holds damaged curves: {AFRESH}")
        with torch.no_grad():
            for name, value in self.tensors().items():
                value.copy_(found[name])
        self.curves = noted["curves"]

    def snapshot(self) -> None:
        """Write the picture so far and the state from which the same command goes on."""
        name = f"restart-{self.number}-{len(self.curves):05d}.png"
        images.write_png(self.folder / "snapshots" / name, self.picture())
        with artefacts.atomic_path(self.state) as temporary:
            write_tensors(temporary, self.tensors(), {"facts": self.facts, "curves": self.curves})

    def rgb(self) -> np.ndarray:
        """The image so far, (H, W, 3) float32 RGB, clipped to 0-255."""
        return self.backbone.to_rgb(self.image().detach())[0].permute(1, 2, 0).cpu().numpy()

    def picture(self) -> np.ndarray:
        """The image so far, (H, W, 3) uint8 RGB, truncated as in the original."""
        return self.rgb().astype(np.uint8)


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
    names = ["restart", "iteration", *restarts[0].curves[0]]
    rows = [[r.number, i, *terms.values()] for r in restarts for i, terms in enumerate(r.curves)]
    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    artefacts.write_text(folder / "curves.csv", text.getvalue())
    figures.reconstruction_curves([r.curves for r in restarts], folder / "curves.png")


def best_of(restarts: list[Restart]) -> Restart:
    """The restart whose objective, at its last update, is lowest."""
    return min(restarts, key=lambda r: r.curves[-1]["total"])


def save(out: Path, restarts: list[Restart], rgb: np.ndarray | None) -> None:
    """Pictures and curves of the restarts that made an update, finished or interrupted."""
    begun = [r for r in restarts if r.curves]
    if not begun:
        return
    best = best_of(begun)
    for r in begun:
        images.write_png(out / f"restart-{r.number}.png", r.picture())
    images.write_png(out / "reconstruction.png", best.picture())
    if rgb is not None:
        images.write_png(out / "image.png", rgb)
    write_curves(out, begun)
    titled = {} if rgb is None else {"image": rgb}
    title = f"{best.facts['target']}, {best.facts['regularizer']}"
    figures.picture_row({**titled, title: best.picture()}, out / "comparison.png")


def finish(out: Path, restarts: list[Restart], facts: artefacts.Facts) -> None:
    """Write the float result, the parameters and the sidecar, and drop the states."""
    best = best_of(restarts)
    result = best.rgb()
    array_files.write_array(out / "reconstruction.npy", result)
    last = {"best_restart": best.number, "losses": best.curves[-1]}
    artefacts.write_json(out / "parameters.json", {**facts, **last, "versions": program.versions()})
    described = {"shape": list(result.shape), "dtype": str(result.dtype), **facts, **last}
    artefacts.write_json(artefacts.sidecar_path(out / "reconstruction.npy"), described)
    for restart in restarts:
        ownership.remove(restart.state)
    terms = ", ".join(f"{name} {value:.4f}" for name, value in best.curves[-1].items())
    print(f"{out}/reconstruction.png: {terms}")


def reuse(out: Path, facts: artefacts.Facts, overwrite: bool) -> bool:
    """Whether `out` holds the result of these facts; says so.

    Raises:
        UserError: it holds that of others.
    """
    if not artefacts.reuse(out / "reconstruction.npy", facts, overwrite):
        return False
    for state in out.glob("restart-*.state.safetensors*"):  # killed just before it removed them
        ownership.remove(state)
    print(f"{out} is finished: nothing to do")
    return True
