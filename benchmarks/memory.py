"""Training from memory-mapped features against features in memory: speed, and how memory grows with the images.

As a module it is one training run that says how much memory it came to hold: `python -m benchmarks.memory OPTIONS`,
those of train_vlm.py.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import train_vlm
from benchmarks.timing import SEED, Figure, Report, Setup, milliseconds, ratio, run_python, seconds
from benchmarks.updates import make_models, optimizer_of
from models import training
from models.weights.downloads import file_hash
from pipeline import array_files, artefacts
from pipeline.features import open_features, read_batch

LAYER = "conv5"
GROWTH = 10  # times the images
SAID = "resident bytes: "


def write_features(folder: Path, count: int, height: int, width: int, size: int) -> None:
    """Made-up features (N, H, W, D) with their projection, as stage 2 leaves them."""
    generator = np.random.default_rng(SEED)
    path = folder / "projection.safetensors"
    parts = {"mean": size, "std": size, "pca_mean": size, "components": (size, size)}
    tensors = {f"{LAYER}.projection.{part}": torch.ones(shape) for part, shape in parts.items()}
    facts = {"layers": [LAYER], "backbone": "alexnet", "images_sha256": "", "weights": "", "weights_sha256": ""}
    facts |= {"names": [str(i) for i in range(count)], "held_out": []}
    artefacts.write_tensors(path, tensors, facts)
    artefacts.write_json(artefacts.sidecar_path(path), facts)
    noted = {"projection_sha256": file_hash(path)}
    writer = array_files.ArrayWriter(folder / f"{LAYER}.npy", (count, height, width, size), "float32", noted)
    for row in range(count):
        writer.put(row, generator.standard_normal((1, height, width, size), dtype=np.float32))
    writer.finish()


def measure_speed(setup: Setup) -> Figure:
    """Updates per second from the map over those from memory; conv5 of alexnet, batch 16."""
    count, (height, width, size), batch = (6, (4, 4, 6), 2) if setup.quick else (256, (13, 13, 128), 16)
    write_features(setup.folder / "speed", count, height, width, size)
    mapped = open_features(setup.folder / "speed", [LAYER]).stored[LAYER]
    models = make_models({LAYER: (height, width, size)}, setup)
    optimizer = optimizer_of(models)
    generator = np.random.default_rng(SEED)

    def update(features: np.ndarray) -> None:
        rows = generator.integers(0, count, batch)
        training.update(models, {LAYER: read_batch(features, rows, setup.device)}, optimizer)

    stored = np.array(mapped)
    took = seconds({"mapped": lambda: update(mapped), "in memory": lambda: update(stored)}, setup)
    note = f"{milliseconds(took['mapped'])} per update from the map, the file in the system's cache"
    return Figure(
        "updates: features mapped / in memory", ratio(took["in memory"], took["mapped"]), "%", 0.95, note=note
    )


def resident(root: Path, setup: Setup) -> int:
    """Most memory that train_vlm.py held while it read every row of a workspace some times, in bytes."""
    updates, batch = (4, 64) if setup.quick else (60, 256)
    options = ["--root", str(root), "--iterations", str(updates), "--batch-size", str(batch), "--log-every", "1000000"]
    options += ["--checkpoint-every", "1000000", "--learning-rate", "1e-3", "--held-out", "0", "--device", "cpu"]
    _, printed = run_python(["-m", "benchmarks.memory", *options], setup)
    return int(printed.rpartition(SAID)[2])


def measure_growth(setup: Setup) -> Figure:
    """Memory of a training run on ten times the images over that on the images."""
    count, size = (20, 4) if setup.quick else (1000, 16)
    held = {}
    for images in (count, GROWTH * count):
        root = setup.folder / f"root{images}"
        write_features(root / "features", images, 13, 13, size)
        held[images] = resident(root, setup)
    small, large = held[count], held[GROWTH * count]
    file = GROWTH * count * 13 * 13 * size * 4
    note = f"{small / 1e6:.0f} MB with {count} images, {large / 1e6:.0f} MB with {GROWTH * count}, {file / 1e6:.0f} MB"
    return Figure(f"training: memory with {GROWTH}× the images", (large / small,), goal=1.1, at_most=True, note=note)


def measure(setup: Setup) -> Report:
    """Speed of training from the map, and how memory grows with the images."""
    return Report([measure_speed(setup), measure_growth(setup)])


def peak_resident() -> int:
    """Most memory that this process has held, in bytes; of the parent it was started from, too, but on Linux."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    train_vlm.main(sys.argv[1:])
    print(f"{SAID}{peak_resident()}")
