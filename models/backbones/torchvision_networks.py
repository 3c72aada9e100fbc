"""Any classification network of torchvision: the nodes of its graph are taps, called as torchvision lists them.

The name of a module stands for its last node (`layer4` for `layer4.2.relu_2`). Whatever order a network keeps its
channels in, a tap with a grid is read as (N, C, h, w): channels that come last are moved, and a vision transformer's
tokens become its grid, the class token dropped. Its positional embeddings are resized (bicubic) where an image is not
of the size that it was trained on; rows and columns that are no whole patch, at the bottom and right, are not read.
"""

import re
from collections.abc import Collection
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, fx, nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from models.backbones.architecture import REFUSALS, Architecture
from models.backbones.chains import TORCHVISION_LICENCE
from models.backbones.taps import Found
from models.weights.downloads import RemoteFile
from models.weights.origin import Origin

STORED = 256  # pixels of a side of the images of stage 1, of which a crop is taken
# What some networks need to be built as their published weights are.
BUILDING = {name: {"transform_input": True, "init_weights": False} for name in ("googlenet", "inception_v3")}
# The end of each stage, by the beginning of a family's names; a vision transformer's blocks are counted from its depth.
STAGES = {
    "alexnet": ("features.0", "features.3", "features.6", "features.8", "features.10"),
    "convnext": ("features.1", "features.3", "features.5", "features.7"),
    "densenet": ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features.denseblock4"),
    "efficientnet": ("features.1", "features.2", "features.3", "features.5", "features.7"),
    "googlenet": ("conv3", "inception3b", "inception4e", "inception5b"),
    "inception": ("Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"),
    "maxvit": ("blocks.0", "blocks.1", "blocks.2", "blocks.3"),
    "mnasnet": ("layers.8", "layers.9", "layers.11", "layers.13"),
    "mobilenet_v2": ("features.1", "features.3", "features.6", "features.13", "features.17"),
    "regnet": ("trunk_output.block1", "trunk_output.block2", "trunk_output.block3", "trunk_output.block4"),
    "resn": ("layer1", "layer2", "layer3", "layer4"),  # ResNet and ResNeXt
    "shufflenet": ("stage2", "stage3", "stage4"),
    "swin": ("features.1", "features.3", "features.5", "features.7"),
    "wide_resnet": ("layer1", "layer2", "layer3", "layer4"),
}
SIXTHS = 6  # of a vision transformer's depth


class _Reading(fx.Interpreter):
    """Runs a graph until the nodes `wanted` are there; `grid` is that of a transformer's patches."""

    def __init__(self, network: nn.Module, graph: fx.Graph, wanted: set[fx.Node], grid: tuple[int, int] | None):
        super().__init__(network, graph=graph)
        self.wanted, self.grid, self.found = wanted, grid, {}

    def run_node(self, node: fx.Node) -> Any:
        """The node's value; what torchvision asserts of an image's size does not count."""
        if node.target is torch._assert:
            return None
        value = super().run_node(node)
        if self.grid and node.op == "get_attr" and str(node.target).endswith("pos_embedding"):
            value = resized_positions(value, *self.grid)
        if node in self.wanted:
            self.found[node] = value.clone() if isinstance(value, Tensor) else value  # the next may write into it
            if len(self.found) == len(self.wanted):
                raise Found
        return value


