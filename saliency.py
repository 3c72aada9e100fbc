"""Stage 5: images -> unnaturalness and saliency maps.

In:  images of any size, or folders of them; ROOT/vlm.safetensors, of stage 3.
Out: per image OUT/<name>.npy, the saliency map (H, W) in 0…1 of the image's size (float32; uint8 with --postprocess
     original), OUT/<name>.png, OUT/<name>-overlay.png, and OUT/<name>-unnaturalness.npy, the map (h-1, w-1) of the
     layer before post-processing, float64.

    python saliency.py photo.jpg photos/ --preset vgg16 --layer conv5_3
    torchrun --nproc-per-node=8 saliency.py photos/ --preset vgg16
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.errors import UserError
from pipeline import artefacts, cli, distributed

if TYPE_CHECKING:
    import torch

    from models.backbones import Backbone
    from models.vlm import VisualLanguageModel

SUFFIXES = ("-overlay", "-unnaturalness")  # behind an image's name in its outputs


def write_maps(out: Path, name: str, rgb: np.ndarray, raw: np.ndarray, saliency: np.ndarray, facts: dict) -> None:
    """All files of one image; the sidecar of the saliency map comes last."""
    from pipeline.figures import overlay
    from pipeline.images import write_png

    unit = saliency / 255 if saliency.dtype == np.uint8 else saliency
    artefacts.write_array(out / f"{name}-unnaturalness.npy", raw)
    write_png(out / f"{name}.png", (unit * 255).astype(np.uint8))
    write_png(out / f"{name}-overlay.png", overlay(rgb, unit))
    stored = saliency if saliency.dtype == np.uint8 else saliency.astype(np.float32)
    artefacts.write_array(out / f"{name}.npy", stored)
    described = {"shape": list(stored.shape), "dtype": str(stored.dtype), **facts, "versions": cli.versions()}
    artefacts.write_json(artefacts.sidecar_path(out / f"{name}.npy"), described)


def get_parser() -> cli.Parser:
    """Options of this stage."""
    parser = cli.stage_parser(__doc__)
    cli.add_weights_options(parser)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE|FOLDER", help="images of any size, or folders of them")
    parser.add_argument("--vlm", type=cli.readable_file, help="checkpoint (default: ROOT/vlm.safetensors)")
    parser.add_argument(
        "--layer", help="layer whose map is used (default: the deepest trained; paper: conv5_4 of VGG-19)"
    )
    parser.add_argument("--max-side", type=cli.positive, help="shrink larger images to this side, to save memory")
    cli.add_postprocess_options(parser)
    parser.add_argument("--out", type=cli.writable_folder, help="folder (default: ROOT/saliency)")
    return parser


def process(
    args, name: str, path: Path, backbone: "Backbone", vlm: "VisualLanguageModel", out: Path, facts: dict
) -> str:
    """One image from file to maps; returns what was done."""
    from models.saliency import postprocess, postprocess_original, unnaturalness_map
    from pipeline.images import check_file, limit_side, read_rgb

    check_file(path)
    facts = {**facts, "input_sha256": artefacts.file_sha256(path)}
    if artefacts.is_finished(out / f"{name}.npy", facts, args.overwrite):
        return "finished before"
    rgb = limit_side(read_rgb(path), args.max_side)
    if backbone.device.type == "cpu":
        needed = backbone.architecture.memory(args.layer, *rgb.shape[:2])
        artefacts.check_memory(f"{rgb.shape[1]}×{rgb.shape[0]} pixels, which --max-side can shrink,", needed)
    raw = unnaturalness_map(backbone, vlm, rgb, args.layer)
    finish = postprocess_original if args.postprocess == "original" else postprocess
    stride = backbone.architecture.stride(args.layer)
    saliency = finish(raw, *rgb.shape[:2], stride, args.power, args.blur)
    write_maps(out, name, rgb, raw, saliency, facts)
    return f"{rgb.shape[1]}×{rgb.shape[0]}"


def main(argv: list[str] | None = None) -> int:
    """Run the stage; 2 if any image could not be read."""
    args = cli.parse_args(get_parser(), argv, "saliency")
    device = cli.pick_device(args.device)
    out = args.out or args.root / "saliency"
    with distributed.group(device), artefacts.claim(out):
        return compute(args, out, device)


def compute(args, out: Path, device: "torch.device") -> int:
    """The maps of all images, which the ranks share; 2 if any image could not be read."""
    from models.checkpoints import load_vlm
    from pipeline.images import list_images, printable

    files, problems = list_images(args.inputs, SUFFIXES)
    checkpoint = args.vlm or args.root / "vlm.safetensors"
    vlm, configuration = load_vlm(checkpoint)
    args.layer = list(vlm.layers)[-1] if args.layer is None else args.layer
    if args.layer not in vlm.layers:
        raise UserError(f"{checkpoint} has no layer {args.layer!r}: choose from {', '.join(vlm.layers)}")
    cli.announce(args, device)
    backbone, weights = cli.load_backbone(args, configuration["backbone"], [args.layer], device)
    vlm = vlm.freeze().to(device)
    facts = {
        "stage": "saliency",
        "backbone": configuration["backbone"],
        **cli.weights_facts(backbone, weights),
        "vlm_sha256": artefacts.file_sha256(checkpoint),
        **{key: getattr(args, key) for key in ("layer", "max_side", "power", "blur", "postprocess")},
    }
    mine, failed = distributed.share(list(files.items())), 0
    if distributed.rank() == 0:
        failed += len(problems)
        for problem in problems:
            print(f"saliency.py: {problem}", file=sys.stderr)
    with cli.Progress(len(mine), "saliency", "images") as progress:
        for name, path in mine:
            try:
                progress.update(note=f"{name} {process(args, name, path, backbone, vlm, out, facts)}")
            except artefacts.NoRoomError:
                raise
            except Exception as error:
                if (line := cli.explanation(error)) is None:
                    raise
                failed += 1
                where = printable(str(path))
                print(f"saliency.py: {'' if where in line else f'{where}: '}{line}", file=sys.stderr)
    failed = round(distributed.total(failed))
    done = len(files) + len(problems) - failed
    print(f"{out}: {done} saliency maps of {args.layer}" + (f", {failed} failed" if failed else ""))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
