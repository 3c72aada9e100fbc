"""The detector: a CNN and what reads its layers. An image goes in; one pass gives unnaturalness and saliency maps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import naturalness, unnaturalness
from models.backbones import Backbone, central_part
from models.checkpoints import load_vlm
from models.errors import UserError
from models.projection import fold_deepest
from models.surprise import surprise
from models.vlm import (
    DIRECTIONS,
    TRIVIAL_PREDICTORS,
    LayerModel,
    Measure,
    VisualLanguageModel,
    layer_map,
    mean_squares,
)
from models.weights.downloads import file_hash
from pipeline import artefacts, networks
from pipeline.images import STORED_SIZE
from pipeline.presets import DEFAULTS
from pipeline.scaling import area_scale

LANGUAGE_MODEL, FEATURE_CONTRAST = "vlm", "feature-contrast"


@dataclass(frozen=True)
class Seen:
    """What a predictor may read of a layer: raw features (1, C, h, w), projected ones (1, D, h, w), the model."""

    features: Tensor
    projected: Tensor
    model: LayerModel


def _trivial(name: str, measure: Measure = mean_squares) -> Callable[[Seen], Tensor]:
    predictors = dict.fromkeys(DIRECTIONS, TRIVIAL_PREDICTORS[name])
    return lambda seen: layer_map(seen.projected, predictors, measure=measure)


def side_by_side(compute: Callable[[Any], Tensor], items: Sequence[Any]) -> list[Tensor]:
    """What `compute` makes of every item, each in a thread, among which torch's own are shared out.

    For chains of small products on a CPU, which gain next to nothing where each has all threads in its turn.
    """
    threads = torch.get_num_threads()
    workers = min(len(items), threads)
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(threads // workers)) as pool:
        return list(pool.map(compute, items))


def _language_model(measure: Measure) -> Callable[[Seen], Tensor]:
    def read(seen: Seen) -> Tensor:
        apply = side_by_side if seen.projected.device.type == "cpu" else map
        return seen.model.unnaturalness_map(seen.projected, apply, measure)

    return read


# What may give a layer's map (1, h', w'). Two read the language model's errors: vlm by their size, surprise by how
# improbable they are. The others are controls: a trivial predictor in its place, or none. Rarity is to surprise what
# predict-nothing is to vlm: how improbable a feature is in its image.
PREDICTORS: dict[str, Callable[[Seen], Tensor]] = {
    LANGUAGE_MODEL: _language_model(mean_squares),
    "surprise": _language_model(surprise),
    **{name.replace(" ", "-"): _trivial(name) for name in TRIVIAL_PREDICTORS},
    "rarity": _trivial("predict nothing", surprise),
    FEATURE_CONTRAST: lambda seen: unnaturalness.feature_contrast(seen.features),
}


@dataclass(frozen=True)
class Postprocess:
    """How an unnaturalness map becomes a saliency map; `kind` is float or original, see `models.unnaturalness`.

    `centre_prior` is σ, in the image's sides, of a Gaussian at its centre that the map is multiplied by; 0: none.
    """

    kind: str = "float"
    power: float = DEFAULTS["saliency"]["power"].value
    blur: float = DEFAULTS["saliency"]["blur"].value
    centre_prior: float = 0.0

    def __call__(self, raw: np.ndarray, height: int, width: int, stride: unnaturalness.Stride) -> np.ndarray:
        """Map (h-1, w-1) -> (height, width), float64 in 0…1, or uint8 where `kind` is original."""
        finish = unnaturalness.postprocess_original if self.kind == "original" else unnaturalness.postprocess
        saliency = finish(raw, height, width, stride, self.power, self.blur)
        return unnaturalness.centred(saliency, self.centre_prior) if self.centre_prior else saliency

    @property
    def facts(self) -> artefacts.Facts:
        """All of it; the prior only where there is one."""
        prior = {"centre_prior": self.centre_prior} if self.centre_prior else {}
        return {"power": self.power, "blur": self.blur, "postprocess": self.kind, **prior}


@dataclass(frozen=True)
class Checkpoint:
    """A file of language models, frozen, the name of the backbone that they read, and by layer how it was trained."""

    path: Path
    backbone: str
    vlm: VisualLanguageModel
    sha256: str
    training: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Checkpoint":
        """Read it; a UserError says what is wrong with the file."""
        vlm, notes = load_vlm(path)
        return cls(path, notes.backbone, vlm.freeze().to(device), file_hash(path), notes.training)


@dataclass(frozen=True)
class Reading:
    """One map that an image gives: what `predictor` (of `PREDICTORS`) predicts badly on a layer of a checkpoint."""

    name: str
    checkpoint: Checkpoint
    layer: str
    predictor: str = LANGUAGE_MODEL
    postprocess: Postprocess = Postprocess()

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise UserError(f"there is no predictor {self.predictor!r}: choose from {', '.join(PREDICTORS)}")


@dataclass(frozen=True)
class Detector:
    """A frozen CNN and its readings by name; `source` says where its weights are from, `facts` what they are."""

    backbone: Backbone
    facts: artefacts.Facts
    source: str
    readings: dict[str, Reading] = field(default_factory=dict)

    @classmethod
    def load(cls, readings: Iterable[Reading], choice: networks.WeightsChoice, device: torch.device) -> "Detector":
        """The CNN that readings of one backbone share; says which weights were taken.

        Raises:
            UserError: no weights, or not the layers that are read.
        """
        by_name = {reading.name: reading for reading in readings}
        (name,) = {reading.checkpoint.backbone for reading in by_name.values()}
        layers = list(dict.fromkeys(reading.layer for reading in by_name.values()))
        backbone, weights = networks.load_backbone(choice, name, layers, device)
        facts = {"backbone": name, **networks.weights_facts(backbone, weights)}
        return cls(networks.lay_out(backbone), facts, weights.source, by_name)

    @cached_property
    def _folded(self) -> tuple[Backbone, str | None]:
        """The CNN with the projection of its deepest layer inside, and the layer, where nothing else reads it."""
        read = self.readings.values()
        alike = len({r.checkpoint.sha256 for r in read}) == 1 and all(r.predictor != FEATURE_CONTRAST for r in read)
        if not alike:
            return self.backbone, None
        return fold_deepest(self.backbone, {r.layer: r.checkpoint.vlm.projections[r.layer] for r in read})

    def unnaturalness(self, rgb: np.ndarray, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Map (h-1, w-1) float64 of an image (H, W, 3) uint8 for some readings (default: all), in one pass.

        (h, w) where nothing is predicted from its neighbours, as by feature-contrast.

        Raises:
            UserError: the image is too small for a layer.
        """
        wanted = [self.readings[name] for name in (self.readings if names is None else names)]
        backbone, folded = self._folded
        features = unnaturalness.layer_features(backbone, rgb, dict.fromkeys(r.layer for r in wanted))
        projected: dict[tuple[str, str], Tensor] = {}
        maps = {}
        with torch.no_grad():
            for reading in wanted:
                vlm, key = reading.checkpoint.vlm, (reading.checkpoint.sha256, reading.layer)
                found = features[reading.layer]
                if key not in projected:
                    projected[key] = found if reading.layer == folded else vlm.projections[reading.layer](found)
                seen = Seen(found, projected[key], vlm.layers[reading.layer])
                raw = PREDICTORS[reading.predictor](seen)
                maps[reading.name] = raw[0].cpu().double().numpy()
        return maps

    def naturalness(self, rgb: np.ndarray) -> dict[str, dict[str, float | None]]:
        """How natural the language models find an image (H, W, 3) uint8, scaled and cropped as for training.

        Returns:
            by reading the `loss`, and its `percentile` among the checkpoint's held-out images (0: more natural than
            all of them, 100: less), None where the checkpoint does not say.
        """
        height, width = self.backbone.architecture.crop
        crop = central_part(area_scale(rgb, STORED_SIZE, STORED_SIZE), height, width)[None]  # (1, height, width, 3)
        found: dict[str, dict[str, float | None]] = {}
        checkpoints = {reading.checkpoint.sha256: reading.checkpoint for reading in self.readings.values()}
        for checkpoint in checkpoints.values():
            names = {r.layer: name for name, r in self.readings.items() if r.checkpoint.sha256 == checkpoint.sha256}
            for layer, (loss,) in naturalness.losses_of(self.backbone, checkpoint.vlm, crop, names).items():
                held_out = naturalness.kept_quantiles(checkpoint.training.get(layer, {}))
                found[names[layer]] = {"loss": loss, "percentile": held_out and naturalness.percentile(loss, held_out)}
        return found

    def saliency(self, name: str, raw: np.ndarray, height: int, width: int) -> np.ndarray:
        """Saliency map (height, width) of a reading from its unnaturalness map, post-processed as the reading says."""
        reading = self.readings[name]
        return reading.postprocess(raw, height, width, self.backbone.architecture.stride(reading.layer))

    def memory(self, height: int, width: int) -> int:
        """Bytes that a pass over an image needs at least, where it is the computer's memory; else 0."""
        if self.backbone.device.type != "cpu":
            return 0
        layers = {reading.layer for reading in self.readings.values()}
        return max(self.backbone.architecture.memory(layer, height, width) for layer in layers)

    def facts_of(self, name: str) -> artefacts.Facts:
        """All that determines a reading's maps, but the image and what its name says."""
        return {**self.facts, "vlm_sha256": self.readings[name].checkpoint.sha256}


