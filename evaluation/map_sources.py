"""Where the saliency maps of an evaluation come from: checkpoints with their controls, folders, baselines.

A source names rows of the table and gives the map (H, W) of each for an image (H, W, 3). Nothing is ever resized: a map
of another size than its image is an error.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from evaluation.fixation_metrics import centre_gaussian, spectral_residual
from models.errors import UserError
from pipeline import artefacts, networks, options
from pipeline.images import open_image, output_name

if TYPE_CHECKING:
    from models.backbones import Backbone
    from models.vlm import VisualLanguageModel

PRETRAINED = Path(__file__).parent.parent / "models" / "pretrained"
NOTHING, RANDOM = "predict-nothing", "random-cnn"
Maps = dict[str, np.ndarray]
Key = tuple[str, str]  # layer and predictor


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


@dataclass(frozen=True)
class Baselines:
    """Maps that need no model."""

    rows: dict[str, Row]

    @property
    def facts(self) -> artefacts.Facts:
        """The names say all."""
        return {"baselines": list(self.rows)}

    def maps(self, path: Path, rgb: np.ndarray) -> Maps:
        """See `BASELINES`."""
        return {name: BASELINES[name][1](rgb) for name in self.rows}


BASELINES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "centre-gaussian": (
        "Gaussian at the image's centre, standard deviation a quarter of its sides",
        lambda rgb: centre_gaussian(*rgb.shape[:2]),
    ),
    "spectral-residual": ("spectral residual (Hou & Zhang 2007), blur 0.03", spectral_residual),
    "spectral-residual-raw": ("spectral residual without blur", lambda rgb: spectral_residual(rgb, blur=0)),
    "uniform": ("a constant map: chance", lambda rgb: np.zeros(rgb.shape[:2])),
}
ALWAYS = ("centre-gaussian", "spectral-residual")


class Folder:
    """Maps of one model in a folder: for the stimulus `a.jpg` the file `a.npy`, `a.jpg.npy`, `a.png` or `a.jpg.png`.

    The first of these that is there is taken: floats before 8 or 16 bits of grey.

    Raises:
        UserError: a map is missing, unreadable, coloured, not finite, or of another size than its stimulus.
    """

    def __init__(self, name: str, folder: Path, sizes: Mapping[Path, tuple[int, int]]):
        self.files = {image: self._find(folder, image) for image in sizes}
        wrong = [(i, f"{w}×{h}", self._size(i)) for i, (h, w) in sizes.items() if self._size(i) != f"{w}×{h}"]
        if wrong:
            image, expected, found = wrong[0]
            raise UserError(
                f"{self.files[image]} has {found} pixels, its stimulus {expected}"
                + (f" (and {len(wrong) - 1} more maps do not fit)" if len(wrong) > 1 else "")
                + ": save every map at its image's own size, for nothing is resized here"
            )
        self.rows = {name: Row("model", f"maps of the folder {folder}")}
        self.facts = {"folder": name, "maps": {f.name: artefacts.file_sha256(f) for f in self.files.values()}}

    @staticmethod
    def _find(folder: Path, image: Path) -> Path:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the folder of the maps")
        for name in (f"{image.stem}.npy", f"{image.name}.npy", f"{image.stem}.png", f"{image.name}.png"):
            if (folder / name).is_file():
                return folder / name
        raise UserError(f"{folder} has no map of {image.name}: add {image.stem}.npy or {image.stem}.png")

    def _size(self, image: Path) -> str:
        height, width = self._read(image).shape
        return f"{width}×{height}"

    def _read(self, image: Path) -> np.ndarray:
        path = self.files[image]
        try:
            values = artefacts.map_array(path) if path.suffix == ".npy" else _read_grey(path)
        except UserError:
            raise
        except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
            raise UserError(f"{path} cannot be read as a map ({error}): save it anew") from None
        if values.ndim != 2 or not values.size or values.dtype.kind not in "biuf":
            raise UserError(f"{path} is {values.dtype} of shape {values.shape}: a map is (height, width), real numbers")
        return values

    def maps(self, path: Path, rgb: np.ndarray) -> Maps:
        """The map of the folder."""
        values = np.array(self._read(path))
        if not np.isfinite(values).all():
            raise UserError(f"{self.files[path]} holds NaN or infinities: save finite numbers")
        return dict.fromkeys(self.rows, values)


def _read_grey(path: Path) -> np.ndarray:
    with open_image(path) as image:
        if image.mode not in ("1", "L", "I", "F") and not image.mode.startswith("I;16"):
            raise ValueError(f"a picture of mode {image.mode}, not grey")
        return np.asarray(image)


@dataclass(frozen=True)
class Pipeline:
    """The project's own maps: CNN, language models of some layers, post-processing.

    names gives the row of a layer and a predictor, `vlm` or `predict-nothing`; finish turns an unnaturalness map into
    the saliency map: (raw, height, width, stride) -> (H, W). Raw maps are kept in `cache`, under names that are hashes
    of everything that determines them, so that they are never mistaken; `fresh` computes them anew.
    """

    backbone: "Backbone"
    vlm: "VisualLanguageModel"
    names: dict[tuple[str, str], str]
    rows: dict[str, Row]
    finish: Callable[[np.ndarray, int, int, int], np.ndarray]
    facts: artefacts.Facts
    cache: Path
    fresh: bool = False

    def maps(self, path: Path, rgb: np.ndarray) -> Maps:
        """Saliency map of every row."""
        stride = self.backbone.architecture.stride
        raw = self.raw_maps(path, rgb)
        return {name: self.finish(raw[key], *rgb.shape[:2], stride(key[0])) for key, name in self.names.items()}

    def raw_maps(self, path: Path, rgb: np.ndarray) -> dict[Key, np.ndarray]:
        """Unnaturalness map (h-1, w-1) float64 by layer and predictor, from the cache where it is there."""
        digest = artefacts.file_sha256(path)
        files = {key: self._cache_file(key, path, digest) for key in self.names}
        found = {} if self.fresh else {key: kept for key, f in files.items() if (kept := _load(f)) is not None}
        missing = [key for key in self.names if key not in found]
        if missing:
            for key, raw in self._compute(rgb, missing):
                artefacts.write_array(files[key], raw)
                found[key] = raw
        return found

    def _cache_file(self, key: Key, path: Path, image_sha256: str) -> Path:
        determining = ("backbone", "weights_sha256", "mean_image_sha256", "vlm_sha256")
        kept: artefacts.Facts = {k: self.facts[k] for k in determining if k in self.facts}
        determined = json.dumps({**kept, "key": key, "image": image_sha256}, sort_keys=True)
        digest = hashlib.sha256(determined.encode()).hexdigest()
        return self.cache / self.names[key] / f"{output_name(path.stem)}-{digest[:16]}.npy"

    def _compute(self, rgb: np.ndarray, keys: Sequence[Key]) -> Iterator[tuple[Key, np.ndarray]]:
        import torch

        from models.unnaturalness import projected_features
        from models.vlm import DIRECTIONS, layer_map, predict_nothing

        layers = list(dict.fromkeys(layer for layer, _ in keys))
        projected = projected_features(self.backbone, self.vlm, rgb, layers)
        nothing = dict.fromkeys(DIRECTIONS, predict_nothing)
        for layer, predictor in keys:
            with torch.no_grad():
                raw = layer_map(projected[layer], nothing if predictor == NOTHING else self.vlm.layers[layer])
            yield (layer, predictor), raw[0].cpu().double().numpy()


class Added:
    """Several pipelines and, as further rows, the sums of their maps: of the models, and of each kind of control.

    Each map is scaled to 0…1 before, so that all weigh the same.
    """

    def __init__(self, parts: Sequence[Pipeline]):
        self.parts = parts
        self.rows = {name: row for part in parts for name, row in part.rows.items()}
        self.facts = {"added": [part.facts for part in parts]}
        titles = [name for name, row in self.rows.items() if row.kind == "model"]
        if len(titles) < 2:
            raise UserError("there is one model only, nothing to add: give further checkpoints or layers")
        title = "+".join(titles)
        self.sums = {title: titles}
        for control in (NOTHING, RANDOM):
            self.sums[f"{title}/{control}"] = [f"{name}/{control}" for name in titles]
        first, *controls = self.sums
        self.rows[first] = Row("model", "the maps of these models, each scaled to 0…1, added", tuple(controls))
        self.rows |= {name: Row("control", "the same of their controls") for name in controls}

    def maps(self, path: Path, rgb: np.ndarray) -> Maps:
        """The maps of all parts and the sums."""
        from models.unnaturalness import added

        found = {name: values for part in self.parts for name, values in part.maps(path, rgb).items()}
        return found | {name: added(found[part] for part in parts) for name, parts in self.sums.items()}


def _load(path: Path) -> np.ndarray | None:
    try:
        return np.array(artefacts.map_array(path))
    except ValueError:
        return None


def choose_layers(checkpoints: Mapping[Path, Iterable[str]], wanted: Sequence[str] | None) -> dict[Path, list[str]]:
    """Which layers of each checkpoint (path -> its layers) are evaluated: those wanted that it has, else its deepest.

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


