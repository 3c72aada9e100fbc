"""All stages on networks that are no chains: one that a user registers, one of torchvision's; from their own taps."""

import json
from pathlib import Path

import numpy as np
import pytest

import extract_features
import prepare_images
import reconstruct
import saliency
import train_vlm
from models.backbones import ARCHITECTURES, find_architecture
from models.checkpoints import load_vlm
from models.errors import UserError
from tests.conftest import RUN
from tests.models.test_backbones import RESIDUAL

NETWORKS = {"residual": ["branch", "end"], "shufflenet_v2_x0_5": ["stage3", "stage4"]}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up network is one entry."""
    monkeypatch.setitem(ARCHITECTURES, "residual", RESIDUAL)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_five_stages(name: str, photos: Path, tmp_path: Path) -> None:
    architecture, layers = find_architecture(name), NETWORKS[name]
    photo = photos / "class0" / "photo00.png"
    common, weights = [*RUN, "--root", str(tmp_path)], ["--weights", "random"]
    prepare_images.main([*common, "--source", str(photos), "--num-images", "4"])
    extract_features.main([*common, *weights, "--backbone", name, "--layers", *layers, "--pca-positions", "400"])
    for layer in layers:
        stored = np.load(tmp_path / "features" / f"{layer}.npy")
        components = (architecture.channels(layer) + 1) // 2
        assert stored.shape == (4, *architecture.grid(layer, *architecture.crop), components) and stored.std() > 0
    train_vlm.main([*common, "--iterations", "2", "--batch-size", "2"])
    vlm, facts = load_vlm(tmp_path / "vlm.safetensors")
    assert (facts.backbone, list(facts.training), list(vlm.layers)) == (name, layers, layers)

    scores = architecture.scores
    options = ["--target", scores, "--iterations", "3", "--descent", "authors", "--learning-rate", "10"]
    reconstruct.main([str(photo), *common, *weights, *options, "--snapshot-every", "3", "--out", str(tmp_path / "r")])
    found = np.load(tmp_path / "r" / "reconstruction.npy")
    assert found.shape == (*architecture.crop, 3) and np.isfinite(found).all()
    told = json.loads((tmp_path / "r" / "parameters.json").read_text())
    assert (told["target"], told["backbone"]) == (scores, name)

    assert saliency.main([str(photo), *common, *weights, "--layer", *layers, "--out", str(tmp_path / "s")]) == 0
    assert np.load(tmp_path / "s" / "photo00.npy").shape == (100, 150)
    for layer in layers:
        raw = np.load(tmp_path / "s" / f"photo00-unnaturalness-{name}-{layer}.npy")
        assert raw.shape == tuple(side - 1 for side in architecture.grid(layer, 100, 150))


@pytest.mark.parametrize(
    ("backbone", "layers", "message"),
    [
        ("residuall", ["end"], r"no backbone 'residuall' \(nearest: residual.*\): choose from alexnet"),
        ("residual", ["ende"], r"residual has no tap 'ende' \(nearest: end\): choose from data"),
        ("residual", ["scores"], "scores of residual gives no grid"),
    ],
)
def test_what_is_no_network_or_no_layer_is_told(
    workspace: Path, tmp_path: Path, backbone: str, layers: list[str], message: str
) -> None:
    """By the script, in one line; the network's geometry says so before any image is read."""
    common = [*RUN, "--root", str(tmp_path), "--images", str(workspace / "images.npy"), "--weights", "random"]
    with pytest.raises(UserError, match=message) as caught:
        extract_features.main([*common, "--backbone", backbone, "--layers", *layers])
    assert "\n" not in str(caught.value)
