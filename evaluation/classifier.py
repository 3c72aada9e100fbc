"""ImageNet classifiers that judge pictures: EfficientNet-Lite0, of another kind than AlexNet and VGG, or else Lite2."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbones import Architecture, Backbone, centre_crop
from models.backbones.efficientnet_lite import EFFICIENTNET_LITE0, EFFICIENTNET_LITE2
from models.weights.find import package_file
from models.weights.read import read_weights

JUDGES = (EFFICIENTNET_LITE0, EFFICIENTNET_LITE2)


def judge_of(backbone: str) -> Architecture:
    """Who judges what was reconstructed from a backbone: the first judge that is another network."""
    return next(judge for judge in JUDGES if judge.name != backbone)


def find_weights(judge: Architecture) -> Path | None:
    """The weights file of the judge's installed package, which is not imported; None where it is not installed.

    Raises:
        UserError: the file is missing, or not the one that was tested.
    """
    return package_file(judge.origin.packaged)


class Classifier:
    """A backbone that gives class scores, as probabilities."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    @classmethod
    def load(cls, judge: Architecture, path: Path, device: torch.device) -> "Classifier":
        """With the weights of the package's file."""
        return cls(Backbone(judge, read_weights(path, judge)).to(device))

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """RGB images (N, 3, H, W) in 0-255 -> (N, classes).

        The centre of the network's size is read; smaller images are enlarged to it.
        """
        architecture = self.backbone.architecture
        images = images.float()
        if any(side < crop for side, crop in zip(images.shape[2:], architecture.crop, strict=True)):
            images = F.interpolate(images, architecture.crop, mode="bilinear")
        x = self.backbone.preprocess(centre_crop(images, *architecture.crop))
        return self.backbone(x, [architecture.scores])[architecture.scores].softmax(dim=1)
