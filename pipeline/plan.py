"""What a run will cost, computed from the architecture: disk, memory, arithmetic, network."""

from dataclasses import dataclass

from models.backbones import Architecture, Conv, Linear

PAPER_IMAGES = 50_000  # ILSVRC2012 validation set
ASSUMED_GFLOPS = 80.0  # of each process: what two cores sustain, measured while training
STORED_BYTES = 256 * 256 * 3  # of an image of stage 1
PCA_POSITIONS = 100_000  # of every layer, whose vectors the ranks send to the first
SEQUENCE_FLOPS = 34  # per D² and predicted vector: two LSTMs of 16 D² and a linear map of 2 D²
BACKWARD = 3  # forward and backward cost three times forward


@dataclass(frozen=True)
class Cost:
    """One stage: bytes written, bytes of memory it needs at least, floating-point operations, bytes read and sent.

    `memory` and `network`, what a process sends to the others, are those of each process, the rest of all together.
    """

    disk: float
    memory: float
    flops: float
    read: float = 0.0
    network: float = 0.0

    def hours(self, gflops: float = ASSUMED_GFLOPS, processes: int = 1) -> float:
        """Of arithmetic alone, at `gflops` GFLOP/s of each process."""
        return self.flops / (gflops * processes) / 1e9 / 3600


def all_reduced(size: float, processes: int) -> float:
    """Bytes that each process sends to sum `size` bytes over all, as in a ring: all but one part, there and back."""
    return 2 * size * (processes - 1) / processes


def cnn_flops(architecture: Architecture, layer: str, height: int, width: int) -> float:
    """Floating-point operations of one image from the input to a tap."""
    total = 0.0
    for operation in architecture.operations:
        if isinstance(operation, Conv):
            h, w = architecture.grid(operation.name, height, width)
            total += 2 * h * w * operation.outputs * operation.kernel**2 * operation.inputs / operation.groups
        elif isinstance(operation, Linear):
            total += 2 * operation.inputs * operation.outputs
        if operation.name == layer:
            break
    return total


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
    itemsize: int = 4,
    processes: int = 1,
) -> dict[str, Cost]:
    """Cost of every stage, by its name; `processes` share the work of extraction, training and saliency."""
    sizes = {layer: layer_size(architecture, layer) for layer in layers}
    features = sum(h * w * d for h, w, d in sizes.values()) * itemsize
    parameters = 4 * sum(4 * (17 * d * d + 9 * d) for _, _, d in sizes.values())  # bytes of the four directions'
    deepest = architecture.taps[-1]
    forward = cnn_flops(architecture, deepest, *architecture.crop)
    channels = sum(architecture.channels(layer) for layer in layers)
    samples = PCA_POSITIONS * channels * 4
    moments = all_reduced(2 * 8 * channels, processes) + samples * (processes > 1) / processes
    activations = 64 * sum(h * w * d for h, w, d in sizes.values()) * 4  # gates, cells, states of four directions
    update = update_flops(architecture, layers, batch)
    one = update_flops(architecture, [layer for layer in layers if layer != "data"], 1)
    return {
        "prepare_images": Cost(images * STORED_BYTES, 50e6, 0),
        "extract_features": Cost(
            images * features,
            samples + 16 * 5 * features,
            2 * images * forward,
            2 * images * STORED_BYTES,
            moments,
        ),
        "train_vlm": Cost(
            3 * parameters,
            3 * parameters + -(-batch // processes) * activations,
            iterations * update,
            iterations * batch * features,
            iterations * all_reduced(parameters, processes),
        ),
        "reconstruct": Cost(5e6, activations + parameters, reconstruction_iterations * (BACKWARD * forward + one)),
        "saliency": Cost(5e6, activations + parameters, forward + one / BACKWARD),
    }
