"""Projected features on disk: what they are of, how stage 2 writes them and stage 3 reads them."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.backbones import Backbone
from models.checkpoints import listed_layers, read_tensors
from models.errors import UserError
from models.vlm import part_name
from models.weights.downloads import file_hash
from pipeline import array_files, artefacts, distributed, program
from pipeline.views import Views

AFRESH = "rerun extract_features.py --overwrite"
STATE = "statistics.npz"  # of pass 1, while it runs
SAVE_EVERY = 60.0  # seconds between two notes of progress on disk


@dataclass(frozen=True)
class Provenance:
    """What features and the language models trained on them are of: the network, its weights, images, projection.

    `sources` counts the images by where they are from; None where that is not known. `all_layers` are those that have
    features, trained or not.
    """

    backbone: str
    weights: str
    weights_sha256: str
    images_sha256: str
    projection_sha256: str
    sources: dict[str, int] | None
    all_layers: tuple[str, ...]

    @classmethod
    def read(cls, configuration: Mapping[str, Any], path: Path, projection_sha256: str) -> "Provenance":
        """What a projection's configuration states.

        Raises:
            UserError: it leaves something out; `path` holds it.
        """
        texts = {}
        for key in ("backbone", "weights", "weights_sha256", "images_sha256"):
            if not isinstance(value := configuration.get(key), str):
                raise UserError(f"{path} does not state {key}: {AFRESH}")
            texts[key] = value
        layers = tuple(listed_layers(configuration, path))
        return cls(
            **texts, projection_sha256=projection_sha256, sources=configuration.get("sources"), all_layers=layers
        )

    def facts(self) -> artefacts.Facts:
        """As a checkpoint's configuration says it."""
        facts = {key: value for key, value in vars(self).items() if value is not None}
        return {**facts, "all_layers": list(self.all_layers)}


@dataclass(frozen=True)
class Features:
    """Stored features of some layers, memory-mapped, of the images of one workspace.

    Attributes:
        stored: (K·N, H, W, D) by layer, see `Views`.
        projection: the tensors of projection.safetensors.
        names: of the N images, in order; `held_out` are those that statistics and PCA have not seen.
    """

    stored: dict[str, np.ndarray]
    projection: dict[str, torch.Tensor]
    provenance: Provenance
    views: Views
    names: list[str]
    held_out: list[str]

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return list(self.stored)

    @property
    def count(self) -> int:
        """N, the images."""
        return len(next(iter(self.stored.values()))) // self.views.count

    @property
    def dtype(self) -> str:
        """Of the stored values: float32 or float16."""
        return str(next(iter(self.stored.values())).dtype)

    def facts(self) -> artefacts.Facts:
        """What a training states of them."""
        about = {"num_images": self.count, "images_sha256": self.provenance.images_sha256, "dtype": self.dtype}
        return {**about, **self.views.facts()}


def open_features(folder: Path, layers: list[str] | None) -> Features:
    """Stored features of some layers (None: of all), checked against their projection.

    Raises:
        UserError: a layer is missing, unfinished, or was projected otherwise.
    """
    path = folder / "projection.safetensors"
    names = artefacts.read_sidecar(path, "extract_features.py").get("names")
    tensors, configuration = read_tensors(path)
    provenance = Provenance.read(configuration, path, file_hash(path))
    held_out = configuration.get("held_out")
    if not isinstance(names, list) or not isinstance(held_out, list):
        raise UserError(f"{path} does not say which images it is of: {AFRESH}")
    stored, views = {}, []
    for layer in layers or provenance.all_layers:
        if layer not in provenance.all_layers:
            there = ", ".join(provenance.all_layers)
            raise UserError(f"{folder} has no features of {layer}: choose from {there}, or run extract_features.py")
        array, facts = array_files.open_array(folder / f"{layer}.npy", "extract_features.py")
        if facts.get("projection_sha256") != provenance.projection_sha256:
            raise UserError(f"{folder / layer}.npy belongs to another projection: {AFRESH}")
        stored[layer] = array
        views.append(
            _check(folder / f"{layer}.npy", array, facts, tensors.get(f"{part_name(layer)}.projection.components"))
        )
    if len({len(array) for array in stored.values()}) > 1 or len(set(views)) > 1:
        raise UserError(f"{folder} holds features of differing images or views: {AFRESH}")
    return Features(stored, tensors, provenance, views[0], names, held_out)


