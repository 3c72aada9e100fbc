"""From an image to the unnaturalness map of a layer, and from that to a saliency map of the image's size."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from torch import Tensor

from models.backbones import Backbone
from models.errors import UserError

Stride = int | tuple[int, int]  # input pixels between neighbours of a grid; of rows and columns where they differ
CONTRAST_BLUR = 0.2  # of the grid's height and width


def layer_features(backbone: Backbone, rgb: np.ndarray, layers: Iterable[str]) -> dict[str, Tensor]:
    """What a CNN gives for an image (H, W, 3) uint8 at its own size: features (1, C, h, w) of some layers.

    Raises:
        UserError: the image is too small for a layer's map.
    """
    layers = list(layers)
    for layer in layers:
        backbone.architecture.check_size(layer, *rgb.shape[:2], grid=3)
    x = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None].float().to(backbone.device)  # (1, 3, H, W)
    with torch.no_grad():
        return backbone(backbone.preprocess(x), layers)


def feature_contrast(features: Tensor) -> Tensor:
    """Σ over channels of |F - blurred F| of raw features (1, C, h, w): a map (1, h, w) without any language model.

    The bottom-up part of DeepFeat (Mahdi, Qin & Crosby 2019), here of one layer.
    """
    values = features[0].cpu().numpy()
    height, width = values.shape[1:]
    blurred = gaussian_filter(values, (0, CONTRAST_BLUR * height, CONTRAST_BLUR * width))
    return torch.from_numpy(np.abs(values - blurred).sum(axis=0, dtype=np.float64))[None]


def centred(saliency: np.ndarray, sigma: float) -> np.ndarray:
    """A saliency map (H, W) times a Gaussian at its centre, its σ being `sigma` × the map's sides, scaled as it was.

    differs from the paper: people look at the centre of photos whatever is there, which its maps do not count on.
    """
    vertical, horizontal = (np.exp(-0.5 * (((np.arange(n) + 0.5) / n - 0.5) / sigma) ** 2) for n in saliency.shape)
    values = to_unit(saliency * np.outer(vertical, horizontal))
    return (values * 255).astype(np.uint8) if saliency.dtype == np.uint8 else values


def added(maps: Iterable[np.ndarray]) -> np.ndarray:
    """One saliency map (H, W) float64 in 0…1 from several of one image: each is scaled to 0…1, then their sum is.

    differs from the paper, which uses one layer of one network.
    """
    return to_unit(np.sum([to_unit(np.asarray(values, dtype=np.float64)) for values in maps], axis=0))


def postprocess(
    unnaturalness: np.ndarray, height: int, width: int, stride: Stride, power: float, blur: float
) -> np.ndarray:
    """Saliency map (height, width) float64 in 0…1 from an unnaturalness map (h, w).

    Power, scaling to 0…1, bilinear enlargement by the layer's stride, zero padding around the centre whatever the
    padding of the network's convolutions, Gaussian blur of `blur` times the image's sides, scaling:
    `postprocess_original` without its rounding to bytes.
    """
    values = to_unit(powered(unnaturalness, power))
    strides = (stride, stride) if isinstance(stride, int) else stride
    down, across = map(enlargement, values.shape, (height, width), strides, (blur, blur))
    return to_unit(down @ values @ across.T)


@lru_cache(16)
def enlargement(cells: int, size: int, stride: int, blur: float) -> np.ndarray:
    """Matrix (size, cells): enlarging, padding and blurring along one side, which are linear."""
    unit = torch.eye(cells, dtype=torch.float64)[None]  # (1, cells, cells)
    enlarged = F.interpolate(unit, scale_factor=float(stride), mode="linear")[0].T.numpy()
    padded = pad_to(enlarged, size, cells)
    return gaussian_filter1d(padded, blur * size, axis=0) if blur else padded


def postprocess_original(
    unnaturalness: np.ndarray, height: int, width: int, stride: Stride, power: float, blur: float
) -> np.ndarray:
    """The same byte for byte as the original code: (height, width) uint8.

    There the map is scaled to bytes before it is enlarged, in 8-bit arithmetic, and the result is truncated to bytes.
    """
    small = to_bytes(powered(unnaturalness, power))
    rows, columns = (stride, stride) if isinstance(stride, int) else stride
    size = (small.shape[1] * columns, small.shape[0] * rows)
    enlarged = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BILINEAR))
    values = pad_to(enlarged, height, width).astype(np.float64)
    blurred = gaussian_filter(values, (blur * height, blur * width)) if blur else values
    return (to_unit(blurred) * 255).astype(np.uint8)


def powered(unnaturalness: np.ndarray, power: float) -> np.ndarray:
    """The map to a power, float64.

    Raises:
        UserError: the result is beyond the range of numbers.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(unnaturalness, dtype=np.float64) ** power
    if not np.isfinite(values).all():
        raise UserError(f"the map to the power {power:g} is beyond the range of numbers: give another power")
    return values


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Minimum → 0, maximum → 255, rounded: uint8. A constant map becomes 0."""
    low, high = values.min(), values.max()
    if high == low:
        return np.zeros(values.shape, np.uint8)
    return ((values - low) * (255.0 / (high - low)) + 0.5).clip(0, 255).astype(np.uint8)


def pad_to(enlarged: np.ndarray, height: int, width: int) -> np.ndarray:
    """Zeros around (h, w) up to (height, width), an odd one at the bottom or right; a larger map is cropped so."""
    for axis, size in enumerate((height, width)):
        missing = size - enlarged.shape[axis]
        before = abs(missing) // 2
        if missing >= 0:
            widths = [(0, 0), (0, 0)]
            widths[axis] = (before, missing - before)
            enlarged = np.pad(enlarged, widths)
        else:
            enlarged = enlarged.take(range(before, before + size), axis=axis)
    return enlarged


def to_unit(values: np.ndarray) -> np.ndarray:
    """Scale to 0…1.

    differs from the original: a constant map becomes 0, not 0/0.
    """
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
