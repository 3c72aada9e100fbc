"""Pictures: loss curves, heat maps over photos, and the layouts of the figures."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artefacts import atomic_path


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure without a window, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG, atomically and without a time stamp, so that equal figures are equal files."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def loss_curves(log: list[list], path: Path) -> None:
    """Training and held-out loss by iteration, a panel per layer, with the two trivial predictors as lines.

    Args:
        log: lines of log.csv: layer, iteration, learning rate, training loss, held-out loss, loss of predicting
            nothing, loss of repeating the last vector, …
    """
    layers = list(dict.fromkeys(line[0] for line in log))
    if not layers:
        return
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(4.2 * columns, 3.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, layer in zip(axes, layers, strict=False):
        lines = np.array([line[1:] for line in log if line[0] == layer], dtype=float)
        ax.axhline(lines[-1, 4], color="0.6", linestyle=":", label="predict nothing")
        ax.axhline(lines[-1, 5], color="0.6", linestyle="--", label="repeat last")
        ax.plot(lines[:, 0], lines[:, 2], label="training")
        if np.isfinite(lines[:, 3]).any():
            ax.plot(lines[:, 0], lines[:, 3], label="held out")
        ax.set_title(layer)
        ax.set_xlabel("iteration")
        ax.set_ylabel("loss")
        ax.set_ylim(bottom=0)
    for ax in list(axes)[len(layers) :]:
        ax.set_axis_off()
    figure.axes[0].legend(fontsize=8)
    save_figure(figure, path)