def _check(path: Path, stored: np.ndarray, facts: artefacts.Facts, components: torch.Tensor | None) -> Views:
    """The views of stored features; a UserError where they cannot be what stage 2 writes of a projection (D, C)."""
    if components is None or components.ndim != 2:
        raise UserError(f"the projection of {path} is missing: {AFRESH}")
    fits = stored.ndim == 4 and stored.dtype in (np.float32, np.float16) and min(stored.shape) > 0
    if not fits or stored.shape[3] != len(components) or min(stored.shape[1:3]) < 2:
        raise UserError(
            f"{path} is {stored.dtype} {stored.shape}, not float (N, H, W, {len(components)}) as its projection "
            f"gives: {AFRESH}"
        )
    views = Views.from_facts(facts)
    if views is None or len(stored) % views.count:
        said = artefacts.SHORT.repr(facts.get("views", 1))
        raise UserError(f"{path} holds {len(stored)} rows, its sidecar says {said} views of each image: {AFRESH}")
    return views


def read_batch(stored: np.ndarray, rows: np.ndarray, device: object) -> torch.Tensor:
    """Rows of stored features (N, H, W, D) as a float32 tensor (B, D, H, W)."""
    return torch.from_numpy(array_files.read_rows(stored, rows)).to(device, torch.float32).permute(0, 3, 1, 2)


def feature_facts(
    count: int, backbone: Backbone, layer: str, size: int, views: Views, facts: artefacts.Facts
) -> artefacts.Facts:
    """What the features of a layer of `count` images with `size` components must state."""
    architecture = backbone.architecture
    shape = [count * views.count, *architecture.grid(layer, *architecture.crop), size]
    return {"shape": shape, **facts, "layer": layer, **views.facts()}


def unfinished(folder: Path, facts: Mapping[str, artefacts.Facts]) -> dict[str, artefacts.Facts]:
    """Those facts, by layer, whose features do not stand in a folder yet."""
    return {name: f for name, f in facts.items() if not artefacts.reuse(folder / f"{name}.npy", f, overwrite=False)}


def clear(folder: Path, layers: Sequence[str]) -> None:
    """Declare the projection and the features of some layers unfinished, and drop every state."""
    artefacts.discard(folder / STATE)
    for name in ("projection.safetensors", *(f"{layer}.npy" for layer in layers)):
        artefacts.withdraw(folder / name)


class FeatureFiles:
    """The files of pass 2, written batch by batch by a thread of its own; what was noted survives a kill.

    Args:
        folder: where `<layer>.npy` are written.
        facts: of each layer's file, `shape` and `dtype` among them.
        rows: first and last+1 row that this process writes.

    Attributes:
        first, stop: the `rows`.
        done: rows before it are written, by an earlier run or this one.
    """

    def __init__(self, folder: Path, facts: Mapping[str, artefacts.Facts], rows: tuple[int, int]):
        self.writers = {
            layer: array_files.ArrayWriter(folder / f"{layer}.npy", tuple(f["shape"]), f["dtype"], f, rows)
            for layer, f in facts.items()
        }
        self.first, self.stop = rows
        self.done = min(writer.done for writer in self.writers.values())
        self.thread = ThreadPoolExecutor(1)
        self.waiting: list[Future] = []

    def put(self, batch: Mapping[str, list[torch.Tensor]]) -> None:
        """Write the next rows: by layer (b, H, W, D) tensors that follow each other. Returns before they are written.

        Raises:
            NoRoomError: the disk is full, of this batch or the one before.
        """
        self._wait()
        for layer, parts in batch.items():
            self.waiting.append(self.thread.submit(self._write, self.writers[layer], self.done, parts))
        self.done += sum(map(len, next(iter(batch.values()))))

    @staticmethod
    def _write(writer: array_files.ArrayWriter, first: int, parts: list[torch.Tensor]) -> None:
        dtype = getattr(torch, str(writer.array.dtype))  # NumPy's cast to float16 takes ten times as long
        for part in parts:
            writer.put(first, part.to("cpu", dtype).numpy())
            first += len(part)

    def _wait(self) -> None:
        for future in self.waiting:
            future.result()
        self.waiting = []

    def note(self) -> None:
        """Note on disk how far the files are."""
        self._wait()
        for writer in self.writers.values():
            writer.mark(self.done)

    def finish(self) -> None:
        """Make the files artefacts, once all ranks have written their rows."""
        if distributed.size() > 1:
            self.note()  # another rank may fail while this one waits for it
        self._wait()
        for writer in self.writers.values():
            writer.finish(versions=program.versions())

    def __enter__(self) -> "FeatureFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(cancel_futures=True)


def check_room(folder: Path, facts: Mapping[str, artefacts.Facts]) -> None:
    """Say what will be written of each layer; a NoRoomError where the disk has not room for what is missing of it."""
    missing = 0
    for layer, f in facts.items():
        size = math.prod(f["shape"]) * np.dtype(f["dtype"]).itemsize
        print(f"  {layer}: {tuple(f['shape'])} {f['dtype']}, {artefacts.format_bytes(size)}")
        partial = folder / f"{layer}.npy{artefacts.PARTIAL}"
        missing += size - (partial.stat().st_size if partial.is_file() else 0)
    distributed.first(lambda: artefacts.check_disk(folder, missing))
