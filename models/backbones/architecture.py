"""What a backbone is besides its weights: a network with named taps, how it wants its pixels, and its geometry.

Geometry is measured, not computed: the network is run on PyTorch's meta device, where tensors have shapes and no data.
"""

from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from threading import RLock, get_ident

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from models.backbones.taps import ModuleReader, Reader, shapes_alone
from models.errors import UserError
from models.weights.origin import Origin

GROWTH = 20_160  # pixels by which an image is enlarged to measure a stride: a multiple of all that networks have
LARGEST = 2**14  # pixels of a side beyond which no least size is looked for
REFUSALS = (RuntimeError, ValueError, AttributeError, AssertionError, KeyError)  # of a network, what does not fit
LISTED = 20  # names that fit into a message
_one_run = RLock()  # runs without data share a network, whose hooks would catch another thread's run


@dataclass(frozen=True, eq=False)
class Architecture:
    """What defines a backbone besides its weights.

    Args:
        build: makes the network, with any weights; called on the meta device too.
        vlm_layers: the taps that language models read.
        crop: height and width of training images.
        mean, scale, bgr: a network input is `(pixels - mean) / scale` with pixels in 0-255 and both per channel, in
            the network's own channel order (`bgr` or RGB).
        mean_image: whether a mean image is subtracted per pixel where there is one (Caffe's networks).
        reader: how the network's taps are called and read.
        origin: where its weights are from.
    """

    name: str
    build: Callable[[], nn.Module]
    vlm_layers: tuple[str, ...]
    crop: tuple[int, int]
    mean: tuple[float, float, float]
    scale: tuple[float, float, float]
    bgr: bool = False
    mean_image: bool = False
    reader: Reader = field(default_factory=ModuleReader)
    origin: Origin = field(default_factory=Origin)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The network on the meta device, in evaluation mode, to measure shapes with."""
        network = self.make().eval()
        return shapes_alone(network) if isinstance(self.reader, ModuleReader) else network

    def make(self) -> nn.Module:
        """A network of its own, on the meta device: its parameters have shapes and no values."""
        try:
            with torch.device("meta"):
                return self.build()
        except NotImplementedError:  # some compute constants while they are built
            return self.build().to("meta")

    @cached_property
    def taps(self) -> tuple[str, ...]:
        """Names to offer: `data`, the network's input itself, and the reader's."""
        return ("data", *self.reader.names(self.skeleton))

    @cached_property
    def maps(self) -> tuple[str, ...]:
        """Taps with a grid, which language models can read."""
        return ("data", *(tap for tap, shape in self._crop_shapes.items() if len(shape) == 4))

    @cached_property
    def fully_connected(self) -> tuple[str, ...]:
        """Taps without a grid: vectors (N, units)."""
        return tuple(tap for tap, shape in self._crop_shapes.items() if len(shape) == 2)

    @property
    def scores(self) -> str | None:
        """The tap of the class scores: the last vector; None where the network has none."""
        return next(reversed(self.fully_connected), None)

    @property
    def targets(self) -> tuple[str, ...]:
        """Taps behind the deepest one that language models read, what reconstruction starts from."""
        deepest = max((self.taps.index(tap) for tap in self.vlm_layers if tap in self.taps), default=0)
        return tuple(tap for tap in self.taps[deepest + 1 :] if tap in self._crop_shapes)

    @cached_property
    def _crop_shapes(self) -> dict[str, tuple[int, ...]]:
        taps = self.taps[1:]
        return {tap: tuple(value.shape) for tap, value in self._run(taps, *self.crop).items()} if taps else {}

    def survey(self) -> None:
        """Measure channels, grid and stride of all taps at once, which is quicker than one by one."""
        h, w = self.crop
        for size in ((h, w), (h + GROWTH, w), (h, w + GROWTH)):
            for tap, value in self._run(self.taps[1:], *size).items():
                self._shapes[(tap, *size)] = tuple(value.shape)

    def parameter_shapes(self, upto: str | None = None) -> dict[str, tuple[int, ...]]:
        """Shapes of all that weights must give, by name (`conv1.weight`, …), up to the tap `upto`.

        Running means and variances of batch normalisation are among them, constants of the network are not.
        """
        names = None if upto is None else self.modules_upto(upto)
        return {
            name: tuple(value.shape)
            for name, value in self.skeleton.state_dict().items()
            if value.is_floating_point() and (names is None or name.rpartition(".")[0] in names)
        }

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """What a network makes for itself, the same with any weights: indices of attention, counters of batches."""
        whole = {n: v for n, v in self.skeleton.state_dict().items() if not v.is_floating_point()}
        if any(value.ndim for value in whole.values()):
            made = self.build().state_dict()
            return {name: made[name] for name in whole}
        return {name: torch.zeros((), dtype=value.dtype) for name, value in whole.items()}

    def modules_upto(self, layer: str) -> tuple[str, ...]:
        """Names of the modules that a run to a tap goes through."""
        if layer == "data":
            return ()
        with _runs() as modules:
            self._run([layer], *self.crop)
        names = {module: name for name, module in self.skeleton.named_modules()}
        return tuple(names[module] for module, _ in modules)

    def channels(self, layer: str) -> int:
        """Channels (or units) of a tap."""
        return self._shape(layer, *self.crop)[1]

    def grid(self, layer: str, height: int, width: int) -> tuple[int, int]:
        """Height and width of a tap's grid for an input of `height` × `width`; (1, 1) for a vector.

        (0, 0) where the network cannot read such an input (see `minimum_size`).
        """
        shape = self._shape(layer, height, width)
        return shape[2:] if len(shape) == 4 else (1, 1) if shape else (0, 0)

    def stride(self, layer: str) -> tuple[int, int]:
        """Input pixels between neighbouring rows and columns of a tap's grid, (1, 1) for a vector.

        Positions count from the top left whatever the padding; a network that takes one size only is taken to
        divide it evenly.
        """
        h, w = self.crop
        rows, columns = self.grid(layer, h, w)
        if layer == "data" or len(self._shape(layer, h, w)) != 4:
            return 1, 1
        more = self.grid(layer, h + GROWTH, w)[0] - rows, self.grid(layer, h, w + GROWTH)[1] - columns
        if min(more) < 1:
            return h // rows, w // columns
        return round(GROWTH / more[0]), round(GROWTH / more[1])

    def memory(self, layer: str, height: int, width: int) -> int:
        """Bytes that a pass over one image to a tap needs at least: the largest module's input and output, float32."""
        if layer == "data":
            return 4 * 3 * height * width
        with _runs() as modules:
            self._run([layer], height, width)
        return 4 * max((values for _, values in modules), default=0)

    def flops(self, layer: str, height: int, width: int) -> int:
        """Floating-point operations of one image from the input to a tap: two for each multiplication and sum."""
        from torch.utils.flop_counter import FlopCounterMode

        if layer == "data":
            return 0
        with FlopCounterMode(display=False) as counter:
            self._run([layer], height, width, self.make().eval())
        return counter.get_total_flops()

    def minimum_size(self, layer: str, grid: int = 2) -> int:
        """Smallest side of a square input that gives `grid` positions along the sides of the tap."""
        low, high = 0, max(self.crop)
        while not self._is_enough(layer, high, high, grid) and high < LARGEST:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_enough(layer, middle, middle, grid) else (middle, high)
        return high

    def _is_enough(self, layer: str, height: int, width: int, grid: int) -> bool:
        shape = self._shape(layer, height, width)
        return bool(shape) and (len(shape) != 4 or min(shape[2:]) >= grid)

    def check_tap(self, layer: str, hidden: bool = False) -> None:
        """Raise a UserError with the nearest names if the network has no such tap.

        `hidden`: any module counts, one that is not offered too.
        """
        if layer not in self.taps and not (hidden and self._shape(layer, *self.crop)):
            raise UserError(f"{self.name} has no tap {layer!r:.80}{self._choice(layer, self.taps)}")

    def check_maps(self, layers: Collection[str]) -> None:
        """Raise a UserError if one of `layers` is no tap with a grid, which a language model could read."""
        for layer in layers:
            if layer not in self.maps:
                self.check_tap(layer)
                raise UserError(f"{layer} of {self.name} gives no grid{self._choice(layer, self.maps)}")

    def _choice(self, layer: str, names: Collection[str]) -> str:
        """How a message goes on: the nearest names, and the list where it is short."""
        near = get_close_matches(layer.lower(), names, n=3, cutoff=0.5)
        if len(names) <= LISTED:
            return (f" (nearest: {', '.join(near)})" if near else "") + f": choose from {', '.join(names)}"
        near = near or [*self.vlm_layers[:3]]
        return f": {', '.join(near)} are near, extract_features.py --backbone {self.name} --list-layers lists all"

    def check_size(self, layer: str, height: int, width: int, grid: int = 2) -> None:
        """Raise a UserError if the network cannot read an input of `height` × `width` up to a tap."""
        if self._is_enough(layer, height, width, grid):
            return
        image = f"an image of {width}×{height} pixels"
        least = self.minimum_size(layer, grid)
        if min(height, width) < least:
            raise UserError(f"{image} is too small for {layer} of {self.name}: give one of at least {least}×{least}")
        raise UserError(
            f"{layer} of {self.name} does not fit {image}: give one of {self.crop[1]}×{self.crop[0]} pixels"
        )

    @cached_property
    def _shapes(self) -> dict[tuple[str, int, int], tuple[int, ...]]:
        return {}

    def _shape(self, layer: str, height: int, width: int) -> tuple[int, ...]:
        """Shape of a tap for one image; () where there is no such tap or the image does not fit."""
        if layer == "data":
            return (1, 3, height, width)
        key = (layer, height, width)
        if key not in self._shapes:
            value = self._run([layer], height, width).get(layer)
            self._shapes[key] = () if value is None or 0 in value.shape else tuple(value.shape)
        return self._shapes[key]

    def _run(
        self, layers: Collection[str], height: int, width: int, network: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """Taps of one image without data; empty where the network (default: the skeleton) refuses it."""
        x = torch.empty(1, 3, height, width, device="meta")
        try:
            with _one_run, torch.no_grad():
                return self.reader.read(network or self.skeleton, x, layers)
        except REFUSALS:
            return {}


@contextmanager
def _runs():
    """Collects the modules without parts that are run inside, each with the number of values it reads and gives."""
    runs: list[tuple[nn.Module, int]] = []
    thread = get_ident()

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        if get_ident() == thread and next(module.children(), None) is None:
            runs.append((module, sum(v.numel() for v in (*inputs, output) if isinstance(v, Tensor))))

    handle = register_module_forward_hook(note)
    try:
        yield runs
    finally:
        handle.remove()
