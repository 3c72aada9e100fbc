"""The page of one photo: its maps, its reconstructions, and the language models' training where that was part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.unnaturalness import pad_to
from pipeline import array_files, report_parts
from pipeline.array_files import write_array
from pipeline.detector import LANGUAGE_MODEL, Checkpoint, Detector, Reading
from pipeline.figures import results_figure
from pipeline.images import read_rgb, write_png
from pipeline.networks import WeightsChoice
from pipeline.report import Comparison, Group, LayerMap, Picture, Report, heat_map

Natural = Mapping[str, Mapping[str, float | None]]  # loss and percentile of a photo, by the title of a layer


@dataclass(frozen=True)
class LayerResult:
    """Unnaturalness map (h-1, w-1) of a layer, whose cells are `stride` pixels of the photo apart, down and across."""

    title: str
    raw: np.ndarray
    stride: tuple[int, int]


def detector_of_layers(path: Path, choice: WeightsChoice, device: torch.device, control: str = "") -> Detector:
    """The detector of a checkpoint, with a reading for every layer, and another for a control of `PREDICTORS`."""
    checkpoint = Checkpoint.load(path, device)
    readings = [
        Reading(f"{layer} {predictor}", checkpoint, layer, predictor)
        for layer in checkpoint.vlm.layers
        for predictor in (LANGUAGE_MODEL, *([control] if control else []))
    ]
    return Detector.load(readings, choice, device)


def layer_results(detector: Detector, rgb: np.ndarray) -> list[LayerResult]:
    """Unnaturalness of every layer that a detector reads, of a photo (H, W, 3) uint8."""
    backbone = detector.backbone.architecture
    raws = detector.unnaturalness(rgb)
    layers = {name: detector.readings[name].layer for name in raws}
    return [LayerResult(f"{backbone.name} {layers[n]}", raw, backbone.stride(layers[n])) for n, raw in raws.items()]


def naturalness_of(detector: Detector, rgb: np.ndarray) -> Natural:
    """How natural every layer that a detector reads finds a photo (H, W, 3) uint8, by its title on the page."""
    name = detector.backbone.architecture.name
    found = detector.naturalness(rgb)
    return {f"{name} {detector.readings[reading].layer}": values for reading, values in found.items()}


def write_layer_maps(folder: Path, layers: Sequence[LayerResult]) -> None:
    """<backbone>-<layer>.npy of every map, and .png, coloured by its square root."""
    for layer in layers:
        path = folder / f"{layer.title.replace(' ', '-')}.npy"
        write_array(path, layer.raw)
        write_png(path.with_suffix(".png"), np.asarray(heat_map(_root(layer.raw)).convert("RGB")))


def _root(raw: np.ndarray) -> np.ndarray:
    """Square root of a map, 1 at its largest."""
    return np.sqrt(raw / (float(raw.max()) or 1.0))


def draw_figure(
    path: Path,
    photo: np.ndarray,
    overlay: Path,
    reconstructions: Mapping[str, Path],
    small: str,
    layers: Sequence[LayerResult],
    dpi: int,
) -> None:
    """figure.png: photo, saliency and reconstructions above the unnaturalness maps of all layers.

    Reconstructions are folders by title; the one called `small` is drawn at half the height.
    """
    top = {"photo": (photo, 1.0), "where people look": (read_rgb(overlay), 1.0)}
    for title, folder in reconstructions.items():
        picture = read_rgb(folder / "reconstruction.png")
        top[title.replace(", ", "\n")] = (picture, 0.55 if folder.name == small else 1.0)
    rows: dict[str, dict[str, np.ndarray]] = {}
    for layer in layers:
        row = layer.title.split()[0] if len(layers) > MOST_IN_ROW else ""
        rows.setdefault(row, {})[layer.title] = layer.raw
    results_figure(top, list(rows.values()), FIGURE_NOTE, path, dpi=dpi)


def on_photo(values: np.ndarray, height: int, width: int, stride: tuple[int, int]) -> np.ndarray:
    """A layer's values (h, w) over the photo (height, width): a stride's rectangle each, zeros around the centre."""
    return pad_to(values.repeat(stride[0], axis=0).repeat(stride[1], axis=1), height, width)


def ranks(values: np.ndarray) -> np.ndarray:
    """The share of a map's other values that lie below each, 0…1."""
    ordered = np.sort(values, axis=None)
    return np.searchsorted(ordered, values) / max(values.size - 1, 1)


