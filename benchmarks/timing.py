"""What the benchmarks share: interleaved timing, figures with goals, the machine's matrix product, growth rates."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEED = 0
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Setup:
    """How to measure: rounds, device, threads of torch, an empty folder, whether tiny sizes are enough."""

    repeats: int
    device: torch.device
    threads: int
    folder: Path
    quick: bool = False


@dataclass(frozen=True)
class Figure:
    """One measured quantity, a value per round.

    `goal` is what the median shall reach: at least, or (`at_most`) at most. `note` says how it was measured.
    """

    name: str
    values: tuple[float, ...]
    unit: str = "×"
    goal: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def median(self) -> float:
        """The median of the rounds, in `unit`."""
        return float(np.median(self.values))

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        if self.goal is None:
            return None
        return self.median <= self.goal if self.at_most else self.median >= self.goal

    def as_json(self) -> dict[str, Any]:
        """All fields and what follows from them, as JSON values."""
        spread = {"median": self.median, "min": min(self.values), "max": max(self.values)}
        return {**asdict(self), **spread, "met": self.met}

    def as_cells(self) -> list[str]:
        """Cells of the table: name, median, min, max, goal, met or missed, note."""
        numbers = [self._show(value) for value in (self.median, min(self.values), max(self.values))]
        goal = "" if self.goal is None else f"{'≤' if self.at_most else '≥'} {self._show(self.goal)}"
        return [self.name, *numbers, goal, {None: "", True: "met", False: "missed"}[self.met], self.note]

    def _show(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * value:.1f} %"
        return f"{value:.3g} {self.unit}".strip() if abs(value) < 1000 else f"{value:.0f} {self.unit}".strip()


@dataclass
class Report:
    """What one part measured: its figures, and facts that explain them."""

    figures: list[Figure] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def joined(cls, reports: "Sequence[Report]") -> "Report":
        """All figures, in order, and all facts."""
        return cls([f for r in reports for f in r.figures], {key: v for r in reports for key, v in r.facts.items()})


def seconds(
    functions: Mapping[str, Callable[[], object]], setup: Setup, prepare: Callable[[], object] = lambda: None
) -> dict[str, np.ndarray]:
    """Seconds (R,) of every function by name, one value per round; `prepare` runs before each, uncounted.

    In each round all run once, one after the other, each time beginning with another, so that neither a slow moment
    nor what the predecessor left in the caches favours one. A first round is not counted.
    """
    names = list(functions)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(setup.repeats + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            prepare()
            _wait(setup)
            began = time.perf_counter()
            functions[name]()
            _wait(setup)
            taken[name].append(time.perf_counter() - began)
    return {name: np.array(values[1:]) for name, values in taken.items()}


def milliseconds(values: np.ndarray) -> str:
    """The median of seconds, for a note."""
    return f"{1e3 * float(np.median(values)):.3g} ms"


def run_python(arguments: Sequence[str], setup: Setup) -> tuple[float, str]:
    """Seconds of a Python process of its own, started in the project's folder, and what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(setup.threads)}
    began = time.perf_counter()
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    took = time.perf_counter() - began
    if result.returncode:
        raise RuntimeError(result.stderr)
    return took, result.stdout


def _wait(setup: Setup) -> None:
    if setup.device.type != "cpu":
        getattr(torch, setup.device.type).synchronize()


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, ...]:
    """Quotients of two functions' seconds (R,), round by round."""
    return tuple((above / below).tolist())


class MatrixProduct:
    """A product of two large square float32 matrices: what the machine reaches at best (sgemm)."""

    def __init__(self, setup: Setup):
        size = 64 if setup.quick else 2048 if setup.device.type == "cpu" else 8192
        generator = torch.Generator().manual_seed(SEED)
        self.a, self.b = (torch.randn(size, size, generator=generator).to(setup.device) for _ in range(2))
        self.out = torch.empty_like(self.a)
        self.flops = 2.0 * size**3

    def __call__(self) -> None:
        torch.mm(self.a, self.b, out=self.out)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """x of the power law size^x that fits best: the slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
