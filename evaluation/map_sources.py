"""Where the saliency maps of an evaluation come from: checkpoints with their controls, folders, baselines.

A source names rows of the table and gives the map (H, W) of each for an image (H, W, 3). Nothing is ever resized: a map
of another size than its image is an error.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from evaluation.baselines import BASELINES
from evaluation.journal import text_sha256
from models.errors import UserError
from models.unnaturalness import added
from models.weights.downloads import file_hash
from pipeline import array_files, artefacts, networks, options, ownership
from pipeline.decoding import open_image
from pipeline.detector import LANGUAGE_MODEL, Checkpoint, Detector, Postprocess, Reading, choose_layers
from pipeline.images import output_name
from pipeline.names import Names
from pipeline.paths import real

NOTHING, RANDOM = "predict-nothing", "random-cnn"
Maps = dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """A line of the table: kind is model, control, baseline or ceiling; about says what it is; controls name what
    it is to be compared with.
    """

    kind: str
    about: str
    controls: tuple[str, ...] = ()


class Source(Protocol):
    """Gives maps for some rows; facts are plain JSON that determines them."""

    rows: dict[str, Row]
    facts: artefacts.Facts

    def maps(self, path: Path, rgb: np.ndarray) -> Maps:
        """Map (H, W) of every row for an image file and its pixels (H, W, 3) uint8."""


class Baselines:
    """Maps that need no model, of `BASELINES`: those that are always there and those asked for."""

    def __init__(self, names: Sequence[str]):
        always = [name for name, baseline in BASELINES.items() if baseline.always]
        made = [name for name in dict.fromkeys((*names, *always)) if BASELINES[name].make is not None]
        self.rows = {name: Row("baseline", BASELINES[name].about) for name in made}
        self.facts = {"baselines": list(self.rows)}

    def maps(self, path: Path, rgb: np.ndarray) -> Maps:
        """The map (H, W) of every baseline; the file itself is not read."""
        return {name: BASELINES[name].make(rgb) for name in self.rows}


class Folder:
    """Maps of one model in a folder: for the stimulus `a.jpg` the file `a.npy`, `a.jpg.npy`, `a.png` or `a.jpg.png`.

    The first of these that is there is taken: floats before 8 or 16 bits of grey. Of stimuli that differ only in their
    extension, `a.jpg` and `a.png`, each needs the map with the whole name.

    Raises:
        UserError: a map is missing, of two stimuli, unreadable, coloured, not finite, or of another size than its
            stimulus.
    """

    def __init__(self, name: str, folder: Path, sizes: Mapping[Path, tuple[int, int]]):
        self.files = _find_maps(folder, list(sizes))
        ownership.reading(*self.files.values())
        wrong = [(i, f"{w}×{h}", self._size(i)) for i, (h, w) in sizes.items() if self._size(i) != f"{w}×{h}"]
        if wrong:
            image, expected, found = wrong[0]
            raise UserError(
                f"{self.files[image]} has {found} pixels, its stimulus {expected}"
                + (f" (and {len(wrong) - 1} more maps do not fit)" if len(wrong) > 1 else "")
                + ": save every map at its image's own size, for nothing is resized here"
            )
        self.rows = {name: Row("model", f"maps of the folder {folder}")}
        self.facts = {"folder": name, "maps": {f.name: file_hash(f) for f in self.files.values()}}

    def _size(self, image: Path) -> str:
        height, width = self._read(image).shape
        return f"{width}×{height}"

    def _read(self, image: Path) -> np.ndarray:
        path = self.files[image]
        try:
            values = array_files.map_array(path) if path.suffix == ".npy" else _read_grey(path)
        except UserError:
            raise
        except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
            raise UserError(f"{path} cannot be read as a map ({error}): save it anew") from None
        if values.ndim != 2 or not values.size or values.dtype.kind not in "biuf":
            raise UserError(f"{path} is {values.dtype} of shape {values.shape}: a map is (height, width), real numbers")
        return values

    def maps(self, path: Path, rgb: np.ndarray) -> Maps:
        """The folder's map (H, W) of the image; a UserError where it holds NaN or infinities."""
        values = np.array(self._read(path))
        if not np.isfinite(values).all():
            raise UserError(f"{self.files[path]} holds NaN or infinities: save finite numbers")
        return dict.fromkeys(self.rows, values)


