"""One image in, a page of results out, with the language models that ship in models/pretrained/.

In:  IMAGE, any size, mode and format that Pillow opens (default: a sample photo).
Out: OUT/report.html, the page, in one file; OUT/figure.png, the paper's figure; OUT/README.txt says what else is there:
     saliency map, unnaturalness map of every layer, reconstructions with the language models and without.

    python run_pretrained_model.py photo.jpg
    python run_pretrained_model.py photo.jpg --target fc8

With --figures: all pictures of the README, assets/figure.png, saliency.png, reconstruction.png and logits.png, from
sample photos; what they are made of stays in out/figures/, where another run takes it up again. With --out, both there.

    python run_pretrained_model.py --figures
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import reconstruct
import saliency
from models.errors import UserError
from pipeline import artefacts, options, ownership, program, sources
from pipeline.images import limit_side, output_name, read_rgb
from pipeline.presets import PRETRAINED

if TYPE_CHECKING:
    from pipeline.detector import Detector
    from pipeline.results_page import LayerResult, Natural

RECONSTRUCTION = PRETRAINED / "alexnet.safetensors"
SALIENCY = PRETRAINED / "vgg16.safetensors"
ASSETS = Path(__file__).parent / "assets"
DESCENTS = {  # reconstructions of the page: folder -> title, options of reconstruct.py
    "vlm": ("with language models", {"regularizer": "vlm", "descent": "fourier"}),
    "none": ("without them", {"regularizer": "none", "descent": "fourier"}),
    "authors": ("with them, the paper's descent", {"regularizer": "vlm", "descent": "authors"}),
}
SMALL, AT_MOST = "authors", 200  # the figure shows it small; it gets no more updates
# The README's pictures: sample photos by their names.
SALIENCY_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
RECONSTRUCTED_PHOTOS = ("china", "flower", "astronaut", "chelsea", "coffee", "rocket")
GRIDS = {  # of reconstructions: checkpoint, target, regularisers
    "reconstruction": (RECONSTRUCTION, "pool5", ("none", "l2", "tv", "vlm", "vlm+tv")),
    "logits": (PRETRAINED / "efficientnet_lite0.safetensors", "logits", ("none", "tv", "vlm", "vlm+tv")),
}
FIGURE_DPI = 75
PAGE = "report.html"
PLAN = """{image}, with the language models that ship; times are of two CPU cores with nothing else to do:
  1. where people look                               10 s
  2. how unnatural every layer finds every place      5 s
  3. three reconstructions from its {target} feature   90 s
