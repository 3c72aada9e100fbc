"""Parts of a page from what stages leave on disk: curves, tables, and what was run."""

import csv
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import program
from pipeline.artefacts import sidecar_path, write_text
from pipeline.report import Chart, Table

LONGEST_FACT = 300  # characters


def descent_charts(folders: Mapping[str, Path]) -> list[Chart]:
    """The objective and each of its terms by update, a line for every reconstruction's folder by its title."""
    curves = {title: _columns(folder / "curves.csv") for title, folder in folders.items()}
    terms = list(dict.fromkeys(name for columns in curves.values() for name in columns))
    charts = []
    for term in [name for name in terms if name not in ("restart", "iteration")]:
        lines = {}
        for title, columns in curves.items():
            values = np.array(columns.get(term, []), float)
            if (values > 0).any():
                first = np.array(columns["restart"], float) == 0
                lines[title] = (
                    np.array(columns["iteration"], float)[first],
                    np.where(values > 0, values, np.nan)[first],
                )
        if lines:
            title = {"total": "objective", "feature": "error of the feature"}.get(term, term)
            charts.append(Chart(title, lines, log=True))
    return charts


def descent_table(folders: Mapping[str, Path]) -> Table:
    """The terms of the objective where each reconstruction ended."""
    ends = {}
    for title, folder in folders.items():
        columns = _columns(folder / "curves.csv")
        ends[title] = {name: values[-1] for name, values in columns.items() if name != "restart"}
    terms = list(dict.fromkeys(name for values in ends.values() for name in values))
    rows = [[title, *(_short(values.get(term)) for term in terms)] for title, values in ends.items()]
    return Table(
        "Where the descents ended", ["reconstruction", *terms], rows, "Terms before the last update, unweighted."
    )


def naturalness_table(natural: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Loss of a photo by layer, and its percentile among held-out images where a checkpoint knows theirs."""
    rows = [
        [layer, f"{found['loss']:.4g}", "–" if found["percentile"] is None else f"{found['percentile']:.0f} %"]
        for layer, found in natural.items()
    ]
    note = (
        "Loss of the language models over the photo, scaled and cropped as for training: the lower, the more natural. "
        "The last column says how many of the images that the checkpoint held out have a lower loss"
    )
    known = any(found["percentile"] is not None for found in natural.values())
    note += "." if known else ", where it keeps their losses."
    return Table("How natural the photo is", ["layer", "loss", "held-out images below"], rows, note)


LOSSES = {  # of log.csv, as a chart names them
    "training": "training_loss",
    "held out": "validation_loss",
    "predict nothing": "predict_nothing",
    "repeat last": "repeat_last",
}


def training_charts(log: Path) -> list[Chart]:
    """Training and held-out loss of every layer by update, with the two trivial predictors, from log.csv."""
    columns = {name: np.array(values) for name, values in _columns(log).items()}
    charts = []
    for layer in dict.fromkeys(columns.get("layer", ())):
        mine = columns["layer"] == layer
        update = columns["iteration"][mine].astype(float)
        values = {title: columns[name][mine].astype(float) for title, name in LOSSES.items() if name in columns}
        lines = {title: (update, loss) for title, loss in values.items() if np.isfinite(loss).any()}
        charts.append(Chart(str(layer), lines))
    return charts


def _columns(path: Path) -> dict[str, list[str]]:
    """A CSV file by the heads of its columns; empty where there is none."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    return {name: [row[place] for row in rows] for place, name in enumerate(head)}


def _short(text: str | None) -> str:
    return "–" if text is None else f"{float(text):.4g}"


def facts_of_run(seconds: float, **more: Any) -> dict[str, Any]:
    """Command, time and versions of this process."""
    versions = program.versions()
    versions.pop("arguments", None)
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "time": f"{seconds:.0f} s", **more, **versions}


def facts_of_artefact(path: Path) -> dict[str, str]:
    """What the sidecar of an artefact says, as texts; empty where there is none."""
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return {}
    facts = json.loads(sidecar.read_text(encoding="utf-8"))
    return {key: fact_text(value) for key, value in facts.items() if key != "versions"}


def write_guide(folder: Path, title: str, files: Mapping[str, str]) -> None:
    """README.txt, which says of each file or folder that is there what it is; `files` may have patterns for names."""
    there = {name: what for name, what in files.items() if any(folder.glob(name.rstrip("/")))}
    width = max(map(len, there), default=0)
    lines = [f"{name:<{width}}  {what}" for name, what in there.items()]
    write_text(folder / "README.txt", "\n".join([program.printable(title), "", *lines]) + "\n")


def fact_text(value: Any) -> str:
    """A value of a sidecar for people, not longer than `LONGEST_FACT`."""
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {fact_text(inner)}" for key, inner in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = ", ".join(map(fact_text, value))
    else:
        text = str(value)
    return text if len(text) <= LONGEST_FACT else text[:LONGEST_FACT] + " …"
