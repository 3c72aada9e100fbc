"""The checkpoint of a visual language model: one safetensors file that rebuilds it alone.

Tensors are named `<layer>.projection.<mean|std|components|pca_mean>`, `<layer>.<direction>.<parameter>` and
`statistics.<tap>.<mean|std>`; the metadata entry `configuration` is JSON: format, backbone, layers, training facts. It
is the only one, as safetensors writes several in no fixed order and equal models would be unequal files.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.backbones import find_architecture
from models.errors import UserError
from models.projection import Projection
from models.vlm import CELLS, PAPER_CELL, LayerModel, VisualLanguageModel, part_name, tap_name
from models.weights.contents import other_kind_of

FORMAT = "cnn-vlm 1"
PROJECTION_PARTS = ("mean", "std", "components", "pca_mean")
FULL_PRECISION = ("mean", "std", "pca_mean")  # statistics stay float32 in a float16 file
AFRESH = "start afresh with --overwrite, or put the right file back"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of a safetensors file written by this project.

    Raises:
        UserError: missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: train a language model with train_vlm.py or give another file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, struct.error) as error:
        found = other_kind_of(path) or f"not a readable safetensors file ({error})"
        raise UserError(f"{path} is {found}: give another file") from None
    try:
        configuration = json.loads(metadata["configuration"])
    except (KeyError, ValueError, RecursionError):
        configuration = None
    if not isinstance(configuration, dict):
        raise UserError(f"{path} carries no readable configuration: give another file")
    if (found := configuration.pop("format", None)) != FORMAT:
        raise UserError(f"{path} has format {found!r}, not {FORMAT!r}: it was not written by this version")
    return tensors, configuration


def write_tensors(path: Path, tensors: Mapping[str, Tensor], configuration: Mapping[str, Any]) -> None:
    """Write tensors and a JSON configuration as one safetensors file (not atomic: give a temporary path).

    Raises:
        OSError: the disk is full (safetensors' own writer hides the reason).
    """
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"configuration": json.dumps({"format": FORMAT, **configuration})}
    path.write_bytes(save(contiguous, metadata=metadata))


def vlm_tensors(vlm: VisualLanguageModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors of a model under their names in the file; means and deviations stay float32."""
    tensors = projection_tensors(vlm.projections, vlm.statistics)
    for layer, model in vlm.layers.items():
        tensors |= {f"{part_name(layer)}.{name}": value for name, value in model.state_dict().items()}
    return {n: v.float() if n.rsplit(".", 1)[-1] in FULL_PRECISION else v.to(dtype) for n, v in tensors.items()}


def projection_tensors(
    projections: Mapping[str, Projection], statistics: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Projections by layer, and mean and std by tap, under their names in the file."""
    tensors: dict[str, Tensor] = {}
    for layer, projection in projections.items():
        tensors |= {f"{part_name(layer)}.projection.{part}": getattr(projection, part) for part in PROJECTION_PARTS}
    for tap, values in statistics.items():
        tensors |= {f"statistics.{part_name(tap)}.{key}": value for key, value in values.items()}
    return tensors


def vlm_from_tensors(
    tensors: Mapping[str, Tensor],
    layers: list[str],
    source: object = "checkpoint",
    cells: Mapping[str, str] | None = None,
) -> VisualLanguageModel:
    """Rebuild a model from the tensors of `vlm_tensors`, whatever their precision; `cells` as it was made with.

    Raises:
        UserError: a tensor is missing, left over, of another shape or type, or not finite.
    """
    tensors, cells = dict(tensors), cells or {}
    _check_finite(tensors, source)
    projections, states = {}, {}
    for layer in layers:
        projections[layer] = take_projection(tensors, layer, source)
        expected = _state_shapes(projections[layer].size, cells.get(layer, PAPER_CELL))
        prefix = f"{part_name(layer)}."
        states[layer] = {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
        for name in sorted(expected.keys() | states[layer].keys()):
            found = tuple(states[layer][name].shape) if name in states[layer] else None
            if expected.get(name) != found:
                what = f"{layer}.{name}"
                raise UserError(f"{source}: tensor {what!r:.80} should be {expected.get(name)}, found {found}")
    statistics = take_statistics(tensors, source)
    if tensors:
        raise UserError(f"{source}: unexpected tensor {next(iter(tensors))!r:.80}: give another file")
    vlm = VisualLanguageModel(projections, statistics, cells)
    for layer, state in states.items():
        vlm.layers[layer].load_state_dict(state)
    return vlm


def _state_shapes(size: int, cell: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a `LayerModel`'s state, without its memory: a small file may announce a large model."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in LayerModel(size, cell).state_dict().items()}


def _check_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    for name, value in tensors.items():
        if value.dtype not in FLOATS or not bool(torch.isfinite(value.float()).all()):
            raise UserError(f"{source}: tensor {name!r:.80} holds values that are no finite numbers: give another file")


def take_projection(tensors: dict[str, Tensor], layer: str, source: object) -> Projection:
    """The projection of a layer; its tensors are taken out of `tensors`.

    Raises:
        UserError: a tensor is missing, not finite, or does not fit the others.
    """
    parts = {}
    for part in PROJECTION_PARTS:
        name = f"{part_name(layer)}.projection.{part}"
        if name not in tensors:
            raise UserError(f"{source}: tensor {name} is missing: give another file")
        parts[part] = tensors.pop(name)
    _check_finite(parts, f"{source}: projection of {layer}")
    _check_projection(parts, f"{source}: projection of {layer}")
    return Projection(**parts)


def take_statistics(tensors: dict[str, Tensor], source: object) -> dict[str, dict[str, Tensor]]:
    """Mean and std (C,) by tap; their tensors are taken out of `tensors`.

    Raises:
        UserError: one of the two is missing, they are not finite or of different lengths, or a std is not positive.
    """
    statistics: dict[str, dict[str, Tensor]] = {}
    for name in [n for n in tensors if n.startswith("statistics.") and n.count(".") == 2]:
        _, tap, key = name.split(".")
        statistics.setdefault(tap_name(tap), {})[key] = tensors.pop(name)
    for tap, found in statistics.items():
        what = f"{source}: statistics of {tap!r:.80}"
        _check_finite(found, what)
        shapes = {key: tuple(value.shape) for key, value in sorted(found.items())}
        if list(shapes) != ["mean", "std"] or len(shapes["mean"]) != 1 or shapes["mean"] != shapes["std"]:
            raise UserError(f"{what} have inconsistent shapes {shapes}: give another file")
        statistics[tap] = {key: found[key].float() for key in ("mean", "std")}
        if not bool((statistics[tap]["std"] > 0).all()):
            raise UserError(f"{what} have deviations that are not positive: give another file")
    return statistics


def _check_projection(parts: Mapping[str, Tensor], what: str) -> None:
    channels = parts["mean"].shape[0] if parts["mean"].ndim == 1 else -1
    shapes_fit = (
        parts["std"].shape == parts["pca_mean"].shape == (channels,)
        and parts["components"].ndim == 2
        and parts["components"].shape[1] == channels
        and 1 <= parts["components"].shape[0] <= channels
    )
    if not shapes_fit:
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        raise UserError(f"{what} has inconsistent shapes {shapes}: give another file")
    if not bool((parts["std"].float() > 0).all()):
        raise UserError(f"{what} has deviations that are not positive: give another file")


def listed_layers(configuration: Mapping[str, Any], path: Path) -> list[str]:
    """The layers that a configuration names.

    Raises:
        UserError: none, or not by names that a layer can have.
    """
    layers = configuration.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
        raise UserError(f"{path} does not say which layers it holds: give another file")
    for name in layers:
        proper = all(part.isidentifier() or part.isdigit() for part in name.split("."))
        if not proper or hasattr(torch.nn.ModuleDict(), name) or layers.count(name) > 1:
            raise UserError(f"{path} holds a layer called {name[:40]!r}, twice or by no proper name: give another file")
    return layers


@dataclass(frozen=True)
class Notes:
    """What a checkpoint says of itself, checked.

    Attributes:
        backbone: name of the network that it reads.
        training: by layer, how it was trained.
        configuration: all that it says, to write it again.
    """

    backbone: str
    training: Mapping[str, Mapping[str, Any]]
    configuration: Mapping[str, Any]


def load_vlm(path: Path) -> tuple[VisualLanguageModel, Notes]:
    """A language model and what its file says of it; strict, on the CPU.

    Raises:
        UserError: in one line, what does not fit.
    """
    tensors, configuration = read_tensors(path)
    layers = listed_layers(configuration, path)
    backbone, training = configuration.get("backbone"), configuration.setdefault("training", {})
    if not isinstance(backbone, str):
        raise UserError(f"{path} does not say which backbone it reads: give another file")
    if not isinstance(training, dict) or not all(isinstance(facts, dict) for facts in training.values()):
        raise UserError(f"{path} does not say how its layers were trained: give another file")
    vlm = vlm_from_tensors(tensors, layers, path, _cells(training, path))
    channels = {layer: len(projection.mean) for layer, projection in vlm.projections.items()}
    check_channels(channels | {tap: len(values["mean"]) for tap, values in vlm.statistics.items()}, backbone, path)
    return vlm, Notes(backbone, training, configuration)


def _cells(training: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, str]:
    """Kind of recurrent model by layer, as their training facts state it."""
    cells = {layer: facts.get("cell", PAPER_CELL) for layer, facts in training.items()}
    for layer, cell in cells.items():
        if not isinstance(cell, str) or cell not in CELLS:
            raise UserError(
                f"{path} has a {cell!r:.40} for {layer}, which this version has not (it has {', '.join(CELLS)}): "
                "give another file"
            )
    return cells


def check_channels(channels: Mapping[str, int], backbone: str, path: Path) -> None:
    """Raise a UserError if a tap that `path` describes is not the backbone's; one that is unknown is refused later."""
    try:
        architecture = find_architecture(backbone)
    except UserError:
        return
    for tap, found in channels.items():
        if tap not in architecture.taps:
            raise UserError(f"{path} describes {tap!r:.80}, which {backbone} has not: give another file")
        if found != architecture.channels(tap):
            raise UserError(
                f"{path} reads {found} channels of {tap}, {backbone} has {architecture.channels(tap)}: "
                "give another file"
            )


def read_state(path: Path, types: Mapping[str, type]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and notes of an interrupted run's state; `types` are those of the notes it must have.

    Raises:
        UserError: damaged, or not the state of such a run.
    """
    try:
        tensors, noted = read_tensors(path)
        _check_finite(tensors, path)
    except UserError as error:
        raise UserError(f"the state of an interrupted run is damaged ({error}): {AFRESH}") from None
    for name, kind in types.items():
        if type(noted.get(name)) is not kind:
            raise UserError(f"{path} says {noted.get(name)!r:.40} for {name!r}: {AFRESH}")
    return tensors, noted


def check_state(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise a UserError if a state's tensors are not called as one's `own`, or are of other shapes."""
    for name in sorted(own.keys() | tensors.keys()):
        expected, found = (tuple(of[name].shape) if name in of else None for of in (own, tensors))
        if found != expected:
            raise UserError(f"{path}: tensor {name!r:.80} should be {expected}, found {found}: {AFRESH}")


def merge_layers(first: Mapping[str, Tensor], second: Mapping[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """`first` with everything of `layers` replaced by `second`'s tensors; layers share no parameters."""
    prefixes = tuple(f"{part_name(layer)}." for layer in layers)
    kept = {name: value for name, value in first.items() if not name.startswith(prefixes)}
    return kept | {name: value for name, value in second.items() if name.startswith((*prefixes, "statistics."))}
