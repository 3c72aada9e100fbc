"""What keeps a reconstruction natural, each with the descent that its authors used. Plain values: no torch here.

`vlm` is the paper; `none` its control; `l2` penalises the norm (Simonyan, Vedaldi & Zisserman 2014, arXiv 1312.6034);
`tv` is Mahendran & Vedaldi 2015 (arXiv 1412.0035) with the settings of their experiments
(https://github.com/aravindhm/deep-goggle, experiments/experiment_cnn.m); `vlm+tv` adds their smoothness to the paper's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Norm of a typical mean-subtracted image of 227 × 227 in 0-255 units (deep-goggle, experiments/x0_sigma.mat).
IMAGE_NORM = 27098.11571533
# Original code, of pixels in 0-255; its README says 2^20. Measured: 40 updates with the language models from conv1,
# conv2, conv3, conv4, conv5, pool5 of alexnet, 25 without from conv1_2, conv2_2, conv3_3, conv4_3, conv5_3 of vgg16: it
# descends everywhere (2^21 diverges at conv4). The fully connected taps, vgg19 and the Caffe networks: not measured.
LEARNING_RATE = 2.0**19


@dataclass(frozen=True)
class Regularizer:
    """An objective and its descent.

    Attributes:
        vlm: whether language models are part of it.
        relative: the feature's error is |φ(x) - φ₀|²/|φ₀|², not the mean of ((φ(x) - φ₀)/σ)².
        penalties: λ by name of the terms in `models.objective.PENALTIES`; None depends on the tap, see `penalties_for`.
        start: "data", noise like the `data` layer; "norm", noise of norm `IMAGE_NORM`; "zero", the mean colour.
        learning_rate: None for what is measured for the tap.
        decay_at: fractions of the run at which the rate falls to a tenth and the momentum to zero.
        iterations: None for the preset's.
    """

    vlm: bool = False
    relative: bool = False
    penalties: Mapping[str, float | None] = field(default_factory=dict)
    start: str = "data"
    learning_rate: float | None = None
    decay_at: tuple[float, ...] = ()
    iterations: int | None = None


# Updates of 0.004·s²·gradient, s = IMAGE_NORM: their objective times s² descended at 0.004; 100, 200, 100 iterations.
_MAHENDRAN = {"relative": True, "decay_at": (0.25, 0.75), "iterations": 400}
_MAHENDRAN_RATE = 0.004 * IMAGE_NORM**2

REGULARIZERS: dict[str, Regularizer] = {
    "none": Regularizer(),
    # Simonyan et al. start from the mean image, and give no step for inversion: the descent is Mahendran & Vedaldi's,
    # at a tenth of their rate, which from that start leaves the loss of alexnet's pool5 where it was (80 iterations).
    "l2": Regularizer(penalties={"l2": 1.0}, start="zero", learning_rate=_MAHENDRAN_RATE / 10, **_MAHENDRAN),
    "tv": Regularizer(penalties={"tv": None, "l6": 8e-10}, start="norm", learning_rate=_MAHENDRAN_RATE, **_MAHENDRAN),
    "vlm": Regularizer(vlm=True),
    # differs from the paper: a light total variation takes away the noise that its language models let pass. Of 0.3, 1,
    # 3, 10 and 30, 10 was best by the classifier on five sample photos (alexnet, pool5, 150 updates).
    "vlm+tv": Regularizer(vlm=True, penalties={"tv": 10.0}),
}


def learning_rate_for(regularizer: str) -> float:
    """Default rate, of pixels in 0-255."""
    return REGULARIZERS[regularizer].learning_rate or LEARNING_RATE


def penalties_for(regularizer: str, tap: str) -> dict[str, float]:
    """λ of every penalty for a tap.

    Mahendran & Vedaldi smooth by depth: λ 1 up to conv2, 10 up to conv4, 100 beyond; for VGG its blocks count.
    """
    block = re.search(r"\d", tap)
    depth = int(block.group()) if block else 0
    by_depth = 1.0 if depth <= 2 else 10.0 if depth <= 4 else 100.0
    penalties = REGULARIZERS[regularizer].penalties
    return {name: by_depth if weight is None else weight for name, weight in penalties.items()}