def pipelines(args: Any, device: Any, cache: Path) -> list[Pipeline]:
    """The trained pipeline and its two controls for every checkpoint and layer that the options ask for.

    Controls: `predict-nothing` is the squared projected features under the same ramp, same CNN, same projection, same
    post-processing; `random-cnn` has He-initialised CNN weights, while projection and language model stay those of the
    checkpoint, fitted to the trained CNN.

    Raises:
        UserError: a checkpoint, a layer or weights are missing.
    """
    from models import unnaturalness
    from models.checkpoints import load_vlm

    loaded = {path: load_vlm(path) for path in dict.fromkeys(args.vlm)}
    chosen = choose_layers({path: vlm.layers for path, (vlm, _) in loaded.items()}, args.layer)
    process = unnaturalness.postprocess_original if args.postprocess == "original" else unnaturalness.postprocess

    def finish(raw: np.ndarray, height: int, width: int, stride: int) -> np.ndarray:
        return process(raw, height, width, stride, args.power, args.blur)

    found: list[Pipeline] = []
    taken: Counter[str] = Counter()
    for path, (vlm, configuration) in loaded.items():
        vlm, name = vlm.freeze().to(device), configuration["backbone"]
        titles = {}
        for layer in chosen[path]:
            title = f"{name}-{layer}"
            taken[title] += 1
            titles[layer] = title if taken[title] == 1 else f"{title}-{taken[title]}"
        facts = {"backbone": name, "vlm_sha256": artefacts.file_sha256(path)}
        facts |= {key: getattr(args, key) for key in ("power", "blur", "postprocess")}
        for random in (False, True):
            wanted = options.replace(args, weights="random" if random else args.weights)
            backbone, weights = networks.load_backbone(wanted, name, chosen[path], device)
            about = f"{path}, CNN weights: {weights.source}"
            names, rows = _random_rows(titles, about) if random else _trained_rows(titles, about)
            described = {**facts, **networks.weights_facts(backbone, weights), "rows": list(rows)}
            found.append(Pipeline(backbone, vlm, names, rows, finish, described, cache, args.overwrite))
    return found


