"""Stage 4: CNN features -> the images that have them.

In:  images to invert, or features (.npy), or rows of ROOT/images.npy; ROOT/vlm.safetensors of stage 3.
Out: a folder per input: reconstruction.png and .npy (H, W, 3) float32 RGB, of the best restart; image.png, what was
     inverted; restart-<r>.png; snapshots/; curves.csv and .png of every term; comparison.png; parameters.json.

    python reconstruct.py photo.jpg --target pool5 --regularizer vlm
    python reconstruct.py --held-out --regularizer tv
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import UserError
from models.weights.downloads import file_hash
from pipeline import artefacts, locks, options, ownership, program
from pipeline.progress import Progress, SafePoints, Terminated

if TYPE_CHECKING:
    from models.descent import Schedule
    from models.objective import ReconstructionLoss
    from pipeline.reconstruction import Restart, Task
    from pipeline.targets import Source


def reconstruct(
    task: "Task", source: "Source", out: Path, facts: artefacts.Facts, restarts: int, every: int, overwrite: bool
) -> None:
    """All restarts of one input, and what they leave in `out`; nothing where that is finished."""
    from pipeline import reconstruction, targets

    target, rgb, digest = targets.read_source(source, task.backbone, task.objective.target)
    facts = {"input": source.name, "input_sha256": digest, **facts}
    if reconstruction.reuse(out, facts, overwrite):
        return
    ownership.foresee(out, *reconstruction.OUTPUTS)
    facts |= {"energies": task.energies}
    loss, begun = task.loss(target), []
    try:
        for number in range(restarts):
            restart = task.restart(number, out, facts)
            if not overwrite:
                restart.resume()
            begun.append(restart)
            run(restart, loss, task.schedule, every)
    except (KeyboardInterrupt, Terminated):
        reconstruction.save(out, begun, rgb)
        raise
    reconstruction.save(out, begun, rgb)
    reconstruction.finish(out, begun, facts)


def run(restart: "Restart", loss: "ReconstructionLoss", schedule: "Schedule", every: int) -> None:
    """Descend to the end; save a snapshot and the state every so many updates, and on Ctrl-C."""
    from models.descent import descend

    iterations, done = restart.facts["iterations"], len(restart.curves)
    what = f"reconstructing {restart.facts['target']} ({restart.facts['regularizer']})"
    with Progress(iterations, what, "it", done) as progress, SafePoints() as signals:

        def callback(i: int, terms: dict[str, float]) -> None:
            restart.curves.append(terms)
            progress.update(note=f"loss {terms['total']:.4f}, feature {terms['feature']:.4f}")
            if (i + 1) % every == 0 and i + 1 < iterations:
                restart.snapshot()
            signals.check(restart.snapshot)  # image, optimiser and curves agree only here

        descend(loss, restart.image, restart.optimizer, schedule, iterations, callback, done)


def for_each(sources: "list[Source]", problems: list[str], work: Callable[["Source"], None]) -> int:
    """Do the work of every input, past those that cannot be done of several; the exit code, 2 if there were any."""
    failed = len(problems)
    for problem in problems:
        print(f"reconstruct.py: {problem}", file=sys.stderr)
    for number, source in enumerate(sources, start=1):
        if len(sources) > 1:
            print(f"{number}/{len(sources)} {source.name}", flush=True)
        try:
            work(source)
        except Exception as error:
            if len(sources) == 1:
                raise
            print(f"reconstruct.py: {source.name}: {program.why_left_out(error)}", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


def output_folder(out: Path | None, root: Path, source: "Source", single: bool, kind: str) -> Path:
    """Where the results of one input go; `single` where it is the only one, named on the command line."""
    if out is None:
        return root / "reconstructions" / f"{source.name}-{kind}"
    return out if single else out / source.name


def get_parser() -> options.Parser:
    """Options; those without a default here take the preset's."""
    parser = options.stage_parser(__doc__)
    options.add_weights_options(parser)
    options.add_image_options(parser)
    parser.inputs(
        "inputs", nargs="*", metavar="IMAGE|FOLDER|FEATURE.npy", help="images to reconstruct, or stored features"
    )
    parser.inputs(
        "--images", type=options.readable_file, help="images of stage 1 for --rows (default: ROOT/images.npy)"
    )
    parser.inputs("--rows", type=options.natural, nargs="+", metavar="ROW", help="reconstruct these of --images")
    parser.inputs("--held-out", action="store_true", help="reconstruct the rows that training held out")
    parser.model(
        "--vlm", type=options.readable_file, help="checkpoint, also for the statistics (default: ROOT/vlm.safetensors)"
    )
    parser.model(
        "--statistics",
        type=options.readable_file,
        help="of stage 2: σ of taps that the checkpoint lacks (default: of sample photos)",
    )
    parser.model("--target", metavar="TAP", help="feature to invert")
    parser.descent("--restarts", type=options.positive, default=1, help="descents from other noise; the best is kept")
    parser.output("--snapshot-every", type=options.positive, default=100, help="updates between snapshots")
    parser.output(
        "--out",
        type=options.writable_folder,
        help="folder, of several inputs one for each (default: below ROOT/reconstructions)",
    )
    add_objective_options(parser)
    add_descent_options(parser)
    return parser


