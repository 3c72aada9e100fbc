"""Pictures: loss curves, heat maps over photos, and the layouts of the figures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artefacts import write_bytes
from pipeline.plotting import colormap, matplotlib

if TYPE_CHECKING:
    from pipeline.training_log import LogLine

HEAT = "inferno"
TITLE_SIZE = 10  # points
LINE = 1.5 * TITLE_SIZE / 72  # inches of a title's line
TITLE_GAP, GAP = 0.15, 0.15  # inches above a title, and between rows


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure without a window, sizes in inches."""
    return matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG, atomically and without a time stamp, so that equal figures are equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def loss_curves(log: "Sequence[LogLine]", path: Path) -> None:
    """Training and held-out loss by iteration, a panel per layer, with the two trivial predictors as lines."""
    layers = list(dict.fromkeys(line.layer for line in log))
    if not layers:
        return
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(4.2 * columns, 3.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, layer in zip(axes, layers, strict=False):
        lines = [line for line in log if line.layer == layer]
        iterations = [line.iteration for line in lines]
        held_out = [line.validation_loss for line in lines]
        ax.axhline(lines[-1].predict_nothing, color="0.6", linestyle=":", label="predict nothing")
        ax.axhline(lines[-1].repeat_last, color="0.6", linestyle="--", label="repeat last")
        ax.plot(iterations, [line.training_loss for line in lines], label="training")
        if np.isfinite(held_out).any():
            ax.plot(iterations, held_out, label="held out")
        ax.set_title(layer)
        ax.set_xlabel("iteration")
        ax.set_ylabel("loss")
        ax.set_ylim(bottom=0)
    for ax in list(axes)[len(layers) :]:
        ax.set_axis_off()
    figure.axes[0].legend(fontsize=8)
    save_figure(figure, path)


def reconstruction_curves(curves: list[list[dict[str, float]]], path: Path) -> None:
    """Every term of the reconstruction loss by iteration, a panel per term, a line per restart."""
    names = list(curves[0][0])
    width = 3.2 * len(names)
    figure = matplotlib().figure.Figure(figsize=(width, 2.8))  # places found by a layout take twice as long
    figure.subplots_adjust(left=0.65 / width, right=1 - 0.15 / width, bottom=0.19, top=0.88, wspace=0.35)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        for number, terms in enumerate(curves):
            ax.plot([t[name] for t in terms], label=f"restart {number}")
        ax.set_yscale("log")
        ax.tick_params(axis="y", which="both", labelsize=8)
        ax.set_title(name)
        ax.set_xlabel("iteration")
    if len(curves) > 1:
        axes[0].legend(fontsize=8)
    save_figure(figure, path)


def picture_row(pictures: dict[str, np.ndarray], path: Path) -> None:
    """Pictures (H, W, 3) or (H, W) side by side under their titles; one channel is shown as a heat map."""
    picture_grid([pictures], path)


def picture_grid(
    rows: list[dict[str, np.ndarray]],
    path: Path,
    points: list[tuple[np.ndarray, np.ndarray]] | None = None,
    *,
    column: float = 3.2,
    dpi: int = 120,
) -> None:
    """Rows of pictures under their titles, every row as wide as the widest; see `picture_row`.

    A row is as high as its highest picture. `points` are x and y (K,) by row, in pixels from the top left edge, drawn
    on the heat maps. `column` is the width in inches of a picture in the widest row.
    """
    widest = max(len(row) for row in rows)
    heights = [_row_height(row, column * widest / len(row)) for row in rows]
    figure = new_figure(column * widest, sum(heights))
    parts = np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=heights))
    for number, (part, row) in enumerate(zip(parts, rows, strict=True)):
        axes = part.subplots(1, len(row), squeeze=False)[0]
        for ax, (title, picture) in zip(axes, row.items(), strict=True):
            ax.imshow(picture, **({"cmap": HEAT} if picture.ndim == 2 else {}))
            if points is not None and picture.ndim == 2:
                x, y = points[number]
                # a pixel's centre has whole coordinates; the dark rim shows where the map is bright
                ax.scatter(x - 0.5, y - 0.5, s=7, color="cyan", linewidths=0.4, edgecolors="black")
            if title.strip():  # a blank one would take its place all the same
                ax.set_title(title, fontsize=TITLE_SIZE)
            ax.set_axis_off()
    save_figure(figure, path, dpi)