def resized_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Positional embeddings (1, 1 + g², D) of a square grid and its class token -> (1, 1 + height·width, D)."""
    side = int((positions.shape[1] - 1) ** 0.5)
    if (side, side) == (height, width):
        return positions
    square = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (1, D, g, g)
    grid = F.interpolate(square, size=(height, width), mode="bicubic", align_corners=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class GraphReader:
    """Reads the nodes of a network's graph, which is traced once; how each lays out its values is measured."""

    def __init__(self, size: int):
        self.size = size

    def names(self, network: nn.Module) -> tuple[str, ...]:
        """Nodes that give a map or a vector for each image, and the modules that end in them."""
        self._trace(network)
        return tuple(name for name, node in self._nodes.items() if self._layouts.get(node))

    def read(self, network: nn.Module, x: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Values by node, maps as (N, C, h, w)."""
        self._trace(network)
        nodes = {name: self._nodes[name] for name in names}
        found = self._run(network, x, set(nodes.values()))
        grid = self._patches(network, x)
        return {name: _arranged(found[node], self._layouts[node], grid) for name, node in nodes.items()}

    def _trace(self, network: nn.Module) -> None:
        """Trace the graph and measure the layouts, the first time: of a network without data."""
        if hasattr(self, "_graph"):
            return
        names = get_graph_node_names(network, suppress_diff_warning=True)[1]
        extractor = create_feature_extractor(
            network, eval_return_nodes=names, train_return_nodes=names[-1:], suppress_diff_warning=True
        ).eval()
        self._graph = extractor.graph
        outputs = next(node for node in self._graph.nodes if node.op == "output").args[0]
        self._nodes: dict[str, fx.Node] = {}
        for name, node in outputs.items():
            self._nodes[name] = node
        for name, node in list(outputs.items()):
            for parent in _parents(name):
                self._nodes.pop(parent, None)
                self._nodes[parent] = node
        order = {node: i for i, node in enumerate(self._graph.nodes)}
        self._nodes = dict(sorted(self._nodes.items(), key=lambda item: order[item[1]]))
        self._layouts = self._measure(network)

    def _measure(self, network: nn.Module) -> dict[fx.Node, str]:
        """How every node lays out its values: by the axes that grow with the image."""
        nodes = {node for node in self._nodes.values() if node.op not in ("placeholder", "get_attr")}
        shapes = []
        for side in (self.size, 2 * self.size):
            x = torch.empty(1, 3, side, side, device=next(network.parameters()).device)
            try:
                with torch.no_grad():
                    found = self._run(network, x, nodes)
            except REFUSALS:  # it takes images of one size only
                found = {}
            shapes.append({node: tuple(v.shape) for node, v in found.items() if isinstance(v, Tensor)})
        return {node: _layout(shape, shapes[1].get(node), bool(shapes[1])) for node, shape in shapes[0].items()}

    def _run(self, network: nn.Module, x: Tensor, wanted: set[fx.Node]) -> dict[fx.Node, Any]:
        reading = _Reading(network, self._graph, wanted, self._patches(network, x))
        try:
            reading.run(x)
        except Found:
            pass
        return reading.found

    @staticmethod
    def _patches(network: nn.Module, x: Tensor) -> tuple[int, int] | None:
        """Grid of a vision transformer's patches; None for other networks."""
        size = getattr(network, "patch_size", None)
        return (x.shape[2] // size, x.shape[3] // size) if size else None


def _parents(name: str) -> list[str]:
    """`a.b.c` -> `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def _layout(shape: tuple[int, ...], larger: tuple[int, ...] | None, resizable: bool) -> str:
    """`map`, `last` (channels come last), `tokens`, `vector`, or nothing that can be read for each image."""
    if not resizable:
        return {4: "map", 2: "vector"}.get(len(shape), "") if shape[:1] == (1,) else ""
    if larger is None or len(larger) != len(shape) or len(shape) < 2:
        return ""
    grown = [axis for axis, (a, b) in enumerate(zip(shape, larger, strict=True)) if a != b]
    layout = {(4, (2, 3)): "map", (4, (1, 2)): "last", (3, (1,)): "tokens"}.get((len(shape), tuple(grown)))
    return layout or ("vector" if not grown else "")


def _arranged(value: Tensor, layout: str, grid: tuple[int, int] | None) -> Tensor:
    """A map as (N, C, h, w), a vector as (N, units)."""
    if layout == "last":
        return value.permute(0, 3, 1, 2)
    if layout == "tokens" and grid and value.shape[1] - grid[0] * grid[1] in (0, 1):
        return value[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
    return value.flatten(1) if layout == "vector" else value


def _default_layers(architecture: Architecture) -> tuple[str, ...]:
    """Defaults of the family; of one that is not known, the last map of each of its grids."""
    name = architecture.name
    if name.startswith("vit"):
        depth = len(architecture.skeleton.encoder.layers)
        blocks = sorted({max(round(i * depth / SIXTHS), 1) - 1 for i in range(1, SIXTHS + 1)})
        return tuple(f"encoder.layers.encoder_layer_{i}" for i in blocks)
    stages = next((layers for family, layers in STAGES.items() if name.startswith(family)), ())
    if stages and all(layer in architecture.taps for layer in stages):
        return stages
    last: dict[tuple[int, int], str] = {}
    for tap in architecture.maps[1:]:
        last[architecture.grid(tap, *architecture.crop)] = tap
    return tuple(tap for grid, tap in last.items() if min(grid) > 1)


def renamed(name: str) -> str:
    """Names in old files of weights, as torchvision itself changes them: of DenseNets and vision transformers."""
    name = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2.", name)
    return re.sub(r"\.mlp\.linear_([12])\.", lambda match: f".mlp.{3 * (int(match[1]) - 1)}.", name)


def torchvision_names() -> list[str]:
    """All classification networks of the installed torchvision."""
    return list_models(module=torchvision.models)


@cache
def torchvision_architecture(name: str) -> Architecture:
    """The entry of a network, one of `torchvision_names`: its published weights and the input that they want."""
    published = get_model_weights(name).DEFAULT
    transforms = published.transforms()
    side = min(transforms.crop_size[0], STORED)
    options = dict(BUILDING.get(name, {}))
    if name.startswith("vit"):
        options["image_size"] = transforms.crop_size[0]
    file = published.url.rpartition("/")[2]
    digest = re.search(r"-([0-9a-f]{8,})\.pth$", file)
    architecture = Architecture(
        name,
        partial(get_model, name, weights=None, **options),
        (),
        crop=(side, side),
        mean=tuple(255 * m for m in transforms.mean),
        scale=tuple(255 * s for s in transforms.std),
        reader=GraphReader(side),
        origin=Origin(
            RemoteFile(file, (published.url,), TORCHVISION_LICENCE, sha256=digest[1] if digest else None),
            rename=renamed,
        ),
    )
    return replace(architecture, vlm_layers=_default_layers(architecture))
