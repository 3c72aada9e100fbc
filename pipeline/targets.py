"""What is inverted: images, rows of stage 1 or stored features; and the statistics of the taps."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backbones import Backbone, centre_crop
from models.checkpoints import check_channels, read_tensors, take_statistics
from models.errors import UserError
from models.projection import Moments
from models.vlm import VisualLanguageModel
from models.weights.downloads import file_hash
from pipeline import array_files, artefacts, images
from pipeline.presets import SAMPLES
from pipeline.progress import Progress
from pipeline.scaling import area_scale
from pipeline.sources import list_images as list_views
from pipeline.splits import rows_of

ENERGY_VIEWS = 32  # of the sample photos, for the energies of language models
SAMPLE_VIEWS = 128  # of the sample photos, for taps that nobody measured
Statistics = dict[str, dict[str, Tensor]]  # mean and std (C,) by tap


@dataclass(frozen=True)
class Source:
    """One thing to invert: an image or feature file, or a row of images.npy."""

    name: str
    path: Path
    row: int | None = None


def list_sources(
    inputs: list[str], rows: list[int], held_out_by: Mapping[str, Mapping[str, Any]] | None, stored: Path
) -> tuple[list[Source], list[str]]:
    """What is to be inverted, in order, and a line for every input that gives nothing.

    Args:
        inputs: files and folders.
        rows: of the images of stage 1 in `stored`.
        held_out_by: by layer, how the checkpoint was trained whose held-out rows are added; None for none.

    Raises:
        UserError: nothing to invert, or rows that are not there.
    """
    files, problems = images.list_images(inputs) if inputs else ({}, [])
    sources = [Source(name, path) for name, path in files.items()]
    if rows or held_out_by:
        there, facts = images.open_stored(stored)
        for row in dict.fromkeys([*rows, *(held_out_rows(held_out_by, facts) if held_out_by else [])]):
            if row >= len(there):
                raise UserError(f"{stored} has no row {row}: it holds {len(there)} images")
            name = images.output_name(f"{row:05d}-{Path(facts['names'][row]).stem}")
            sources.append(Source(name if name not in files else f"row-{name}", stored, row))
    if not sources:
        raise UserError("nothing to reconstruct: give images, --rows or --held-out")
    return sources, problems


def held_out_rows(training: Mapping[str, Mapping[str, Any]], stored: artefacts.Facts) -> list[int]:
    """Rows of images.npy that no layer of a checkpoint was trained on, though its training knew them.

    Raises:
        UserError: there are none, the layers were split differently, or the images are not there.
    """
    splits = [facts.get("held_out_names") for facts in training.values()]
    if not splits or any(split != splits[0] for split in splits):
        raise UserError("the layers of the checkpoint were trained on different splits: name rows with --rows")
    held = splits[0]
    if not isinstance(held, list) or not all(isinstance(name, str) for name in held):
        raise UserError("the checkpoint does not say which images it held out: name rows with --rows")
    if not held:
        raise UserError("training held no images out: name rows with --rows")
    return rows_of(held, stored["names"], "the checkpoint")


def read_source(source: Source, backbone: Backbone, tap: str) -> tuple[Tensor, np.ndarray | None, str]:
    """The feature to invert (1, …), the image it is of, (h, w, 3) uint8, if there is one, and the input's sha256."""
    crop = backbone.architecture.crop
    if source.row is not None:
        stored = np.array(np.load(source.path, mmap_mode="r")[source.row])
        x = centre_crop(torch.from_numpy(stored).permute(2, 0, 1)[None], *crop)  # (1, 3, h, w)
        digest = array_files.hash_rows(stored)
    else:
        images.check_file(source.path)
        digest = file_hash(source.path)
        if source.path.suffix == ".npy":
            return read_feature(source.path, backbone, tap), None, digest
        rgb = images.fit_to(images.read_rgb(source.path), *crop)
        x = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        feature = backbone(backbone.preprocess(x.float().to(backbone.device)), [tap])[tap]
    return feature, x[0].permute(1, 2, 0).numpy(), digest


