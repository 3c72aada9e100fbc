"""The checkpoint of a visual language model: one safetensors file that rebuilds it alone.

Tensors are named `<layer>.projection.<mean|std|components|pca_mean>`, `<layer>.<direction>.<parameter>` and
`statistics.<tap>.<mean|std>`; the metadata entry `configuration` is JSON: format, backbone, layers, training facts. It
is the only one, as safetensors writes several in no fixed order and equal models would be unequal files.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.errors import UserError
from models.projection import Projection
from models.vlm import VisualLanguageModel

FORMAT = "cnn-vlm 1"
PROJECTION_PARTS = ("mean", "std", "components", "pca_mean")
FULL_PRECISION = ("mean", "std", "pca_mean")  # statistics stay float32 in a float16 file


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
        raise UserError(f"{path} is not a readable safetensors file ({error}): give another file") from None
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
    tensors: dict[str, Tensor] = {}
    for layer, model in vlm.layers.items():
        projection = vlm.projections[layer]
        tensors |= {f"{layer}.projection.{part}": getattr(projection, part) for part in PROJECTION_PARTS}
        tensors |= {f"{layer}.{name}": value for name, value in model.state_dict().items()}
    tensors = {n: v if n.rsplit(".", 1)[-1] in FULL_PRECISION else v.to(dtype) for n, v in tensors.items()}
    for tap, values in vlm.statistics.items():
        tensors |= {f"statistics.{tap}.{key}": value.float() for key, value in values.items()}
    return tensors


def vlm_from_tensors(
    tensors: Mapping[str, Tensor], layers: list[str], source: object = "checkpoint"
) -> VisualLanguageModel:
    """Rebuild a model from the tensors of `vlm_tensors`, whatever their precision.

    Raises:
        UserError: a tensor is missing, left over, of another shape, or not finite.
    """
    tensors = dict(tensors)
    for name, value in tensors.items():
        if not value.dtype.is_floating_point or not bool(torch.isfinite(value).all()):
            raise UserError(f"{source}: tensor {name} holds values that are no finite numbers: give another file")

    def take(name: str) -> Tensor:
        if name not in tensors:
            raise UserError(f"{source}: tensor {name} is missing: give another file")
        return tensors.pop(name).float()

    projections, states = {}, {}
    for layer in layers:
        parts = {part: take(f"{layer}.projection.{part}") for part in PROJECTION_PARTS}
        _check_projection(parts, f"{source}: projection of {layer}")
        projections[layer] = Projection(**parts)
        prefix = f"{layer}."
        states[layer] = {n.removeprefix(prefix): take(n) for n in list(tensors) if n.startswith(prefix)}
    statistics: dict[str, dict[str, Tensor]] = {}
    for name in [n for n in tensors if n.startswith("statistics.") and n.count(".") == 2]:
        _, tap, key = name.split(".")
        statistics.setdefault(tap, {})[key] = take(name)
    if tensors:
        raise UserError(f"{source}: unexpected tensor {next(iter(tensors))}: give another file")
    vlm = VisualLanguageModel(projections, statistics)
    for layer, state in states.items():
        expected = {n: tuple(v.shape) for n, v in vlm.layers[layer].state_dict().items()}
        for name in sorted(expected.keys() | state.keys()):
            found = tuple(state[name].shape) if name in state else None
            if expected.get(name) != found:
                raise UserError(f"{source}: tensor {layer}.{name} should be {expected.get(name)}, found {found}")
        vlm.layers[layer].load_state_dict(state)
    return vlm


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
    if not bool((parts["std"] > 0).all()):
        raise UserError(f"{what} has deviations that are not positive: give another file")


def load_vlm(path: Path) -> tuple[VisualLanguageModel, dict[str, Any]]:
    """A language model and its configuration from one file; strict, on the CPU.

    Raises:
        UserError: in one line, what does not fit.
    """
    tensors, configuration = read_tensors(path)
    layers = configuration.get("layers")
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers) or not layers:
        raise UserError(f"{path} does not say which layers it holds: give another file")
    if not isinstance(configuration.get("backbone"), str):
        raise UserError(f"{path} does not say which backbone it reads: give another file")
    return vlm_from_tensors(tensors, layers, path), configuration


def merge_layers(first: Mapping[str, Tensor], second: Mapping[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """`first` with everything of `layers` replaced by `second`'s tensors; layers share no parameters."""
    prefixes = tuple(f"{layer}." for layer in layers)
    kept = {name: value for name, value in first.items() if not name.startswith(prefixes)}
    return kept | {name: value for name, value in second.items() if name.startswith((*prefixes, "statistics."))}
