"""The training loop, and the kinds of recurrent model that it trains."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train_vlm
from models import naturalness
from models.checkpoints import load_vlm, read_tensors
from models.descent import MomentumSGD, Schedule
from models.errors import UserError
from models.vlm import CELLS, LayerModel
from pipeline import artefacts, options
from pipeline.features import read_batch
from tests.conftest import RUN

SMALL = ["--layers", "conv5", "--iterations", "2", "--batch-size", "2", "--checkpoint-every", "1"]


def train(schedule: Schedule, iterations: int, callback) -> MomentumSGD:
    """One layer of 2 components on made-up features, from weights that are drawn large."""
    layer = LayerModel(2)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    optimizer = MomentumSGD([p for p in layer.parameters() if p.requires_grad], 0)
    stored = np.random.default_rng(0).standard_normal((6, 3, 4, 2), dtype=np.float32)
    draw = lambda i: np.arange(i, i + 2)  # noqa: E731
    train_vlm.train({"conv1": layer}, {"conv1": stored}, draw, optimizer, schedule, iterations, callback(optimizer))
    return optimizer


def test_a_decay_resets_the_momentum_of_training_whatever_its_factor() -> None:
    """After update 1, counted from 0, the velocity is that of the last gradient alone."""
    fresh = []

    def callback(optimizer: MomentumSGD):
        def note(losses: dict[str, float]) -> None:
            assert losses.keys() == {"conv1"}
            pairs = zip(optimizer.velocities, optimizer.parameters, strict=True)
            fresh.append(all(torch.allclose(v, -optimizer.lr * p.grad, rtol=1e-5, atol=0) for v, p in pairs))

        return note

    train(Schedule(0.1, decay_at=(1,), decay_factor=1.0), 4, callback)
    assert fresh == [True, False, True, False]


def workspace_of(workspace: Path, root: Path) -> list[str]:
    shutil.copytree(workspace / "features", root / "features")
    return [*RUN, "--root", str(root), *SMALL]


def test_a_kind_of_recurrent_model_is_one_entry(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One that is registered from outside trains, is recorded, loaded, merged beside others, and refused elsewhere."""
    command = workspace_of(workspace, tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(CELLS, "plain", lambda size: nn.RNN(size, size))
        train_vlm.main([*command, "--cell", "plain"])
        train_vlm.main([*command, "--layers", "conv4"])
        vlm, noted = load_vlm(tmp_path / "vlm.safetensors")
        assert [noted.training[layer]["cell"] for layer in ("conv4", "conv5")] == ["lstm", "plain"]
        assert isinstance(vlm.layers["conv5"]["up"].get_submodule("plain"), nn.RNN)
        p = torch.randn(1, vlm.layers["conv5"].size, 5, 6)
        assert vlm.layers["conv5"].unnaturalness_map(p).shape == (1, 4, 5)
        names = set(read_tensors(tmp_path / "vlm.safetensors")[0])
        assert {"conv5.up.plain.weight_hh_l0", "conv4.up.lstm.weight_hh_l1"} <= names
        with pytest.raises(UserError, match="cell is 'plain', not 'gru'"):
            train_vlm.main([*command, "--cell", "gru", "--iterations", "3"])
    with pytest.raises(UserError, match="has a 'plain' for conv5, which this version has not"):
        load_vlm(tmp_path / "vlm.safetensors")
    with pytest.raises(SystemExit):
        train_vlm.main([*command, "--cell", "plain", "--overwrite"])
    assert "'plain' is unknown: choose from lstm, gru" in capsys.readouterr().err


def test_gru_learns(workspace: Path, tmp_path: Path) -> None:
    command = [*workspace_of(workspace, tmp_path), "--cell", "gru", "--learning-rate", "30", "--log-every", "1"]
    train_vlm.main([*command, "--iterations", "6"])
    lines = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert lines["training_loss"][-1] < lines["training_loss"][0]
    model = load_vlm(tmp_path / "vlm.safetensors")[0].layers["conv5"]["down"]
    assert not model.gru.bias_hh_l0.any() and model.gru.bias_ih_l0.any(), "one bias per gate, as the LSTM has"


def test_an_old_checkpoint_is_of_lstms(workspace: Path, tmp_path: Path) -> None:
    tensors, noted = read_tensors(workspace / "vlm.safetensors")
    for facts in noted["training"].values():
        del facts["cell"]
    artefacts.write_tensors(tmp_path / "old.safetensors", tensors, noted)
    assert load_vlm(tmp_path / "old.safetensors")[0].layers["conv5"].cell == "lstm"


def test_default_decays_follow_the_length_of_the_run(workspace: Path, tmp_path: Path) -> None:
    """Under every preset: no preset fixes what --help says is derived."""
    train_vlm.main([*workspace_of(workspace, tmp_path), "--preset", "alexnet", "--iterations", "9"])
    facts = load_vlm(tmp_path / "vlm.safetensors")[1].training["conv5"]
    assert facts["decay_at"] == [2, 4, 6]
    for preset in options.PRESETS.values():
        assert preset["train_vlm"]["decay_at"].value is None


def test_checkpoint_keeps_the_quantiles_of_held_out_losses(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of every held-out image by itself, as of the last line of the log; a state of an older version gets them anew."""
    command = workspace_of(workspace, tmp_path)
    names = artefacts.read_sidecar(workspace / "images.npy", "")["names"]
    (tmp_path / "held.txt").write_text("\n".join(names[row] for row in (1, 4, 7)))
    command += ["--held-out", str(tmp_path / "held.txt")]
    train_vlm.main(command)
    path = tmp_path / "vlm.safetensors"
    vlm, noted = load_vlm(path)
    found = noted.training["conv5"]["held_out_quantiles"]
    stored = read_batch(np.load(tmp_path / "features" / "conv5.npy"), np.array([1, 4, 7]), "cpu")
    losses = [vlm.layers["conv5"].loss(p[None]).item() for p in stored]
    assert len(found) == len(naturalness.LEVELS)
    assert (found[0], found[10], found[-1]) == pytest.approx(tuple(sorted(losses)), rel=1e-4)
    assert noted.training["conv5"]["losses"]["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    state = tmp_path / "train_state" / "conv5.safetensors"
    tensors, notes = read_tensors(state)
    notes.pop("quantiles")
    artefacts.write_tensors(state, tensors, notes)
    train_vlm.main(command)
    assert load_vlm(path)[1].training["conv5"]["held_out_quantiles"] == found
    capsys.readouterr()
    train_vlm.main(command)
    assert "nothing to do" in capsys.readouterr().out
