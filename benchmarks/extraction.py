"""Both passes of feature extraction against the bare network's forward pass on the same tensors.

The network is measured twice: as it is loaded, and in the memory layout that the stage gives it on CPUs. What a plain
program would need beside it, to put as many bytes on the disk, is measured too.
"""

import contextlib
import io
import os
import shutil
from dataclasses import dataclass

import numpy as np
import torch

import extract_features
from benchmarks.random_networks import make_backbone, make_projection
from benchmarks.timing import SEED, Figure, Report, Setup, ratio, seconds
from models.backbones import ARCHITECTURES, Backbone
from pipeline import artefacts
from pipeline.features import FeatureFiles, feature_facts
from pipeline.networks import lay_out
from pipeline.presets import DEFAULTS
from pipeline.views import Views, network_batches

POSITIONS = 3  # per image for PCA, as with 50,000 images
GOAL = 0.9
DTYPE = DEFAULTS["extract_features"]["dtype"].value


@dataclass(frozen=True)
class Case:
    """A backbone, the layers to extract, the images to do it with."""

    name: str
    layers: tuple[str, ...]
    others: tuple[str, ...]
    images: int
    batch: int


CASES = (
    Case("alexnet", ARCHITECTURES["alexnet"].vlm_layers, ("data", "pool5"), images=192, batch=16),
    Case("vgg16", ("conv5_3",), ("data", "pool5"), images=8, batch=8),
    Case("efficientnet_lite0", ARCHITECTURES["efficientnet_lite0"].vlm_layers, ("data", "logits"), images=32, batch=16),
)
QUICK_CASES = (Case("alexnet", ("conv2",), ("data", "pool5"), images=3, batch=2),)


class Work:
    """The passes over some made-up images, each a call without arguments."""

    def __init__(self, case: Case, setup: Setup):
        architecture = ARCHITECTURES[case.name]
        loaded, self.backbone = (make_backbone(case.name, case.others[-1], setup) for _ in range(2))
        self.case, self.loaded = case, loaded
        self.backbone = lay_out(self.backbone)
        shape = (case.images, 256, 256, 3)
        self.images = np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)
        self.rows = np.arange(case.images)
        self.batches = [x for _, x in network_batches(self.images, loaded, case.batch, self.rows)]
        self.projections = {layer: make_projection(architecture.channels(layer)) for layer in case.layers}
        self.folder = setup.folder / case.name

    def clear(self) -> None:
        """Remove what a pass has written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def forward(self, backbone: Backbone) -> None:
        """The bare network, to the deepest layer, over all batches."""
        with torch.no_grad():
            for x in self.batches:
                backbone(x, list(self.case.layers))

    def statistics(self) -> None:
        """Pass 1: moments of all taps, samples for PCA."""
        extract_features.collect_statistics(
            self.images,
            self.backbone,
            list(self.case.layers),
            list(self.case.others),
            rows=self.rows,
            pca_positions=POSITIONS * len(self.images) - 1,
            batch_size=self.case.batch,
            seed=SEED,
            state=self.folder / "state",
            facts={},
        )

    def facts(self) -> dict[str, artefacts.Facts]:
        """What the features of every layer must state."""
        facts = {
            layer: feature_facts(len(self.images), self.backbone, layer, p.size, Views(), {})
            for layer, p in self.projections.items()
        }
        return {layer: {**f, "dtype": DTYPE} for layer, f in facts.items()}

    def features(self) -> None:
        """Pass 2: project every layer and write it to files."""
        with contextlib.redirect_stdout(io.StringIO()):
            extract_features.write_features(
                self.images,
                self.backbone,
                self.projections,
                FeatureFiles(self.folder, self.facts(), (0, len(self.images))),
                batch_size=self.case.batch,
                views=Views(),
            )

    def plain_write(self) -> None:
        """As many bytes as `features` leaves, batch by batch, to files that are on the disk at the end."""
        for layer, facts in self.facts().items():
            batch = np.zeros((self.case.batch, *facts["shape"][1:]), DTYPE)
            with (self.folder / layer).open("wb") as file:
                for _ in range(0, self.case.images, self.case.batch):
                    file.write(batch.data)
                os.fsync(file.fileno())


def measure_case(case: Case, setup: Setup) -> Report:
    """Figures of one backbone."""
    work = Work(case, setup)
    functions = {
        "network as loaded": lambda: work.forward(work.loaded),
        "network in its layout": lambda: work.forward(work.backbone),
        "statistics": work.statistics,
        "features": work.features,
        "plain write": work.plain_write,
    }
    took = seconds(functions, setup, work.clear)
    rates = {name: len(work.images) / float(np.median(values)) for name, values in took.items()}
    what = f"{case.name}, {len(case.layers)} layer{'s' if len(case.layers) > 1 else ''}"
    figures = []
    for name in ("statistics", "features"):
        for base in ("network as loaded", "network in its layout"):
            note = f"{rates[name]:.3g} against {rates[base]:.3g} images/s"
            figures.append(Figure(f"{what}: {name} / {base}", ratio(took[base], took[name]), "%", GOAL, note=note))
    parts = took["network in its layout"] + took["plain write"]
    note = f"plain write: {float(np.median(took['plain write'])):.3g} s of {len(work.images)} images"
    figures.append(
        Figure(f"{what}: features / network and plain write", ratio(parts, took["features"]), "%", note=note)
    )
    facts = {"images": case.images, "batch": case.batch, "seconds": {n: v.tolist() for n, v in took.items()}}
    return Report(figures, {what: facts})


def measure(setup: Setup) -> Report:
    """Both passes with every backbone of the cases."""
    return Report.joined([measure_case(case, setup) for case in (QUICK_CASES if setup.quick else CASES)])
