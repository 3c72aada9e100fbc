"""How costs grow: exponents of power laws fitted to measured times, beside those of the arithmetic.

An exponent is the slope of a line through the logarithms of size and cost, of a round's times or of the floating-point
operations at the same sizes.
"""

from collections.abc import Callable, Mapping

import numpy as np

from benchmarks import updates
from benchmarks.random_networks import make_backbone, make_projection
from benchmarks.timing import SEED, Figure, Report, Setup, exponent, milliseconds, seconds
from models.training import update as update_models
from models.unnaturalness import layer_features
from models.vlm import VisualLanguageModel
from pipeline import plan
from pipeline.detector import Postprocess

SLACK = 0.1  # by which a fitted exponent may exceed the arithmetic's: timing noise, caches
SIDES = (128, 192, 256, 384, 512)  # of images
BATCHES, GRIDS, COMPONENTS = (4, 8, 16, 32), (7, 10, 14, 20), (32, 64, 128, 256)
QUICK = (96, 128)


def fit(what: str, sizes: Mapping[float, float], functions: Mapping[float, Callable], setup: Setup) -> Report:
    """A figure with the exponent of every round; `sizes` are operations by size, `functions` what is timed."""
    took = seconds({str(size): function for size, function in functions.items()}, setup)
    rounds = [[took[str(size)][turn] for size in sizes] for turn in range(setup.repeats)]
    arithmetic = exponent(list(sizes), list(sizes.values()))
    times = ", ".join(f"{size:g}: {milliseconds(took[str(size)])}" for size in sizes)
    figure = Figure(
        f"exponent of {what}",
        tuple(exponent(list(sizes), values) for values in rounds),
        "",
        arithmetic + SLACK,
        at_most=True,
        note=f"arithmetic {arithmetic:.2f}; {times}",
    )
    return Report([figure], {what: {"arithmetic": arithmetic, "seconds": {k: v.tolist() for k, v in took.items()}}})


def saliency(setup: Setup) -> list[Report]:
    """Unnaturalness map and its post-processing against the area of the image."""
    name, layer = ("alexnet", "conv2") if setup.quick else ("vgg16", "conv5_3")
    backbone = make_backbone(name, layer, setup)
    architecture = backbone.architecture
    projection = make_projection(architecture.channels(layer))
    size = projection.size
    vlm = VisualLanguageModel({layer: projection}, {})
    vlm.initialise(SEED)
    vlm.freeze().to(setup.device)
    generator = np.random.default_rng(SEED)
    maps, finishes, flops, blurs = {}, {}, {}, {}
    for side in QUICK if setup.quick else SIDES:
        rgb = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        h, w = architecture.grid(layer, side, side)
        raw = generator.random((h - 1, w - 1))
        area = float(side * side)
        maps[area] = lambda rgb=rgb: vlm.layers[layer].unnaturalness_map(
            vlm.projections[layer](layer_features(backbone, rgb, [layer])[layer])
        )
        finishes[area] = lambda raw=raw, side=side: Postprocess()(raw, side, side, architecture.stride(layer))
        models = plan.predicted(h, w) * plan.SEQUENCE_FLOPS * size * size
        flops[area] = architecture.flops(layer, side, side) + models
        blurs[area] = (
            4 * area * (2 * int(4 * Postprocess.blur * side + 0.5) + 1)
        )  # both passes of the Gaussian, cut off at 4 σ
    return [
        fit("unnaturalness map in the image's area", flops, maps, setup),
        fit("its post-processing in the image's area", blurs, finishes, setup),
    ]


def update(setup: Setup) -> list[Report]:
    """A training update against batch, area of the grid, and components."""
    batches, grids, components = ((2, 4), (4, 6), (4, 8)) if setup.quick else (BATCHES, GRIDS, COMPONENTS)
    base = (2, 4, 4) if setup.quick else (8, 13, 64)  # batch, side, components where they do not vary
    cases = {
        "update in the batch": {float(b): (b, *base[1:]) for b in batches},
        "update in the grid's area": {float(s * s): (base[0], s, base[2]) for s in grids},
        "update in the components": {float(d): (*base[:2], d) for d in components},
    }
    reports = []
    for what, by_size in cases.items():
        functions, flops = {}, {}
        for size, (batch, side, d) in by_size.items():
            sizes = {"conv5": (side, side, d)}
            models, projected = updates.make_models(sizes, setup), updates.draw(sizes, batch, setup)
            arguments = (models, projected, updates.optimizer_of(models))
            functions[size] = lambda arguments=arguments: update_models(*arguments)
            flops[size] = updates.flops(sizes, batch)
        reports.append(fit(what, flops, functions, setup))
    return reports


def measure(setup: Setup) -> Report:
    """Exponents of maps in the image's area, of an update in batch, grid and components."""
    return Report.joined([*saliency(setup), *update(setup)])