The page fills as results come; open it in a browser:"""


@dataclass(frozen=True)
class Run:
    """What to do, with which image, and where the results go."""

    image: Path
    out: Path
    target: str = "pool5"
    iterations: int | None = None
    max_side: int = 1024
    device: str = "auto"
    seed: int = 0
    weights: str = "auto"
    cache: Path | None = None
    range: list[float] | None = None  # black and white of images of more than 8 bits
    overwrite: bool = False

    def shared(self, **more: object) -> list[str]:
        """Options that every stage gets, and more."""
        own = {name: getattr(self, name) for name in ("device", "seed", "overwrite", "range", "cache")}
        return options.as_arguments(**own, **more)

    @property
    def saliency(self) -> Path:
        """Where stage 5 writes the saliency map."""
        return self.out / "saliency" / f"{output_name(self.image.stem)}.npy"

    @property
    def reconstructions(self) -> dict[str, Path]:
        """Where stage 4 writes each reconstruction, by its title on the page."""
        return {f"{self.target}, {title}": self.out / "reconstructions" / name for name, (title, _) in DESCENTS.items()}


def open_detector(run: Run, checkpoint: Path, *, control: str = "") -> "Detector":
    """The detector of a checkpoint, with a reading for every layer, and one for a control."""
    from pipeline import networks, results_page

    weights = networks.WeightsChoice(run.weights if checkpoint == RECONSTRUCTION else "auto", None, run.cache, run.seed)
    return results_page.detector_of_layers(checkpoint, weights, networks.prepare_device(run.device), control)


def make_saliency(run: Run) -> None:
    """The saliency map and its overlay; a UserError where stage 5 could not make them."""
    given = run.shared(max_side=run.max_side, vlm=SALIENCY, out=run.saliency.parent)
    if saliency.main([str(run.image), *given]):
        raise UserError(f"{run.image} gives no saliency map: see the line above")


def make_layer_maps(run: Run, rgb: np.ndarray) -> "tuple[list[LayerResult], Natural]":
    """Unnaturalness maps of every layer of both checkpoints, as .npy and .png; and how natural layers find it all."""
    from pipeline.results_page import layer_results, naturalness_of, write_layer_maps

    detectors = [open_detector(run, checkpoint) for checkpoint in (RECONSTRUCTION, SALIENCY)]
    results = [result for detector in detectors for result in layer_results(detector, rgb)]
    write_layer_maps(run.out / "unnaturalness", results)
    return results, {title: found for detector in detectors for title, found in naturalness_of(detector, rgb).items()}


def make_reconstructions(run: Run) -> Iterator[Path]:
    """Every descent of `DESCENTS`, one after the other."""
    for name, (_, descent) in DESCENTS.items():
        iterations = min(run.iterations or AT_MOST, AT_MOST) if name == SMALL else run.iterations
        folder = run.out / "reconstructions" / name
        asked = {"weights": run.weights, "target": run.target, "iterations": iterations}
        reconstruct.main([str(run.image), *run.shared(vlm=RECONSTRUCTION, out=folder, **asked, **descent)])
        yield folder


def make_results(run: Run, started: float, dpi: int = 120) -> Path:
    """Everything of one image; the page is written anew whenever something is added to it. Returns the figure."""
    from pipeline import networks, report_parts, results_page
    from pipeline.report import write

    ownership.foresee(run.out, "figure.png", PAGE, "README.txt")
    rgb = limit_side(read_rgb(run.image), run.max_side)
    name = output_name(run.image.stem)
    overlay, figure = run.saliency.with_name(f"{run.saliency.stem}-overlay.png"), run.out / "figure.png"

    def write_page(
        layers: "Sequence[LayerResult]" = (), natural: "Natural | None" = None, unfinished: str = ""
    ) -> None:
        """The page with what there is."""
        report = results_page.results_report(
            name, rgb, saliency=run.saliency, layers=layers, natural=natural, reconstructions=run.reconstructions
        )
        report.unfinished = f"Not finished: {unfinished}. Reload this page in a while." if unfinished else ""
        report.facts = {
            "this run": report_parts.facts_of_run(time.monotonic() - started, image=str(run.image)),
            **report.facts,
        }
        write(run.out / PAGE, report)

    networks.obtain(networks.WeightsChoice(run.weights, None, run.cache, run.seed), RECONSTRUCTION, run.target)
    make_saliency(run)
    write_page(unfinished="maps of all layers and reconstructions follow")
    print(f"{overlay}: where people look, after {time.monotonic() - started:.0f} s", flush=True)
    layers, natural = make_layer_maps(run, rgb)
    write_page(layers, natural, "reconstructions follow")
    for folder in make_reconstructions(run):
        write_page(layers, natural, "more reconstructions follow" if folder.name != list(DESCENTS)[-1] else "")
    results_page.draw_figure(figure, rgb, overlay, run.reconstructions, SMALL, layers, dpi)
    report_parts.write_guide(run.out, f"{name}: results of run_pretrained_model.py", results_page.GUIDE)
    return figure


def make_readme_pictures(run: Run, folder: Path, started: float) -> list[Path]:
    """All pictures of the README in a folder, from sample photos; returns their paths.

    Raises:
        UserError: a sample photo is missing.
    """
    from pipeline import readme_pictures

    photos = {path.stem: path for path in sources.sample_photos()}
    if missing := {*SALIENCY_PHOTOS, *RECONSTRUCTED_PHOTOS} - photos.keys():
        raise UserError(f"the installed packages lack {', '.join(sorted(missing))}: pip install -r requirements.txt")
    figure, saliency, *grids = (folder / f"{name}.png" for name in ("figure", "saliency", *GRIDS))
    detector = open_detector(run, SALIENCY, control="predict-nothing")
    readme_pictures.saliency_picture(detector, [photos[name] for name in SALIENCY_PHOTOS], saliency)
    made = make_results(replace(run, image=next(iter(photos.values()))), started, FIGURE_DPI)
    if made != figure:
        artefacts.write_bytes(figure, made.read_bytes())
    inverted = [photos[name] for name in RECONSTRUCTED_PHOTOS]
    for path, (checkpoint, target, regularizers) in zip(grids, GRIDS.values(), strict=True):
        columns = {name: run.out / path.stem / name for name in regularizers}
        for name, out in columns.items():
            print(f"\n{path.name}: {name}", flush=True)
            asked = {"weights": run.weights, "target": target, "iterations": run.iterations, "regularizer": name}
            reconstruct.main([*map(str, inverted), *run.shared(vlm=checkpoint, out=out, **asked)])
        readme_pictures.reconstruction_picture(columns, inverted, path)
    return [figure, saliency, *grids]


def get_parser() -> options.Parser:
    """Options; what is given goes to the stages that make the results."""
    parser = options.stage_parser(__doc__, workspace=False)
    options.add_weights_options(parser)
    options.add_image_options(parser)
    parser.inputs("image", metavar="IMAGE", nargs="?", type=options.readable_file, help="(default: a sample photo)")
    parser.output("--out", type=options.writable_folder, help="folder (default: out/pretrained)")
    parser.inputs("--figures", action="store_true", help="make all pictures of the README instead")
    parser.model(
        "--target", default=Run.target, metavar="TAP", help="feature to invert (paper: fc8, of complete weights)"
    )
    parser.descent("--iterations", type=options.positive, help="updates of each reconstruction (paper: 1000)")
    parser.inputs("--max-side", type=options.positive, default=Run.max_side, help="shrink larger images for the maps")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Make the maps, the reconstructions and the page, or all pictures of the README."""
    started = time.monotonic()
    args = get_parser().parse_args(argv)
    if args.figures and args.image is not None:
        raise UserError("--figures shows sample photos: leave the image out")
    out = args.out or Path("out/figures" if args.figures else "out/pretrained")
    asked = {field.name: getattr(args, field.name) for field in fields(Run) if field.name not in ("image", "out")}
    run = Run(args.image or sources.sample_photos()[0], out, **asked)
    if not args.figures:
        plan = PLAN.format(image=program.printable(run.image.name), target=run.target)
        print(f"{plan}\n{run.out / PAGE}\n", flush=True)
    from pipeline import networks

    program.announce(vars(args), networks.prepare_device(args.device))
    if args.figures:
        results = ", ".join(map(str, make_readme_pictures(run, args.out or ASSETS, started)))
    else:
        results = f"{make_results(run, started).with_name(PAGE)}"
    print(f"\n{results} shows the results; {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    sys.exit(program.run(main))
