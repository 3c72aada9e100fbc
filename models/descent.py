"""How an image is looked for: what is varied, from which start, by which optimiser, at which rate; and the loop.

The objective says which image is best (models/objective.py), the descent how it is found. `DESCENTS` names the two
that there are: each author's own, on raw pixels, and one that all regularisers share, on Fourier coefficients.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from models.backbones import Backbone
from models.errors import UserError

# Norm of a typical mean-subtracted image of 227 × 227 in 0-255 units (deep-goggle, experiments/x0_sigma.mat).
IMAGE_NORM = 27098.11571533
# From decorrelated colours to RGB: a square root of the colours' covariance over ImageNet, its longest column of norm 1
# (https://github.com/tensorflow/lucid/blob/6dcc927/lucid/optvis/param/color.py).
COLORS = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
COLORS = COLORS / COLORS.norm(dim=0).max()
PAPER_RATE = 2.0**19  # original code, of pixels in 0-255; its README says 2^20


class Image(Protocol):
    """An image as a function of what is varied."""

    parameters: list[Tensor]

    def __call__(self) -> Tensor:
        """Mean-subtracted pixels (1, 3, H, W) in 0-255 units."""
        ...


class Pixels:
    """The pixels themselves."""

    def __init__(self, start: Tensor, *, bgr: bool = False):
        self.parameters = [start.detach().clone().requires_grad_()]

    def __call__(self) -> Tensor:
        """Mean-subtracted pixels (1, 3, H, W)."""
        return self.parameters[0]


class Fourier:
    """x = C · irfft2(s ⊙ z): complex coefficients z of every frequency and decorrelated colour.

    s = 1/max(f, 1/max(H, W)) over the spatial frequency f in cycles per pixel, scaled to mean 1, is about the spectrum
    of natural images; C maps decorrelated colours to the network's channels. Both only precondition: minima stay where
    they are (Olah, Mordvintsev & Schubert 2017, "Feature Visualization", https://doi.org/10.23915/distill.00007).

    Args:
        start: pixels (1, 3, H, W).
        exponent: of s; 0 treats all frequencies alike.
        decorrelate: whether there is a C.
        bgr: order of the channels.
    """

    def __init__(self, start: Tensor, *, exponent: float = 1.0, decorrelate: bool = True, bgr: bool = False):
        self.size = tuple(start.shape[2:])
        height, width = self.size
        frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))  # (H, W//2 + 1)
        scale = frequency.clamp(min=1 / max(self.size)).pow(-exponent)
        self.scale = (scale / scale.mean()).to(start)
        self.colors = ((COLORS.flip(0) if bgr else COLORS) if decorrelate else torch.eye(3)).to(start)
        plain = torch.einsum("dc,ncij->ndij", torch.linalg.inv(self.colors), start.detach())
        spectrum = torch.fft.rfft2(plain, norm="ortho") / self.scale
        self.parameters = [torch.view_as_real(spectrum).clone().requires_grad_()]  # (1, 3, H, W//2 + 1, 2)

    def __call__(self) -> Tensor:
        """Mean-subtracted pixels (1, 3, H, W)."""
        spectrum = self.scale * torch.view_as_complex(self.parameters[0])
        return torch.einsum("dc,ncij->ndij", self.colors, torch.fft.irfft2(spectrum, s=self.size, norm="ortho"))


PARAMETRIZATIONS: dict[str, Callable[..., Image]] = {"pixels": Pixels, "fourier": Fourier}


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

    def state(self) -> dict[str, Tensor]:
        """What an interrupted descent needs besides the parameters, by name; these very tensors."""
        return {f"velocity.{i}": v for i, v in enumerate(self.velocities)}


class Adam(MomentumSGD):
    """w ← w − lr·m/√v, m and v the means of the gradient and of its square, each over what it has seen so far.

    Kingma & Ba 2015, Algorithm 1, with their second factor 0.999 and 1e-8. Its momentum is m: a reset forgets that,
    and keeps v, the gradients' scale.
    """

    MEMORY, EPSILON = 0.999, 1e-8

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.9):
        super().__init__(parameters, lr, momentum)
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.ages = torch.zeros(2)  # updates that m and v have seen

    @torch.no_grad()
    def step(self) -> None:
        """One update from the parameters' gradients."""
        self.ages += 1
        unbias_m, unbias_v = 1 - self.momentum ** int(self.ages[0]), 1 - self.MEMORY ** int(self.ages[1])
        for p, m, v in zip(self.parameters, self.velocities, self.squares, strict=True):
            m.mul_(self.momentum).add_(p.grad, alpha=1 - self.momentum)
            v.mul_(self.MEMORY).addcmul_(p.grad, p.grad, value=1 - self.MEMORY)
            p.addcdiv_(m, (v / unbias_v).sqrt_().add_(self.EPSILON), value=-self.lr / unbias_m)

    def reset_momentum(self) -> None:
        """Set m to zero."""
        super().reset_momentum()
        self.ages[0] = 0

    def state(self) -> dict[str, Tensor]:
        """What an interrupted descent needs besides the parameters, by name; these very tensors."""
        return {**super().state(), **{f"square.{i}": v for i, v in enumerate(self.squares)}, "ages": self.ages}


OPTIMIZERS: dict[str, type[MomentumSGD]] = {"momentum": MomentumSGD, "adam": Adam}


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

    def prepare(self, optimizer: MomentumSGD, i: int) -> None:
        """Give the optimiser the rate of update `i`, and take its momentum where that is the first after a decay."""
        optimizer.lr = self.rate(i)
        if i - 1 in self.decay_at:
            optimizer.reset_momentum()


def noise_like_data(backbone: Backbone, data: Mapping[str, Tensor], noise: float, seed: int) -> Tensor:
    """Gaussian noise with the mean of the `data` layer and `noise` times its std, as mean-subtracted pixels.

    differs from the original: the noise is seeded.
    """
    x = _noise(backbone.architecture.crop, seed) * (noise * data["std"].cpu()[:, None, None])
    return backbone.to_pixels((x + data["mean"].cpu()[:, None, None]).to(backbone.device))


def noise_of_norm(size: tuple[int, int], seed: int) -> Tensor:
    """Gaussian noise (1, 3, H, W) of norm `IMAGE_NORM`, the start of Mahendran & Vedaldi."""
    noise = _noise(size, seed)
    return noise * (IMAGE_NORM / noise.norm())


def _noise(size: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def _image_norm(backbone: Backbone, data: Mapping[str, Tensor], noise: float, seed: int) -> Tensor:
    return noise * noise_of_norm(backbone.architecture.crop, seed).to(backbone.device)


def _mean_colour(backbone: Backbone, data: Mapping[str, Tensor], noise: float, seed: int) -> Tensor:
    return torch.zeros(1, 3, *backbone.architecture.crop, device=backbone.device)


# What a descent starts from: mean-subtracted pixels (1, 3, H, W) of a backbone, mean and std of its `data` layer (only
# "data" reads them), the strength of the noise and a seed.
STARTS: dict[str, Callable[[Backbone, Mapping[str, Tensor], float, int], Tensor]] = {
    "data": noise_like_data,
    "norm": _image_norm,
    "zero": _mean_colour,
}


@dataclass(frozen=True)
class Descent:
    """One way of descending.

    Attributes:
        start: name in `STARTS`.
        noise: strength of its noise, times that of the data or of an image.
        parametrization: name in `PARAMETRIZATIONS`.
        settings: of the parametrisation, by name.
        optimizer: name in `OPTIMIZERS`.
        learning_rate: of pixels in 0-255, or of what is varied instead.
        decay_at: parts of the run after which the rate falls to a tenth and the momentum to zero.
        momentum: of the optimiser.
        iterations: updates.
        vlm_weight: λ₂ of the language models that goes with it.
        energy_weight: of the energy that goes with it (`models.objective.energy_loss`).
        in_turn: each update looks along one of their four directions, another at every update.
    """

    learning_rate: float
    iterations: int
    decay_at: tuple[float, ...] = ()
    start: str = "data"
    noise: float = 1.0
    parametrization: str = "pixels"
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "momentum"
    momentum: float = 0.9
    vlm_weight: float = 10.0  # original code
    energy_weight: float = 0.0
    in_turn: bool = False

    def decays(self, iterations: int) -> list[int]:
        """Updates of a run of so many, counted from 0, after which the rate falls."""
        return [at for part in self.decay_at if (at := round(part * iterations) - 1) >= 0]

    def values(self, decay_at: Sequence[int]) -> dict[str, Any]:
        """Its settings under the names of reconstruct.py's options, with the updates after which its rate falls."""
        names = ("iterations", "learning_rate", "momentum", "in_turn")
        return {name: getattr(self, name) for name in names} | {"decay_at": list(decay_at), "start_noise": self.noise}

    def image(self, start: Tensor, bgr: bool = False) -> Image:
        """What is varied, from pixels (1, 3, H, W)."""
        return PARAMETRIZATIONS[self.parametrization](start, bgr=bgr, **self.settings)


PAPER = Descent(PAPER_RATE, iterations=1000)
# Updates of 0.004·s²·gradient, s = IMAGE_NORM: their objective times s² descended at 0.004; 100, 200, 100 iterations.
MAHENDRAN = Descent(0.004 * IMAGE_NORM**2, iterations=400, decay_at=(0.25, 0.75), start="norm")
FOURIER = Descent(
    4.0,
    iterations=200,
    decay_at=(0.7,),
    noise=0.1,
    parametrization="fourier",
    settings={"exponent": 1.0, "decorrelate": True},
    optimizer="adam",
    # differs from the paper, whose 10 was for its own descent (docs/RESULTS.md, what was tried).
    vlm_weight=3.0,
    energy_weight=0.1,
    in_turn=True,
)
DESCENTS: dict[str, Descent | None] = {"authors": None, "fourier": FOURIER}  # None: the regulariser's own


def descend(
    loss: Callable[[Tensor, int], dict[str, Tensor]],
    image: Image,
    optimizer: MomentumSGD,
    schedule: Schedule,
    iterations: int,
    callback: Callable[[int, dict[str, float]], None],
    first: int = 0,
) -> None:
    """Minimise `loss(pixels, i)` over an image, whose parameters `optimizer` changes in place.

    `callback(i, terms)` gets the terms before update `i` (as the original printed them), once it is made.

    Raises:
        UserError: the loss is no longer finite.
    """
    for i in range(first, iterations):
        schedule.prepare(optimizer, i)
        optimizer.zero_grad()
        terms = loss(image(), i)
        total = terms["total"].item()
        if not math.isfinite(total):
            raise UserError(
                f"the loss is no longer finite at iteration {i} with learning rate {optimizer.lr:g}: "
                "use a smaller --learning-rate"
            )
        terms["total"].backward()
        optimizer.step()
        callback(i, {name: value.item() for name, value in terms.items()})
