"""A network with its weights: frozen, read at named taps, with the way from pixels to its input and back."""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from models.backbones.architecture import Architecture
from models.errors import UserError


class Backbone(nn.Module):
    """A frozen CNN whose taps are read by name.

    Modules none of whose parameters are given (fully connected layers, where only the convolutions were found) cannot
    be tapped or passed.

    Args:
        architecture: which network.
        parameters: tensors by name, shapes as `architecture.parameter_shapes()`.
        mean_image: (3, H, W) in the network's channel order, 0-255. Where an image has exactly this height and
            width the mean is subtracted per pixel, elsewhere per channel (the original's rule).
    """

    def __init__(self, architecture: Architecture, parameters: Mapping[str, Tensor], mean_image: Tensor | None = None):
        super().__init__()
        self.architecture = architecture
        self.network, self.absent = _filled(architecture, parameters)
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
    def available_targets(self) -> tuple[str, ...]:
        """Targets of reconstruction that the loaded parameters reach."""
        return tuple(t for t in self.architecture.targets if self._missing(t) is None)

    def _missing(self, tap: str) -> str | None:
        """The first module on the way to `tap` whose parameters were not loaded."""
        if not self.absent:
            return None
        return next((name for name in self.architecture.modules_upto(tap) if name in self.absent), None)

    def forward(self, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """Tap the network; it is run no deeper than the deepest layer asked for.

        Args:
            x: network input (N, 3, H, W), see `preprocess`.
            layers: names of taps, or `data`.

        Returns:
            (N, C, H_l, W_l) by layer, (N, units) for fully connected layers, in the order asked for.

        Raises:
            UserError: unknown layer, layer without weights, or image too small or of the wrong size for it.
        """
        for layer in layers:
            self.architecture.check_tap(layer, hidden=True)
            if (missing := self._missing(layer)) is not None:
                raise UserError(
                    f"{layer} of {self.architecture.name} needs the weights of {missing}, which are not loaded: "
                    "give the complete file with --weights FILE"
                )
            self.architecture.check_size(layer, x.shape[2], x.shape[3], grid=1)
        deeper = set(layers) - {"data"}
        taps = self.architecture.reader.read(self.network, x, deeper) if deeper else {}
        return {layer: x if layer == "data" else taps[layer] for layer in layers}

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
        """Mean-subtracted pixels (N, 3, H, W) -> network input. The identity where the scale is one."""
        return pixels / self.scale if self.architecture.scale != (1.0, 1.0, 1.0) else pixels

    def to_pixels(self, x: Tensor) -> Tensor:
        """Network input (N, 3, H, W) -> mean-subtracted pixels, the inverse of `from_pixels`."""
        return x * self.scale

    def to_rgb(self, pixels: Tensor) -> Tensor:
        """Mean-subtracted pixels (N, 3, H, W) -> RGB clipped to 0-255, by the channel means."""
        images = (pixels + self.mean).clamp(0, 255)
        return images.flip(1) if self.architecture.bgr else images


def _filled(architecture: Architecture, parameters: Mapping[str, Tensor]) -> tuple[nn.Module, frozenset[str]]:
    """The network with its parameters, frozen, and the names of the modules that have none."""
    shapes = architecture.parameter_shapes()
    here = {name.rpartition(".")[0] for name in shapes if name in parameters}
    absent = frozenset(name.rpartition(".")[0] for name in shapes) - here
    state = {}
    for name, expected in shapes.items():
        if name.rpartition(".")[0] in absent:
            continue
        found = tuple(parameters[name].shape) if name in parameters else "nothing"
        if found != expected:
            raise UserError(f"{architecture.name}: {name} should be {expected}, found {found}")
        state[name] = parameters[name].detach().to(torch.float32)
    network = architecture.make()
    network.load_state_dict(state | architecture.constants, strict=False, assign=True)
    for name in absent:
        owner, _, kind = name.rpartition(".")
        setattr(network.get_submodule(owner), kind, nn.Identity())
    return network.eval().requires_grad_(False), absent


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


def central_part(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """`centre_crop` of a picture (H, W, 3)."""
    return centre_crop(picture.transpose(2, 0, 1), height, width).transpose(1, 2, 0)


def random_parameters(architecture: Architecture, seed: int, upto: str | None = None) -> dict[str, Tensor]:
    """Random parameters, up to a tap if one is given: the control for what pre-training brings, never a fallback.

    Kernels and matrices are He-initialised and their biases zero; what else a network has is as it makes it itself.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters, others = {}, []
    for name, shape in architecture.parameter_shapes(upto).items():
        module = architecture.skeleton.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.Conv2d | nn.Linear):
            others.append(name)
        elif name.endswith(".bias"):
            parameters[name] = torch.zeros(shape)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            parameters[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    if others:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = architecture.build().state_dict()
        parameters |= {name: value for name, value in made.items() if name not in parameters}
    return parameters
