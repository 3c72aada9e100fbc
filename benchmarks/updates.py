"""One training update, features in memory, against the original's scan, plain nn.LSTM and the machine's own product."""

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from benchmarks import direct
from benchmarks.timing import SEED, Figure, MatrixProduct, Report, Setup, milliseconds, ratio, seconds
from models import training
from models.backbones import ARCHITECTURES
from models.descent import MomentumSGD
from models.vlm import LayerModel, layer_loss
from pipeline import plan

ARCHITECTURE = ARCHITECTURES["alexnet"]
BATCH = 16
TOLERANCE = 1e-4  # of losses, relative: they are sums in other orders, after one update
QUICK_SIZES = {"conv4": (3, 3, 4), "conv5": (4, 4, 6)}
Update = Callable[[], dict[str, float]]


def flops(sizes: Mapping[str, tuple[int, int, int]], batch: int, strict: bool = False) -> float:
    """Floating-point operations of one update, mean of four directions, layers of (H, W, D).

    A direction predicts (H - 1)·W or (W - 1)·H vectors per image. Each takes two LSTMs of 2·4D·(D + D) and a linear map
    of 2·D·D, 34 D² in all; gradients of weights and of inputs as many again each: 3·34 D².

    `strict` leaves out what no implementation needs: the gradient towards the features (8 D² per vector), and the
    recurrence of the first step, which reads zeros (8 D² in each of both LSTMs, three times).
    """
    total = 0.0
    for h, w, d in sizes.values():
        total += plan.BACKWARD * plan.predicted(h, w) * plan.SEQUENCE_FLOPS * d * d
        if strict:
            first = 2 * (w + h)  # vectors predicted by first steps
            total -= plan.predicted(h, w) * 8 * d * d + first * 2 * plan.BACKWARD * 8 * d * d
    return batch * total


def draw(sizes: Mapping[str, tuple[int, int, int]], batch: int, setup: Setup) -> dict[str, Tensor]:
    """Made-up features (B, D, H, W) by layer, in the memory layout that stored ones have."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = {name: torch.randn(batch, h, w, d, generator=generator) for name, (h, w, d) in sizes.items()}
    return {name: x.to(setup.device).permute(0, 3, 1, 2) for name, x in drawn.items()}


def make_models(sizes: Mapping[str, tuple[int, int, int]], setup: Setup) -> dict[str, LayerModel]:
    """Language models by layer, weights large enough that every term counts: N(0, 1/D)."""
    models = {}
    generator = torch.Generator().manual_seed(SEED)
    for name, (_, _, d) in sizes.items():
        model = LayerModel(d)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=d**-0.5, generator=generator)
        models[name] = model.to(setup.device)
    return models


def update_by(
    loss: Callable[[Tensor, LayerModel], Tensor], models: Mapping[str, LayerModel], projected: Mapping[str, Tensor]
) -> Update:
    """`models.training.update` with another way to compute the loss."""
    optimizer = optimizer_of(models)

    def update() -> dict[str, float]:
        """Returns the losses before it, by layer."""
        optimizer.zero_grad()
        losses = {}
        for name, p in projected.items():
            value = loss(p, models[name])
            (value / len(projected)).backward()
            losses[name] = value.item()
        optimizer.step()
        return losses

    return update


def optimizer_of(models: Mapping[str, LayerModel]) -> MomentumSGD:
    """Momentum SGD over all trained parameters, as a training run makes it."""
    trained = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    return MomentumSGD(trained, lr=0.1, momentum=0.9)


def variants(sizes: Mapping[str, tuple[int, int, int]], batch: int, setup: Setup) -> dict[str, Update]:
    """The project's update and what it is compared with, each with models of its own that start alike."""
    projected, models = draw(sizes, batch, setup), make_models(sizes, setup)
    ours = copy.deepcopy(models)
    optimizer = optimizer_of(ours)
    return {
        "ours": lambda: training.update(ours, projected, optimizer),
        "direct": update_by(direct.layer_loss, copy.deepcopy(models), projected),
        "nn.LSTM": update_by(layer_loss, copy.deepcopy(models), projected),
    }


def check_agreement(updates: Mapping[str, Update]) -> dict[str, list[float]]:
    """Losses before and after an update, by layer; an AssertionError if the variants differ.

    That after it depends on every gradient.
    """
    found: dict[str, list[float]] = {}
    for _ in range(2):
        losses = {name: update() for name, update in updates.items()}
        for layer, expected in losses["direct"].items():
            found.setdefault(layer, []).append(expected)
            for name, values in losses.items():
                if abs(values[layer] - expected) > TOLERANCE * abs(expected):
                    raise AssertionError(f"{layer}: the loss of {name} is {values[layer]}, not {expected}")
    return found


def measure_sizes(
    what: str, sizes: dict[str, tuple[int, int, int]], setup: Setup, times_direct: float, peak: float | None
) -> Report:
    """All figures of an update of some layers; `times_direct` and `peak` are the goals."""
    batch = 2 if setup.quick else BATCH
    updates = variants(sizes, batch, setup)
    losses = check_agreement(updates)
    product = MatrixProduct(setup)
    took = seconds({**updates, "sgemm": product}, setup)
    speed, top = flops(sizes, batch) / took["ours"] / 1e9, product.flops / took["sgemm"] / 1e9
    share = flops(sizes, batch, strict=True) / flops(sizes, batch)
    median = {name: milliseconds(values) for name, values in took.items()}
    note = f"batch {batch}; update {median['ours']}, direct loop {median['direct']}, nn.LSTM {median['nn.LSTM']}"
    told = f"{float(np.median(speed)):.3g} GFLOP/s; by the strict count {share:.2f} of this"
    figures = [
        Figure(f"{what}: share of sgemm peak", ratio(speed, top), "%", peak, note=told),
        Figure(f"{what}: direct loop / update", ratio(took["direct"], took["ours"]), goal=times_direct, note=note),
        Figure(f"{what}: nn.LSTM / update", ratio(took["nn.LSTM"], took["ours"])),
        Figure(f"{what}: sgemm", tuple(top.tolist()), "GFLOP/s", note=f"{len(product.a)}² matrices"),
    ]
    taken = {name: values.tolist() for name, values in took.items()}
    facts = {"batch": batch, "sizes": sizes, "losses": losses, "seconds": taken, "flops": flops(sizes, batch)}
    return Report(figures, {what: facts})


def measure(setup: Setup) -> Report:
    """conv5 alone, and all layers jointly."""
    sizes = {layer: plan.layer_size(ARCHITECTURE, layer) for layer in ARCHITECTURE.vlm_layers}
    if setup.quick:
        sizes = QUICK_SIZES
    one = measure_sizes("conv5", {"conv5": sizes["conv5"]}, setup, times_direct=1.6, peak=0.65)
    all_layers = measure_sizes(f"{len(sizes)} layers", sizes, setup, times_direct=3.0, peak=None)
    return Report.joined([one, all_layers])
