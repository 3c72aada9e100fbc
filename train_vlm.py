"""Stage 3: projected features -> the visual language model.

In:  ROOT/features/<layer>.npy (N, H, W, D) and ROOT/features/projection.safetensors, of stage 2.
Out: ROOT/vlm.safetensors, the model of all layers trained so far; ROOT/log.csv, a line per layer and interval;
     ROOT/figures/loss.png; ROOT/train_state/, what a killed run needs to go on.

Layers share no parameters: trained in one run or in several, at once or in turn, they end up in the same
vlm.safetensors; --merge adds those of other workspaces with the same projection. --init starts from trained weights;
--export writes the checkpoint as float16, as those in models/pretrained/ are.

    python train_vlm.py --preset alexnet --layers conv5 --learning-rate 10 --iterations 3000
    torchrun --nproc-per-node=8 train_vlm.py --preset alexnet
    python train_vlm.py --preset alexnet --merge other/vlm.safetensors
    python train_vlm.py --preset alexnet --export alexnet.safetensors
"""

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from models.errors import UserError
from pipeline import distributed, locks, options, ownership, program
from pipeline.progress import Progress, SafePoints
from pipeline.splits import split_for_training

if TYPE_CHECKING:
    import torch

    from models.descent import MomentumSGD, Schedule
    from models.vlm import LayerModel
    from pipeline.training_runs import Run

PRECISIONS = ("float32", "bfloat16")
WATCHED = 16  # training images whose loss is logged where none are held out
DECIDING = tuple("iterations batch_size learning_rate momentum decay_at decay_factor seed precision cell".split())


def train(
    layers: "Mapping[str, LayerModel]",
    stored: Mapping[str, np.ndarray],
    draw: Callable[[int], np.ndarray],
    optimizer: "MomentumSGD",
    schedule: "Schedule",
    iterations: int,
    callback: Callable[[dict[str, float]], object],
    first: int = 0,
    *,
    device: "torch.device | str" = "cpu",
    precision: str = "float32",
) -> None:
    """Train language models by layer on stored features (N, H, W, D), from update `first` to before `iterations`.

    Args:
        draw: rows of the batch of an update, of which each rank takes its share.
        optimizer: of the layers' parameters, changed in place.
        schedule: rate of every update, and when the momentum starts anew.
        callback: gets the losses before an update, by layer, once it is made.
    """
    from models import training
    from pipeline.features import read_batch

    for i in range(first, iterations):
        schedule.prepare(optimizer, i)
        rows = draw(i)
        mine = np.array_split(rows, distributed.size())[distributed.rank()]
        batch = {layer: read_batch(features, mine, device) for layer, features in stored.items()}  # (B, D, H, W)
        losses = training.update(
            layers,
            batch,
            optimizer,
            part=len(mine) / len(rows),
            precision=precision,
            reduction=distributed.GradientSum(),
        )
        callback(losses)


def train_on_disk(
    run: "Run", training: np.ndarray, watched: np.ndarray, device: "torch.device", log_every: int, checkpoint_every: int
) -> None:
    """The remaining updates of a run on the images `training`, with its log, its checkpoints, and answers to signals.

    The loss of the images `watched` is logged beside the training loss.

    Raises:
        UserError: the loss is no longer finite; the last checkpoint stays.
    """
    from models.training import draw_rows

    facts, stored = run.facts, run.features.stored
    progress = Progress(facts.iterations, f"training {' '.join(stored)}", "it", run.iteration)
    with progress, SafePoints() as signals:

        def callback(losses: dict[str, float]) -> None:
            """What follows an update."""
            run.add(losses)
            progress.update(note=f"loss {sum(losses.values()) / len(losses):.4f}")
            if run.iteration % log_every == 0 or run.is_done:
                run.write_log_lines(watched, device)
            if run.iteration % checkpoint_every == 0 or run.is_done:
                run.save()
            signals.check(run.save, distributed.any_of(signals.caught is not None))

        train(
            run.vlm.layers,
            stored,
            lambda i: draw_rows(facts.seed, i, training, facts.batch_size, views=facts.views, count=facts.num_images),
            run.optimizer,
            run.schedule,
            facts.iterations,
            callback,
            run.iteration,
            device=device,
            precision=facts.precision,
        )