def postprocess_each(kind: str, power: Any, blur: Any, centre_prior: float, count: int) -> list[Postprocess]:
    """The post-processing of each of `count` checkpoints, of options with one value for all, or as many."""
    numbers = zip(each(power, count, "--power"), each(blur, count, "--blur"), strict=True)
    return [Postprocess(kind, *pair, centre_prior) for pair in numbers]


def each(values: Any, count: int, option: str) -> list[Any]:
    """The values of an option for `count` checkpoints: one for all, or as many.

    Raises:
        UserError: another number.
    """
    values = values if isinstance(values, list) else [values]
    if len(values) not in (1, count):
        raise UserError(f"{option} has {len(values)} values for {count} checkpoints: give one, or one for each")
    return values if len(values) == count else values * count


def combined(maps: Sequence[np.ndarray]) -> np.ndarray:
    """The saliency map of an image from those of its readings: the one there is, or their sum scaled as they are."""
    if len(maps) == 1:
        return maps[0]
    total = unnaturalness.added(m / 255 if m.dtype == np.uint8 else m for m in maps)
    return (total * 255).astype(np.uint8) if maps[0].dtype == np.uint8 else total


def open_detectors(
    checkpoints: Sequence[Path],
    layers: Sequence[str] | None,
    predictors: Sequence[str],
    postprocess: Sequence[Postprocess],
    choice: networks.WeightsChoice,
    device: torch.device,
) -> list[Detector]:
    """What gives the maps that are to be added: the layers of all checkpoints, each with its predictor.

    Raises:
        UserError: a file, a layer or weights that are not there, or two maps of one name.
    """
    loaded = {path: Checkpoint.load(path, device) for path in dict.fromkeys(checkpoints)}
    chosen = choose_layers({path: checkpoint.vlm.layers for path, checkpoint in loaded.items()}, layers)
    readings = []
    for path, predictor, finish in dict.fromkeys(zip(checkpoints, predictors, postprocess, strict=True)):
        for layer in dict.fromkeys(chosen[path]):
            control = "" if predictor == LANGUAGE_MODEL else f"-{predictor}"
            name = f"{loaded[path].backbone}-{layer}{control}"
            readings.append(Reading(name, loaded[path], layer, predictor, finish))
    names = [reading.name for reading in readings]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two checkpoints give a map of {twice[0]}: leave one out, or choose another --layer")
    return load_detectors(readings, choice, device)


