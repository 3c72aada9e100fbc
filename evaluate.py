"""Tables: saliency maps against human fixations, reconstructions against one another, images against spoiled copies.

In:  see the commands.
Out: tables, per-image scores, pictures, and report.html with all of them, in the folder of --out.

    python evaluate.py fixations --stimuli photos/ --fixations fixations.csv
    python evaluate.py reconstruction out/alexnet/reconstructions
    python evaluate.py naturalness photos/
    python evaluate.py fixations --help
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.baselines import BASELINES
from evaluation.datasets import DATASETS
from evaluation.spoiling import SPOILINGS
from models.errors import UserError
from pipeline import distributed, locks, options, program

if TYPE_CHECKING:
    import torch


def fixation_options(parser: options.Parser) -> None:
    """Options of `fixations`, but for those that every command has."""
    parser.inputs("--stimuli", type=options.folder, help="folder of the images")
    parser.inputs("--fixations", type=options.readable_path, help=".csv, .mat, or MIT1003's folder DATA")
    parser.inputs("--dataset", choices=tuple(DATASETS), help="download this data set instead")
    parser.inputs("--skip", type=options.natural, default=0, help="leave out the first images (default: 0)")
    parser.inputs("--limit", type=options.positive, help="take so many images (default: all)")
    parser.model(
        "--vlm",
        type=options.readable_file,
        nargs="+",
        default=[],
        help="checkpoints (default: those in models/pretrained)",
    )
    parser.model("--layer", nargs="+", help="layers, each a model of its own (default: the deepest trained)")
    parser.model(
        "--add",
        action="store_true",
        help="score the sum of all these layers' maps too, each scaled to 0…1 first: what saliency.py makes of several "
        "--vlm",
    )
    parser.inputs(
        "--maps", type=options.folder, nargs="+", default=[], help="folders of .npy or grey .png, named as the stimuli"
    )
    parser.inputs("--baseline", choices=tuple(BASELINES), nargs="+", default=[], help="further baselines")
    options.add_postprocess_options(parser)
    options.add_weights_options(parser)
    options.add_image_options(parser)
    parser.output(
        "--out", type=options.writable_folder, default=Path("out/fixations"), help="folder (default: out/fixations)"
    )


def fixations(args: argparse.Namespace, device: "torch.device") -> None:
    """How well saliency maps predict where people look, beside controls.

    In:  stimuli (a folder of images) and fixations: a .csv with the columns image, subject, x, y; OSIE's fixations.mat;
         Toronto's origfixdata.mat; MIT1003's unpacked folder DATA; or --dataset, which downloads all of these.
         Maps: of checkpoints (--vlm, --layer), of folders (--maps) or baselines (--baseline).
    Out: OUT/scores.csv, a line per image and model; OUT/summary.json, means with 95 % intervals over images, and
         paired differences; OUT/table.md, both as tables; OUT/examples-<model>.png, the best, median and worst image by
         AUC with the fixations on the map; OUT/maps/, the maps before post-processing, which another run takes up.

        python evaluate.py fixations --stimuli photos/ --fixations fixations.csv
        torchrun --nproc-per-node=8 evaluate.py fixations --dataset osie

    Metrics: AUC (all pixels as negatives), shuffled AUC, NSS, CC, SIM and KLD as the MIT/Tübingen benchmark has them.
    """
    from evaluation import map_sources, score_fixations
    from pipeline import detector, networks

    places = (args.dataset, args.cache, args.stimuli, args.fixations, args.skip, args.limit)
    looks = distributed.together(lambda: score_fixations.read_data(*places))

    def open_sources() -> list[map_sources.Source]:
        """What the options name, the checkpoints that ship where they name nothing."""
        sizes = dict(zip(looks.images, map(tuple, looks.fixations.sizes.tolist()), strict=True))
        sources = [map_sources.Folder(folder.resolve().name, folder, sizes) for folder in args.maps]
        if checkpoints := args.vlm or ([] if args.maps or args.baseline else networks.shipped_checkpoints()):
            count = len(checkpoints)
            found = map_sources.model_sources(
                checkpoints,
                args.layer,
                detector.each(args.predictor, count, "--predictor"),
                detector.postprocess_each(args.postprocess, args.power, args.blur, args.centre_prior, count),
                [name for b in dict.fromkeys(args.baseline) if (name := BASELINES[b].predictor)],
                networks.WeightsChoice(args.weights, args.mean_image, args.cache, args.seed),
                device,
                cache=args.out / "maps",
                fresh=args.overwrite,
            )
            sources += [map_sources.Added(found)] if args.add else found
        sources.append(map_sources.Baselines(args.baseline))
        names = [name for source in sources for name in source.rows]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two models would be called {twice[0]!r}: rename one folder of maps")
        return sources

    stated = {key: getattr(args, key) for key in ("power", "blur", "postprocess", "seed")}
    stated |= {"centre_prior": args.centre_prior} if args.centre_prior else {}
    stated |= options.image_facts()
    sources = distributed.together(open_sources)
    score_fixations.evaluate(sources, looks, args.out, stated, args.overwrite)


def reconstruction_options(parser: options.Parser) -> None:
    """Options of `reconstruction`, but for those that every command has."""
    parser.inputs("folders", nargs="+", type=options.folder, metavar="FOLDER", help="results of reconstruct.py")
    parser.output("--grid", type=options.natural, default=8, help="images in pictures.png (default: 8)")
    parser.output(
        "--out",
        type=options.writable_folder,
        default=Path("out/reconstruction-scores"),
        help="(default: out/reconstruction-scores)",
    )
    options.add_weights_options(parser)


def reconstruction(args: argparse.Namespace, device: "torch.device") -> None:
    """How understandable reconstructions are, by regulariser, beside controls.

    In:  folders that hold finished results of reconstruct.py, one or more for every image; searched all the way down.
    Out: OUT/scores.csv, a line per image and model; OUT/summary.json, means with 95 % intervals over images, and paired
         differences; OUT/table.md, both as tables; OUT/pictures.png, original and reconstructions of some images.

        python evaluate.py reconstruction out/alexnet/reconstructions

    A model is a regulariser and its descent with their settings; only images that every model has reconstructed count.
    Scores: feature_error, |φ(x) - φ₀|²/|φ₀|² (did it invert at all?); ssim and psnr to the original, also after a
    Gaussian blur of σ 4 pixels, since fine noise decides them otherwise; colour_blurred, channels' correlation after
    it; of an independent classifier (EfficientNet-Lite0, or Lite2 where Lite0 was inverted): top1 and top5, whether it
    sees the original's class, and probability, what it gives to that. Controls: the original itself, noise, the mean.
    """
    from evaluation.score_reconstructions import common_images, evaluate, find_results, group_by_model
    from pipeline.networks import WeightsChoice

    models = distributed.together(lambda: group_by_model(find_results(args.folders)))
    images = distributed.together(lambda: common_images(models))
    choice = WeightsChoice(args.weights, args.mean_image, args.cache, args.seed)
    evaluate(models, images, choice, device, args.out, args.grid, args.seed, args.overwrite)


def naturalness_options(parser: options.Parser) -> None:
    """Options of `naturalness`, but for those that every command has."""
    parser.inputs("folder", nargs="?", type=options.folder, help="images of any size, instead of --images")
    parser.inputs(
        "--images", type=options.readable_file, help="images.npy of stage 1: those that every layer held out are taken"
    )
    parser.inputs("--limit", type=options.positive, help="take so many images (default: all)")
    parser.model(
        "--vlm", type=options.readable_file, nargs="+", help="checkpoints (default: those in models/pretrained)"
    )
    parser.model("--layer", nargs="+", help="layers (default: all that the checkpoints have)")
    parser.inputs(
        "--spoilings",
        nargs="+",
        choices=tuple(SPOILINGS),
        default=list(SPOILINGS),
        metavar="NAME",
        help=f"copies to make (default: all: {', '.join(SPOILINGS)})",
    )
    parser.inputs(
        "--reconstructions", type=options.folder, nargs="+", default=[], help="folders of results of reconstruct.py"
    )
    options.add_weights_options(parser)
    options.add_image_options(parser)
    parser.output(
        "--out", type=options.writable_folder, default=Path("out/naturalness"), help="folder (default: out/naturalness)"
    )


def naturalness(args: argparse.Namespace, device: "torch.device") -> None:
    """What naturalness is worth: whether spoiled copies have higher losses, and maps point at spoiled regions.

    In:  images of stage 1 (--images), of which those are taken that the checkpoints held out, or a folder of any
         images, which are scaled as stage 1 does; checkpoints (--vlm) with all their layers; results of reconstruct.py
         (--reconstructions), which count as spoiled copies of what they were made from.
    Out: OUT/scores.csv, a line per image, layer, predictor and copy; OUT/summary.json and OUT/table.md, with 95 %
         intervals over images; OUT/regions-<layer>.png, eight images with a spoiled region and the maps of it.

        python evaluate.py naturalness --images out/alexnet/images.npy --vlm out/alexnet/vlm.safetensors
        python evaluate.py naturalness photos/ --layer conv5 --spoilings "noise 25" "pasted 1/4"
        torchrun --nproc-per-node=8 evaluate.py naturalness photos/

    Scores of every layer: how often a copy has a higher loss than its own original; AUC over images; AUC of the map for
    the pixels of the region. Beside the language model stands its loss relative to predicting nothing. Every table
    has controls: predict nothing, repeat last, the language model on a random CNN; among the copies, the mirrored one.

    Where it can fail: the loss is what cannot be predicted, not what is wrong. A blurred copy is *more* predictable
    than its original, so layers that see the detail call it more natural; what leaves a layer's features weak (dark,
    flat, smooth) lowers its loss; and a reconstruction that was made with language models descended on this very loss.
    The table says for every layer which copies it fails on, and where it tells more than predicting nothing does.
    """
    from evaluation import naturalness_readers, score_naturalness
    from pipeline import detector, networks

    def prepare() -> tuple[list[naturalness_readers.Reader], list, score_naturalness.Spoilings]:
        """What reads, what is read, and the spoilings in it."""
        paths = args.vlm or networks.shipped_checkpoints()
        checkpoints = [detector.Checkpoint.load(path, device) for path in dict.fromkeys(paths)]
        items, spoilings = score_naturalness.collect(
            args.folder, args.images, args.limit, checkpoints, args.spoilings, args.reconstructions, args.seed
        )
        choice = networks.WeightsChoice(args.weights, args.mean_image, args.cache, args.seed)
        return naturalness_readers.load_readers(checkpoints, args.layer, choice, device), items, spoilings

    score_naturalness.evaluate(*distributed.together(prepare), args.out, args.seed, args.overwrite)


COMMANDS = {  # what adds a command's options, and its main
    "fixations": (fixation_options, fixations),
    "reconstruction": (reconstruction_options, reconstruction),
    "naturalness": (naturalness_options, naturalness),
}


def get_parser() -> options.Parser:
    """Options of all commands."""
    return options.command_parser(__doc__, COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Run a command: a finished evaluation is shown again, an interrupted one goes on. Ranks share the images."""
    args = get_parser().parse_args(argv)
    from evaluation.page import write_page
    from pipeline.networks import prepare_device

    device = prepare_device(args.device)
    with distributed.group(device), locks.claim(args.out):
        program.announce(vars(args), device)
        COMMANDS[args.command][1](args, device)
    if distributed.leads() and (args.out / "summary.json").is_file():
        write_page(args.out, args.command)
    return 0


if __name__ == "__main__":
    sys.exit(program.run(main))