def _find_maps(folder: Path, images: Sequence[Path]) -> dict[Path, Path]:
    """The map of every stimulus in a folder; a stimulus is never its own map."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of the maps")
    stimuli = {real(image) for image in images}
    there = sorted(f for f in folder.iterdir() if f.suffix in (".npy", ".png") and real(f) not in stimuli)
    index, stems = Names([file.name for file in there], stems=False), Counter(image.stem for image in images)
    found, taken = {}, set()
    for image in images:
        ways = (image.stem, image.name, output_name(image.stem)) if stems[image.stem] == 1 else (image.name,)
        places = [index.find(f"{way}{suffix}") for suffix in (".npy", ".png") for way in ways]
        place = next((place for place in places if place is not None), None)
        if place is None:
            raise UserError(f"{folder} has no map of {image.name}: add {ways[0]}.npy or {ways[0]}.png")
        if place in taken:
            raise UserError(f"{there[place]} would be the map of {image.name} and of another stimulus: rename one")
        taken.add(place)
        found[image] = there[place]
    return found


def _read_grey(path: Path) -> np.ndarray:
    with open_image(path) as image:
        if image.mode not in ("1", "L", "I", "F") and not image.mode.startswith("I;16"):
            raise ValueError(f"a picture of mode {image.mode}, not grey")
        return np.asarray(image)


@dataclass(frozen=True)
class Models:
    """The project's own maps: all readings of one CNN, of which every image needs one pass.

    Raw maps are kept in `cache`, under names that are hashes of everything that determines them, so that they are never
    mistaken; `fresh` computes them anew, once.
    """

    detector: Detector
    rows: dict[str, Row]
    cache: Path
    fresh: bool = False
    made: set[Path] = field(default_factory=set)

    @property
    def facts(self) -> artefacts.Facts:
        """Of the CNN, and by row of what reads it and how its maps are post-processed."""
        rows = {}
        for name, reading in self.detector.readings.items():
            described = {"layer": reading.layer, "predictor": reading.predictor, **reading.postprocess.facts}
            rows[name] = {**described, "vlm_sha256": reading.checkpoint.sha256}
        return {**self.detector.facts, "rows": rows}

    def maps(self, path: Path, rgb: np.ndarray) -> Maps:
        """Saliency map (H, W) of every row, post-processed as its reading says."""
        raws = self.raw_maps(path, rgb)
        return {name: self.detector.saliency(name, raw, *rgb.shape[:2]) for name, raw in raws.items()}

    def raw_maps(self, path: Path, rgb: np.ndarray) -> Maps:
        """Unnaturalness map (h-1, w-1) float64 of every row, from the cache where it is there."""
        digest = file_hash(path)
        files = {name: self._cache_file(name, path, digest) for name in self.rows}
        usable = {name: file for name, file in files.items() if not self.fresh or file in self.made}
        found = {name: kept for name, file in usable.items() if (kept := _load(file)) is not None}
        if missing := [name for name in self.rows if name not in found]:
            for name, raw in self.detector.unnaturalness(rgb, missing).items():
                array_files.write_array(files[name], raw)
                self.made.add(files[name])
                found[name] = raw
        return {name: found[name] for name in self.rows}

    def _cache_file(self, name: str, path: Path, image_sha256: str) -> Path:
        reading = self.detector.readings[name]
        key = (reading.layer, reading.predictor)
        facts = {**self.detector.facts_of(name), **options.image_facts(), "key": key, "image": image_sha256}
        determined = json.dumps(facts, sort_keys=True)
        return self.cache / name / f"{output_name(path.stem)}-{text_sha256(determined)[:16]}.npy"


class Added:
    """Several sources and, as further rows, the sums of their models' maps and of the maps of each kind of control.

    Each map is scaled to 0…1 before, so that all weigh the same.
    """

    def __init__(self, parts: Sequence[Models]):
        self.parts = parts
        self.rows = {name: row for part in parts for name, row in part.rows.items()}
        self.facts = {"added": [part.facts for part in parts]}
        titles = [name for name, row in self.rows.items() if row.kind == "model"]
        if len(titles) < 2:
            raise UserError("there is one model only, nothing to add: give further checkpoints or layers")
        title = "+".join(titles)
        self.sums = {title: titles}
        for control in (name.removeprefix(f"{titles[0]}/") for name in self.rows[titles[0]].controls):
            self.sums[f"{title}/{control}"] = [f"{name}/{control}" for name in titles]
        first, *controls = self.sums
        self.rows[first] = Row("model", "the maps of these models, each scaled to 0…1, added", tuple(controls))
        self.rows |= {name: Row("control", "the same of their controls") for name in controls}

    def maps(self, path: Path, rgb: np.ndarray) -> Maps:
        """The maps (H, W) of all parts, and their sums scaled to 0…1."""
        found = {name: values for part in self.parts for name, values in part.maps(path, rgb).items()}
        return found | {name: added(found[part] for part in parts) for name, parts in self.sums.items()}


def _load(path: Path) -> np.ndarray | None:
    try:
        return np.array(array_files.map_array(path))
    except ValueError:
        return None


def model_sources(
    checkpoints: Sequence[Path],
    layers: Sequence[str] | None,
    predictors: Sequence[str],
    postprocess: Sequence[Postprocess],
    beside: Sequence[str],
    choice: networks.WeightsChoice,
    device: torch.device,
    cache: Path,
    fresh: bool,
) -> list[Models]:
    """Every layer that is read of every checkpoint, with its controls: two sources for each CNN.

    Controls: `predict-nothing` is the squared projected features under the same ramp, same CNN, same projection, same
    post-processing; `random-cnn` has He-initialised CNN weights, while projection and language model stay those of the
    checkpoint, fitted to the trained CNN; and the predictors `beside`.

    Args:
        predictors, postprocess: of each checkpoint. One that is given twice, with two predictors, gives two models.

    Raises:
        UserError: a checkpoint, a layer or weights are missing.
    """
    loaded = {path: Checkpoint.load(path, device) for path in dict.fromkeys(checkpoints)}
    chosen = choose_layers({path: checkpoint.vlm.layers for path, checkpoint in loaded.items()}, layers)
    taken: Counter[str] = Counter()
    trained: dict[str, list[Reading]] = {}  # by backbone
    random: dict[str, list[Reading]] = {}
    for path, predictor, finish in dict.fromkeys(zip(checkpoints, predictors, postprocess, strict=True)):
        checkpoint = loaded[path]
        for layer in chosen[path]:
            title = f"{checkpoint.backbone}-{layer}{'' if predictor == LANGUAGE_MODEL else f'-{predictor}'}"
            taken[title] += 1
            title = title if taken[title] == 1 else f"{title}-{taken[title]}"
            named = {title: predictor} | {f"{title}/{name}": name for name in (NOTHING, *beside)}
            trained.setdefault(checkpoint.backbone, []).extend(
                Reading(name, checkpoint, layer, predicting, finish) for name, predicting in named.items()
            )
            random.setdefault(checkpoint.backbone, []).append(
                Reading(f"{title}/{RANDOM}", checkpoint, layer, predictor, finish)
            )
    found: list[Models] = []
    for backbone, readings in trained.items():
        for of_weights, weights in ((readings, choice), (random[backbone], replace(choice, weights="random"))):
            detector = Detector.load(of_weights, weights, device)
            rows = {reading.name: _row(reading, detector.source, beside) for reading in of_weights}
            found.append(Models(detector, rows, cache, fresh))
    return found


def _row(reading: Reading, source: str, beside: Sequence[str]) -> Row:
    about = f"{reading.checkpoint.path}, CNN weights: {source}"
    _, _, control = reading.name.partition("/")
    if control == RANDOM:
        told = "projection and language model of the checkpoint as they are, on a CNN that was never trained"
        return Row("control", f"{told}; {about}")
    if control == NOTHING:
        return Row("control", f"energy of the projected features of {reading.layer}, nothing predicted; {about}")
    if control:
        return Row("control", f"{control} of {reading.layer}, no language model; {about}")
    controls = tuple(f"{reading.name}/{name}" for name in (NOTHING, RANDOM, *beside))
    if reading.predictor == LANGUAGE_MODEL:
        return Row("model", f"language model of {reading.layer} in {about}", controls)
    return Row("model", f"{reading.predictor} in place of the language model of {reading.layer} in {about}", controls)
