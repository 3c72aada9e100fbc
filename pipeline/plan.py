"""What a run will use and cost: every value with its source, disk and memory, hours at a stated speed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.backbones import Architecture
from models.objective import REGULARIZERS, default_layer_weights, descent_for
from models.training import default_decays, share_of_rate
from pipeline.presets import CARRIED, CODE, OURS, PRESETS, Setting

PAPER_IMAGES = 50_000  # ILSVRC2012 validation set
STORED_BYTES = 256 * 256 * 3  # of an image of stage 1
SEQUENCE_FLOPS = 34  # per D² and predicted vector: two LSTMs of 16 D² and a linear map of 2 D²
BACKWARD = 3  # forward and backward cost three times forward
GIVEN = "given"


@dataclass(frozen=True)
class Cost:
    """One stage: bytes written, bytes of memory each process needs at least, floating-point operations of all."""

    disk: float
    memory: float
    flops: float

    def hours(self, gflops: float, processes: int = 1) -> float:
        """Of arithmetic alone, at `gflops` GFLOP/s of each process."""
        return self.flops / (gflops * processes) / 1e9 / 3600


def values_used(stage: str, preset: str, used: Mapping[str, Any], layers: list[str]) -> dict[str, tuple[Any, str]]:
    """Value and source of every setting of a stage.

    Args:
        used: the stage's parsed arguments.
        layers: that are trained.
    """
    derived = {}
    if stage == "train_vlm":
        derived["decay_at"] = default_decays(used["iterations"])
        derived["learning_rate"] = share_of_rate(used["joint_learning_rate"], len(layers))
    if stage == "reconstruct":
        descent = descent_for(used["descent"], used["regularizer"])
        derived = descent.values(descent.decays(used["iterations"] or descent.iterations))
        has_vlm = REGULARIZERS[used["regularizer"]].vlm
        derived |= {name: getattr(descent, name) if has_vlm else 0.0 for name in ("vlm_weight", "energy_weight")}
    rows = {}
    for name, setting in PRESETS[preset][stage].items():
        if used[name] is None and setting.rule:
            rows[name] = derived.get(name), f"{setting.source}: {setting.rule}"
        else:
            rows[name] = used[name], setting.source if used[name] == setting.value else GIVEN
    return rows


def rules(architecture: Architecture, target: str) -> list[Setting]:
    """What no option sets of the reconstruction from a tap, in words, each with its source."""
    weights = ", ".join(f"{layer} {weight:g}" for layer, weight in default_layer_weights(architecture).items())
    whose = CODE if architecture.name.startswith("alexnet") else CARRIED
    per_unit = target in architecture.fully_connected
    sigma = f"σ of {target}: per {'unit' if per_unit else 'channel'}, over the training images"
    return [Setting(f"λ of the language models: {weights}", whose), Setting(sigma, CODE if per_unit else OURS)]


def layer_size(architecture: Architecture, layer: str) -> tuple[int, int, int]:
    """Grid and kept components (H, W, D) of a layer of training images."""
    return (*architecture.grid(layer, *architecture.crop), (architecture.channels(layer) + 1) // 2)


def predicted(height: int, width: int) -> int:
    """Vectors that the four directions predict on one feature map."""
    return 2 * ((height - 1) * width + (width - 1) * height)


def update_flops(architecture: Architecture, layers: list[str], batch: int) -> float:
    """Floating-point operations of one training update of the language models."""
    total = 0.0
    for layer in layers:
        h, w, d = layer_size(architecture, layer)
        total += BACKWARD * batch * predicted(h, w) * SEQUENCE_FLOPS * d * d
    return total


def costs(
    architecture: Architecture,
    images: int,
    layers: list[str],
    *,
    batch: int,
    iterations: int,
    reconstruction_iterations: int,
    pca_positions: int,
    itemsize: int = 4,
    processes: int = 1,
) -> dict[str, Cost]:
    """Cost of every stage, by its name; `processes` share the work of extraction, training and saliency."""
    sizes = [layer_size(architecture, layer) for layer in layers]
    features = sum(h * w * d for h, w, d in sizes) * itemsize
    parameters = 4 * sum(4 * (17 * d * d + 9 * d) for _, _, d in sizes)  # bytes of the four directions'
    forward = architecture.flops(architecture.taps[-1], *architecture.crop)
    samples = pca_positions * sum(architecture.channels(layer) for layer in layers) * 4
    activations = 64 * sum(h * w * d for h, w, d in sizes) * 4  # gates, cells, states of four directions
    update = update_flops(architecture, layers, batch)
    one = update_flops(architecture, [layer for layer in layers if layer != "data"], 1)
    share = -(-batch // processes)
    return {
        "prepare_images": Cost(images * STORED_BYTES, 50e6, 0),
        "extract_features": Cost(images * features, samples + 16 * 5 * features, 2 * images * forward),
        "train_vlm": Cost(3 * parameters, 3 * parameters + share * activations, iterations * update),
        "reconstruct": Cost(5e6, activations + parameters, reconstruction_iterations * (BACKWARD * forward + one)),
        "saliency": Cost(5e6, activations + parameters, forward + one / BACKWARD),
    }