def load_detectors(readings: Sequence[Reading], choice: networks.WeightsChoice, device: torch.device) -> list[Detector]:
    """One detector for every backbone that the readings need, so that each image goes once through each."""
    backbones = dict.fromkeys(reading.checkpoint.backbone for reading in readings)
    return [Detector.load([r for r in readings if r.checkpoint.backbone == name], choice, device) for name in backbones]


def choose_layers(checkpoints: Mapping[Path, Iterable[str]], wanted: Sequence[str] | None) -> dict[Path, list[str]]:
    """Which layers of each checkpoint (path -> its layers) are read: those wanted that it has, else its deepest.

    Raises:
        UserError: a layer is in no checkpoint, or a checkpoint has none of them.
    """
    layers = {path: list(there) for path, there in checkpoints.items()}
    if not wanted:
        return {path: there[-1:] for path, there in layers.items()}
    for layer in wanted:
        if not any(layer in there for there in layers.values()):
            there = "; ".join(f"{path} has {', '.join(names)}" for path, names in layers.items())
            raise UserError(f"there is no layer {layer!r}: {there}")
    chosen = {path: [layer for layer in wanted if layer in there] for path, there in layers.items()}
    for path, names in chosen.items():
        if not names:
            raise UserError(f"{path} has none of the layers {', '.join(wanted)}: choose from {', '.join(layers[path])}")
    return chosen