def get_parser() -> options.Parser:
    """Options; those without a default here take the preset's."""
    parser = options.stage_parser(__doc__)
    parser.inputs("--features", type=options.folder, help="folder of stage 2 (default: ROOT/features)")
    parser.output("--out", type=options.writable_file, help="checkpoint to write (default: ROOT/vlm.safetensors)")
    parser.model("--layers", nargs="+", metavar="LAYER", help="layers to train now (default: all extracted)")
    parser.inputs(
        "--merge",
        nargs="+",
        type=options.readable_file,
        metavar="FILE",
        help="train nothing: add layers trained elsewhere on the same projection",
    )
    parser.inputs("--export", type=options.writable_file, help="train nothing: write the checkpoint as float16")
    parser.model(
        "--init", type=options.readable_file, help="checkpoint whose weights training starts from (paper: N(0, 0.01²))"
    )
    parser.inputs(
        "--from-iteration", type=options.natural, default=0, help="with --init: where in the schedule its weights stand"
    )
    cell = options.entry_of("models.vlm", "CELLS")
    parser.model("--cell", type=cell, metavar="lstm|gru", help="recurrent model of every direction")
    parser.descent("--iterations", type=options.positive, help="updates")
    parser.descent("--batch-size", type=options.positive, help="images of an update")
    parser.descent(
        "--joint-learning-rate",
        type=options.positive_number,
        help="learning rate where six layers are trained jointly; the loss is the mean over the layers of a run",
    )
    parser.descent("--learning-rate", type=options.positive_number, help="learning rate of this run")
    parser.descent("--momentum", type=options.fraction, help="of gradient descent")
    parser.descent(
        "--decay-at",
        type=options.positive,
        nargs="*",
        help="updates after which the learning rate falls and the momentum is reset",
    )
    parser.descent("--decay-factor", type=options.positive_number, help="of the learning rate at each of them")
    parser.inputs(
        "--held-out",
        type=options.count_or_file,
        metavar="COUNT|FILE",
        help="images for the validation loss: how many, or a text file of their names",
    )
    parser.inputs(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="images, by name, that are not trained on either"
    )
    parser.descent(
        "--precision",
        choices=PRECISIONS,
        help="of the products; bfloat16: mixed precision, for CUDA and CPUs that have it",
    )
    parser.output("--log-every", type=options.positive, default=100, help="updates between log lines")
    parser.output("--checkpoint-every", type=options.positive, help="updates between checkpoints")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train, or with --merge and --export only handle what was trained."""
    args = options.parse_args(get_parser(), argv, "train_vlm")
    out = args.out or args.root / "vlm.safetensors"
    chosen = {**vars(args), "out": out}
    if args.from_iteration and not args.init:
        raise UserError("--from-iteration tells where the weights of --init stand: give both, or neither")
    if args.from_iteration >= args.iterations:
        raise UserError(f"--from-iteration {args.from_iteration} leaves nothing of --iterations {args.iterations}")
    from models import training
    from pipeline import language_models, networks
    from pipeline.features import open_features
    from pipeline.training_runs import Run, TrainingFacts

    if args.merge or args.export:
        program.announce(chosen)
        if args.merge:
            with locks.claim(out):
                language_models.merge_files(args.merge, out, args.root, args.overwrite)
        else:
            language_models.export(out, args.export)
        return
    device = networks.prepare_device(args.device)
    with distributed.group(device):
        features = open_features(args.features or args.root / "features", args.layers)
        with locks.claim(*(args.root / "train_state" / layer for layer in features.layers)):
            rate = args.learning_rate or training.share_of_rate(args.joint_learning_rate, len(features.layers))
            decays = training.default_decays(args.iterations) if args.decay_at is None else sorted(args.decay_at)
            chosen |= {"learning_rate": rate, "decay_at": tuple(decays)}
            program.announce(chosen, device)
            training.check_precision(args.precision, device)
            rows, held = split_for_training(args.held_out, args.exclude, features.names, features.held_out, args.seed)
            vlm = language_models.build_model(features.projection, features.layers, args.seed, args.cell)
            init = None
            if args.init:
                digest = language_models.start_from(args.init, vlm, features.provenance.backbone)
                init = {"sha256": digest, "iteration": args.from_iteration}
            facts = TrainingFacts(
                **features.facts(),
                **{name: chosen[name] for name in DECIDING},
                held_out=len(held),
                held_out_names=tuple(features.names[row] for row in held),
                exclude=tuple(args.exclude),
                init=init,
            )
            run = Run(args.root, out, vlm.to(device), features, facts, args.from_iteration)
            distributed.first(lambda: ownership.foresee(out.parent, out.name))
            distributed.first(lambda: ownership.foresee(args.root, "log.csv"))
            run.resume(args.overwrite)
            layers = ", ".join(features.layers)
            watched = held if len(held) else rows[:WATCHED]
            if run.is_done and distributed.first(run.is_written):
                print(f"{run.out}: {layers} finished {run.iteration} iterations: nothing to do")
                return
            if run.is_done:
                run.complete(watched, device)
            elif run.iteration > args.from_iteration:
                print(f"going on after iteration {run.iteration}")
            train_on_disk(run, rows, watched, device, args.log_every, args.checkpoint_every)
            print(f"{run.out}: {layers} trained for {run.iteration} iterations")


if __name__ == "__main__":
    sys.exit(program.run(main))
