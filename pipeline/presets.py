"""Presets: the values of every stage's options for one experiment, each with its source.

`demo` runs on embedded sample photos in minutes; `alexnet_caffe` and `vgg19_caffe` are the paper; the others apply
the paper's rules to backbones whose weights are easy to get.
"""

from dataclasses import dataclass
from typing import Any

PAPER = "paper"
CODE = "original code"
OURS = "ours"


@dataclass(frozen=True)
class Setting:
    """A value and where it is from: the paper, its published code, or this project."""

    value: Any
    source: str


Stage = dict[str, Setting]

SAMPLES = "samples"


def _preset(backbone: str, *, batch: int, lr: float, faithful: bool, target: str) -> dict[str, Stage]:
    source = CODE if faithful else OURS
    return {
        "prepare_images": {
            "num_images": Setting(None, CODE),
            "strict": Setting(False, OURS),
        },
        "extract_features": {
            "backbone": Setting(backbone, PAPER if faithful else OURS),
            "pca_positions": Setting(100_000, CODE),
            "dtype": Setting("float32", CODE),
            "batch_size": Setting(16, OURS),
            "held_out": Setting(0 if faithful else 50, source),
        },
        "train_vlm": {
            "batch_size": Setting(batch, CODE),
            "joint_learning_rate": Setting(lr, CODE),
            "momentum": Setting(0.9, CODE),
            "iterations": Setting(20_001, CODE),
            "decay_at": Setting([5_000, 10_000, 15_000], CODE),
            "decay_factor": Setting(0.1, CODE),
            "checkpoint_every": Setting(1_000, CODE),
        },
        "reconstruct": {
            "target": Setting(target, CODE if faithful else OURS),
            "iterations": Setting(1_000, CODE),
            "momentum": Setting(0.9, CODE),
            "feature_weight": Setting(1.0, CODE),
            "vlm_weight": Setting(10.0, CODE),
        },
        "saliency": {
            "power": Setting(0.5, CODE),
            "blur": Setting(0.03, CODE),
            "postprocess": Setting("original" if faithful else "float", source),
        },
    }


def _demo() -> dict[str, Stage]:
    preset = _preset("alexnet", batch=8, lr=10.0, faithful=False, target="pool5")
    preset["prepare_images"] |= {"source": Setting([SAMPLES], OURS), "num_images": Setting(128, OURS)}
    preset["extract_features"] |= {"pca_positions": Setting(20_000, OURS), "held_out": Setting(16, OURS)}
    preset["train_vlm"] |= {
        "iterations": Setting(100, OURS),
        "decay_at": Setting(None, OURS),
        "joint_learning_rate": Setting(60.0, OURS),
        "checkpoint_every": Setting(25, OURS),
    }
    preset["reconstruct"] |= {"iterations": Setting(200, OURS)}
    return preset


PRESETS: dict[str, dict[str, Stage]] = {
    "demo": _demo(),
    "alexnet": _preset("alexnet", batch=16, lr=10.0, faithful=False, target="pool5"),
    "alexnet_caffe": _preset("alexnet_caffe", batch=16, lr=10.0, faithful=True, target="fc8"),
    "vgg16": _preset("vgg16", batch=1, lr=20.0, faithful=False, target="pool5"),
    "vgg19": _preset("vgg19", batch=1, lr=20.0, faithful=False, target="pool5"),
    "vgg19_caffe": _preset("vgg19_caffe", batch=1, lr=20.0, faithful=True, target="pool5"),
}
