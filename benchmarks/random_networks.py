"""CNNs with random weights, up to a tap: speed does not depend on what the weights are."""

import torch

from benchmarks.timing import SEED, Setup
from models.backbones import Backbone, find_architecture, random_parameters
from models.projection import Projection


def make_backbone(name: str, upto: str, setup: Setup) -> Backbone:
    """Convolutions up to a tap, He-initialised."""
    architecture = find_architecture(name)
    return Backbone(architecture, random_parameters(architecture, SEED, upto)).to(setup.device).eval()


def make_projection(channels: int) -> Projection:
    """To half of the channels, rounded up."""
    generator = torch.Generator().manual_seed(SEED)
    components = torch.randn((channels + 1) // 2, channels, generator=generator) / channels**0.5
    return Projection(torch.zeros(channels), torch.ones(channels), components, torch.zeros(channels))
