"""Both passes of feature extraction against the bare network's forward pass on the same tensors.

The network is measured twice: as it is loaded, and in the memory layout that the stage gives it on CPUs.
"""

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import extract_features
from benchmarks.networks import make_backbone, make_projection
from benchmarks.timing import SEED, Figure, Report, Setup, ratio, seconds
from models.backbones import ARCHITECTURES, Backbone

POSITIONS = 3  # per image for PCA, as with 50,000 images
GOAL = 0.9


@dataclass(frozen=True)
class Case:
    """A backbone, the layers to extract, the images to do it with."""

    name: str
    layers: tuple[str, ...]
    others: tuple[str, ...]
    images: int
    batch: int


CASES = (
    Case("alexnet", ARCHITECTURES["alexnet"].vlm_layers, ("data", "pool5"), images=64, batch=16),
    Case("vgg16", ("conv5_3",), ("data", "pool5"), images=8, batch=8),
)
QUICK_CASES = (Case("alexnet", ("conv2",), ("data",), images=3, batch=2),)


class Work:
    """The passes over some made-up images, each a call without arguments."""

    def __init__(self, case: Case, setup: Setup):
        architecture = ARCHITECTURES[case.name]
        loaded, self.backbone = (make_backbone(case.name, "pool5", setup) for _ in range(2))
        self.case, self.setup, self.loaded = case, setup, loaded
        if setup.device.type == "cpu":
            self.backbone.to(memory_format=torch.channels_last)
        shape = (case.images, 256, 256, 3)
        self.images = np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)
        self.batches = [x for _, x in extract_features.network_batches(self.images, loaded, case.batch, 0)]
        self.projections = {layer: make_projection(architecture.channels(layer)) for layer in case.layers}

    def forward(self, backbone: Backbone) -> None:
        """The bare network."""
        with torch.no_grad():
            for x in self.batches:
                backbone(x, list(self.case.layers))

    def statistics(self) -> None:
        """Pass 1."""
        with tempfile.TemporaryDirectory(dir=self.setup.folder) as folder:
            extract_features.collect_statistics(
                self.images,
                self.backbone,
                list(self.case.layers),
                list(self.case.others),
                pca_positions=POSITIONS * len(self.images) - 1,
                batch_size=self.case.batch,
                seed=SEED,
                state=Path(folder) / "state",
                facts={},
            )

    def features(self) -> None:
        """Pass 2, to files."""
        views, layers = extract_features.Views(), self.projections.items()
        facts = {
            layer: extract_features.feature_facts(self.images, self.backbone, layer, p.size, views, {})
            for layer, p in layers
        }
        facts = {layer: {**f, "dtype": "float32"} for layer, f in facts.items()}
        with tempfile.TemporaryDirectory(dir=self.setup.folder) as folder, contextlib.redirect_stdout(io.StringIO()):
            extract_features.write_features(
                self.images,
                self.backbone,
                self.projections,
                Path(folder),
                batch_size=self.case.batch,
                views=views,
                facts=facts,
            )


def measure_case(case: Case, setup: Setup) -> Report:
    """Figures of one backbone."""
    work = Work(case, setup)
    functions = {
        "network as loaded": lambda: work.forward(work.loaded),
        "network in its layout": lambda: work.forward(work.backbone),
        "statistics": work.statistics,
        "features": work.features,
    }
    took = seconds(functions, setup)
    rates = {name: len(work.images) / float(np.median(values)) for name, values in took.items()}
    what = f"{case.name}, {len(case.layers)} layer{'s' if len(case.layers) > 1 else ''}"
    figures = []
    for name in ("statistics", "features"):
        for base in ("network as loaded", "network in its layout"):
            note = f"{rates[name]:.3g} against {rates[base]:.3g} images/s"
            figures.append(Figure(f"{what}: {name} / {base}", ratio(took[base], took[name]), "%", GOAL, note=note))
    facts = {"images": case.images, "batch": case.batch, "seconds": {n: v.tolist() for n, v in took.items()}}
    return Report(figures, {what: facts})


def measure(setup: Setup) -> Report:
    """All cases."""
    reports = [measure_case(case, setup) for case in (QUICK_CASES if setup.quick else CASES)]
    return Report([f for r in reports for f in r.figures], {k: v for r in reports for k, v in r.facts.items()})
