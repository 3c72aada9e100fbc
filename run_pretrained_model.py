"""One image in, the paper's figure out, with the language models that ship in models/pretrained/.

In:  IMAGE, any size, mode and format that Pillow opens (default: a sample photo).
Out: OUT/saliency/: the saliency map (.npy, .png, overlay); OUT/unnaturalness/<backbone>-<layer>.npy and .png of every
     layer; OUT/reconstructions/: the image from the deepest feature that the weights reach, with the language model
     and without; OUT/figure.png, all of it.

    python run_pretrained_model.py photo.jpg

With --figures: all pictures of the README, assets/figure.png, assets/saliency.png and assets/reconstruction.png, from
sample photos; what they are made of stays in out/figures/, where another run takes it up again. With --out, both there.

    python run_pretrained_model.py --figures
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.errors import UserError
from pipeline import artefacts, networks, options, program
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.detector import Detector

PRETRAINED = Path(__file__).parent / "models" / "pretrained"
RECONSTRUCTION = PRETRAINED / "alexnet.safetensors"
SALIENCY = PRETRAINED / "vgg16.safetensors"
STATISTICS_IMAGES = 128
ASSETS = Path(__file__).parent / "assets"
# The README's pictures: sample photos by their names, and widths in pixels that keep the files below a megabyte.
SALIENCY_PHOTOS, SALIENCY_SIDE = ("astronaut", "chelsea", "coffee", "rocket"), 448
RECONSTRUCTED_PHOTOS, RECONSTRUCTED_ITERATIONS = ("china", "flower"), 200
REGULARIZERS = ("none", "l2", "tv", "vlm", "vlm+tv")
FIGURE_DPI, SALIENCY_DPI, RECONSTRUCTION_DPI = 50, 75, 75


def deepest_target(args, backbone_name: str) -> tuple[str, str, str]:
    """The deepest tap that the weights at hand reach, the --weights value that gives it, and why."""
    from models.backbones import ARCHITECTURES
    from models.weights import FILES, has_full_weights, load_backbone

    architecture = ARCHITECTURES[backbone_name]
    if args.weights == "auto" and has_full_weights(architecture, args.cache):
        from models.weights.downloads import cache_folder

        path = (args.cache or cache_folder()) / FILES[backbone_name].name
        return "fc8", str(path), f"the complete {backbone_name} lies in the cache"
    backbone, _ = load_backbone(backbone_name, args.weights, cache=args.cache, seed=args.seed)
    if "fc8" in backbone.available_taps:
        return "fc8", args.weights, "the weights are complete"
    return (
        "pool5",
        args.weights,
        f"the weights are convolutions only; for fc8 give {FILES[backbone_name].name} with --weights",
    )


def open_detector(args, path: Path, layers: list[str] | None, predictors: tuple[str, ...]) -> "Detector":
    """The detector of a checkpoint, with a reading `<layer> <predictor>` for all layers (None: of the checkpoint)."""
    from pipeline.detector import Checkpoint, Detector, Reading

    device = networks.pick_device(args.device)
    checkpoint = Checkpoint.load(path, device)
    weights = args.weights if checkpoint.backbone == args.backbone else "auto"
    choice = networks.WeightsChoice.of(options.replace(args, weights=weights))
    layers = layers or list(checkpoint.vlm.layers)
    readings = [Reading(f"{layer} {name}", checkpoint, layer, name) for layer in layers for name in predictors]
    return Detector.load(readings, choice, device)


def unnaturalness_maps(args, image: Path, checkpoint: Path, out: Path) -> dict[str, np.ndarray]:
    """Compute and write the map of every layer of a checkpoint; returns them by `<backbone> <layer>`."""
    from pipeline.detector import LANGUAGE_MODEL
    from pipeline.figures import HEAT
    from pipeline.images import limit_side, read_rgb, write_png
    from pipeline.plotting import colormap

    detector = open_detector(args, checkpoint, None, (LANGUAGE_MODEL,))
    raws = detector.unnaturalness(limit_side(read_rgb(image), args.max_side))
    maps = {}
    for reading, raw in raws.items():
        name, layer = detector.facts["backbone"], detector.readings[reading].layer
        artefacts.write_array(out / f"{name}-{layer}.npy", raw)
        root = np.sqrt(raw / max(raw.max(), 1e-300))
        write_png(out / f"{name}-{layer}.png", (colormap(HEAT)(root)[:, :, :3] * 255).astype(np.uint8))
        maps[f"{name} {layer}"] = root
    return maps


def fc8_statistics(args, weights: str, backbone: str, target: str, root: Path) -> list[str]:
    """Options that give reconstruct.py σ of a tap that the shipped checkpoint lacks, measured on the sample photos."""
    import extract_features
    import prepare_images
    from models.checkpoints import load_vlm

    if target in load_vlm(RECONSTRUCTION)[0].statistics:
        return []
    common = ["--preset", "demo", "--root", str(root), "--device", args.device]
    prepare_images.main([*common, "--source", "samples", "--num-images", str(STATISTICS_IMAGES)])
    extract_features.main(
        [*common, "--backbone", backbone, "--weights", weights, "--layers", "conv5", "--statistics", target]
    )
    return ["--statistics", str(root / "features" / "projection.safetensors")]


def get_parser() -> options.Parser:
    """Options of this script."""
    parser = options.stage_parser(__doc__, workspace=False)
    options.add_weights_options(parser)
    parser.add_argument(
        "image", metavar="IMAGE", nargs="?", type=options.readable_file, help="(default: a sample photo)"
    )
    parser.add_argument("--out", type=options.writable_folder, help="folder (default: out/pretrained)")
    parser.add_argument("--figures", action="store_true", help="make all pictures of the README instead (10 minutes)")
    parser.add_argument("--iterations", type=options.positive, default=400, help="of each reconstruction (paper: 1000)")
    parser.add_argument("--max-side", type=options.positive, default=1024, help="shrink larger images for the maps")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Make the maps, the reconstructions and the figure, or all pictures of the README."""
    started = time.monotonic()
    args = get_parser().parse_args(argv)
    args.backbone = networks.checkpoint_backbone(RECONSTRUCTION)
    if args.figures:
        pictures = readme_figures(args)
    else:
        args.out = args.out or Path("out/pretrained")
        pictures = [paper_figure(args)]
    print(f"\n{', '.join(map(str, pictures))} shows the results; {time.monotonic() - started:.0f} s in all")


