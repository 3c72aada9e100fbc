"""The computed costs of a run."""

import pytest

import run_all
from models.backbones import ARCHITECTURES
from pipeline import plan

ALEXNET = ARCHITECTURES["alexnet"]
RUN = {"batch": 16, "iterations": 100, "reconstruction_iterations": 10, "pca_positions": 100_000}


def costs(images: int = 1000, layers: tuple[str, ...] = ("conv5",), **options: int) -> dict[str, plan.Cost]:
    return plan.costs(ALEXNET, images, list(layers), **RUN | options)


def test_predicted_vectors_by_counting() -> None:
    steps = sum(1 for _ in range(2) for step in range(1, 5) for _ in range(7))
    assert plan.predicted(5, 7) == steps + sum(1 for _ in range(2) for step in range(1, 7) for _ in range(5))


def test_operations_of_a_network_by_counting() -> None:
    """A convolution of AlexNet: 2·k²·inputs per output, without its bias."""
    conv1 = 2 * 56 * 56 * 64 * 11**2 * 3
    assert ALEXNET.flops("conv1", 227, 227) == conv1
    assert ALEXNET.flops("conv2", 227, 227) == conv1 + 2 * 27 * 27 * 192 * 5**2 * 64
    assert ALEXNET.flops("data", 227, 227) == 0


def test_costs_of_conv5() -> None:
    alone, shared = costs(), costs(processes=4)
    features = 13 * 13 * 128 * 4
    assert alone["prepare_images"].disk == 1000 * 256 * 256 * 3
    assert alone["extract_features"].disk == 1000 * features
    assert alone["train_vlm"].flops == 100 * 16 * 3 * (4 * 12 * 13) * 34 * 128**2
    assert shared["train_vlm"].flops == alone["train_vlm"].flops
    assert shared["train_vlm"].memory < alone["train_vlm"].memory
    assert shared["train_vlm"].hours(50.0, 4) == pytest.approx(alone["train_vlm"].hours(200.0))


def test_dry_run_shares_the_hours_among_processes(capsys: pytest.CaptureFixture) -> None:
    options = ["--preset", "alexnet", "--dry-run", "--num-images", "1281167"]
    run_all.main(options)
    alone = capsys.readouterr().out
    assert alone.count(" of arithmetic at 80 GFLOP/s\n") == 5 and " 13 h of arithmetic" in alone
    run_all.main([*options, "--processes", "8", "--gflops", "10000"])
    shared = capsys.readouterr().out
    assert "894.5 GB" in shared and shared.count("GFLOP/s of each of 8 processes") == 3
