"""Gradient descent with classical momentum, the one optimiser of the paper, and the one schedule of its rate."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The learning rate by update, of training and of reconstruction.

    Updates are counted from 0. After update `i` of `decay_at`, thus from update `i + 1` on, the rate is `decay_factor`
    times what it was, and the momentum starts anew, whatever the factor.
    """

    learning_rate: float
    decay_at: tuple[int, ...] = ()
    decay_factor: float = 0.1

    def rate(self, i: int) -> float:
        """Learning rate of update `i`."""
        return self.learning_rate * self.decay_factor ** sum(i > at for at in self.decay_at)

    def prepare(self, optimizer: "MomentumSGD", i: int) -> None:
        """Give the optimiser the rate of update `i`, and take its momentum where that is the first after a decay."""
        optimizer.lr = self.rate(i)
        if i - 1 in self.decay_at:
            optimizer.reset_momentum()


class MomentumSGD:
    """v ← momentum·v − lr·g;  w ← w + v.

    torch.optim.SGD scales its velocity by the learning rate of the current step, so the two part when the rate
    changes while the velocity is kept; this is the original's form.

    Args:
        parameters: leaf tensors, changed in place.
        lr: learning rate, may be assigned between steps.
        momentum: 0.9 in the paper.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.9):
        self.parameters = list(parameters)
        self.velocities = [torch.zeros_like(p) for p in self.parameters]
        self.lr = lr
        self.momentum = momentum

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update from the parameters' gradients."""
        for p, v in zip(self.parameters, self.velocities, strict=True):
            v.mul_(self.momentum).sub_(p.grad, alpha=self.lr)
            p.add_(v)

    def reset_momentum(self) -> None:
        """Set all velocities to zero."""
        for v in self.velocities:
            v.zero_()
