"""Stages run in a fraction of a second, on a CNN of two small convolutions, in processes that meet with accidents.

The processes are forked from one that has imported torch, so that dozens of runs cost seconds. As a module this runs
one stage on that CNN: `python -m tests.tiny extract_features --backbone tiny …`.
"""

import errno
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import nn

import evaluate
import extract_features
import prepare_images
import reconstruct
import saliency
import train_vlm
from evaluation import classifier, fixation_metrics, map_sources, score_fixations, tables  # noqa: F401 (imported before the fork)  # noqa: F401
from models import checkpoints, descent, training, vlm  # noqa: F401 (imported before the fork)
from models import unnaturalness as maps  # noqa: F401
from models.backbones import ARCHITECTURES, chain, named
from pipeline import artefacts, features, figures, program, targets  # noqa: F401
from pipeline.images import write_png

STAGES = {m.__name__: m for m in (prepare_images, extract_features, train_vlm, reconstruct, saliency, evaluate)}
matplotlib.colormaps.get_cmap(figures.HEAT)  # a first time
TINY = chain(
    "tiny",
    lambda: named(
        conv1=nn.Conv2d(3, 6, 3, stride=2),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(6, 20, 3),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(3, 3),
        flatten=nn.Flatten(),
        fc3=nn.Linear(20 * 3 * 3, 5),
    ),
    vlm_layers=("data", "conv1", "conv2"),
    crop=(24, 24),
    mean=(120.0, 110.0, 100.0),
    scale=(60.0, 60.0, 60.0),
)
TINY.survey()  # a first run without data makes torch import a thousand modules
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Accident:
    """What happens to a process when it touches a file in its workspace for the `at`-th time, or later.

    `signal`: it gets this signal (SIGKILL leaves the file that it was writing cut in half). `full`: from then on no
    file can be opened for writing, for want of room. `largest_file`: no file may grow beyond so many bytes, from the
    start. `at_update`: the signal comes in this training update instead.
    """

    at: int = 0
    signal: int = 0
    full: bool = False
    largest_file: int = 0
    at_update: int = 0


class _Watch:
    """An audit hook that counts what changes the files of a folder, and lets the accident happen."""

    def __init__(self, folder: str, accident: Accident):
        self.folder, self.accident, self.count, self.writing = folder, accident, 0, None

    def __call__(self, event: str, arguments: tuple) -> None:
        changes = event in ("os.rename", "os.remove", "os.truncate") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        )
        if not changes or not str(arguments[0]).startswith(self.folder) or str(arguments[0]).endswith(".lock"):
            return
        self.count += 1
        if self.accident.at and self.count >= self.accident.at:
            if self.accident.full and event == "open":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            if self.accident.signal and self.count == self.accident.at:
                self.strike()
        if event == "open":
            self.writing = str(arguments[0]) if arguments[1] and "w" in arguments[1] else None

    def strike(self) -> None:
        if self.accident.signal == signal.SIGKILL and self.writing and Path(self.writing).is_file():
            os.truncate(self.writing, Path(self.writing).stat().st_size // 2)
        os.kill(os.getpid(), self.accident.signal)


def _prepare(stage: str, argv: list[str]) -> None:
    sys.argv = [f"{stage}.py", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    torch.set_num_threads(1)
    ARCHITECTURES["tiny"] = TINY
    os.fsync = os.fstat  # as in conftest.py
    features.SAVE_EVERY = 0.0
    targets.ENERGY_VIEWS = 2
    prepare_images.MARK_EVERY = 2
    program.code_version = lambda: "tested"  # git costs a process
    for name in ("loss_curves", "reconstruction_curves", "picture_row", "picture_grid"):  # matplotlib costs a second
        setattr(figures, name, lambda _, path, *more, **named: write_png(path, np.zeros((2, 2), np.uint8)))
    tables.RESAMPLES = 50
    classifier.find_weights = lambda judge: None


def _run(
    stage: str,
    argv: list[str],
    root: str,
    output: str,
    accident: Accident,
    environment: dict[str, str],
    before: Callable[[], object] | None,
) -> None:
    with Path(output).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update(environment)
    _prepare(stage, argv)
    if before is not None:
        before()
    if accident.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (accident.largest_file, resource.RLIM_INFINITY))
    watch = _Watch(root, accident)
    if accident.at_update:
        update, calls = training.update, []

        def interrupted(*arguments, **options):
            calls.append(None)
            if len(calls) == accident.at_update:
                os.kill(os.getpid(), accident.signal)
            return update(*arguments, **options)

        training.update = interrupted
    else:
        sys.addaudithook(watch)
    code = program.run(lambda: STAGES[stage].main(argv))
    sys.stdout.flush()
    sys.stderr.flush()
    Path(f"{output}.count").write_text(str(watch.count))
    os._exit(code)


def start(
    stage: str,
    argv: list[str],
    root: Path,
    output: Path,
    accident: Accident = Accident(),  # noqa: B008
    environment: Mapping[str, str] | None = None,
    before: Callable[[], object] | None = None,
) -> BaseProcess:
    """Start a stage in a process of its own, which first calls `before`; its output goes to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tiny"])
    process = context.Process(
        target=_run, args=(stage, argv, str(root), str(output), accident, dict(environment or {}), before)
    )
    process.start()
    return process


def run(
    stage: str,
    argv: list[str],
    root: Path,
    output: Path,
    accident: Accident = Accident(),  # noqa: B008
) -> tuple[int, str, int]:
    """Run a stage to its end: exit code (negative: a signal), output, how often it changed a file of `root`."""
    process = start(stage, argv, root, output, accident)
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    count = Path(f"{output}.count")
    touched = int(count.read_text()) if count.is_file() else 0
    count.unlink(missing_ok=True)
    return process.exitcode, output.read_text(), touched


def run_ranks(
    ranks: int,
    stage: str,
    argv: list[str],
    root: Path,
    accidents: Mapping[int, Accident] | None = None,
    before: Callable[[], object] | None = None,
) -> list[tuple[int, str]]:
    """Run a stage in several processes that work together: exit code and output of each, kept in `root`/../rank<r>."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        accident = (accidents or {}).get(rank, Accident())
        texts = {name: str(value) for name, value in environment.items()}
        processes.append(start(stage, argv, root, root.parent / f"rank{rank}", accident, texts, before))
    for process in processes:
        process.join(300)
        assert process.exitcode is not None, "it hangs"
    return [(p.exitcode, (root.parent / f"rank{rank}").read_text()) for rank, p in enumerate(processes)]


def touched(rank: int, root: Path) -> int:
    """How often a rank of the latest `run_ranks` changed a file of `root`."""
    return int((root.parent / f"rank{rank}.count").read_text())


if __name__ == "__main__":
    _prepare(sys.argv[1], sys.argv[2:])
    sys.exit(program.run(lambda: STAGES[Path(sys.argv[0]).stem].main(sys.argv[1:])))
