"""The benchmark script runs; what it compares with is right, and so is what it counts."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import direct, run, updates
from benchmarks.timing import Figure, Setup, exponent, seconds
from models.vlm import layer_loss

SETUP = Setup(repeats=3, device=torch.device("cpu"), threads=1, folder=Path(), quick=True)
SIZES = {"conv5": (4, 6, 5)}
BATCH = 3


def test_all_parts_at_tiny_sizes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run.main(["--quick", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "benchmarks.json").read_text())
    assert tuple(results["parts"]) == tuple(run.PARTS)
    figures = [figure for part in results["parts"].values() for figure in part["figures"]]
    assert len({figure["name"] for figure in figures}) == len(figures) > 15
    for figure in figures:
        assert all(map(math.isfinite, figure["values"])) and figure["min"] <= figure["median"] <= figure["max"]
        assert (figure["goal"] is None) == (figure["met"] is None)
    table = (tmp_path / "benchmarks.md").read_text()
    assert table in capsys.readouterr().out
    assert all(f"| {figure['name']} " in table for figure in figures) and "| met " in table


def test_direct_port_equals_the_model() -> None:
    p, models = updates.draw(SIZES, BATCH, SETUP)["conv5"], updates.make_models(SIZES, SETUP)["conv5"]
    found = []
    for loss in (direct.layer_loss, layer_loss):
        models.zero_grad()
        value = loss(p, models)
        value.backward()
        found.append([value, *(w.grad.clone() for w in models.parameters() if w.requires_grad)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_operations_by_counting() -> None:
    p, models = updates.draw(SIZES, BATCH, SETUP)["conv5"], updates.make_models(SIZES, SETUP)["conv5"]
    with FlopCounterMode(display=False) as forward:
        loss = direct.layer_loss(p, models)
    assert forward.get_total_flops() == updates.flops(SIZES, BATCH) / 3
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert updates.flops(SIZES, BATCH, strict=True) < total < updates.flops(SIZES, BATCH)


def test_variants_that_disagree_are_not_timed() -> None:
    made = updates.variants(SIZES, BATCH, SETUP)
    before, after = updates.check_agreement(made)["conv5"]
    assert abs(after - before) > updates.TOLERANCE * before, "an update changes the loss by more than the tolerance"
    with pytest.raises(AssertionError, match="the loss of wrong is"):
        updates.check_agreement({**made, "wrong": lambda: {"conv5": 1.0}})


def test_rounds_interleave() -> None:
    calls: list[str] = []
    taken = seconds({name: lambda name=name: calls.append(name) for name in "abc"}, SETUP)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    assert {name: len(values) for name, values in taken.items()} == {"a": 3, "b": 3, "c": 3}


def test_goals() -> None:
    assert Figure("a", (1.0, 2.0, 9.0), goal=2.0).met and not Figure("a", (1.0, 2.0, 9.0), goal=2.1).met
    assert Figure("a", (1.0, 2.0, 9.0), goal=2.0, at_most=True).met
    assert not Figure("a", (1.0, 2.0, 9.0), goal=1.9, at_most=True).met
    assert Figure("a", (1.0,)).met is None
    assert Figure("a", (0.5, 0.61, 0.7), "%", 0.65).as_cells()[:6] == [
        "a",
        "61.0 %",
        "50.0 %",
        "70.0 %",
        "≥ 65.0 %",
        "missed",
    ]


def test_exponent_of_a_power_law() -> None:
    assert exponent([1, 2, 5, 9], [3 * x**1.5 for x in (1, 2, 5, 9)]) == pytest.approx(1.5)
