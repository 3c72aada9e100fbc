"""The pre-trained CNNs: architectures, taps, input conventions.

A backbone is a list of operations, each with a name; a tap is the output of the operation of that name. Since
ReLUs are operations of their own, `conv5` is the output of the convolution *before* its ReLU, as in the paper's
code. `data` is the network's input itself.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError

IMAGENET_MEAN_RGB = (0.485, 0.456, 0.406)
IMAGENET_STD_RGB = (0.229, 0.224, 0.225)
# Channel means of the original's mean image (imagenet_mean.binaryproto of yosinski/convnet_transfer), BGR.
CAFFE_MEAN_BGR = (103.046827, 115.973744, 122.668716)


@dataclass(frozen=True)
class Conv:
    """2-D correlation with square kernel, weights (out, in/groups, k, k)."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1


@dataclass(frozen=True)
class Linear:
    """Fully connected layer on the flattened input, weights (out, in)."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ReLU:
    """Rectification, never in place: the tap before it must survive."""

    name: str


@dataclass(frozen=True)
class LocalResponseNorm:
    """x / (1 + alpha/size * sum of squares over `size` neighbouring channels)^beta."""

    name: str
    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75


@dataclass(frozen=True)
class MaxPool:
    """Max pooling without padding. Partial windows are dropped (floor mode), where Caffe keeps them."""

    name: str
    kernel: int
    stride: int


@dataclass(frozen=True)
class AdaptiveAveragePool:
    """torchvision's bridge to the fully connected layers; the identity at the training size."""

    name: str
    size: int


Operation = Conv | Linear | ReLU | LocalResponseNorm | MaxPool | AdaptiveAveragePool


@dataclass(frozen=True)
class Architecture:
    """What defines a backbone besides its weights.

    `vlm_layers` are the taps that language models read, `crop` the height and width of training images. A network
    input is `(pixels - mean) / scale` with pixels in 0-255 and mean and scale per channel, in the network's own
    channel order (`bgr` or RGB).
    """

    name: str
    operations: tuple[Operation, ...]
    vlm_layers: tuple[str, ...]
    crop: tuple[int, int]
    bgr: bool
    mean: tuple[float, float, float]
    scale: tuple[float, float, float]

    def __getitem__(self, name: str) -> Operation:
        """The operation called `name`; a UserError lists the taps there are."""
        for operation in self.operations:
            if operation.name == name:
                return operation
        raise UserError(f"{self.name} has no layer {name!r}; choose from: {', '.join(self.taps)}")

    @property
    def taps(self) -> tuple[str, ...]:
        """Names a user may ask for: data, convolutions, the last pooling, fully connected layers."""
        pools = [o.name for o in self.operations if isinstance(o, MaxPool)]
        wanted = (Conv, Linear)
        return (
            "data",
            *(o.name for o in self.operations if isinstance(o, wanted) or o.name in pools[-1:]),
        )

    @property
    def fully_connected(self) -> tuple[str, ...]:
        """Names of the fully connected layers, in order."""
        return tuple(o.name for o in self.operations if isinstance(o, Linear))

    def parameter_shapes(self, upto: str | None = None) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters by name (`conv1.weight`, `conv1.bias`, …), up to the tap `upto`."""
        shapes = {}
        for o in self.operations:
            if isinstance(o, Conv):
                shapes[f"{o.name}.weight"] = (o.outputs, o.inputs // o.groups, o.kernel, o.kernel)
                shapes[f"{o.name}.bias"] = (o.outputs,)
            elif isinstance(o, Linear):
                shapes[f"{o.name}.weight"] = (o.outputs, o.inputs)
                shapes[f"{o.name}.bias"] = (o.outputs,)
            if o.name == upto:
                break
        return shapes

    def channels(self, layer: str) -> int:
        """Channels (or units) of a tap."""
        if layer == "data":
            return 3
        channels = 3
        self[layer]
        for o in self.operations:
            channels = getattr(o, "outputs", channels)
            if o.name == layer:
                break
        return channels

    def grid(self, layer: str, height: int, width: int) -> tuple[int, int]:
        """Height and width of a tap's grid for an input of `height` × `width`; (1, 1) from fc6 on.

        May be zero or negative where the input is too small (see `minimum_size`).
        """
        return self._sizes(layer, height)[-1], self._sizes(layer, width)[-1]

    def _sizes(self, layer: str, size: int) -> list[int]:
        """Lengths of one axis after every operation up to `layer`, the input's first."""
        sizes = [size]
        if layer == "data":
            return sizes
        self[layer]
        for o in self.operations:
            if isinstance(o, Conv):
                size = (size + 2 * o.padding - o.kernel) // o.stride + 1
            elif isinstance(o, MaxPool):
                size = (size - o.kernel) // o.stride + 1
            elif isinstance(o, AdaptiveAveragePool):
                size = o.size if size > 0 else 0
            elif isinstance(o, Linear):
                size = 1 if size > 0 else 0
            sizes.append(size)
            if o.name == layer:
                break
        return sizes

    def stride(self, layer: str) -> int:
        """Input pixels between neighbouring positions of a tap's grid."""
        total = 1
        if layer == "data":
            return 1
        self[layer]
        for o in self.operations:
            total *= getattr(o, "stride", 1)
            if o.name == layer:
                break
        return total

    def memory(self, layer: str, height: int, width: int) -> int:
        """Bytes that a pass over one image to a tap needs at least: the largest two neighbouring float32 maps."""
        channels, values = 3, [3 * height * width]
        for o, h, w in zip(
            self.operations, self._sizes(layer, height)[1:], self._sizes(layer, width)[1:], strict=False
        ):
            channels = getattr(o, "outputs", channels)
            values.append(channels * max(h, 0) * max(w, 0))
        return 4 * max(map(sum, zip(values, [*values[1:], 0], strict=True)))

    def minimum_size(self, layer: str, grid: int = 2) -> int:
        """Smallest input side that gives `grid` positions along that side of the tap."""
        size = 1
        while not self._is_enough(layer, size, grid):
            size += 1
        return size

    def _is_enough(self, layer: str, size: int, grid: int) -> bool:
        sizes = self._sizes(layer, size)
        has_grid = layer == "data" or not isinstance(self[layer], Linear | AdaptiveAveragePool)
        return min(sizes) >= 1 and (sizes[-1] >= grid or not has_grid)

    def check_maps(self, layers: Collection[str]) -> None:
        """Raise a UserError if one of `layers` is no tap with a grid, which a language model could read."""
        maps = [tap for tap in self.taps if tap not in self.fully_connected]
        if others := [layer for layer in layers if layer not in maps]:
            raise UserError(f"{self.name} has no feature map {others[0]!r}; choose from: {', '.join(maps)}")

    def check_size(self, layer: str, height: int, width: int, grid: int = 2) -> None:
        """Raise a UserError if an input of `height` × `width` is too small for a tap."""
        if not self._is_enough(layer, min(height, width), grid):
            least = self.minimum_size(layer, grid)
            raise UserError(
                f"an image of {width}×{height} pixels is too small for {layer} of {self.name}: "
                f"give one of at least {least}×{least}"
            )


