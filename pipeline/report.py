"""The page of a run: one HTML file with everything inside, for a browser without network.

What it shows is plain data; `templates/report.html.jinja` lays it out. Texts are escaped there, file names among them;
the page's own policy lets the browser run nothing but the script that it was written with, and fetch nothing.
"""

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from pipeline.artefacts import write_text
from pipeline.figures import HEAT
from pipeline.plotting import colormap, matplotlib
from pipeline.program import printable

TEMPLATES = Path(__file__).parent / "templates"
JPEG_QUALITY = 88
MOST_SIDE = 1024  # pixels of a photo inside the page
MAP_CELLS = 64  # per side, of the values that are read out under the pointer
MOST_POINTS = 300  # of a line
COLOURS = 6  # of lines, as the style sheet has them
LEFT, RIGHT, TOP, BOTTOM = 52, 336, 10, 202  # of a chart's area, in the units of its drawing


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        name: of the file that a download gives, without extension; tells it from the others.
        pixels: (H, W, 3) uint8, or (H, W) in 0…1, shown as a heat map.
        alt: what is to be seen, for those who do not see it.
        scale: texts at the ends of a heat map's colour bar.
        pixelated: each value is a square when the picture is enlarged.
    """

    name: str
    title: str
    pixels: np.ndarray
    alt: str
    note: str = ""
    scale: tuple[str, str] | None = None
    pixelated: bool = False

    @cached_property
    def encoded(self) -> tuple[bytes, str]:
        """The file inside the page, and its extension: PNG for maps and small pictures, JPEG for photos."""
        if self.pixels.ndim == 2:
            return _encode(heat_map(self.pixels), "PNG"), "png"
        image = Image.fromarray(self.pixels)
        image.thumbnail((MOST_SIDE, MOST_SIDE))
        if max(image.size) < 256:
            return _encode(image, "PNG"), "png"
        return _encode(image, "JPEG", quality=JPEG_QUALITY, subsampling=0), "jpg"


@dataclass(frozen=True)
class Comparison:
    """Two pictures of one size for the slider; `aligned` ones stand where the maps under the pointer do."""

    before: Picture
    after: Picture
    aligned: bool = False


@dataclass(frozen=True)
class Group:
    """Pictures under a heading; `wide` ones stand below the tables, with more room for each."""

    title: str
    pictures: Sequence[Picture]
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class LayerMap:
    """Values (H, W) from 0 up over the photo, and their ranks (H, W) in 0…1, both read out under the pointer."""

    title: str
    values: np.ndarray
    ranks: np.ndarray


@dataclass(frozen=True)
class Chart:
    """Lines over x, each a pair of sequences by its name; values of a log scale are above 0."""

    title: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x_label: str = "update"
    log: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; a column of numbers is sorted by the first number of each cell."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Report:
    """All that a page shows, in this order."""

    title: str
    lead: Sequence[str] = ()
    unfinished: str = ""
    comparisons: list[Comparison] = field(default_factory=list)
    maps: list[LayerMap] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def write(path: Path, report: Report) -> None:
    """The page at `path`, atomically."""
    write_text(path, render(report))


@cache
def _environment() -> Environment:
    """What reads the templates, and compiles each once."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
    )


def render(report: Report) -> str:
    """The page's HTML, everything inside it."""
    environment, pictures = _environment(), _pictures(report)
    style = environment.get_template("report.css.jinja").render(stops=_stops())
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.jinja").render(
        report=report,
        groups=_groups(report),
        charts=_charts(report),
        maps=[_cells(layer) for layer in report.maps],
        ids={name: f"picture-{number}" for number, name in enumerate(pictures)},
        uris={name: _uri(*picture.encoded) for name, picture in pictures.items()},
        files={name: f"{name}.{picture.encoded[1]}" for name, picture in pictures.items()},
        sizes={name: _size(picture) for name, picture in pictures.items()},
        style=style,
        style_hash=_digest(style),
        script=script,
        script_hash=_digest(script),
    )


def _shown(value: Any) -> Any:
    """Texts without what would steer a terminal or turn the reading direction."""
    return printable(value) if type(value) is str else value


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _groups(report: Report) -> list[Group]:
    """The report's groups, and before them one of the pictures that only comparisons show."""
    listed = {picture.name for group in report.groups for picture in group.pictures}
    others = {p.name: p for c in report.comparisons for p in (c.before, c.after) if p.name not in listed}
    return ([Group("Pictures", list(others.values()))] if others else []) + list(report.groups)


def _pictures(report: Report) -> dict[str, Picture]:
    """Every picture by its name."""
    return {picture.name: picture for group in _groups(report) for picture in group.pictures}