def _row_height(row: dict[str, np.ndarray], width: float) -> float:
    """Inches that pictures of this width need, with their titles."""
    lines = max(title.count("\n") + 1 if title.strip() else 0 for title in row)
    titles = LINE * lines + TITLE_GAP if lines else 0
    return width * max(picture.shape[0] / picture.shape[1] for picture in row.values()) + titles + GAP


def overlay(rgb: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """Heat map of a saliency map (H, W) in 0…1 over the greyed photo (H, W, 3) uint8: (H, W, 3) uint8."""
    colours = 255 * colormap(HEAT)(np.arange(256))[:, :3].T  # (3, 256)
    level = (256 * saliency).astype(np.intp).clip(max=255)
    opacity = 0.6 * (0.35 + 0.65 * saliency)
    red, green, blue = rgb.transpose(2, 0, 1).astype(np.uint16)
    grey = (red + green + blue) / 3 * (1 - opacity)
    picture = np.empty(rgb.shape, np.uint8)
    for channel, colour in enumerate(colours):  # one at a time: operations on the last axis of three are slow
        picture[:, :, channel] = grey + colour[level] * opacity + 0.5
    return picture


def results_figure(
    top: dict[str, tuple[np.ndarray, float]],
    maps: list[dict[str, np.ndarray]],
    note: str,
    path: Path,
    dpi: int = 120,
) -> None:
    """A row of pictures, and below it rows of maps, each with a colour bar of its own.

    Args:
        top: pictures (H, W, 3) uint8 by title, each with its height as a part of the row's.
        maps: rows of maps (H, W) from 0 up by title, coloured by their square root up to their own largest value.
        note: what the maps are, written above them.
    """
    figure = new_figure(RESULTS_WIDTH, 1)
    figure.set_layout_engine("none")
    sizes = [_sizes([(picture.shape, part) for picture, part in top.values()], MOST_HEIGHT)]
    sizes += [_sizes([(values.shape, 1.0) for values in row.values()], MOST_HEIGHT / 2) for row in maps]
    lines = [max(title.count("\n") + 1 for title in row) * LINE + TITLE_GAP for row in (top, *maps)]
    bars = [0.0] + [BAR] * len(maps)
    heights = [max(h for _, h in size) + line + bar for size, line, bar in zip(sizes, lines, bars, strict=True)]
    heights[0] += LINE + GAP if maps else 0
    total = sum(heights) + GAP * len(heights)
    figure.set_size_inches(RESULTS_WIDTH, total)
    y = total
    for row, size, line, height in zip((top, *maps), sizes, lines, heights, strict=True):
        x = GAP
        for (title, picture), (w, h) in zip(row.items(), size, strict=True):
            box = (x / RESULTS_WIDTH, (y - line - h) / total, w / RESULTS_WIDTH, h / total)
            ax = figure.add_axes(box)
            _draw_with_bar(figure, ax, picture, box, total) if row is not top else ax.imshow(picture[0])
            ax.set_title(title, fontsize=TITLE_SIZE)
            ax.set_axis_off()
            x += w + GAP
        y -= height + GAP
        if row is top and maps:
            figure.text(GAP / RESULTS_WIDTH, (y + GAP) / total, note, fontsize=TITLE_SIZE, fontstyle="italic")
    save_figure(figure, path, dpi)


RESULTS_WIDTH, MOST_HEIGHT, BAR = 13.0, 2.9, 0.3  # inches: of a figure of results, of its pictures, of a colour bar


def _sizes(shapes: list[tuple[tuple[int, ...], float]], most: float) -> list[tuple[float, float]]:
    """Widths and heights in inches that fill a row of pictures, none higher than `most`."""
    aspects = [part * shape[1] / shape[0] for shape, part in shapes]
    height = min(most, (RESULTS_WIDTH - GAP * (len(shapes) + 1)) / sum(aspects))
    return [(height * aspect, height * part) for aspect, (_, part) in zip(aspects, shapes, strict=True)]


def _draw_with_bar(figure: Any, ax: Any, values: np.ndarray, box: tuple[float, ...], total: float) -> None:
    """A map coloured by its square root, and under it the colours of its values."""
    largest = float(values.max()) or 1.0
    image = ax.imshow(values, cmap=HEAT, norm=matplotlib().colors.PowerNorm(0.5, 0, largest))
    bar = figure.add_axes((box[0], box[1] - 0.12 / total, box[2], 0.07 / total))
    figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[0, largest])
    bar.set_xticklabels(["0", f"{largest:.3g}"], fontsize=7)
    for label, side in zip(bar.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    bar.tick_params(length=0, pad=2)
    bar.minorticks_off()
