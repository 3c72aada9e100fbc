"""The objective of reconstruction: match a CNN feature, stay natural.

What keeps a reconstruction natural is a `Regularizer`: `vlm` is the paper; `none` its control; `l2` penalises the norm
(Simonyan, Vedaldi & Zisserman 2014, arXiv 1312.6034); `tv` is Mahendran & Vedaldi 2015 (arXiv 1412.0035) with the
settings of their experiments (https://github.com/aravindhm/deep-goggle, experiments/experiment_cnn.m); `vlm+tv` adds
their smoothness to the paper's.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from models.backbones import Architecture, Backbone
from models.descent import DESCENTS, IMAGE_NORM, MAHENDRAN, PAPER, Descent
from models.errors import UserError
from models.vlm import VisualLanguageModel


def default_layer_weights(architecture: Architecture) -> dict[str, float]:
    """λ of each layer's language-model loss: 1, 0.1, … 0.0001 from the first convolution on; `data` has none.

    The paper's code gives these for AlexNet; for VGG they are carried over by depth.
    """
    layers = [layer for layer in architecture.vlm_layers if layer != "data"]
    return {layer: 10.0**-depth for depth, layer in enumerate(layers)}


def feature_loss(feature: Tensor, target: Tensor, std: Tensor) -> Tensor:
    """mean(((φ(x) - φ₀)/σ)²), σ per unit or per channel (C,) of features (N, C) or (N, C, H, W)."""
    sigma = std.view(-1, *[1] * (feature.ndim - 2))
    return ((feature - target) / sigma).square().mean()


def relative_feature_loss(feature: Tensor, target: Tensor) -> Tensor:
    """|φ(x) - φ₀|² / |φ₀|² (Mahendran & Vedaldi 2015)."""
    return (feature - target).square().sum() / target.square().sum()


def energy_loss(projected: Mapping[str, Tensor], energies: Mapping[str, float], weights: Mapping[str, float]) -> Tensor:
    """Σ_l √λ_l ((mean(p_l²) - E_l) / E_l)², E_l the mean of p_l² over photos; projected feature maps (1, D, H, W).

    differs from the paper: weak features are easy to predict, so that the language models alone make images pale.
    """
    return sum(
        weights[layer] ** 0.5 * (p.square().mean() / energies[layer] - 1).square() for layer, p in projected.items()
    )


def total_variation(x: Tensor) -> Tensor:
    """Σ over positions and channels of squared forward differences down and to the right; none leaves the image.

    Mahendran & Vedaldi's V^β with β = 2, of an image (N, C, H, W).
    """
    return x.diff(dim=2).square().sum() + x.diff(dim=3).square().sum()


def _power_sum(exponent: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.pow(exponent).sum()


# Σ x² (Simonyan et al. 2014, Eq. 1), Σ x⁶ and total variation (Mahendran & Vedaldi 2015), of mean-subtracted pixels.
PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"l2": _power_sum(2), "l6": _power_sum(6), "tv": total_variation}


def penalty(name: str, pixels: Tensor) -> Tensor:
    """One of `PENALTIES` over 2·`IMAGE_NORM`², as Mahendran & Vedaldi scale it against the relative feature error."""
    return PENALTIES[name](pixels) / (2 * IMAGE_NORM**2)


@dataclass(frozen=True)
class Regularizer:
    """What is added to the feature's error.

    Attributes:
        vlm: whether language models are part of it.
        relative: the feature's error is |φ(x) - φ₀|²/|φ₀|², not the mean of ((φ(x) - φ₀)/σ)².
        penalties: λ by name of `PENALTIES`; None depends on the tap, see `penalties_for`.
        descent: its authors' own.
    """

    vlm: bool = False
    relative: bool = False
    penalties: Mapping[str, float | None] = field(default_factory=dict)
    descent: Descent = PAPER


REGULARIZERS: dict[str, Regularizer] = {
    "none": Regularizer(),
    # Simonyan et al. start from the mean image, and give no step for inversion: the descent is Mahendran & Vedaldi's,
    # at a tenth of their rate, which from that start does not descend.
    "l2": Regularizer(
        relative=True,
        penalties={"l2": 1.0},
        descent=replace(MAHENDRAN, start="zero", learning_rate=MAHENDRAN.learning_rate / 10),
    ),
    "tv": Regularizer(relative=True, penalties={"tv": None, "l6": 8e-10}, descent=MAHENDRAN),
    "vlm": Regularizer(vlm=True),
    # differs from the paper: a light total variation takes away the noise that its language models let pass.
    "vlm+tv": Regularizer(vlm=True, penalties={"tv": 10.0}),
}


def descent_for(name: str, regularizer: str) -> Descent:
    """The descent of a name in `DESCENTS` for a regulariser."""
    return DESCENTS[name] or REGULARIZERS[regularizer].descent


def penalties_for(regularizer: str, tap: str) -> dict[str, float]:
    """λ of every penalty for a tap.

    Mahendran & Vedaldi smooth by depth: λ 1 up to conv2, 10 up to conv4, 100 beyond. Of another network the first
    number in a tap's name counts as the depth; a tap without one (`logits`) is deep.
    """
    number = re.search(r"\d+", tap)
    depth = int(number.group()) if number else 0 if tap == "data" else 5
    by_depth = 1.0 if depth <= 2 else 10.0 if depth <= 4 else 100.0
    penalties = REGULARIZERS[regularizer].penalties
    return {name: by_depth if weight is None else weight for name, weight in penalties.items()}


class ReconstructionLoss:
    """λ₁ · feature error + λ₂ · Σ_l λ_l · loss_l + Σ_p λ_p · penalty_p, a function of the image.

    Args:
        tap, target: which feature of the backbone, and its value (1, C) or (1, C, H, W).
        std: σ of the tap over the training images, (C,); None for the error relative to the target's norm.
        vlm: language models as regulariser, frozen; None for no regulariser.
        layer_weights: λ_l of the layers to regularise, of which those in `vlm` count.
        penalties: λ_p by name of `PENALTIES`.
        in_turn: each update looks along one direction of every layer, for speed, and along all in four updates.
        energy_weight, energies: weight of `energy_loss`, and E by layer, where that weighs anything.

    Raises:
        UserError: the target does not have the tap's shape, or no weighted layer has a language model.
    """

    def __init__(
        self,
        backbone: Backbone,
        tap: str,
        target: Tensor,
        std: Tensor | None,
        vlm: VisualLanguageModel | None,
        *,
        feature_weight: float = 1.0,
        vlm_weight: float = 10.0,
        layer_weights: Mapping[str, float] | None = None,
        penalties: Mapping[str, float] | None = None,
        in_turn: bool = False,
        energy_weight: float = 0.0,
        energies: Mapping[str, float] | None = None,
    ):
        weights = default_layer_weights(backbone.architecture) if layer_weights is None else layer_weights
        there = set(vlm.layers) if vlm is not None else set()
        self.layer_weights = {layer: weight for layer, weight in weights.items() if layer in there}
        if vlm is not None and not self.layer_weights:
            raise UserError(
                f"the language model has only {', '.join(vlm.layers)}, none of which is weighted: train another layer"
            )
        if std is not None and target.shape[1] != len(std):
            raise UserError(f"the target has {target.shape[1]} channels, {tap} has {len(std)}: give a feature of {tap}")
        self.backbone, self.tap, self.target, self.std, self.vlm = backbone, tap, target, std, vlm
        self.feature_weight, self.vlm_weight, self.penalties = feature_weight, vlm_weight, dict(penalties or {})
        self.in_turn, self.energy_weight, self.energies = in_turn, energy_weight, dict(energies or {})

    def __call__(self, pixels: Tensor, update: int = 0) -> dict[str, Tensor]:
        """Terms for mean-subtracted pixels (1, 3, H, W) in 0-255 units, at an update of the descent.

        Returns:
            `total` (what is minimised), and the unweighted terms: `feature`, `<layer>` for each language model,
            `energy` where it is weighted, `<penalty>`.
        """
        taps = list(dict.fromkeys([*self.layer_weights, self.tap]))
        features = self.backbone(self.backbone.from_pixels(pixels), taps)
        if features[self.tap].shape != self.target.shape:
            raise UserError(
                f"the target is {tuple(self.target.shape)}, {self.tap} of this image is "
                f"{tuple(features[self.tap].shape)}: give a feature of {self.backbone.architecture.name}"
            )
        if self.std is None:
            terms = {"feature": relative_feature_loss(features[self.tap], self.target)}
        else:
            terms = {"feature": feature_loss(features[self.tap], self.target, self.std)}
        total = self.feature_weight * terms["feature"]
        if self.vlm is not None:
            projected = self.vlm.project({layer: features[layer] for layer in self.layer_weights})
            losses = self.vlm.losses(projected, update if self.in_turn else None)
            total = total + self.vlm_weight * sum(w * losses[layer] for layer, w in self.layer_weights.items())
            terms |= losses
            if self.energy_weight:
                terms["energy"] = energy_loss(projected, self.energies, self.layer_weights)
                total = total + self.energy_weight * terms["energy"]
        for name, weight in self.penalties.items():
            terms[name] = penalty(name, pixels)
            total = total + weight * terms[name]
        return {"total": total, **terms}