def _trained_rows(titles: Mapping[str, str], about: str) -> tuple[dict[tuple[str, str], str], dict[str, Row]]:
    names, rows = {}, {}
    for layer, title in titles.items():
        controls = (f"{title}/{NOTHING}", f"{title}/{RANDOM}")
        names |= {(layer, "vlm"): title, (layer, NOTHING): controls[0]}
        rows[title] = Row("model", f"language model of {layer} in {about}", controls)
        rows[controls[0]] = Row("control", f"energy of the projected features of {layer}, nothing predicted; {about}")
    return names, rows


def _random_rows(titles: Mapping[str, str], about: str) -> tuple[dict[tuple[str, str], str], dict[str, Row]]:
    names = {(layer, "vlm"): f"{title}/{RANDOM}" for layer, title in titles.items()}
    told = "projection and language model of the checkpoint as they are, on a CNN that was never trained"
    return names, {name: Row("control", f"{told}; {about}") for name in names.values()}


def build_sources(args: Any, device: Any, images: Sequence[Path], sizes: np.ndarray) -> list[Source]:
    """All sources of an evaluation; without --vlm, --maps and --baseline the checkpoints that ship, deepest layers.

    Raises:
        UserError: something is missing or does not fit, or two rows have one name.
    """
    if not (args.vlm or args.maps or args.baseline):
        args.vlm = sorted(PRETRAINED.glob("*.safetensors"))
        if not args.vlm:
            raise UserError("there is nothing to evaluate: give checkpoints with --vlm, or folders of maps with --maps")
    by_image = {image: (int(h), int(w)) for image, (h, w) in zip(images, sizes, strict=True)}
    sources: list[Source] = [Folder(folder.resolve().name, folder, by_image) for folder in args.maps]
    parts = pipelines(args, device, args.out / "maps") if args.vlm else []
    sources += [Added(parts)] if args.add else parts
    names = dict.fromkeys((*args.baseline, *ALWAYS))
    sources.append(Baselines({name: Row("baseline", BASELINES[name][0]) for name in names}))
    counts = Counter(name for source in sources for name in source.rows)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"two models would be called {twice[0]!r}: rename one folder of maps")
    return sources
