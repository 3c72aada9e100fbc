"""One iteration of reconstruction against the bare cost of its parts: CNN and language models, forward and backward."""

from functools import partial
from itertools import count

import torch

from benchmarks.random_networks import make_backbone, make_projection
from benchmarks.timing import SEED, Figure, Report, Setup, milliseconds, ratio, seconds
from models.backbones import Backbone
from models.descent import MomentumSGD, Pixels, Schedule, descend
from models.objective import ReconstructionLoss, default_layer_weights
from models.vlm import VisualLanguageModel

GOAL = 1.15
UPDATES, SECONDS = 200, 30  # of a reconstruction as run_pretrained_model.py makes it
TARGET = "pool5"


def make_parts(setup: Setup) -> tuple[Backbone, VisualLanguageModel, list[str]]:
    """alexnet with language models of all weighted layers, random; and those layers."""
    backbone = make_backbone("alexnet", TARGET, setup)
    layers = ["conv5"] if setup.quick else list(default_layer_weights(backbone.architecture))
    generator = torch.Generator().manual_seed(SEED)
    vlm = VisualLanguageModel({name: make_projection(backbone.architecture.channels(name)) for name in layers}, {})
    for name, parameter in vlm.named_parameters():
        if "weight" in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
    return backbone, vlm.freeze().to(setup.device), layers


def measure(setup: Setup) -> Report:
    """Time of one iteration over that of its parts alone, and of a whole reconstruction."""
    backbone, vlm, layers = make_parts(setup)
    architecture = backbone.architecture
    channels = architecture.channels(TARGET)
    generator = torch.Generator().manual_seed(SEED)
    pixels = (60 * torch.randn(1, 3, *architecture.crop, generator=generator)).to(setup.device)
    target = torch.randn(1, channels, *architecture.grid(TARGET, *architecture.crop), generator=generator)
    loss = ReconstructionLoss(backbone, TARGET, target.to(setup.device), torch.ones(channels).to(setup.device), vlm)
    moving = Pixels(pixels)
    optimizer = MomentumSGD(moving.parameters, lr=1e-3)
    x = backbone.from_pixels(pixels).clone().requires_grad_()
    taps = [*layers, TARGET]
    features = {name: value.detach().requires_grad_() for name, value in backbone(x, taps).items()}
    gradients = [torch.randn(value.shape, generator=generator).to(setup.device) for value in features.values()]

    turns = count()

    def iteration() -> None:
        loss.in_turn = False
        descend(loss, moving, optimizer, Schedule(1e-3), 1, lambda i, terms: None)

    def iteration_in_turn() -> None:
        loss.in_turn, i = True, next(turns)
        descend(loss, moving, optimizer, Schedule(1e-3), i + 1, lambda i, terms: None, i)

    def network() -> None:
        torch.autograd.grad(list(backbone(x, taps).values()), x, gradients)

    def language_models() -> None:
        losses = vlm.losses(vlm.project({layer: features[layer] for layer in layers}))
        torch.autograd.grad(sum(losses.values()), [features[layer] for layer in layers])

    def language_model(layer: str) -> None:
        (loss,) = vlm.losses(vlm.project({layer: features[layer]})).values()
        torch.autograd.grad(loss, features[layer])

    works = {
        "iteration": iteration,
        "in turn": iteration_in_turn,
        "network": network,
        "language models": language_models,
    }
    took = seconds(works | {layer: partial(language_model, layer) for layer in layers}, setup)
    bare = took["network"] + took["language models"]
    parts = ", ".join(f"{name} {milliseconds(values)}" for name, values in took.items())
    values = ratio(took["iteration"], bare)
    figure = Figure("reconstruction: iteration / its parts", values, goal=GOAL, at_most=True, note=parts)
    facts = {"layers": layers, "target": TARGET, "seconds": {name: values.tolist() for name, values in took.items()}}
    whole = Figure(
        f"reconstruction: {UPDATES} updates", tuple(UPDATES * took["in turn"]), "s", goal=SECONDS, at_most=True
    )
    return Report([figure, whole], facts)
