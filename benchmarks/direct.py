"""The original's scan, ported as it stands: a Python loop of single steps, in plain tensor operations with autograd.

What the project's own language model is compared with; it takes the same modules, so that both can be checked to agree.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.vlm import DIRECTIONS, DirectionalModel, accumulation_type, to_sequences


def step(x: Tensor, hidden: Tensor, cell: Tensor, model: DirectionalModel, layer: int) -> tuple[Tensor, Tensor]:
    """One step of one LSTM on vectors (B, D): the next hidden state and cell."""
    weights = [model.lstm.get_parameter(f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih")]
    gates = x @ weights[0].T + hidden @ weights[1].T + weights[2]  # (B, 4D)
    i, f, c, o = gates.chunk(4, dim=1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(c)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def direction_loss(p: Tensor, direction: str, model: DirectionalModel) -> Tensor:
    """As `models.vlm.direction_loss`, step by step."""
    sequences = to_sequences(p, direction)  # (T, B, D)
    steps = len(sequences) - 1
    hidden = [torch.zeros_like(sequences[0]) for _ in range(2)]
    cells = [torch.zeros_like(sequences[0]) for _ in range(2)]
    losses = []
    for t in range(steps):
        x = sequences[t]
        for layer in range(2):
            x, cells[layer] = step(x, hidden[layer], cells[layer], model, layer)
            hidden[layer] = x
        errors = (model.linear(x) - sequences[t + 1]).square()
        losses.append(errors.mean(dtype=accumulation_type(p)) * (t / steps))
    return torch.stack(losses).mean()


def layer_loss(p: Tensor, models: Mapping[str, DirectionalModel]) -> Tensor:
    """As `models.vlm.layer_loss`: the mean of the four directions, (N, D, H, W) -> a scalar."""
    return torch.stack([direction_loss(p, direction, models[direction]) for direction in DIRECTIONS]).mean()
