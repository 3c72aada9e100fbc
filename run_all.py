"""All stages in order, or a range of them, for a preset.

In:  --source, as for prepare_images.py (preset demo: sample photos); for stages 4 and 5 --image, a photo.
Out: a workspace folder --root (default: out/<preset>) with every artefact; report.html there shows the results,
     README.txt says which file is what.

The preset demo goes on from the language models that ship: its photos are too few to begin from nothing.
Before each stage the equivalent single command is printed; it works by hand.

    python run_all.py
    python run_all.py --preset vgg16 --source ILSVRC2012_img_val.tar --from 1 --to 3
"""

import argparse
import importlib
import json
import shlex
import sys
import time
from pathlib import Path

from models.errors import UserError
from pipeline import artefacts, figures, options, parsers, program, sources
from pipeline.images import limit_side, output_name, read_rgb
from pipeline.presets import PRESETS, PRETRAINED

STAGES = ("prepare_images", "extract_features", "train_vlm", "reconstruct", "saliency")
STAGE_NUMBERS = {str(number): name for number, name in enumerate(STAGES, start=1)} | {name: name for name in STAGES}

SHIPPED = PRETRAINED / "alexnet.safetensors"
GOES_ON = "The training of these language models went on from those that ship; its own photos are too few."
NOT_SHARED = ("prepare_images", "reconstruct")  # stages of one process


def stage_name(text: str) -> str:
    """argparse type: a stage by number or name."""
    name = STAGE_NUMBERS.get(text.removesuffix(".py"))
    if name is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no stage: give 1-5 or one of {', '.join(STAGES)}")
    return name


def run_stage(name: str, argv: list[str]) -> None:
    """Call one stage's main in this process."""
    print(f"\n$ python {name}.py {shlex.join(argv)}", flush=True)
    if importlib.import_module(name).main(argv):
        raise UserError(f"{name}.py failed: see the lines above")


def print_plan(
    commands: dict[str, list[list[str]]], preset: str, layers: list[str] | None, processes: int, gflops: float
) -> None:
    """Every stage's commands, every value that they will use with its source, and what the stage will cost."""
    from models.backbones import find_architecture
    from models.objective import descent_for
    from pipeline import plan

    used = {}
    for stage, of_stage in commands.items():
        parser = importlib.import_module(stage).get_parser()
        used[stage] = [(argv, options.parse_args(parser, argv, stage)) for argv in of_stage]
    first = {stage: parsed[0][1] for stage, parsed in used.items()}
    architecture = find_architecture(first["extract_features"].backbone)
    layers = layers or list(architecture.vlm_layers)
    images = first["prepare_images"].num_images or plan.PAPER_IMAGES
    costs = plan.costs(
        architecture,
        images,
        layers,
        batch=first["train_vlm"].batch_size,
        iterations=first["train_vlm"].iterations,
        reconstruction_iterations=first["reconstruct"].iterations
        or descent_for(first["reconstruct"].descent, first["reconstruct"].regularizer).iterations,
        pca_positions=first["extract_features"].pca_positions,
        itemsize=2 if first["extract_features"].dtype == "float16" else 4,
        processes=processes,
    )
    for stage, parsed in used.items():
        print(f"\n{stage}.py")
        for argv, stage_args in parsed:
            print(f"  $ python {stage}.py {shlex.join(argv)}")
            for name, (value, source) in plan.values_used(stage, preset, vars(stage_args), layers).items():
                print(f"    {name:<22} {parsers.show(value) or 'none':<28} {source}")
        for rule in plan.rules(architecture, first[stage].target) if stage == "reconstruct" else []:
            print(f"    {rule.value} ({rule.source})")
        cost, sharing = costs[stage], 1 if stage in NOT_SHARED else processes
        hours = cost.hours(gflops, sharing)
        took = f"{hours:.2g} h" if hours >= 0.1 else f"{3600 * hours:.2g} s"
        disk, memory = artefacts.format_bytes(cost.disk), artefacts.format_bytes(cost.memory)
        each = f" of each of {sharing} processes" if sharing > 1 else ""
        print(f"    computed: disk {disk}, memory {memory}, {took} of arithmetic at {gflops:g} GFLOP/s{each}")
    print(f"\ncomputed for {images} images")


