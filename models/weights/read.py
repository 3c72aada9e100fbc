"""Weights from a file of others: recognised by its content, its names mapped to ours, every tensor checked."""

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.backbones.architecture import Architecture
from models.errors import UserError
from models.weights.caffe import match_parameters, read_caffemodel
from models.weights.contents import other_kind
from models.weights.downloads import file_hash
from models.weights.pickles import read_convolutions

# The number that torch files from before version 1.6 start with, as pickled.
_LEGACY_TORCH = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_SAFETENSORS_HEADER = 100_000_000  # bytes of a header that the format allows
_TORCHVISION = ("features.", "classifier.")  # its names of AlexNet and VGG
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NESTED = ("state_dict", "model_state_dict", "model", "network", "net")  # above the weights in training scripts' files
_DEPTH = 3  # of such, one below the other


def read_weights(path: Path, architecture: Architecture) -> dict[str, Tensor]:
    """Parameters from a file, recognised by its content: torch, safetensors, caffemodel, or the package's pickle.

    Names may be ours or those of `architecture.origin`, all behind `module.` or the like, and lie below `state_dict`,
    `model` or an only key. Fully connected layers may be missing altogether where the origin allows that.

    Raises:
        UserError: unreadable, of another network, not finite; nothing in the file is ever executed.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the weights of {architecture.name} with --weights FILE")
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file") from None
    tensors = _read(path, head, architecture)
    return _checked(_canonical(tensors, architecture, path), architecture, path)


def _read(path: Path, head: bytes, architecture: Architecture) -> Mapping[str, Tensor]:
    if head[:2] == b"PK":
        _check_archive(path)
        return _read_torch(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _SAFETENSORS_HEADER:
        return _read_safetensors(path)
    if _LEGACY_TORCH in head[:64]:
        return _read_torch(path)
    if head[:1] == b"\x80":
        return _read_package(path, architecture)
    if architecture.origin.caffe and head:
        return _read_caffe(path, architecture)
    kind = other_kind(head)
    raise UserError(
        f"{path} is {kind or 'neither a torch nor a safetensors file'}: give weights of {architecture.name}"
        + ("" if kind else " (a Caffe model fits the Caffe backbones only)")
    )


def _check_archive(path: Path) -> None:
    """Raise a UserError if a zip archive is damaged or unpacks to more than its size; torch itself packs nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # a hostile archive may raise nearly anything
        raise UserError(f"{path} is a damaged torch file ({_first_line(error)}): give another file") from None
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise UserError(f"{path} unpacks to more than its size, torch files do not: give a file saved by torch")


def _read_torch(path: Path) -> Mapping[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message tells how to execute the file
        raise UserError(f"{path} is damaged or asks for more than tensors: give a plain state dict") from None
    except Exception as error:  # a damaged or hostile file may raise nearly anything
        raise UserError(f"{path} holds no plain weights ({_first_line(error)}): give a state dict") from None
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} is no state dict, tensors by name: give one, saved as model.state_dict()")
    inner = loaded
    for _ in range(_DEPTH):
        keys = (*_NESTED, *(inner if len(inner) == 1 else ()))
        inner = next((inner[key] for key in keys if isinstance(inner.get(key), Mapping)), inner)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in inner.items()):
        found = ", ".join(f"{name!s:.30}" for name in list(inner)[:5])
        raise UserError(f"{path} holds {found}, no state dict (tensors by name): give one, saved as model.state_dict()")
    return inner


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} is no readable safetensors file ({_first_line(error)}): give another") from None


def _read_package(path: Path, architecture: Architecture) -> Mapping[str, Tensor]:
    """A pickle can do anything to whoever reads it: only the two of the package are, known by their hashes."""
    packaged = architecture.origin.packaged
    if packaged is None or file_hash(path) != packaged.sha256:
        raise UserError(f"{path} is a pickle, which could run code: give {architecture.name} as a torch file")
    return read_convolutions(path, architecture)


def _read_caffe(path: Path, architecture: Architecture) -> Mapping[str, Tensor]:
    shapes = architecture.parameter_shapes()
    blobs = read_caffemodel(path, wanted={name.split(".")[0] for name in shapes})
    absent = {layer for layer in architecture.fully_connected if layer not in blobs}
    needed = {name: shape for name, shape in shapes.items() if name.split(".")[0] not in absent}
    matched = match_parameters(blobs, needed, path=path)
    return {name: torch.from_numpy(np.array(value)) for name, value in matched.items()}


def _canonical(tensors: Mapping[str, Tensor], architecture: Architecture, path: Path) -> dict[str, Tensor]:
    """Our names for those of the origin; names that are ours already stay.

    torchvision's names are refused for the Caffe backbones: its VGG-19 has the same shapes and other weights, for
    another input.
    """
    rename, shapes = architecture.origin.rename, architecture.parameter_shapes()
    prefix = _common_prefix(tensors, lambda name: rename(name) in shapes or name.startswith(_TORCHVISION))
    renamed: dict[str, Tensor] = {}
    for full_name, value in tensors.items():
        name = full_name.removeprefix(prefix)
        if architecture.origin.caffe and name.startswith(_TORCHVISION):
            raise UserError(
                f"{path} has torchvision's names ({name}), {architecture.name} has other weights: give its caffemodel"
            )
        target = rename(name)
        if target in renamed:
            raise UserError(f"{path} has {target} twice, as {name} too: give a file of one network")
        renamed[target] = value
    return renamed


def _common_prefix(names: Iterable[str], is_known: Callable[[str], bool]) -> str:
    """What wrappers put before every name, `module.` or `_orig_mod.model.`: all parts before the first known name."""
    names, prefix = list(names), ""
    while names and not any(map(is_known, names)):
        parts = [name.partition(".") for name in names]
        if len({first for first, _, _ in parts}) > 1 or not all(rest for _, _, rest in parts):
            return ""
        prefix, names = f"{prefix}{parts[0][0]}.", [rest for _, _, rest in parts]
    return prefix


def _checked(tensors: Mapping[str, Tensor], architecture: Architecture, path: Path) -> dict[str, Tensor]:
    """The architecture's parameters as float32, names and shapes checked."""
    shapes = architecture.parameter_shapes()
    if architecture.origin.headless:
        heads = {f"{layer}.{kind}" for layer in architecture.fully_connected for kind in ("weight", "bias")}
        if not heads & tensors.keys():
            shapes = {name: shape for name, shape in shapes.items() if name not in heads}
    parameters = {}
    for name, shape in shapes.items():
        held = ", ".join(f"{other:.40}" for other in list(tensors)[:3]) or "nothing"
        found = tuple(tensors[name].shape) if name in tensors else f"nothing; the file holds {held}"
        if found != shape:
            raise UserError(
                f"{path}: {name} should be {shape}, found {found}: give weights of {architecture.name} with --weights"
            )
        value = tensors[name].detach()
        usable = value.layout == torch.strided and value.dtype in _FLOATS and value.device.type == "cpu"
        if usable:
            value = value.to(torch.float32).contiguous()
        if not usable or not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: {name} holds values that are no finite numbers: give another file")
        parameters[name] = value
    if extra := sorted(tensors.keys() - shapes.keys() - architecture.constants.keys()):
        raise UserError(
            f"{path} has {extra[0]}, which {architecture.name} has not: give weights of {architecture.name}"
        )
    return parameters


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].split(". ")[0][:200]
