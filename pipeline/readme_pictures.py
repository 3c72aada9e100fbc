"""Two pictures of the README: saliency of several photos, and reconstructions by every regulariser."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.detector import Detector
from pipeline.figures import overlay, picture_grid
from pipeline.images import limit_side, read_rgb
from pipeline.progress import Progress

DPI, SALIENCY_SIDE = 75, 448  # keep the files below a megabyte


def saliency_picture(detector: Detector, photos: Sequence[Path], path: Path) -> None:
    """Photos, and the maps of the detector's deepest layer: with its language model, and with its control."""
    deepest = list(detector.readings.values())[-1].layer
    of_layer = {reading.predictor: name for name, reading in detector.readings.items() if reading.layer == deepest}
    readings = {
        predictor.replace("-", " ").replace("vlm", "language model"): name for predictor, name in of_layer.items()
    }
    rows = []
    with Progress(len(photos), "saliency", "photos") as progress:
        for photo in photos:
            rgb = limit_side(read_rgb(photo), SALIENCY_SIDE)
            raws = detector.unnaturalness(rgb, readings.values())
            row = {"photo": rgb}
            for title, name in readings.items():
                raw = raws[name]
                row[f"unnaturalness,\n{title}"] = np.sqrt(raw / (raw.max() or 1.0))
                row[f"saliency,\n{title}"] = overlay(rgb, detector.saliency(name, raw, *rgb.shape[:2]))
            rows.append(row)
            progress.update()
    picture_grid(_titled_once(rows), path, column=2.4, dpi=DPI)


def reconstruction_picture(columns: Mapping[str, Path], photos: Sequence[Path], path: Path) -> None:
    """What was inverted of each photo and its reconstructions, of folders by title that hold one for each photo."""
    rows = []
    for photo in photos:
        folders = {title: folder / photo.stem for title, folder in columns.items()}
        row = {"photo": read_rgb(next(iter(folders.values())) / "image.png")}
        rows.append(row | {title: read_rgb(folder / "reconstruction.png") for title, folder in folders.items()})
    picture_grid(_titled_once(rows), path, column=1.55, dpi=DPI)


def _titled_once(rows: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The first row with its titles, the others with different ones that show nothing."""
    first, *others = rows
    return [first, *({" " * (place + 1): picture for place, picture in enumerate(row.values())} for row in others)]
