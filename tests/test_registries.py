"""A made-up backbone, recurrent cell, regulariser and metric, each one entry of a registry, go through every stage.

What one touches to add one: the file of its registry, and for a backbone in a module of its own that module too. Help
texts that name the entries want a word more; nothing else knows them.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import evaluate
import extract_features
import prepare_images
import reconstruct
import train_vlm
from evaluation import classifier, picture_metrics
from models.backbones import ARCHITECTURES, Architecture
from models.checkpoints import load_vlm
from models.objective import PENALTIES, REGULARIZERS, Regularizer
from models.vlm import CELLS
from tests.conftest import RUN


class Residual(nn.Module):
    """A network that branches: a sum of two paths, then a vector of class scores."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=4)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.sum = nn.Identity()
        self.scores = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.sum(x + self.inner(x.relu()))
        return self.scores(x.mean(dim=(2, 3)))


MADE_UP = Architecture("made_up", Residual, ("stem", "sum"), (24, 24), (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))


def test_one_entry_of_each_kind_goes_through_every_stage(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "made_up", MADE_UP)
    monkeypatch.setitem(CELLS, "plain", lambda size: nn.RNN(size, size))
    monkeypatch.setitem(PENALTIES, "l1", lambda x: x.abs().sum())
    monkeypatch.setitem(REGULARIZERS, "quiet", Regularizer(vlm=True, penalties={"l1": 5.0}))
    monkeypatch.setitem(picture_metrics.METRICS, "brightness", lambda c: float(c.picture.mean()))
    monkeypatch.setattr(classifier, "find_weights", lambda judge: None)  # it reads larger pictures
    common = [*RUN, "--root", str(tmp_path)]
    prepare_images.main([*common, "--source", str(photos), "--num-images", "10"])
    random = ["--weights", "random"]
    extract_features.main([*common, *random, "--backbone", "made_up", "--pca-positions", "400"])
    train_vlm.main([*common, "--cell", "plain", "--iterations", "2", "--batch-size", "2"])
    vlm, notes = load_vlm(tmp_path / "vlm.safetensors")
    assert notes.backbone == "made_up" and list(vlm.layers) == ["stem", "sum"]
    assert all(isinstance(model.plain, nn.RNN) for layer in vlm.layers.values() for model in layer.values())
    options = ["--rows", "0", "--target", "scores", "--regularizer", "quiet", "--iterations", "2"]
    assert reconstruct.main([*common, *random, *options]) == 0
    (folder,) = (tmp_path / "reconstructions").glob("[!.]*")
    losses = json.loads((folder / "parameters.json").read_text())["losses"]
    assert {"feature", "stem", "sum", "l1"} <= losses.keys()
    out = tmp_path / "scores"
    evaluate.main(["reconstruction", str(tmp_path / "reconstructions"), "--out", str(out), "--seed", "3", *random])
    scores = json.loads((out / "summary.json").read_text())["models"]["quiet"]
    assert 0 < scores["brightness"] < 255 and torch.isfinite(torch.tensor(scores["feature_error"]))
