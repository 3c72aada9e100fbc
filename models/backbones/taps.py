"""Reading a network at named taps: the outputs of its modules, caught by hooks in one run no longer than needed."""

from collections.abc import Collection
from typing import Protocol

from torch import Tensor, nn


class Reader(Protocol):
    """How a network is read: which taps it has, and their values."""

    def names(self, network: nn.Module) -> tuple[str, ...]:
        """The taps to offer, in the order in which the network computes them."""

    def read(self, network: nn.Module, x: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Values by tap for the input `x` (N, 3, H, W): maps (N, C, h, w) and vectors (N, units)."""


class Found(Exception):  # noqa: N818 (no error)
    """The last value asked for is there: what is deeper need not be computed."""


class _Units(nn.Linear):
    """A fully connected layer that gives the shape of its result and no values."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, units read) -> (…, units)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{x.shape[-1]} units are not {self.in_features}")
        return x.new_empty(*x.shape[:-1], self.out_features)


# Of these the meta device knows no shapes but through PyTorch's compiler, which takes two seconds to import.
_SHAPES = {nn.Linear: _Units, nn.ReLU: nn.Identity, nn.ReLU6: nn.Identity, nn.Dropout: nn.Identity}


def shapes_alone(network: nn.Module) -> nn.Module:
    """The network itself, in which plain layers keep their names, parameters and shapes, and compute no values."""
    for module in network.modules():
        module.__class__ = _SHAPES.get(type(module), type(module))
    return network


class ModuleReader:
    """Every module is a tap, by its name; one that is run several times is read at its first run."""

    def names(self, network: nn.Module) -> tuple[str, ...]:
        """All modules, in the order of their definition."""
        return tuple(name for name, _ in network.named_modules() if name)

    def read(self, network: nn.Module, x: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Outputs of the modules `names`; a KeyError names one that the run never came to."""
        found: dict[str, Tensor] = {}
        changeless = isinstance(network, nn.Sequential) and not any(
            getattr(module, "inplace", False) for module in network.modules()
        )

        def note(name: str):
            """A hook that keeps a module's first output."""

            def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
                # what follows may write into its input, as torchvision's ReLUs do
                found.setdefault(name, output if changeless else output.clone())
                if len(found) == len(names):
                    raise Found

            return hook

        handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in names]
        try:
            network(x)
        except Found:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {name: found[name] for name in names}


class ChainReader(ModuleReader):
    """A chain is offered at its convolutions, its last pooling and its fully connected layers, as in the paper."""

    def names(self, network: nn.Module) -> tuple[str, ...]:
        """Of any module the name works; these are the ones worth a list."""
        modules = dict(network.named_modules())
        pools = [name for name, module in modules.items() if isinstance(module, nn.MaxPool2d)]
        return tuple(name for name, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear) or name in pools[-1:])