def common_options(args) -> list[str]:
    """Options that all stages get."""
    options = ["--device", args.device, "--seed", str(args.seed), *(["--overwrite"] if args.overwrite else [])]
    return options + (["--cache", str(args.cache)] if args.cache else [])


def paper_figure(args, dpi: int = 120) -> Path:
    """Saliency, unnaturalness of every layer and two reconstructions of one image, and OUT/figure.png of all."""
    import reconstruct
    import saliency
    from pipeline.images import read_rgb

    if args.image is None:
        from pipeline.sources import sample_photos

        args.image = sample_photos()[0]
    image = read_rgb(args.image)
    common = common_options(args)
    target, weights, why = deepest_target(args, args.backbone)
    print(f"\n1. saliency map of {args.image.name}", flush=True)
    side = ["--max-side", str(args.max_side)]
    folder = args.out / "saliency"
    failed = saliency.main([str(args.image), *common, *side, "--vlm", str(SALIENCY), "--out", str(folder)])
    if failed:
        raise UserError(f"{args.image} gives no saliency map: see the line above")
    print("\n2. unnaturalness map of every layer", flush=True)
    maps = {}
    for checkpoint in (RECONSTRUCTION, SALIENCY):
        maps |= unnaturalness_maps(args, args.image, checkpoint, args.out / "unnaturalness")
    print(f"\n3. reconstruction from {target} of {args.backbone}: {why}", flush=True)
    statistics = fc8_statistics(args, weights, args.backbone, target, args.out / "statistics")
    pictures = {"image": image}
    for regularizer, title in (("vlm", "with language model"), ("none", "without")):
        folder = args.out / "reconstructions" / regularizer
        options = ["--weights", weights, "--vlm", str(RECONSTRUCTION), "--target", target, *statistics]
        options += ["--regularizer", regularizer, "--iterations", str(args.iterations), "--out", str(folder)]
        reconstruct.main([str(args.image), *common, *options])
        pictures[f"{target}, {title}"] = read_rgb(folder / "reconstruction.png")
    return write_figure(args, pictures, maps, dpi)


def write_figure(args, pictures: dict[str, np.ndarray], maps: dict[str, np.ndarray], dpi: int) -> Path:
    """figure.png: photo, reconstructions and saliency above the unnaturalness maps of all layers."""
    from pipeline.figures import picture_grid
    from pipeline.images import output_name, read_rgb

    overlay = read_rgb(args.out / "saliency" / f"{output_name(args.image.stem)}-overlay.png")
    top = {**pictures, "saliency": overlay}
    below = {f"unnaturalness\n{name}": values for name, values in maps.items()}
    picture_grid([top, below], args.out / "figure.png", dpi=dpi)
    return args.out / "figure.png"


