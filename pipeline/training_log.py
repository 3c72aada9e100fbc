"""log.csv: how the losses of every layer fell, a line per layer and interval."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.errors import UserError
from models.naturalness import losses_and_maps, quantiles
from models.vlm import TRIVIAL_PREDICTORS, LayerModel, trivial_losses
from pipeline import artefacts, distributed
from pipeline.features import read_batch

VALIDATION_BATCH = 16


@dataclass(frozen=True)
class LogLine:
    """The losses of a layer once `iteration` updates are made; the training loss is the mean since the last line."""

    layer: str
    iteration: int
    learning_rate: float
    training_loss: float
    validation_loss: float
    predict_nothing: float
    repeat_last: float
    iterations_per_second: float

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> "LogLine":
        """From values or their texts, in the order of `COLUMNS`; a ValueError where they are no line of a log."""
        if len(row) != len(COLUMNS) or not isinstance(row[0], str) or isinstance(row[1], float):
            raise ValueError("other columns")
        layer, iteration, *numbers = row
        return cls(layer, int(iteration), *map(float, numbers))

    def facts(self) -> artefacts.Facts:
        """What a checkpoint says of its losses: all but the speed."""
        return {key: value for key, value in vars(self).items() if key != "iterations_per_second"}

    def __str__(self) -> str:
        return (
            f"iteration {self.iteration} {self.layer}: loss {self.training_loss:.4f}, held out "
            f"{self.validation_loss:.4f} (predict nothing {self.predict_nothing:.4f}, repeat last "
            f"{self.repeat_last:.4f}), learning rate {self.learning_rate:g}, {self.iterations_per_second:.2f} it/s"
        )


COLUMNS = tuple(field.name for field in fields(LogLine))


def rounded(value: float) -> float:
    """A number to the six significant digits that a log keeps."""
    return float(f"{value:.6g}")


def measure(
    layer: LayerModel, stored: np.ndarray, rows: np.ndarray, device: object
) -> tuple[dict[str, float], list[float]]:
    """Mean loss of a model (`model`) and of the trivial predictors on some rows; ranks share the work.

    With them the quantiles of the model's losses of single rows, see `models.naturalness.quantiles`.
    """
    sums, losses = dict.fromkeys(TRIVIAL_PREDICTORS, 0.0), []
    with torch.no_grad():
        for start in distributed.share(range(0, len(rows), VALIDATION_BATCH)):
            chosen = rows[start : start + VALIDATION_BATCH]
            p = read_batch(stored, chosen, device)
            losses += losses_and_maps(p, layer)[0].tolist()
            for name, value in trivial_losses(p).items():
                sums[name] += value * len(chosen)
    means = {name: distributed.total(value) / len(rows) for name, value in {"model": sum(losses), **sums}.items()}
    return means, quantiles(loss for part in distributed.gather(losses) for loss in part)


def read_log(path: Path) -> list[LogLine]:
    """Lines of log.csv; none where there is no file.

    Raises:
        UserError: it is something else, or was damaged by hand.
    """
    if not path.is_file():
        return []
    number = 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        lines = []
        for number, row in enumerate(rows, start=1):
            if number == 1 and tuple(row) == COLUMNS or not row:
                continue
            if number == 1:
                raise ValueError("other columns")
            lines.append(LogLine.from_row(row))
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is not the log of a training (line {number}: {error}): remove it, nothing needs it"
        ) from None
    return lines


def merge_log(path: Path, lines: Iterable[LogLine], layers: Sequence[str]) -> list[LogLine]:
    """Replace the lines of some layers in log.csv; returns all lines, ordered by layer and iteration."""
    others = [line for line in read_log(path) if line.layer not in layers]
    merged = sorted([*others, *lines], key=lambda line: (line.layer, line.iteration))
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *map(astuple, merged)])
    artefacts.write_text(path, text.getvalue())
    return merged