def _alexnet() -> tuple[Operation, ...]:
    return (
        Conv("conv1", 3, 64, 11, stride=4, padding=2),
        ReLU("relu1"),
        MaxPool("pool1", 3, 2),
        Conv("conv2", 64, 192, 5, padding=2),
        ReLU("relu2"),
        MaxPool("pool2", 3, 2),
        Conv("conv3", 192, 384, 3, padding=1),
        ReLU("relu3"),
        Conv("conv4", 384, 256, 3, padding=1),
        ReLU("relu4"),
        Conv("conv5", 256, 256, 3, padding=1),
        ReLU("relu5"),
        MaxPool("pool5", 3, 2),
        AdaptiveAveragePool("average", 6),
        *_fully_connected(256 * 6 * 6),
    )


def _alexnet_caffe() -> tuple[Operation, ...]:
    return (
        Conv("conv1", 3, 96, 11, stride=4),
        ReLU("relu1"),
        LocalResponseNorm("norm1"),
        MaxPool("pool1", 3, 2),
        Conv("conv2", 96, 256, 5, padding=2, groups=2),
        ReLU("relu2"),
        LocalResponseNorm("norm2"),
        MaxPool("pool2", 3, 2),
        Conv("conv3", 256, 384, 3, padding=1),
        ReLU("relu3"),
        Conv("conv4", 384, 384, 3, padding=1, groups=2),
        ReLU("relu4"),
        Conv("conv5", 384, 256, 3, padding=1, groups=2),
        ReLU("relu5"),
        MaxPool("pool5", 3, 2),
        *_fully_connected(256 * 6 * 6),
    )


