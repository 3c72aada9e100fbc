"""One image in, the paper's figure out, with the language models that ship in models/pretrained/.

In:  IMAGE, any size, mode and format that Pillow opens (default: a sample photo).
Out: OUT/saliency/: the saliency map (.npy, .png, overlay); OUT/unnaturalness/<backbone>-<layer>.npy and .png of every
     layer; OUT/reconstructions/: the image from the deepest feature that the weights reach, with the language model
     and without; OUT/figure.png, all of it.

    python run_pretrained_model.py photo.jpg
"""

import sys
import time
from pathlib import Path

import numpy as np

from models.errors import UserError
from pipeline import artefacts, cli

PRETRAINED = Path(__file__).parent / "models" / "pretrained"
RECONSTRUCTION = PRETRAINED / "alexnet.safetensors"
SALIENCY = PRETRAINED / "vgg16.safetensors"
STATISTICS_IMAGES = 128


def deepest_target(args, backbone_name: str) -> tuple[str, str, str]:
    """The deepest tap that the weights at hand reach, the --weights value that gives it, and why."""
    from models.backbones import ARCHITECTURES
    from models.weights import FILES, has_full_weights, load_backbone

    architecture = ARCHITECTURES[backbone_name]
    if args.weights == "auto" and has_full_weights(architecture, args.cache):
        from models.downloads import cache_folder

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


def unnaturalness_maps(args, image: Path, checkpoint: Path, out: Path) -> dict[str, np.ndarray]:
    """Compute and write the map of every layer of a checkpoint; returns them by `<backbone> <layer>`."""
    from matplotlib import colormaps

    from models.checkpoints import load_vlm
    from models.saliency import unnaturalness_map
    from pipeline.figures import HEAT
    from pipeline.images import limit_side, read_rgb, write_png

    vlm, configuration = load_vlm(checkpoint)
    name = configuration["backbone"]
    device = cli.pick_device(args.device)
    weights = args.weights if name == args.backbone else "auto"
    backbone, _ = cli.load_backbone(cli.replace(args, weights=weights), name, list(vlm.layers), device)
    vlm = vlm.freeze().to(device)
    rgb = limit_side(read_rgb(image), args.max_side)
    maps = {}
    with cli.Progress(len(vlm.layers), f"unnaturalness of {name}", "layers") as progress:
        for layer in vlm.layers:
            raw = unnaturalness_map(backbone, vlm, rgb, layer)
            artefacts.write_array(out / f"{name}-{layer}.npy", raw)
            root = np.sqrt(raw / max(raw.max(), 1e-300))
            write_png(out / f"{name}-{layer}.png", (colormaps[HEAT](root)[:, :, :3] * 255).astype(np.uint8))
            maps[f"{name} {layer}"] = root
            progress.update()
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


def get_parser() -> cli.Parser:
    """Options of this script."""
    parser = cli.stage_parser(__doc__, workspace=False)
    cli.add_weights_options(parser)
    parser.add_argument("image", metavar="IMAGE", nargs="?", type=cli.readable_file, help="(default: a sample photo)")
    parser.add_argument(
        "--out", type=cli.writable_folder, default=Path("out/pretrained"), help="folder (default: out/pretrained)"
    )
    parser.add_argument("--iterations", type=cli.positive, default=400, help="of each reconstruction (paper: 1000)")
    parser.add_argument("--max-side", type=cli.positive, default=1024, help="shrink larger images for the maps")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Make the maps, the reconstructions and the figure."""
    started = time.monotonic()
    args = get_parser().parse_args(argv)
    args.backbone = cli.checkpoint_backbone(RECONSTRUCTION)
    if args.image is None:
        from pipeline.sources import sample_photos

        args.image = sample_photos()[0]
    if not args.image.is_file():
        raise UserError(f"{args.image} does not exist: give an image file")
    import reconstruct
    import saliency
    from pipeline.images import read_rgb

    read_rgb(args.image)
    common = ["--device", args.device, "--seed", str(args.seed), *(["--overwrite"] if args.overwrite else [])]
    common += ["--cache", str(args.cache)] if args.cache else []
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
    pictures = {"image": read_rgb(args.image)}
    for regularizer, title in (("vlm", "with language model"), ("none", "without")):
        folder = args.out / "reconstructions" / regularizer
        options = ["--weights", weights, "--vlm", str(RECONSTRUCTION), "--target", target, *statistics]
        options += ["--regularizer", regularizer, "--iterations", str(args.iterations), "--out", str(folder)]
        reconstruct.main([str(args.image), *common, *options])
        pictures[f"{target}, {title}"] = read_rgb(folder / "reconstruction.png")
    write_figure(args, pictures, maps)
    print(f"\n{args.out / 'figure.png'} shows the results; {time.monotonic() - started:.0f} s in all")


def write_figure(args, pictures: dict[str, np.ndarray], maps: dict[str, np.ndarray]) -> None:
    """figure.png: photo, reconstructions and saliency above the unnaturalness maps of all layers."""
    from pipeline.figures import picture_grid
    from pipeline.images import output_name, read_rgb

    overlay = read_rgb(args.out / "saliency" / f"{output_name(args.image.stem)}-overlay.png")
    top = {**pictures, "saliency": overlay}
    picture_grid([top, {f"unnaturalness\n{name}": values for name, values in maps.items()}], args.out / "figure.png")


if __name__ == "__main__":
    sys.exit(cli.run(main))
