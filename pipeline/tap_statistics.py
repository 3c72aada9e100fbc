"""What pass 1 of stage 2 collects, and how it survives a kill and comes together from several ranks."""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.backbones import Architecture
from models.checkpoints import projection_tensors, read_tensors, take_projection
from models.errors import UserError
from models.projection import Moments, Projection
from pipeline import artefacts, distributed, program


@dataclass
class TapStatistics:
    """Moments of every tap, and raw vectors (n, positions, C) at random positions of the layers to project.

    Attributes:
        done: images of this rank that are in.
    """

    moments: dict[str, Moments]
    samples: dict[str, np.ndarray]
    done: int = 0

    @classmethod
    def empty(
        cls, architecture: Architecture, layers: Sequence[str], others: Sequence[str], images: int, positions: int
    ) -> "TapStatistics":
        """Room for `positions` samples of each of this rank's images.

        Raises:
            UserError: they would not fit into memory.
        """
        size = images * positions * sum(architecture.channels(layer) for layer in layers)
        artefacts.check_memory("samples at --pca-positions", 4 * size)
        return cls(
            {tap: Moments(architecture.channels(tap)) for tap in dict.fromkeys([*layers, *others])},
            {layer: np.zeros((images, positions, architecture.channels(layer)), np.float32) for layer in layers},
        )

    def add(self, taps: dict[str, torch.Tensor], positions: dict[str, np.ndarray]) -> None:
        """Add the next images (B, C, H, W) by tap, and the samples at some flat positions (B, n) of each by layer."""
        for tap, values in taps.items():
            self.moments[tap].update(values)
        for layer, drawn in positions.items():
            flat = taps[layer].flatten(2)  # (B, C, H·W)
            index = torch.from_numpy(drawn).to(flat.device)[:, None].expand(-1, flat.shape[1], -1)
            sampled = flat.gather(2, index).transpose(1, 2).cpu()  # (B, n, C)
            self.samples[layer][self.done : self.done + len(drawn)] = sampled
        self.done += len(next(iter(taps.values())))

    def save(self, path: Path, facts: artefacts.Facts) -> None:
        """Note the state on disk so that a killed run can go on."""
        arrays = {f"samples.{layer}": values for layer, values in self.samples.items()}
        for tap, m in self.moments.items():
            arrays |= {f"sums.{tap}": m.sums.numpy(), f"squares.{tap}": m.squares.numpy()}
            arrays[f"count.{tap}"] = np.array(m.count)
        arrays["done"] = np.array(self.done)
        arrays["facts"] = np.array(json.dumps(facts))
        size = sum(array.nbytes for array in arrays.values())
        with artefacts.atomic_path(path, size) as temporary, temporary.open("wb") as file:
            # np.savez of NumPy 1 leaves its archive open, with a traceback, where the disk is full
            with zipfile.ZipFile(file, "w") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array)

    def restore(self, path: Path, facts: artefacts.Facts) -> None:
        """Take up the state of a killed run with the same facts, if there is one.

        Raises:
            UserError: it is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as noted:
                if str(noted["facts"]) != json.dumps(facts):
                    return
                for tap, m in self.moments.items():
                    m.count = int(noted[f"count.{tap}"])
                    m.sums.copy_(torch.from_numpy(noted[f"sums.{tap}"]))
                    m.squares.copy_(torch.from_numpy(noted[f"squares.{tap}"]))
                for layer, values in self.samples.items():
                    values[:] = noted[f"samples.{layer}"]
                self.done = int(noted["done"])
        except FileNotFoundError:
            return
        except Exception as error:  # a damaged archive makes numpy and zipfile raise nearly anything
            raise UserError(f"{path} is damaged ({error}): remove it and run again") from None

    def reduce(self) -> None:
        """Put the parts of all ranks together; the samples on rank 0 alone."""
        for m in self.moments.values():
            count = distributed.add_up(torch.tensor([m.count]))
            m.count, m.sums, m.squares = int(count), distributed.add_up(m.sums), distributed.add_up(m.squares)
        for layer, values in self.samples.items():
            whole = distributed.gather_rows(values)
            self.samples[layer] = values[:0] if whole is None else whole


def fit_projections(statistics: TapStatistics) -> dict[str, Projection]:
    """The projection of every layer that was sampled: its moments, and PCA of the standardised samples.

    Constant channels are reported.
    """
    projections = {}
    for layer, sampled in statistics.samples.items():
        moments = statistics.moments[layer]
        std, constant = moments.guarded_std()
        if constant:
            print(f"{layer}: channels {constant} are constant, their standard deviation counts as 1", flush=True)
        samples = torch.from_numpy(sampled).flatten(0, 1)  # (n, C)
        standardised = (samples - moments.mean.float()) / std.float()
        projections[layer] = Projection.fit(moments.mean, std, standardised.numpy())
    return projections


def write_projections(path: Path, statistics: TapStatistics, facts: artefacts.Facts, about: artefacts.Facts) -> None:
    """projection.safetensors with `facts`, which determine it, and of `about` what a checkpoint repeats."""
    shared = {key: about[key] for key in ("weights", "sources")}
    moments = {tap: m.statistics() for tap, m in statistics.moments.items()}
    tensors = projection_tensors(fit_projections(statistics), moments)
    artefacts.write_tensors(path, tensors, {**shared, **facts})
    artefacts.write_json(artefacts.sidecar_path(path), {**facts, **about, "versions": program.versions()})


def read_projections(path: Path, layers: Sequence[str]) -> dict[str, Projection]:
    """The projections of some layers, of projection.safetensors."""
    tensors = read_tensors(path)[0]
    return {layer: take_projection(tensors, layer, path) for layer in layers}
