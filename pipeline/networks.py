"""Devices, and the backbones that stages read."""

import ctypes
import hashlib
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from models.backbones import Backbone, find_architecture
from models.checkpoints import load_vlm
from models.errors import UserError
from models.weights import find
from pipeline import distributed, ownership
from pipeline.paths import user_path
from pipeline.presets import PRETRAINED
from pipeline.progress import Progress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_BYTES = 2**30


@dataclass(frozen=True)
class WeightsChoice:
    """Which CNN weights are wanted: what the options of `add_weights_options` and --seed say."""

    weights: str = "auto"
    mean_image: Path | None = None
    cache: Path | None = None
    seed: int = 0


def load_backbone(
    choice: WeightsChoice, name: str, layers: Collection[str], device: torch.device
) -> tuple[Backbone, find.Weights]:
    """A backbone and its weights on a device; says which were taken.

    `layers` are the taps that will be read: they decide whether convolutions alone are enough.
    """
    file = choice.weights if choice.weights in ("auto", "random") else str(user_path(choice.weights))
    ownership.reading(Path(file))
    with Progress(None, "weights", "B") as progress:
        backbone, weights = find.load_backbone(
            name,
            file,
            layers=layers,
            mean_image=choice.mean_image or "auto",
            cache=choice.cache,
            progress=progress.download,
            seed=choice.seed,
        )
    _say_once(f"weights: {weights.source}, sha256 {weights.sha256[:16]}")
    return backbone.to(device), weights


def obtain(choice: WeightsChoice, checkpoint: Path, tap: str) -> None:
    """Refuse a tap that a checkpoint's backbone lacks; get the complete weights now if the tap needs them.

    Raises:
        UserError: no such tap, or its weights can neither be found nor downloaded.
    """
    architecture = find_architecture(load_vlm(checkpoint)[1].backbone)
    architecture.check_tap(tap)
    if tap in architecture.fully_connected:
        load_backbone(choice, architecture.name, [tap], pick_device("cpu"))


@cache
def _say_once(line: str) -> None:
    """Print a line, unless this process has printed it before."""
    print(line, flush=True)


def lay_out(backbone: Backbone) -> Backbone:
    """The backbone with its weights in the memory layout that is fastest on its device: channels last on a CPU."""
    return backbone.to(memory_format=torch.channels_last) if backbone.device.type == "cpu" else backbone


def weights_facts(backbone: Backbone, weights: find.Weights) -> dict[str, str]:
    """What a sidecar states of the CNN's weights, and of the mean image where there is one."""
    facts = {"weights_sha256": weights.sha256}
    if backbone.mean_image is not None:
        facts["mean_image_sha256"] = hashlib.sha256(backbone.mean_image.cpu().numpy().tobytes()).hexdigest()
    return facts


def print_taps(name: str) -> None:
    """Every tap of a backbone: channels, grid of a training image, stride; `*` where language models read."""
    architecture = find_architecture(name)
    architecture.survey()
    print(f"{name}: images of {architecture.crop[1]}×{architecture.crop[0]}, taps in order")
    print(f"  {'tap':<48} {'channels':>8} {'grid':>9} {'stride':>7}")
    for tap in architecture.taps:
        grid, stride = (
            "×".join(map(str, pair)) for pair in (architecture.grid(tap, *architecture.crop), architecture.stride(tap))
        )
        shape = f"{grid:>9} {stride:>7}" if tap in architecture.maps else f"{'vector':>9} {'-':>7}"
        print(f"{'*' if tap in architecture.vlm_layers else ' '} {tap:<48} {architecture.channels(tap):>8} {shape}")


def shipped_checkpoints() -> list[Path]:
    """The checkpoints in models/pretrained.

    Raises:
        UserError: there are none.
    """
    if not (found := sorted(PRETRAINED.glob("*.safetensors"))):
        raise UserError("there is nothing to evaluate: give checkpoints with --vlm")
    return found


def prepare_device(name: str) -> torch.device:
    """The torch device of --device, one of `options.DEVICES`, and this process made ready for long work on it.

    Raises:
        UserError: the device asked for is not there.
    """
    device = pick_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def pick_device(name: str) -> torch.device:
    """The torch device of --device; of several ranks each has its own.

    Raises:
        UserError: the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name} is not available here: use --device auto or cpu")
    if name == "cuda" and distributed.launched():
        if distributed.local_rank() >= torch.cuda.device_count():
            raise UserError(f"{torch.cuda.device_count()} CUDA devices are too few: lower --nproc-per-node to that")
        return torch.device(name, distributed.local_rank())
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for what is allocated next; where it is not glibc, nothing changes.

    It gives large blocks back to the system, which then has to hand out and clear the pages of the same tensors in
    every update (docs/RESULTS.md, speed).
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            library.mallopt(parameter, KEPT_BYTES)