def readme_figures(args) -> list[Path]:
    """All pictures of the README, in the folder of --out or assets/; returns their paths.

    Raises:
        UserError: an image was given, or a sample photo is missing.
    """
    from pipeline.sources import sample_photos

    if args.image is not None:
        raise UserError("--figures shows sample photos: leave the image out")
    photos = {path.stem: path for path in sample_photos()}
    if missing := {*SALIENCY_PHOTOS, *RECONSTRUCTED_PHOTOS} - photos.keys():
        raise UserError(f"the installed packages lack {', '.join(sorted(missing))}: pip install -r requirements.txt")
    folder, work = args.out or ASSETS, args.out or Path("out/figures")
    paths = [folder / f"{name}.png" for name in ("figure", "saliency", "reconstruction")]
    print(f"{', '.join(map(str, paths))}, from the checkpoints in {PRETRAINED}", flush=True)
    saliency_picture(args, [photos[name] for name in SALIENCY_PHOTOS], paths[1])
    made = paper_figure(options.replace(args, out=work), FIGURE_DPI)
    if made != paths[0]:
        artefacts.write_bytes(paths[0], made.read_bytes())
    reconstruction_picture(args, [photos[name] for name in RECONSTRUCTED_PHOTOS], work, paths[2])
    return paths


def saliency_picture(args, photos: list[Path], path: Path) -> None:
    """Photos, their unnaturalness and saliency maps, and the same of a language model that predicts nothing."""
    from models.checkpoints import load_vlm
    from pipeline.detector import LANGUAGE_MODEL
    from pipeline.figures import overlay, picture_grid
    from pipeline.images import limit_side, read_rgb

    columns = {"language model": LANGUAGE_MODEL, "predict nothing": "predict-nothing"}
    layer = list(load_vlm(SALIENCY)[0].layers)[-1]
    detector = open_detector(args, SALIENCY, [layer], tuple(columns.values()))
    rows = []
    with Progress(len(photos), "saliency", "photos") as progress:
        for photo in photos:
            rgb = limit_side(read_rgb(photo), SALIENCY_SIDE)
            raws = detector.unnaturalness(rgb)
            row = {f"{detector.facts['backbone']} {layer}": rgb}
            for title, predictor in columns.items():
                name = f"{layer} {predictor}"
                row[f"unnaturalness,\n{title}"] = np.sqrt(raws[name] / raws[name].max())
                row[f"saliency,\n{title}"] = overlay(rgb, detector.saliency(name, raws[name], *rgb.shape[:2]))
            rows.append(row if not rows else dict(zip(_blanks(row), row.values(), strict=True)))
            progress.update()
    picture_grid(rows, path, column=2.4, dpi=SALIENCY_DPI)


def _blanks(row: dict[str, np.ndarray]) -> list[str]:
    """Different titles that show nothing, for rows under one that has the titles of all."""
    return [" " * (place + 1) for place in range(len(row))]


def reconstruction_picture(args, photos: list[Path], work: Path, path: Path) -> None:
    """Photos and their reconstructions from pool5 by every regulariser."""
    import reconstruct
    from pipeline.figures import picture_grid
    from pipeline.images import read_rgb

    folders = {regularizer: work / "photos" / regularizer for regularizer in REGULARIZERS}
    for number, (regularizer, folder) in enumerate(folders.items(), start=1):
        print(f"\nreconstructions {number} of {len(folders)}: {regularizer}", flush=True)
        options = ["--vlm", str(RECONSTRUCTION), "--target", "pool5", "--regularizer", regularizer]
        options += ["--weights", args.weights, "--iterations", str(min(args.iterations, RECONSTRUCTED_ITERATIONS))]
        options += ["--out", str(folder)]
        reconstruct.main([*map(str, photos), *common_options(args), *options])
    rows = []
    for photo in photos:
        of_photo = {name: folder / photo.stem for name, folder in folders.items()}
        row = {"original": read_rgb(of_photo[REGULARIZERS[0]] / "image.png")}
        row |= {name: read_rgb(folder / "reconstruction.png") for name, folder in of_photo.items()}
        rows.append(row if not rows else dict(zip(_blanks(row), row.values(), strict=True)))
    picture_grid(rows, path, column=1.9, dpi=RECONSTRUCTION_DPI)


if __name__ == "__main__":
    sys.exit(program.run(main))
