"""Stage 5: images -> unnaturalness and saliency maps.

In:  images of any size, or folders of them; ROOT/vlm.safetensors, of stage 3.
Out: per image OUT/<name>.npy, the saliency map (H, W) in 0…1 of the image's size (float32; uint8 with --postprocess
     original), OUT/<name>.png, OUT/<name>-overlay.png, and OUT/<name>-unnaturalness.npy, the map (h-1, w-1) of the
     layer before post-processing, float64. Where several maps are added, each is
     OUT/<name>-unnaturalness-<backbone>-<layer>.npy.

    python saliency.py photo.jpg photos/ --preset vgg16 --layer conv5_3
    python saliency.py photo.jpg --vlm models/pretrained/vgg16.safetensors models/pretrained/alexnet.safetensors
    torchrun --nproc-per-node=8 saliency.py photos/ --preset vgg16
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.errors import UserError
from pipeline import artefacts, distributed, networks, options, program
from pipeline.progress import Progress

if TYPE_CHECKING:
    import torch

    from models.backbones import Backbone
    from models.vlm import VisualLanguageModel

UNNATURALNESS = "-unnaturalness"
SUFFIXES = ("-overlay", UNNATURALNESS)  # behind an image's name in its outputs


@dataclass(frozen=True)
class View:
    """One map of an image: that of a layer's language model."""

    backbone: "Backbone"
    vlm: "VisualLanguageModel"
    layer: str

    @property
    def name(self) -> str:
        """Tells it from the other maps that are added."""
        return f"{self.backbone.architecture.name}-{self.layer}"