def _vgg(depths: tuple[int, ...], bridge: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """VGG with `depths[b]` 3×3 convolutions in block b."""
    operations: list[Operation] = []
    widths = (3, 64, 128, 256, 512, 512)
    for block, (depth, (before, width)) in enumerate(zip(depths, pairwise(widths), strict=True), start=1):
        for i in range(1, depth + 1):
            inputs = before if i == 1 else width
            operations += [Conv(f"conv{block}_{i}", inputs, width, 3, padding=1), ReLU(f"relu{block}_{i}")]
        operations.append(MaxPool(f"pool{block}", 2, 2))
    return (*operations, *bridge, *_fully_connected(512 * 7 * 7))


def _fully_connected(inputs: int) -> tuple[Operation, ...]:
    return (
        Linear("fc6", inputs, 4096),
        ReLU("relu6"),
        Linear("fc7", 4096, 4096),
        ReLU("relu7"),
        Linear("fc8", 4096, 1000),
    )


_ALEXNET_LAYERS = ("data", "conv1", "conv2", "conv3", "conv4", "conv5")
_VGG16_LAYERS = ("data", "conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3")
_VGG19_LAYERS = ("data", "conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4")
_TORCHVISION_INPUT = {
    "bgr": False,
    "mean": tuple(255 * m for m in IMAGENET_MEAN_RGB),
    "scale": tuple(255 * s for s in IMAGENET_STD_RGB),
}
_CAFFE_INPUT = {"bgr": True, "mean": CAFFE_MEAN_BGR, "scale": (1.0, 1.0, 1.0)}
_BRIDGE = (AdaptiveAveragePool("average", 7),)

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("alexnet", _alexnet(), _ALEXNET_LAYERS, crop=(227, 227), **_TORCHVISION_INPUT),
        Architecture("alexnet_caffe", _alexnet_caffe(), _ALEXNET_LAYERS, crop=(227, 227), **_CAFFE_INPUT),
        Architecture("vgg16", _vgg((2, 2, 3, 3, 3), _BRIDGE), _VGG16_LAYERS, crop=(224, 224), **_TORCHVISION_INPUT),
        Architecture("vgg19", _vgg((2, 2, 4, 4, 4), _BRIDGE), _VGG19_LAYERS, crop=(224, 224), **_TORCHVISION_INPUT),
        Architecture("vgg19_caffe", _vgg((2, 2, 4, 4, 4), ()), _VGG19_LAYERS, crop=(224, 224), **_CAFFE_INPUT),
    )
}


