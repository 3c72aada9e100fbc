"""Training of the language models: the images of an update, its rate, and what it changes."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from models.descent import MomentumSGD
from models.errors import UserError
from models.randomness import seed_for
from models.vlm import LayerModel

PAPER_LAYERS = 6  # layers that the paper trains jointly, over which its loss is the mean


def default_decays(iterations: int) -> tuple[int, ...]:
    """After one, two and three quarters of the run: 5000, 10000, 15000 for the paper's 20001 updates."""
    return tuple((iterations - 1) * quarter // 4 for quarter in (1, 2, 3))


def share_of_rate(joint_rate: float, layers: int) -> float:
    """The rate that gives some layers the trajectory they have when the paper's six are trained jointly.

    The loss is the mean over the layers of a run, so that fewer of them see larger gradients.
    """
    return joint_rate * layers / PAPER_LAYERS


def draw_rows(
    seed: int, iteration: int, images: np.ndarray, size: int, *, views: int = 1, count: int = 0
) -> np.ndarray:
    """`size` rows of update `iteration`, drawn with replacement: a function of the seed and the iteration alone.

    Of each of the `images` drawn, one of its `views` is taken, `count` rows apart.
    """
    generator = np.random.default_rng(seed_for(seed, "batch", iteration))
    drawn = images[generator.integers(0, len(images), size)]
    return drawn if views == 1 else drawn + count * generator.integers(0, views, size)


class Reduction:
    """How the processes of a training add up their shares of an update. This one is alone: there is nothing to add."""

    def start(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin to sum the gradients of some parameters; they are sums once `finish` returns."""

    def finish(self, losses: Tensor) -> Tensor:
        """Wait until all gradients are sums; returns the sum of the losses."""
        return losses


def batch_loss(layer: LayerModel, p: Tensor, precision: str = "float32") -> Tensor:
    """Loss of a layer on projected features (N, D, H, W), a float64 scalar.

    `precision` is that of the products; sums, losses, gradients and weights are float32 or better.
    """
    with torch.autocast(p.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext():
        return layer.loss(p)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise a UserError where a device cannot train an LSTM in a precision."""
    if precision == "float32":
        return
    try:
        batch_loss(LayerModel(16).to(device), torch.ones(1, 16, 3, 3, device=device), precision).backward()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--precision {precision} does not work on {device} ({reason}): use float32") from None


def update(
    layers: Mapping[str, LayerModel],
    projected: Mapping[str, Tensor],
    optimizer: MomentumSGD,
    *,
    part: float = 1.0,
    precision: str = "float32",
    reduction: Reduction | None = None,
) -> dict[str, float]:
    """One update on projected features (N, D, H, W) by layer; returns the losses before it.

    The loss is the mean over the layers given. Each layer's part is differentiated by itself: they share nothing.
    Of several processes each gives its share of the batch (N may be 0), and all make the update of the whole batch.

    Args:
        part: this process's images over the whole batch's.
        precision: as in `batch_loss`.
        reduction: adds up what the processes found.
    """
    reduction = reduction or Reduction()
    optimizer.zero_grad()
    losses = torch.zeros(len(projected), dtype=torch.float64)
    for i, (name, p) in enumerate(projected.items()):
        if len(p):
            loss = batch_loss(layers[name], p, precision) * part
            losses[i] = loss.item()
            (loss / len(projected)).backward()
        reduction.start([w for w in layers[name].parameters() if w.requires_grad])
    losses = reduction.finish(losses)
    optimizer.step()
    return dict(zip(projected, losses.tolist(), strict=True))