def _uri(data: bytes, extension: str) -> str:
    kind = {"jpg": "jpeg"}.get(extension, extension)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _size(picture: Picture) -> tuple[int, int]:
    """Width and height on the page, so that nothing moves while it loads."""
    height, width = picture.pixels.shape[:2]
    scale = min(1.0, MOST_SIDE / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


def heat_map(values: np.ndarray) -> Image.Image:
    """Values (H, W) in 0…1 as a picture of 256 colours."""
    image = Image.fromarray((np.asarray(values).clip(0, 1) * 255 + 0.5).astype(np.uint8), "L")
    image.thumbnail((MOST_SIDE, MOST_SIDE))
    image = Image.fromarray(np.asarray(image), "P")
    image.putpalette((colormap(HEAT)(np.arange(256))[:, :3] * 255 + 0.5).astype(np.uint8).tobytes())
    return image


def _stops() -> list[str]:
    """Colours of the heat map from low to high, for the colour bar."""
    return [matplotlib().colors.to_hex(colormap(HEAT)(value)) for value in np.linspace(0, 1, 9)]


def _cells(layer: LayerMap) -> dict[str, Any]:
    """A map on at most `MAP_CELLS` cells a side, each the mean of what it covers; ranks in whole per cents."""
    rows, columns = (min(MAP_CELLS, side) for side in layer.values.shape)
    values = [float(f"{value:.3g}") for value in _means(layer.values, rows, columns)]
    per_cent = [round(100 * value) for value in _means(layer.ranks, rows, columns)]
    return {"rows": rows, "columns": columns, "values": values, "ranks": per_cent}


def _means(values: np.ndarray, rows: int, columns: int) -> list[float]:
    """Means of the rows × columns parts of a map that are as equal as can be, row by row."""
    starts = [np.arange(parts) * side // parts for parts, side in zip((rows, columns), values.shape, strict=True)]
    sums = np.add.reduceat(np.add.reduceat(np.asarray(values, float), starts[0], axis=0), starts[1], axis=1)
    sides = [np.diff(start, append=side) for start, side in zip(starts, values.shape, strict=True)]
    return (sums / np.outer(*sides)).ravel().tolist()


def _charts(report: Report) -> list[dict[str, Any]]:
    """Every chart as it is drawn; a line has one colour in all of them."""
    names = list(dict.fromkeys(name for chart in report.charts for name in chart.lines))
    return [_drawn(chart, {name: number % COLOURS for number, name in enumerate(names)}) for chart in report.charts]


def _drawn(chart: Chart, colours: Mapping[str, int]) -> dict[str, Any]:
    """A chart's lines and ticks in the units of its drawing."""
    lines = {name: _thinned(x, y) for name, (x, y) in chart.lines.items()}
    all_x = np.concatenate([x for x, _ in lines.values()] or [np.zeros(1)])
    all_y = np.concatenate([y for _, y in lines.values()] or [np.ones(1)])
    x_low, x_high = _ends(all_x)
    y_low, y_high = _ends(np.log10(all_y)) if chart.log else _ends(np.append(all_y, 0.0))

    def place_x(x: Any) -> Any:
        return LEFT + (RIGHT - LEFT) * (x - x_low) / (x_high - x_low)

    def place_y(y: Any) -> Any:
        return BOTTOM - (BOTTOM - TOP) * ((np.log10(y) if chart.log else y) - y_low) / (y_high - y_low)

    ends = ", ".join(
        f"{name or chart.title} from {y[0]:.3g} to {y[-1]:.3g}" for name, (_, y) in lines.items() if len(y)
    )
    y_values = _log_ticks(y_low, y_high) if chart.log else _ticks(y_low, y_high)
    return {
        "title": chart.title,
        "x_label": chart.x_label,
        "note": chart.note,
        "file": f"{chart.title}.svg",
        "alt": f"{chart.title} by {chart.x_label}: {ends}",
        "lines": [
            {
                "name": name,
                "colour": colours[name],
                "points": " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(place_x(x), place_y(y), strict=True)),
            }
            for name, (x, y) in lines.items()
        ],
        "x_ticks": [{"at": round(float(place_x(x)), 1), "text": f"{x:g}"} for x in _ticks(x_low, x_high)],
        "y_ticks": [{"at": round(float(place_y(y)), 1), "text": f"{y:.3g}"} for y in y_values],
    }


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Finite points of a line, at most `MOST_POINTS` and the last."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).round().astype(int)) if len(x) else slice(0)
    return x[kept], y[kept]


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Least and largest, apart where they are equal."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, four or so."""
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Values at round places between 10^low and 10^high."""
    marks = (1,) if high - low > 3 else (1, 2, 5)
    values = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in marks]
    there = [v for v in values if low <= math.log10(v) <= high]
    return there if len(there) > 1 else [10**low, 10**high]