def show_results(root: Path, image: Path, target: str, descent: str, lead: list[str], seconds: float) -> Path:
    """The page of a workspace, which is returned; the same as a picture, figures/summary.png; and README.txt."""
    from pipeline import report_parts, results_page
    from pipeline.report import write

    name = output_name(image.stem)
    folders = {
        f"{target}, {title}": root / "reconstructions" / f"{name}-{target}-{regularizer}-{descent}"
        for regularizer, title in (("vlm", "with language models"), ("none", "without them"))
    }
    saliency, photo = root / "saliency" / f"{name}.npy", limit_side(read_rgb(image), 1024)
    natural = json.loads((saliency.parent / f"{name}-naturalness.json").read_text(encoding="utf-8"))
    natural = {reading.replace("-", " ", 1): found for reading, found in natural.items()}
    report = results_page.results_report(
        name, photo, saliency=saliency, natural=natural, reconstructions=folders, log=root / "log.csv"
    )
    report.lead = lead
    report.facts = {"this run": report_parts.facts_of_run(seconds, image=str(image)), **report.facts}
    for title, path in (("language models", root / "vlm.safetensors"), ("images", root / "images.npy")):
        report.facts[title] = report_parts.facts_of_artefact(path)
    write(root / "report.html", report)
    pictures = {"photo": photo, "where people look": read_rgb(saliency.with_name(f"{name}-overlay.png"))}
    there = {title: folder / "reconstruction.png" for title, folder in folders.items()}
    pictures |= {title.replace(", ", "\n"): read_rgb(path) for title, path in there.items() if path.is_file()}
    figures.picture_row(pictures, root / "figures" / "summary.png")
    report_parts.write_guide(root, "A workspace of run_all.py", results_page.WORKSPACE)
    return root / "report.html"


def get_parser() -> options.Parser:
    """Options; what is given goes to every stage that knows it."""
    parser = options.stage_parser(__doc__)
    parser.set_defaults(preset="demo")
    options.add_weights_options(parser)
    options.add_image_options(parser)
    parser.inputs("--source", nargs="+", help="training images, as for prepare_images.py (preset demo: sample photos)")
    parser.inputs("--num-images", type=options.positive, help="a random subset of the source")
    parser.model("--layers", nargs="+", metavar="LAYER", help="layers to extract and train (default: six)")
    parser.descent("--iterations", type=options.positive, help="training updates (default: the preset's)")
    parser.descent("--reconstruction-iterations", type=options.positive, help="(default: the descent's)")
    parser.inputs("--image", type=options.readable_file, help="photo for stages 4 and 5 (default: a sample photo)")
    parser.output("--from", dest="first", type=stage_name, default="prepare_images", help="first stage, 1-5 or name")
    parser.output("--to", dest="last", type=stage_name, default="saliency", help="last stage, 1-5 or name")
    parser.machine(
        "--gflops", type=options.positive_number, default=80.0, help="of each process, for --dry-run (default: 80)"
    )
    parser.machine(
        "--processes", type=options.positive, default=1, help="that torchrun is to start, in all, for --dry-run"
    )
    parser.output("--dry-run", action="store_true", help="print the plan with every value and its source, do nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the chosen stages in order and show their results, or print the plan."""
    args = get_parser().parse_args(argv)
    args.root = args.root or Path("out") / args.preset
    chosen = STAGES[STAGES.index(args.first) : STAGES.index(args.last) + 1]
    if not chosen:
        raise UserError(f"--from {args.first} comes after --to {args.last}: exchange them")
    image, first_training = args.image or sources.sample_photos()[0], {}
    if args.preset == "demo" and args.weights == "auto":  # its photos are too few to begin from nothing
        first_training = {"init": SHIPPED}
    given = options.as_arguments
    machine = given(device=args.device, seed=args.seed, overwrite=args.overwrite, verbose=args.verbose)
    common = given(preset=args.preset, root=args.root) + machine
    weights = given(weights=args.weights, mean_image=args.mean_image, cache=args.cache)
    layers, deep = given(layers=args.layers), given(range=args.range)
    rebuild = [str(image), *common, *weights, *given(iterations=args.reconstruction_iterations), *deep]
    commands = {
        "prepare_images": [[*common, *given(source=args.source, num_images=args.num_images), *deep]],
        "extract_features": [[*common, *weights, *layers]],
        "train_vlm": [[*common, *layers, *given(iterations=args.iterations, **first_training)]],
        "reconstruct": [[*rebuild, "--regularizer", name] for name in ("vlm", "none")],
        "saliency": [[str(image), *common, *weights, *deep]],
    }
    if args.dry_run:
        print_plan(commands, args.preset, args.layers, args.processes, args.gflops)
        return
    if "prepare_images" in chosen and args.source is None and args.preset != "demo":
        raise UserError(f"--source is missing: preset {args.preset} trains on your images (or use --preset demo)")
    started = time.monotonic()
    for stage in chosen:
        stage_started = time.monotonic()
        for stage_argv in commands[stage]:
            run_stage(stage, stage_argv)
        print(f"{stage}: {time.monotonic() - stage_started:.0f} s", flush=True)
    if "saliency" in chosen:
        target, descent = (PRESETS[args.preset]["reconstruct"][key].value for key in ("target", "descent"))
        lead, seconds = [GOES_ON] if first_training else [], time.monotonic() - started
        print(f"\n{show_results(args.root, image, target, descent, lead, seconds)} shows the results")
    size = sum(p.stat().st_size for p in args.root.rglob("*") if p.is_file())
    print(f"{args.root}: {artefacts.format_bytes(size)}, {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    sys.exit(program.run(main))