def saliency_map(
    views: list[View], rgb: np.ndarray, postprocess: str, power: float, blur: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Saliency map (H, W) of an image (H, W, 3) uint8, and the unnaturalness map of every view by its name.

    The saliency maps of several views are added. uint8 with `postprocess` original, else float64 in 0…1.

    Raises:
        UserError: the image is too small for a layer.
    """
    from models import unnaturalness

    original = postprocess == "original"
    finish = unnaturalness.postprocess_original if original else unnaturalness.postprocess
    raws, maps = {}, []
    for view in views:
        raw = unnaturalness.unnaturalness_map(view.backbone, view.vlm, rgb, view.layer)
        stride = view.backbone.architecture.stride(view.layer)
        maps.append(finish(raw, *rgb.shape[:2], stride, power, blur))
        raws[view.name] = raw
    if len(maps) == 1:
        return maps[0], raws
    total = unnaturalness.added(maps)
    return (total * 255).astype(np.uint8) if original else total, raws


def write_maps(
    out: Path, name: str, rgb: np.ndarray, raws: Mapping[str, np.ndarray], saliency: np.ndarray, facts: dict
) -> None:
    """All files of one image; the sidecar of the saliency map comes last."""
    from pipeline.figures import overlay
    from pipeline.images import write_png

    unit = saliency / 255 if saliency.dtype == np.uint8 else saliency
    for view, raw in raws.items():
        artefacts.write_array(out / f"{name}{UNNATURALNESS}{'' if len(raws) == 1 else '-' + view}.npy", raw)
    write_png(out / f"{name}.png", (unit * 255).astype(np.uint8))
    write_png(out / f"{name}-overlay.png", overlay(rgb, unit))
    stored = saliency if saliency.dtype == np.uint8 else saliency.astype(np.float32)
    artefacts.write_array(out / f"{name}.npy", stored)
    described = {"shape": list(stored.shape), "dtype": str(stored.dtype), **facts, "versions": program.versions()}
    artefacts.write_json(artefacts.sidecar_path(out / f"{name}.npy"), described)


def get_parser() -> options.Parser:
    """Options of this stage."""
    parser = options.stage_parser(__doc__)
    options.add_weights_options(parser)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE|FOLDER", help="images of any size, or folders of them")
    parser.add_argument(
        "--vlm",
        type=options.readable_file,
        nargs="+",
        help="checkpoint (default: ROOT/vlm.safetensors); the maps of several are scaled to 0…1 and added: vgg16 with "
        "alexnet gained .006 AUC, .001 sAUC, .01 NSS on 50 OSIE images over vgg16 alone (paper: one network)",
    )
    parser.add_argument(
        "--layer",
        nargs="+",
        help="layer whose map is used, several are added (default: the deepest trained; paper: conv5_4 of VGG-19)",
    )
    parser.add_argument("--max-side", type=options.positive, help="shrink larger images to this side, to save memory")
    options.add_postprocess_options(parser)
    parser.add_argument("--out", type=options.writable_folder, help="folder (default: ROOT/saliency)")
    return parser


def process(args, name: str, path: Path, views: list[View], out: Path, facts: dict) -> str:
    """One image from file to maps; returns what was done."""
    from pipeline.images import check_file, limit_side, read_rgb

    check_file(path)
    facts = {**facts, "input_sha256": artefacts.file_sha256(path)}
    if artefacts.is_finished(out / f"{name}.npy", facts, args.overwrite):
        return "finished before"
    rgb = limit_side(read_rgb(path), args.max_side)
    for view in views:
        if view.backbone.device.type == "cpu":
            needed = view.backbone.architecture.memory(view.layer, *rgb.shape[:2])
            artefacts.check_memory(f"{rgb.shape[1]}×{rgb.shape[0]} pixels, which --max-side can shrink,", needed)
    saliency, raws = saliency_map(views, rgb, args.postprocess, args.power, args.blur)
    write_maps(out, name, rgb, raws, saliency, facts)
    return f"{rgb.shape[1]}×{rgb.shape[0]}"


def main(argv: list[str] | None = None) -> int:
    """Run the stage; 2 if any image could not be read."""
    args = options.parse_args(get_parser(), argv, "saliency")
    device = networks.pick_device(args.device)
    out = args.out or args.root / "saliency"
    with distributed.group(device), artefacts.claim(out):
        return compute(args, out, device)


def load_views(args, device: "torch.device") -> tuple[list[View], artefacts.Facts]:
    """All maps that are to be added, and the facts that determine them, each under the map's name."""
    from evaluation.map_sources import choose_layers
    from models.checkpoints import load_vlm

    checkpoints = args.vlm or [args.root / "vlm.safetensors"]
    loaded = {path: load_vlm(path) for path in dict.fromkeys(checkpoints)}
    chosen = choose_layers({path: vlm.layers for path, (vlm, _) in loaded.items()}, args.layer)
    program.announce(args, device)
    views, facts = [], {}
    for path, (vlm, configuration) in loaded.items():
        name, layers = configuration["backbone"], list(dict.fromkeys(chosen[path]))
        backbone, weights = networks.load_backbone(args, name, layers, device)
        vlm = vlm.freeze().to(device)
        of_checkpoint = {
            "backbone": name,
            **networks.weights_facts(backbone, weights),
            "vlm_sha256": artefacts.file_sha256(path),
        }
        for layer in layers:
            views.append(View(backbone, vlm, layer))
            facts |= {f"{views[-1].name} {key}": value for key, value in of_checkpoint.items()}
    names = [view.name for view in views]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two checkpoints give a map of {twice[0]}: leave one out, or choose another --layer")
    return views, facts


def compute(args, out: Path, device: "torch.device") -> int:
    """The maps of all images, which the ranks share; 2 if any image could not be read."""
    from pipeline.images import list_images

    views, facts_of_views = load_views(args, device)
    files, problems = list_images(args.inputs, (*SUFFIXES, *(f"{UNNATURALNESS}-{view.name}" for view in views)))
    facts = {
        "stage": "saliency",
        "maps": [view.name for view in views],
        **facts_of_views,
        **{key: getattr(args, key) for key in ("max_side", "power", "blur", "postprocess")},
    }
    mine, failed = distributed.share(list(files.items())), 0
    if distributed.rank() == 0:
        failed += len(problems)
        for problem in problems:
            print(f"saliency.py: {problem}", file=sys.stderr)
    with Progress(len(mine), "saliency", "images") as progress:
        for name, path in mine:
            try:
                progress.update(note=f"{name} {process(args, name, path, views, out, facts)}")
            except artefacts.NoRoomError:
                raise
            except Exception as error:
                if (line := program.explanation(error)) is None:
                    raise
                failed += 1
                where = program.printable(str(path))
                print(f"saliency.py: {'' if where in line else f'{where}: '}{line}", file=sys.stderr)
    failed = round(distributed.total(failed))
    done, made = len(files) + len(problems) - failed, " + ".join(view.name for view in views)
    print(f"{out}: {done} saliency maps of {made}" + (f", {failed} failed" if failed else ""))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(program.run(main))
