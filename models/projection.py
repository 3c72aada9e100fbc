"""Standardisation and PCA of feature maps, and how both are fitted on streamed features."""

import copy
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import Backbone
from models.randomness import seed_for


class Moments:
    """Running mean and standard deviation of every channel of a tap, summed in float64.

    Feature maps (N, C, H, W) count every position, vectors (N, C) every unit on its own.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.sums = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add a batch of features (N, C, H, W) or (N, C), of any floating type."""
        x = features.detach()
        x = x.cpu() if x.device.type == "mps" else x  # Apple's GPUs have no float64
        sums = torch.zeros(2, len(self.sums), dtype=torch.float64, device=x.device)
        for image in x:  # one at a time: its float64 copy stays in the processor's cache
            values = image.to(torch.float64, copy=True).reshape(len(image), -1)  # (C, H·W)
            sums[0] += values.sum(1)
            sums[1] += values.square_().sum(1)
        self.count += x.numel() // x.shape[1]
        self.sums += sums[0].cpu()
        self.squares += sums[1].cpu()

    @property
    def mean(self) -> Tensor:
        """Mean of every channel, float64 (C,)."""
        return self.sums / self.count

    @property
    def std(self) -> Tensor:
        """Population standard deviation sqrt(E[x²] - E[x]²), float64 (C,); negative variances count as 0."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0).sqrt()

    def statistics(self) -> dict[str, Tensor]:
        """`mean` and `std` (C,), float32, as checkpoints hold them."""
        return {"mean": self.mean.float(), "std": self.guarded_std()[0].float()}

    def guarded_std(self) -> tuple[Tensor, list[int]]:
        """`std` with 1 in place of (near-)zero, and the indices of those constant channels.

        differs from the original: there a constant channel has std 0 or NaN and spoils the layer.
        """
        root_mean_square = (self.squares / self.count).sqrt()
        std = self.std
        constant = std <= 1e-6 * root_mean_square
        return torch.where(constant, torch.ones_like(std), std), constant.nonzero().flatten().tolist()


def positions_per_image(num_images: int, total: int) -> int:
    """Positions drawn from each image so that all images together give about `total` (original code)."""
    return total // num_images + 1


def draw_positions(seed: int, layer: str, image: int, count: int, grid: int) -> np.ndarray:
    """`count` flat grid positions of one image, drawn uniformly with replacement.

    A function of its arguments alone, so that it matters neither in which batch an image is read nor whether the
    run was resumed.
    """
    return np.random.default_rng(seed_for(seed, layer, image)).integers(0, grid, size=count)


def fit_pca(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Principal components of samples (n, C), by eigenvectors of the covariance in float64.

    Returns:
        components: (min(n, C), C), unit rows in order of falling variance; the entry of largest magnitude of a
            row is positive, since PCA leaves the sign open.
        mean: (C,) of the samples.
        variance: (min(n, C),) explained by each component, with n - 1 in the denominator.
    """
    x = np.asarray(samples, dtype=np.float64)
    mean = x.mean(axis=0)
    x = x - mean
    variance, vectors = np.linalg.eigh(x.T @ x / max(len(x) - 1, 1))
    count = min(x.shape)
    variance, components = variance[::-1][:count], vectors.T[::-1][:count]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return components * np.sign(largest), mean, np.maximum(variance, 0)


class Projection(nn.Module):
    """Standardises the channels of a feature map and keeps the first half of its principal components.

    p = A ((x - mean) / std - pca_mean), A of (D, C) with D = (number of components + 1) // 2 (original code);
    not whitened.

    Args:
        mean, std: (C,) of the raw features; std has no zeros.
        components: (D, C), the rows of PCA that are kept.
        pca_mean: (C,) mean of the standardised features that PCA was fitted on.
    """

    def __init__(self, mean: Tensor, std: Tensor, components: Tensor, pca_mean: Tensor):
        super().__init__()
        for name, value in {"mean": mean, "std": std, "components": components, "pca_mean": pca_mean}.items():
            self.register_buffer(name, value.to(torch.float32))

    @classmethod
    def fit(cls, mean: Tensor, std: Tensor, samples: np.ndarray) -> "Projection":
        """Fit PCA on standardised samples (n, C) and keep (min(n, C) + 1) // 2 components."""
        components, pca_mean, _ = fit_pca(samples)
        kept = (len(components) + 1) // 2
        return cls(mean, std, torch.from_numpy(components[:kept].copy()), torch.from_numpy(pca_mean))

    @property
    def size(self) -> int:
        """D, the number of components kept."""
        return self.components.shape[0]

    def as_product(self) -> tuple[Tensor, Tensor]:
        """The same map as one product, p = W x + b: W (D, C) and b (D,), folded in float64."""
        components = self.components.double()
        weight = components / self.std.double()
        offset = -weight @ self.mean.double() - components @ self.pca_mean.double()
        return weight.float(), offset.float()

    def change_to(self, other: "Projection") -> tuple[Tensor, Tensor]:
        """W (D', D) and b (D',), float64, with W p + b what `other` makes of the features that this maps to p.

        Of features as far as the kept components know them: exact where all are kept, else least squares.
        """
        mean, std, components, pca_mean = (v.double() for v in (self.mean, self.std, self.components, self.pca_mean))
        kept = other.components.double() / other.std.double()  # (D', C)
        weight = kept @ (std[:, None] * components.T)
        offset = (
            kept @ (mean + std * pca_mean - other.mean.double()) - other.components.double() @ other.pca_mean.double()
        )
        return weight, offset

    def standardise(self, x: Tensor) -> Tensor:
        """(N, C, H, W) raw features -> zero mean and unit variance per channel."""
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) raw features -> (N, D, H, W), by the formula of the class."""
        centred = self.standardise(x) - self.pca_mean[:, None, None]
        return F.conv2d(centred, self.components[:, :, None, None])


def fold_deepest(backbone: Backbone, projections: Mapping[str, Projection]) -> tuple[Backbone, str | None]:
    """A backbone whose deepest tap of `projections` is projected already, and the name of that tap.

    A convolution before its ReLU is linear, as the projection is: one convolution with fewer output channels is both,
    for a tap that nothing reads on. None, and the backbone itself, where the tap is no such convolution.
    """
    taps, network = backbone.architecture.taps, backbone.network
    deepest = max(projections, key=taps.index)
    if not isinstance(dict(network.named_modules()).get(deepest), nn.Conv2d):
        return backbone, None
    kept = [backbone.architecture, *backbone.parameters(), *backbone.buffers()]
    folded = copy.deepcopy(backbone, {id(value): value for value in kept})  # of the modules alone
    conv = folded.network.get_submodule(deepest)
    if conv.groups > 1 or conv.bias is None:
        return backbone, None
    weight, offset = (t.to(conv.weight.device, torch.float64) for t in projections[deepest].as_product())
    product = torch.einsum("dc,cikl->dikl", weight, conv.weight.double()).float()
    layout = torch.channels_last if conv.weight.is_contiguous(memory_format=torch.channels_last) else None
    conv.weight = nn.Parameter(product.contiguous(memory_format=layout or torch.contiguous_format), False)
    conv.bias = nn.Parameter((weight @ conv.bias.double() + offset).float(), False)
    conv.out_channels = len(weight)
    return folded, deepest
