"""How natural an image is: the loss that language models make of it alone, and where that stands among others."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbones import Backbone, centre_crop
from models.vlm import DIRECTIONS, Predictor, VisualLanguageModel, direction_error_map

LEVELS = np.linspace(0, 100, 21)  # percent, of the quantiles that a checkpoint keeps


def losses_and_maps(p: Tensor, predictors: Mapping[str, Predictor]) -> tuple[Tensor, Tensor]:
    """Of projected features (N, D, H, W) the loss of every image by itself, (N,), and its map (N, H-1, W-1).

    These are `layer_loss` of one image and `layer_map`, of one reading.
    """
    height, width = p.shape[2] - 1, p.shape[3] - 1
    errors = [direction_error_map(p, d, predictors[d]) for d in DIRECTIONS]
    losses = torch.stack([e.mean(dim=(1, 2)) for e in errors]).mean(0)  # (N,)
    return losses, torch.stack([e[:, :height, :width] for e in errors]).sum(0)


def features_of_crops(
    backbone: Backbone, vlm: VisualLanguageModel, crops: np.ndarray, layers: Iterable[str]
) -> dict[str, Tensor]:
    """Projected features (N, D, h, w) by layer of pictures (N, S, S, 3) in 0-255, read as in training.

    Training subtracts a mean image before it crops; so here, where there is one that is larger than the pictures.
    """
    layers = list(layers)
    x = torch.from_numpy(np.asarray(crops, dtype=np.float32)).permute(0, 3, 1, 2).to(backbone.device)
    height, width = x.shape[2:]
    if backbone.mean_image is not None:
        rows, columns = (max(0, backbone.mean_image.shape[axis] - x.shape[axis + 1]) for axis in (1, 2))
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))  # cropped off again
    with torch.no_grad():
        features = backbone(centre_crop(backbone.preprocess(x), height, width), layers)
        return {layer: vlm.projections[layer](features[layer]) for layer in layers}


def quantiles(losses: Iterable[float]) -> list[float]:
    """The losses of held-out images at `LEVELS`, ascending: the lowest, … the median, … the highest."""
    return np.quantile(np.asarray(list(losses), dtype=np.float64), LEVELS / 100).tolist()


def losses_of(
    backbone: Backbone, vlm: VisualLanguageModel, crops: np.ndarray, layers: Iterable[str]
) -> dict[str, list[float]]:
    """Loss of every picture (N, S, S, 3) in 0-255 by itself, by layer, read as in training."""
    projected = features_of_crops(backbone, vlm, crops, layers)
    with torch.no_grad():
        return {layer: losses_and_maps(p, vlm.layers[layer])[0].tolist() for layer, p in projected.items()}


def kept_quantiles(training: Mapping[str, Any]) -> list[float] | None:
    """The quantiles of held-out losses that a checkpoint's facts of a layer hold; None where they hold none."""
    values = training.get("held_out_quantiles")
    if not isinstance(values, list) or len(values) < 2 or not all(type(value) in (int, float) for value in values):
        return None
    return values if values == sorted(values) else None


def percentile(loss: float, held_out: Sequence[float]) -> float:
    """Percentage of held-out images, of which `quantiles` gave these, with a lower loss; 0 and 100 are the ends."""
    return float(np.interp(loss, held_out, np.linspace(0, 100, len(held_out))))
