"""What reads pictures for their naturalness: the layers of a checkpoint, and the controls beside them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from models.backbones import Backbone
from models.errors import UserError
from models.naturalness import features_of_crops, losses_and_maps
from models.vlm import DIRECTIONS, TRIVIAL_PREDICTORS, VisualLanguageModel
from pipeline import artefacts, networks
from pipeline.detector import Checkpoint, Detector, Reading, choose_layers

MODEL, RELATIVE, NOTHING, RANDOM = "language model", "relative", "predict nothing", "random CNN"
PREDICTORS = {  # the columns of the tables
    MODEL: "the checkpoint's, on the CNN that it was trained on",
    RELATIVE: "the language model's loss or map over that of predicting nothing: which part stayed unpredicted (ours)",
    NOTHING: "always the mean: the energy of the same features",
    "repeat last": "the feature that was read last, of the same features",
    RANDOM: "the checkpoint's language model and projection on a CNN that was never trained",
}
AT_ONCE = 4  # pictures; more need more memory, and are no faster


@dataclass(frozen=True)
class Reader:
    """A network with language models for some of its layers, which `titles` name in the tables.

    `weights` is where the network's come from; `facts` are plain JSON and determine what it says.
    """

    backbone: Backbone
    vlm: VisualLanguageModel
    titles: Mapping[str, str]
    random: bool
    weights: str
    facts: artefacts.Facts

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of the pictures that it was trained on."""
        return self.backbone.architecture.crop

    def read(self, pictures: Sequence[np.ndarray]) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
        """Title, predictor, losses (N,) and maps (N, h-1, w-1) of pictures (H, W, 3) of one size, for each layer."""
        parts: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
        for start in range(0, len(pictures), AT_ONCE):
            for key, found in self._read(np.stack([p.astype(np.float32) for p in pictures[start : start + AT_ONCE]])):
                parts.setdefault(key, []).append(found)
        together = {key: [np.concatenate(of) for of in zip(*found, strict=True)] for key, found in parts.items()}
        for (title, predictor), (losses, maps) in together.items():
            yield title, predictor, losses, maps
            if predictor == MODEL:
                yield title, RELATIVE, *map(_ratio, (losses, maps), together[title, NOTHING])

    def _read(self, stack: np.ndarray) -> Iterator[tuple[tuple[str, str], tuple[np.ndarray, np.ndarray]]]:
        projected = features_of_crops(self.backbone, self.vlm, stack, self.titles)
        for layer, title in self.titles.items():
            trained = self.vlm.layers[layer]
            trivial = {} if self.random else TRIVIAL_PREDICTORS
            by_name: dict[str, Any] = {RANDOM if self.random else MODEL: trained}
            by_name |= {name: dict.fromkeys(DIRECTIONS, predictor) for name, predictor in trivial.items()}
            for name, predictors in by_name.items():
                with torch.no_grad():
                    losses, maps = losses_and_maps(projected[layer], predictors)
                yield (title, name), (losses.cpu().double().numpy(), maps.cpu().double().numpy())

    def stride(self, title: str) -> tuple[int, int]:
        """Pixels from cell to cell of a title's map, down and across."""
        layer = next(layer for layer, name in self.titles.items() if name == title)
        return self.backbone.architecture.stride(layer)


def _ratio(values: np.ndarray, to: np.ndarray) -> np.ndarray:
    """values / to; 0 where there is nothing to predict."""
    return np.divide(values, to, out=np.zeros_like(values), where=to > 0)


def load_readers(
    checkpoints: Sequence[Checkpoint],
    wanted: Sequence[str] | None,
    choice: networks.WeightsChoice,
    device: torch.device,
) -> list[Reader]:
    """A reader with the trained network and one with a random one for every checkpoint.

    Args:
        wanted: layers, None for all.
        choice: of the trained network's weights, and the random one's seed.
    """
    there = {checkpoint.path: list(checkpoint.vlm.layers) for checkpoint in checkpoints}
    chosen = choose_layers(there, wanted) if wanted else there
    readers: list[Reader] = []
    taken: Counter[str] = Counter()
    for checkpoint in checkpoints:
        titles = {}
        for layer in chosen[checkpoint.path]:
            taken[title := f"{checkpoint.backbone}-{layer}"] += 1
            titles[layer] = title if taken[title] == 1 else f"{title}-{taken[title]}"
        readings = [Reading(title, checkpoint, layer) for layer, title in titles.items()]
        for random in (False, True):
            drawn = replace(choice, weights="random") if random else choice
            detector = Detector.load(readings, drawn, device)
            facts = {**detector.facts, "vlm_sha256": checkpoint.sha256, "layers": titles, "random": random}
            readers.append(Reader(detector.backbone, checkpoint.vlm, titles, random, detector.source, facts))
    return readers


def common_held_out(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Names of the images that no layer of any checkpoint was trained on, as they state.

    Raises:
        UserError: a checkpoint does not say so, or there are none.
    """
    common: set[str] | None = None
    for checkpoint in checkpoints:
        for layer, facts in checkpoint.training.items():
            names = facts.get("held_out_names")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                what = f"{checkpoint.path} does not say which images were held out from {layer}"
                raise UserError(f"{what}: give a folder of such images")
            common = set(names) if common is None else common & set(names)
    if not common:
        raise UserError("no image was held out from every layer: give a folder of images that none was trained on")
    return sorted(common)
