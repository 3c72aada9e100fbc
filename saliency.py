"""Stage 5: images -> unnaturalness and saliency maps.

In:  images of any size, or folders of them; ROOT/vlm.safetensors, of stage 3.
Out: per image OUT/<name>.npy, the saliency map (H, W) in 0…1 of the image's size (float32; uint8 with --postprocess
     original), OUT/<name>.png, OUT/<name>-overlay.png, and OUT/<name>-unnaturalness.npy, the map (h-1, w-1) of the
     layer before post-processing, float64. Where several maps are added, each is
     OUT/<name>-unnaturalness-<backbone>-<layer>.npy. OUT/<name>-naturalness.json, by map the loss of the image, scaled
     and cropped as for training, and its percentile among the images that the checkpoint held out, where it keeps that.

    python saliency.py photo.jpg photos/ --preset vgg16 --layer conv5_3
    python saliency.py photo.jpg --vlm models/pretrained/vgg16.safetensors models/pretrained/alexnet.safetensors
    torchrun --nproc-per-node=8 saliency.py photos/ --preset vgg16
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.weights.downloads import file_hash
from pipeline import array_files, artefacts, distributed, locks, options, ownership, program
from pipeline.figures import overlay
from pipeline.images import check_file, limit_side, list_images, read_rgb, write_png
from pipeline.overlap import overlapped
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.detector import Detector

UNNATURALNESS = "-unnaturalness"
NATURALNESS = "-naturalness"
SUFFIXES = ("-overlay", UNNATURALNESS, NATURALNESS)  # behind an image's name in its outputs
Found = tuple[np.ndarray, list[dict[str, np.ndarray]], artefacts.Facts]  # image, maps by detector, losses by map


def make_maps(
    detectors: Sequence["Detector"],
    images: Mapping[str, Path],
    out: Path,
    facts: artefacts.Facts,
    max_side: int | None,
    overwrite: bool,
    naturalness: bool = True,
) -> int:
    """Saliency maps of image files, under their names in `out`; returns how many could not be made.

    While the CNN sees an image, the next one is read and the maps of the one before are written. `naturalness` of each
    image is written too, which takes another pass of the CNN over a small picture.

    Raises:
        NoRoomError: the disk is full.
    """
    from pipeline.detector import combined

    described: dict[str, artefacts.Facts] = {}

    def read(name: str) -> np.ndarray | None:
        """The image (H, W, 3), or None where its maps stand."""
        check_file(images[name])
        described[name] = {**facts, "input_sha256": file_hash(images[name])}
        if artefacts.reuse(out / f"{name}.npy", described[name], overwrite):
            return None
        rgb = limit_side(read_rgb(images[name]), max_side)
        for detector in detectors:
            needed = detector.memory(*rgb.shape[:2])
            artefacts.check_memory(f"{rgb.shape[1]}×{rgb.shape[0]} pixels, which --max-side can shrink,", needed)
        return rgb

    def detect(name: str, rgb: np.ndarray | None) -> Found | None:
        """The unnaturalness maps of an image, and how natural it is."""
        if rgb is None:
            return None
        judges = detectors if naturalness else ()
        losses = {name: found for detector in judges for name, found in detector.naturalness(rgb).items()}
        return rgb, [detector.unnaturalness(rgb) for detector in detectors], losses

    def write(name: str, found: Found | None) -> str:
        """Post-process, add and write the maps; returns what was done."""
        if found is None:
            return "finished before"
        rgb, of_detectors, losses = found
        raws = {reading: raw for maps in of_detectors for reading, raw in maps.items()}
        finish = {reading: detector.saliency for detector in detectors for reading in detector.readings}
        saliency = combined([finish[reading](reading, raw, *rgb.shape[:2]) for reading, raw in raws.items()])
        if losses:
            artefacts.write_json(out / f"{name}{NATURALNESS}.json", losses)
        write_maps(out, name, rgb, raws, saliency, described.pop(name))
        return f"{rgb.shape[1]}×{rgb.shape[0]}"

    failed = 0
    with Progress(len(images), "saliency", "images") as progress:
        for name, done in overlapped(images, read, detect, write):
            if isinstance(done, Exception):
                line, where = program.why_left_out(done), program.printable(str(images[name]))
                print(f"saliency.py: {'' if where in line else f'{where}: '}{line}", file=sys.stderr)
                failed += 1
            else:
                progress.update(note=f"{name} {done}")
    return failed


def write_maps(
    out: Path, name: str, rgb: np.ndarray, raws: Mapping[str, np.ndarray], saliency: np.ndarray, facts: dict
) -> None:
    """All files of one image; the sidecar of the saliency map comes last."""
    unit = saliency / 255 if saliency.dtype == np.uint8 else saliency
    for view, raw in raws.items():
        array_files.write_array(out / f"{name}{UNNATURALNESS}{'' if len(raws) == 1 else '-' + view}.npy", raw)
    write_png(out / f"{name}.png", (unit * 255).astype(np.uint8))
    write_png(out / f"{name}-overlay.png", overlay(rgb, unit))
    stored = saliency if saliency.dtype == np.uint8 else saliency.astype(np.float32)
    array_files.write_array(out / f"{name}.npy", stored)
    described = {"shape": list(stored.shape), "dtype": str(stored.dtype), **facts, "versions": program.versions()}
    artefacts.write_json(artefacts.sidecar_path(out / f"{name}.npy"), described)


def get_parser() -> options.Parser:
    """Options; those without a default here take the preset's."""
    parser = options.stage_parser(__doc__)
    options.add_weights_options(parser)
    parser.inputs("inputs", nargs="+", metavar="IMAGE|FOLDER", help="images of any size, or folders of them")
    parser.model(
        "--vlm",
        type=options.readable_file,
        nargs="+",
        help="checkpoint (default: ROOT/vlm.safetensors); the maps of several are scaled to 0…1 and added (paper: one)",
    )
    parser.model(
        "--layer",
        nargs="+",
        help="layer whose map is used, several are added (default: the deepest trained; paper: conv5_4 of VGG-19)",
    )
    parser.inputs("--max-side", type=options.positive, help="shrink larger images to this side, to save memory")
    options.add_image_options(parser)
    parser.output(
        "--naturalness",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write how natural each image is, a tenth of the time (default: yes)",
    )
    options.add_postprocess_options(parser)
    parser.output("--out", type=options.writable_folder, help="folder (default: ROOT/saliency)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the stage; 2 if any image could not be read."""
    args = options.parse_args(get_parser(), argv, "saliency")
    from pipeline import detector, networks

    device = networks.prepare_device(args.device)
    out = args.out or args.root / "saliency"
    with distributed.group(device), locks.claim(out):
        program.announce(vars(args), device)
        choice = networks.WeightsChoice(args.weights, args.mean_image, args.cache, args.seed)
        checkpoints = args.vlm or [args.root / "vlm.safetensors"]
        count = len(checkpoints)
        finish = detector.postprocess_each(args.postprocess, args.power, args.blur, args.centre_prior, count)
        predictors = detector.each(args.predictor, count, "--predictor")
        detectors = detector.open_detectors(checkpoints, args.layer, predictors, finish, choice, device)
        of_readings = {name: d.facts_of(name) for d in detectors for name in d.readings}
        suffixes = (*SUFFIXES, *(f"{UNNATURALNESS}-{name}" for name in of_readings))
        files, problems = list_images(args.inputs, suffixes, out)
        outputs = [f"{name}{suffix}" for name in files for suffix in (".npy", ".png", "-overlay.png")]
        distributed.first(lambda: ownership.foresee(out, *outputs))
        facts = {
            "stage": "saliency",
            "maps": list(of_readings),
            **{f"{name} {key}": value for name, facts in of_readings.items() for key, value in facts.items()},
            **{key: getattr(args, key) for key in ("max_side", "power", "blur", "postprocess")},
            **({"centre_prior": args.centre_prior} if args.centre_prior else {}),
            "naturalness": args.naturalness,
            **options.image_facts(),
        }
        mine, failed = dict(distributed.share(list(files.items()))), 0
        if distributed.rank() == 0:
            failed += len(problems)
            for problem in problems:
                print(f"saliency.py: {problem}", file=sys.stderr)
        failed += make_maps(detectors, mine, out, facts, args.max_side, args.overwrite, args.naturalness)
        failed = round(distributed.total(failed))
    done, made = len(files) + len(problems) - failed, " + ".join(of_readings)
    print(f"{out}: {done} saliency map{'' if done == 1 else 's'} of {made}" + (f", {failed} failed" if failed else ""))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(program.run(main))