def read_feature(path: Path, backbone: Backbone, tap: str) -> Tensor:
    """A stored feature with a leading axis of one; a UserError says why not."""
    try:
        stored = array_files.map_array(path)
    except ValueError as error:
        raise UserError(f"{path} is not a readable .npy array ({error}): give another feature") from None
    dims = 2 if tap in backbone.architecture.fully_connected else 4
    fits = stored.dtype.kind == "f" and stored.ndim in (dims - 1, dims) and stored.size
    with np.errstate(over="ignore"):
        feature = stored.astype(np.float32) if fits else None
    if feature is None or not np.isfinite(feature).all():
        raise UserError(f"{path} is {stored.dtype} {stored.shape}, or holds NaN: give finite floats of {tap}")
    tensor = torch.from_numpy(feature)
    return (tensor if tensor.ndim == dims else tensor[None]).to(backbone.device)


def needed_statistics(
    there: Statistics, more: Path | None, backbone: Backbone, taps: list[str]
) -> tuple[Statistics, list[str]]:
    """Mean and std of `taps`, and those of the taps that had to be measured on the sample photos.

    Args:
        there: of the checkpoint, which come first.
        more: a projection.safetensors of stage 2, which come next.

    Raises:
        UserError: that file is of another backbone, or there are no sample photos.
    """
    if more is not None:
        there = read_statistics(more, backbone.architecture.name) | there
    measured = [tap for tap in taps if tap not in there]
    for tap in measured:
        print(
            f"statistics of {tap}: neither the checkpoint nor --statistics has them, so they are measured on "
            f"{SAMPLE_VIEWS} views of the sample photos",
            flush=True,
        )
    return {tap: there[tap] if tap in there else sample_statistics(backbone, tap) for tap in taps}, measured


def sample_statistics(backbone: Backbone, tap: str) -> dict[str, Tensor]:
    """Mean and std (C,) of a tap over `SAMPLE_VIEWS` square views of the sample photos, always the same ones."""
    moments = Moments(backbone.architecture.channels(tap))
    for features in sample_features(backbone, [tap], SAMPLE_VIEWS, f"statistics of {tap}"):
        moments.update(features[tap])
    return moments.statistics()


def sample_energies(backbone: Backbone, vlm: VisualLanguageModel, layers: list[str]) -> dict[str, float]:
    """Mean square of projected features by layer over `ENERGY_VIEWS` of the views of `sample_statistics`."""
    sums = dict.fromkeys(layers, 0.0)
    for features in sample_features(backbone, layers, ENERGY_VIEWS, "energies"):
        for layer, p in vlm.project(features).items():
            sums[layer] += p.square().mean().item() / ENERGY_VIEWS
    return sums


def sample_features(backbone: Backbone, taps: list[str], views: int, what: str) -> Iterator[dict[str, Tensor]]:
    """Features by tap of so many square views of the sample photos, one view (1, …) at a time."""
    with Progress(views, what, "views") as progress, torch.no_grad():
        for view in list_views(SAMPLES, views, seed=0):
            rgb = torch.from_numpy(area_scale(view.read(), images.STORED_SIZE, images.STORED_SIZE))
            x = centre_crop(rgb.permute(2, 0, 1)[None].float(), *backbone.architecture.crop)
            yield backbone(backbone.preprocess(x.to(backbone.device)), taps)
            progress.update()


def read_statistics(path: Path, backbone: str) -> Statistics:
    """Mean and std by tap of a projection.safetensors of stage 2."""
    tensors, configuration = read_tensors(path)
    if configuration.get("backbone") != backbone:
        raise UserError(f"{path} belongs to {configuration.get('backbone')}, not {backbone}: give another --statistics")
    statistics = take_statistics(tensors, path)
    check_channels({tap: len(values["mean"]) for tap, values in statistics.items()}, backbone, path)
    return statistics
