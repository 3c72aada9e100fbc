"""Presets: the value of every option that decides a result, for each stage of one experiment, each with its source.

`demo` runs on embedded sample photos in minutes; `alexnet_caffe` and `vgg19_caffe` are the paper; the others apply
the paper's rules to backbones whose weights are easy to get. This is the only place where such a default stands: the
scripts' options have none of their own, and --help shows what the chosen preset gives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PAPER = "paper"
CODE = "original code"
CARRIED = "ours, from the original's other network"
OURS = "ours"


@dataclass(frozen=True)
class Setting:
    """A value and where it is from: the paper, its published code, or this project.

    `rule` says what None stands for.
    """

    value: Any
    source: str
    rule: str = ""


Stage = dict[str, Setting]

SAMPLES = "samples"
PRETRAINED = Path(__file__).parent.parent / "models" / "pretrained"  # checkpoints that ship

DEFAULTS: dict[str, Stage] = {
    "prepare_images": {
        "num_images": Setting(None, CODE, "all"),
        "strict": Setting(False, OURS),
    },
    "extract_features": {
        "backbone": Setting("alexnet", OURS),
        "layers": Setting(None, CODE, "the backbone's six"),
        "views": Setting(1, CODE),
        "pca_positions": Setting(100_000, CODE),
        "dtype": Setting("float16", OURS),  # its losses are float32's (docs/RESULTS.md)
        "batch_size": Setting(16, OURS),
        "held_out": Setting(50, OURS),
    },
    "train_vlm": {
        "cell": Setting("lstm", PAPER),
        "iterations": Setting(20_001, CODE),
        "batch_size": Setting(16, CODE),
        "joint_learning_rate": Setting(10.0, CODE),
        "learning_rate": Setting(None, OURS, "joint learning rate · layers of this run / 6, the paper's trajectory"),
        "momentum": Setting(0.9, CODE),
        "decay_at": Setting(None, CODE, "after quarters of the run"),
        "decay_factor": Setting(0.1, CODE),
        "held_out": Setting(None, OURS, "those of stage 2"),
        "precision": Setting("float32", CODE),
        "checkpoint_every": Setting(1_000, CODE),
    },
    "reconstruct": {
        "target": Setting("pool5", OURS),
        "regularizer": Setting("vlm", PAPER),
        "descent": Setting("fourier", OURS),
        "iterations": Setting(None, OURS, "the descent's; paper: 1000"),
        "learning_rate": Setting(None, OURS, "the descent's; paper: 524288, of pixels in 0-255"),
        "decay_at": Setting(None, OURS, "the descent's; paper: never"),
        "momentum": Setting(None, CODE, "the descent's; paper: 0.9"),
        "start_noise": Setting(None, OURS, "the descent's; paper: 1"),
        "in_turn": Setting(None, OURS, "the descent's; paper: no"),
        "feature_weight": Setting(1.0, CODE),
        "vlm_weight": Setting(None, OURS, "the descent's; paper: 10"),
        "energy_weight": Setting(None, OURS, "the descent's; paper: 0"),
    },
    "saliency": {
        "power": Setting(0.5, CODE),
        "blur": Setting(0.03, CODE),
        "postprocess": Setting("float", OURS),
    },
}


def _preset(network: str, source: str, carried: str, changes: Mapping[str, Mapping[str, Setting]]) -> dict[str, Stage]:
    """The defaults for a backbone, some stages' settings replaced; `carried`: the original ran it on another alone."""
    preset = {stage: dict(settings) for stage, settings in DEFAULTS.items()}
    preset["extract_features"]["backbone"] = Setting(network, source)
    for name, setting in preset[carried].items():
        if setting.source == CODE:
            preset[carried][name] = replace(setting, source=CARRIED)
    for stage, settings in changes.items():
        preset[stage] |= settings
    return preset


def _alexnet(network: str, source: str = OURS, **changes: Mapping[str, Setting]) -> dict[str, Stage]:
    """The original reconstructed from an AlexNet, and made no saliency maps with it."""
    return _preset(network, source, "saliency", changes)


def _vgg(network: str, source: str = OURS, **changes: Mapping[str, Setting]) -> dict[str, Stage]:
    """The original made saliency maps with a VGG, and reconstructed nothing from it."""
    trained = {"batch_size": Setting(1, CODE), "joint_learning_rate": Setting(20.0, CODE)}
    return _preset(network, source, "reconstruct", {"train_vlm": trained, **changes})


PRESETS: dict[str, dict[str, Stage]] = {
    "demo": _alexnet(
        "alexnet",
        prepare_images={"source": Setting([SAMPLES], OURS), "num_images": Setting(128, OURS)},
        extract_features={"pca_positions": Setting(20_000, OURS), "held_out": Setting(16, OURS)},
        train_vlm={
            "iterations": Setting(50, OURS),
            "batch_size": Setting(8, OURS),
            # it goes on from trained weights, of which a larger rate leaves little (docs/RESULTS.md)
            "joint_learning_rate": Setting(6.0, OURS),
            "checkpoint_every": Setting(25, OURS),
        },
    ),
    "alexnet": _alexnet("alexnet"),
    "alexnet_caffe": _alexnet(
        "alexnet_caffe",
        PAPER,
        extract_features={"held_out": Setting(0, CODE), "dtype": Setting("float32", CODE)},
        reconstruct={"target": Setting("fc8", CODE), "descent": Setting("authors", CODE)},
    ),
    "efficientnet_lite0": _alexnet("efficientnet_lite0", reconstruct={"target": Setting("logits", OURS)}),
    "vgg16": _vgg("vgg16"),
    "vgg19": _vgg("vgg19"),
    "vgg19_caffe": _vgg(
        "vgg19_caffe",
        PAPER,
        extract_features={"held_out": Setting(0, CODE), "dtype": Setting("float32", CODE)},
        reconstruct={"descent": Setting("authors", CARRIED)},
        saliency={"postprocess": Setting("original", CODE)},
    ),
}