def results_report(
    name: str,
    photo: np.ndarray,
    *,
    saliency: Path | None = None,
    layers: Sequence[LayerResult] = (),
    natural: Natural | None = None,
    reconstructions: Mapping[str, Path] | None = None,
    log: Path | None = None,
) -> Report:
    """All that there is of a photo (H, W, 3) uint8; what is not there yet is left out.

    Args:
        name: of the photo, for titles and downloads.
        saliency: map (.npy) of stage 5, with its pictures beside it.
        natural: what `Detector.naturalness` says of layers by title.
        reconstructions: folders of stage 4 by title.
        log: log.csv of stage 3.
    """
    report = Report(f"{name}: where it is unnatural, where people look, what its features keep")
    shown = Picture(name, "photo", photo, f"The photo {name}")
    maps = [shown]
    if saliency is not None and saliency.is_file():
        maps += _saliency_pictures(name, saliency)
        report.comparisons += [Comparison(shown, picture, aligned=True) for picture in maps[1:]]
        report.facts["saliency map"] = report_parts.facts_of_artefact(saliency)
    report.groups.append(Group("Where people look", maps))
    folders = {
        title: path for title, path in (reconstructions or {}).items() if (path / "reconstruction.png").is_file()
    }
    if folders:
        pictures = _reconstructions(name, folders)
        report.comparisons += [Comparison(pictures[0], picture) for picture in pictures[1:]]
        report.groups.append(Group("Reconstructions", pictures, RECONSTRUCTED))
        report.charts += report_parts.descent_charts(folders)
        report.tables.append(report_parts.descent_table(folders))
        for title, folder in folders.items():
            report.facts[f"reconstruction {title}"] = report_parts.facts_of_artefact(folder / "reconstruction.npy")
    if layers:
        pictures = [_layer_picture(name, layer, *photo.shape[:2]) for layer in layers]
        report.comparisons += [Comparison(shown, picture, aligned=True) for picture in pictures]
        report.groups.append(Group("Unnaturalness of every layer", pictures, OWN_SCALES))
        report.maps = [
            LayerMap(of.title, *(on_photo(values, *photo.shape[:2], of.stride) for values in (of.raw, ranks(of.raw))))
            for of in layers
        ]
    if natural:
        report.tables.append(report_parts.naturalness_table(natural))
    if log is not None:
        report.charts = report_parts.training_charts(log) + report.charts
    return report


GUIDE = {  # what is in a folder of results, for README.txt
    "report.html": "the page: all results in one file, for a browser",
    "figure.png": "the same as one picture",
    "saliency/*-overlay.png": "where people look, over the photo",
    "saliency/*.npy": "the saliency map in 0…1, and the unnaturalness map it is made of",
    "unnaturalness/": "errors of the language models of every layer; .png: square root, each to its own largest",
    "reconstructions/": "a folder for each descent: reconstruction.png, curves.csv, parameters.json",
}
WORKSPACE = {  # what is in a workspace of all stages
    "report.html": "the page: all results in one file, for a browser",
    "images.npy": "stage 1: the training images; rejected.csv lists what was no image",
    "features/": "stage 2: projected feature maps of every layer, and the projection",
    "vlm.safetensors": "stage 3: the language models, all that stages 4 and 5 need",
    "log.csv": "stage 3: losses by layer and update; figures/loss.png shows them",
    "train_state/": "stage 3: from which training goes on",
    "reconstructions/": "stage 4: a folder for each: reconstruction.png, curves.csv, parameters.json",
    "saliency/": "stage 5: saliency maps (.npy), pictures and overlays",
    "figures/": "curves, and the results as one picture",
}
MOST_IN_ROW = 7  # maps of the figure
FIGURE_NOTE = "unnaturalness of every layer: errors of the language models, each layer on a scale of its own"
OWN_SCALES = (
    "Errors of the language models where they stand, coloured by their square root; each layer has a scale of its own, "
    "so colours of different layers cannot be compared."
)
RECONSTRUCTED = "Each is looked for from noise; all that is known of the photo is the feature that the title names."


def _saliency_pictures(name: str, path: Path) -> list[Picture]:
    """The overlay and the map, as stage 5 wrote them."""
    values = array_files.open_array(path, "saliency.py")[0].astype(np.float64)
    values = values / 255 if values.max() > 1 else values
    overlay = read_rgb(path.with_name(f"{path.stem}-overlay.png"))
    return [
        Picture(
            f"{name}-overlay", "where people look", overlay, f"Saliency of {name} as a heat map over the grey photo"
        ),
        Picture(f"{name}-saliency", "saliency map", values, f"Heat map of the saliency of {name}", scale=("0", "1")),
    ]


def _reconstructions(name: str, folders: Mapping[str, Path]) -> list[Picture]:
    """What was inverted, and every reconstruction."""
    crop = read_rgb(next(iter(folders.values())) / "image.png")
    pictures = [Picture(f"{name}-seen", "what the network saw", crop, f"The part of {name} whose feature is inverted")]
    for title, folder in folders.items():
        picture = read_rgb(folder / "reconstruction.png")
        pictures.append(Picture(f"{name}-{folder.name}", title, picture, f"Reconstruction of {name}: {title}"))
    return pictures


def _layer_picture(name: str, layer: LayerResult, height: int, width: int) -> Picture:
    """A layer's map over the photo."""
    largest = float(layer.raw.max()) or 1.0
    values = on_photo(_root(layer.raw), height, width, layer.stride)
    return Picture(
        f"{name}-unnaturalness-{layer.title.replace(' ', '-')}",
        layer.title,
        values,
        f"Heat map of the unnaturalness that {layer.title} finds in {name}",
        scale=("0", f"{largest:.3g}"),
        pixelated=True,
    )