class Backbone(nn.Module):
    """A frozen CNN whose taps are read by name.

    Parameters are named `<layer>.weight` and `<layer>.bias`. Operations whose parameters are not in `parameters`
    (fully connected layers, where only the convolutions were found) cannot be tapped or passed.

    Args:
        architecture: which network.
        parameters: tensors by name, shapes as `architecture.parameter_shapes()`.
        mean_image: (3, H, W) in the network's channel order, 0-255. Where an image has exactly this height and
            width the mean is subtracted per pixel, elsewhere per channel (the original's rule).
    """

    def __init__(self, architecture: Architecture, parameters: dict[str, Tensor], mean_image: Tensor | None = None):
        super().__init__()
        self.architecture = architecture
        for operation in architecture.operations:
            if not isinstance(operation, Conv | Linear) or f"{operation.name}.weight" not in parameters:
                continue
            module = nn.Module()
            for kind in ("weight", "bias"):
                name = f"{operation.name}.{kind}"
                expected = architecture.parameter_shapes()[name]
                if name not in parameters or tuple(parameters[name].shape) != expected:
                    found = tuple(parameters[name].shape) if name in parameters else "nothing"
                    raise UserError(f"{architecture.name}: {name} should be {expected}, found {found}")
                value = parameters[name].detach().to(torch.float32)
                setattr(module, kind, nn.Parameter(value, requires_grad=False))
            self.add_module(operation.name, module)
        mean = torch.tensor(architecture.mean, dtype=torch.float32)
        if mean_image is not None:
            mean_image = mean_image.to(torch.float32)
            mean = mean_image.double().mean(dim=(1, 2)).float()
        self.register_buffer("mean_image", mean_image)
        self.register_buffer("mean", mean[:, None, None])  # (3, 1, 1)
        self.register_buffer("scale", torch.tensor(architecture.scale, dtype=torch.float32)[:, None, None])

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.mean.device

    @property
    def available_taps(self) -> tuple[str, ...]:
        """Taps that the loaded parameters reach."""
        return tuple(t for t in self.architecture.taps if self._missing(t) is None)

    def _missing(self, tap: str) -> str | None:
        """The first operation at or before `tap` whose parameters were not loaded."""
        if tap == "data":
            return None
        for operation in self.architecture.operations:
            if isinstance(operation, Conv | Linear) and not hasattr(self, operation.name):
                return operation.name
            if operation.name == tap:
                return None
        return None

    def forward(self, x: Tensor, layers: tuple[str, ...] | list[str]) -> dict[str, Tensor]:
        """Tap the network; it is run no deeper than the deepest layer asked for.

        Args:
            x: network input (N, 3, H, W), see `preprocess`.
            layers: names of operations, or `data`.

        Returns:
            (N, C, H_l, W_l) by layer, (N, units) for fully connected layers, in the order asked for.

        Raises:
            UserError: unknown layer, layer without weights, or image too small or of the wrong size for it.
        """
        for layer in layers:
            if layer != "data":
                self.architecture[layer]
            if (missing := self._missing(layer)) is not None:
                raise UserError(
                    f"{layer} of {self.architecture.name} needs the weights of {missing}, which are not loaded: "
                    "give the complete file with --weights FILE"
                )
            self.architecture.check_size(layer, x.shape[2], x.shape[3], grid=1)
        wanted = set(layers) - {"data"}
        taps = {"data": x}
        for operation in self.architecture.operations:
            if not wanted:
                break
            x = self._run(operation, x)
            if operation.name in wanted:  # the others go as soon as nothing reads them
                taps[operation.name] = x
                wanted.discard(operation.name)
        return {layer: taps[layer] for layer in layers}

    def _run(self, operation: Operation, x: Tensor) -> Tensor:
        match operation:
            case Conv(name, _, _, _, stride, padding, groups):
                module = getattr(self, name)
                return F.conv2d(x, module.weight, module.bias, stride, padding, groups=groups)
            case ReLU():
                return F.relu(x)
            case LocalResponseNorm(_, size, alpha, beta):
                return F.local_response_norm(x, size, alpha, beta, k=1.0)
            case MaxPool(_, kernel, stride):
                return F.max_pool2d(x, kernel, stride)
            case AdaptiveAveragePool(_, size):
                return F.adaptive_avg_pool2d(x, size)
            case Linear(name, inputs, _):
                module = getattr(self, name)
                x = x.flatten(1)
                if x.shape[1] != inputs:
                    raise UserError(
                        f"{name} of {self.architecture.name} reads {inputs} values, this image gives "
                        f"{x.shape[1]}: give an image of {self.architecture.crop[1]}×{self.architecture.crop[0]} pixels"
                    )
                return F.linear(x, module.weight, module.bias)
        raise TypeError(f"unknown operation {operation!r}")

    def subtract_mean(self, images: Tensor) -> Tensor:
        """RGB images (N, 3, H, W), 0-255 -> mean-subtracted pixels in the network's channel order.

        The unit stays 0-255. The mean image is subtracted per pixel where it has the images' size, its channel
        means elsewhere.
        """
        pixels = images.flip(1) if self.architecture.bgr else images
        per_pixel = self.mean_image is not None and self.mean_image.shape[1:] == images.shape[2:]
        return pixels - (self.mean_image if per_pixel else self.mean)

    def preprocess(self, images: Tensor) -> Tensor:
        """RGB images (N, 3, H, W), 0-255 -> network input (N, 3, H, W)."""
        return self.from_pixels(self.subtract_mean(images))

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Mean-subtracted pixels (N, 3, H, W) -> network input. The identity for the Caffe backbones."""
        return pixels / self.scale if self.architecture.scale != (1.0, 1.0, 1.0) else pixels

    def to_pixels(self, x: Tensor) -> Tensor:
        """Network input (N, 3, H, W) -> mean-subtracted pixels, the inverse of `from_pixels`."""
        return x * self.scale

    def to_rgb(self, pixels: Tensor) -> Tensor:
        """Mean-subtracted pixels (N, 3, H, W) -> RGB clipped to 0-255, by the channel means."""
        images = (pixels + self.mean).clamp(0, 255)
        return images.flip(1) if self.architecture.bgr else images


def centre_crop(images: Tensor, height: int, width: int) -> Tensor:
    """Central `height` × `width` of (…, H, W); of an odd difference the extra row goes at the bottom or right.

    Raises:
        UserError: the images are smaller than the crop.
    """
    h, w = images.shape[-2:]
    if h < height or w < width:
        raise UserError(f"cannot crop {width}×{height} from an image of {w}×{h}: give a larger image")
    # differs from the original: no difference means no crop; its slice 0:-0 returned an empty image
    top, left = (h - height) // 2, (w - width) // 2
    return images[..., top : top + height, left : left + width]


def random_parameters(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """He-initialised parameters, the control for what pre-training brings (never a silent fallback)."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in architecture.parameter_shapes().items():
        if name.endswith(".bias"):
            parameters[name] = torch.zeros(shape)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            parameters[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    return parameters