def add_objective_options(parser: options.Parser) -> None:
    """Options that say which image is best."""
    weight = options.non_negative_number
    parser.model(
        "--regularizer",
        type=options.entry_of("models.objective", "REGULARIZERS"),
        metavar="none|l2|tv|vlm|vlm+tv",
        help="vlm is the paper's, none its control",
    )
    parser.model("--layers", nargs="+", metavar="LAYER", help="layers that regularise (default: all weighted)")
    parser.model("--layer-weights", nargs="+", type=weight, help="λ of --layers, in order")
    parser.model("--feature-weight", type=weight, help="λ₁")
    parser.model("--vlm-weight", type=weight, help="λ₂")
    parser.model("--energy-weight", type=weight, help="of features' energy, against paleness")
    parser.model("--l2-weight", type=weight, help="λ of the norm in l2")
    parser.model("--tv-weight", type=weight, help="λ of total variation (tv: by depth)")


def add_descent_options(parser: options.Parser) -> None:
    """Options that say how it is looked for."""
    parser.descent(
        "--descent",
        type=options.entry_of("models.descent", "DESCENTS"),
        metavar="authors|fourier",
        help="authors: each regulariser's own; fourier: one for all",
    )
    parser.descent("--iterations", type=options.positive, help="updates of each restart")
    parser.descent("--learning-rate", type=options.positive_number, help="of what is varied")
    parser.descent("--decay-at", type=options.natural, nargs="*", metavar="I", help="a tenth of the rate after these")
    parser.descent("--momentum", type=options.fraction, help="of the optimiser")
    parser.descent("--start-noise", type=options.non_negative_number, help="noise at the start, times the data's")
    parser.descent(
        "--frequency-exponent",
        type=options.non_negative_number,
        help="fourier: scale by frequency to minus this (default: 1; 0: all alike)",
    )
    parser.descent(
        "--decorrelate", action=argparse.BooleanOptionalAction, help="fourier: vary decorrelated colours (default: yes)"
    )
    parser.descent("--in-turn", action=argparse.BooleanOptionalAction, help="one direction of each model at an update")


def main(argv: list[str] | None = None) -> int:
    """Run the stage; 2 if one of several inputs could not be reconstructed."""
    args = options.parse_args(get_parser(), argv, "reconstruct")
    from models.checkpoints import load_vlm
    from pipeline import networks, reconstruction, targets

    checkpoint, images = args.vlm or args.root / "vlm.safetensors", args.images or args.root / "images.npy"
    vlm, notes = load_vlm(checkpoint)
    held_out_by = notes.training if args.held_out else None
    sources, problems = targets.list_sources(args.inputs, args.rows or [], held_out_by, images)
    descent, schedule = reconstruction.choose_descent(
        args.descent,
        args.regularizer,
        args.decay_at,
        {"exponent": args.frequency_exponent, "decorrelate": args.decorrelate},
        learning_rate=args.learning_rate,
        iterations=args.iterations,
        momentum=args.momentum,
        noise=args.start_noise,
        in_turn=args.in_turn,
    )
    objective = reconstruction.choose_objective(
        args.regularizer,
        args.target,
        notes.backbone,
        list(vlm.layers),
        layers=args.layers,
        layer_weights=args.layer_weights,
        feature_weight=args.feature_weight,
        vlm_weight=descent.vlm_weight if args.vlm_weight is None else args.vlm_weight,
        energy_weight=descent.energy_weight if args.energy_weight is None else args.energy_weight,
        penalties={"l2": args.l2_weight, "tv": args.tv_weight},
    )
    if descent.start == "zero" and args.restarts > 1:
        raise UserError(f"every descent of {args.regularizer} starts from the same image: use --restarts 1")
    device = networks.prepare_device(args.device)
    effective = {"vlm_weight": objective.vlm_weight, "energy_weight": objective.energy_weight}
    program.announce({**vars(args), **effective, **descent.values(schedule.decay_at)}, device)
    choice = networks.WeightsChoice(args.weights, args.mean_image, args.cache, args.seed)
    backbone, weights = networks.load_backbone(choice, notes.backbone, [args.target], device)
    taps = reconstruction.taps_measured(objective, descent)
    statistics, measured = targets.needed_statistics(vlm.statistics, args.statistics, backbone, taps)
    vlm = vlm.freeze().to(device)
    task = reconstruction.Task(backbone, vlm, statistics, objective, args.descent, descent, schedule, args.seed)
    facts = task.facts(weights.sha256, file_hash(checkpoint))
    facts |= {"restarts": args.restarts, "measured": measured, **options.image_facts()}
    single = len(args.inputs) == 1 and not (args.rows or args.held_out or Path(args.inputs[0]).is_dir())
    kind = f"{args.target}-{args.regularizer}-{args.descent}"

    def work(source: "Source") -> None:
        out = output_folder(args.out, args.root, source, single, kind)
        with locks.claim(out):
            reconstruct(task, source, out, facts, args.restarts, args.snapshot_every, args.overwrite)

    return for_each(sources, problems, work)


if __name__ == "__main__":
    sys.exit(program.run(main))
