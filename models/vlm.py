"""The visual language model: recurrent networks that read a feature map in four directions.

Each direction reads the grid along one axis and predicts, from what it has read, what comes next:

      down: top to bottom      up: bottom to top      right: left to right     left: right to left
      ┌───────────┐            ┌───────────┐          ┌───────────┐            ┌───────────┐
      │ 1 1 1 1 1 │            │ 3 3 3 3 3 │          │ 1 2 3 4 5 │            │ 5 4 3 2 1 │
      │ 2 2 2 2 2 │            │ 2 2 2 2 2 │          │ 1 2 3 4 5 │            │ 5 4 3 2 1 │
      │ 3 3 3 3 3 │            │ 1 1 1 1 1 │          │ 1 2 3 4 5 │            │ 5 4 3 2 1 │
      └───────────┘            └───────────┘          └───────────┘            └───────────┘

Columns are independent sequences for the vertical directions, rows for the horizontal ones. The prediction of
step t+1 has seen steps 1 … t of its own column or row and nothing else.

Letters in shape comments: N images, D components, H × W grid, T steps along the scan, B = sequences (N·W or N·H).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError
from models.fused_lstm import fused_lstm
from models.projection import Projection
from models.randomness import seed_for

DIRECTIONS = ("down", "up", "right", "left")
VERTICAL = ("down", "up")
BACKWARD = ("up", "left")
INITIAL_STD = 0.01  # paper: weights from N(0, 0.01²), biases 0

Predictor = Callable[[Tensor], Tensor]
Measure = Callable[[Tensor], Tensor]

# Kinds of recurrent model by name: from D to a module that maps sequences (T, B, D) to hidden states (T, B, D) and
# something else, usually its last state. The module keeps its weights in parameters called `…weight…` and `…bias…`.
CELLS: dict[str, Callable[[int], nn.Module]] = {
    "lstm": lambda size: nn.LSTM(size, size, num_layers=2),
    "gru": lambda size: nn.GRU(size, size, num_layers=2),
}
PAPER_CELL = "lstm"


def to_sequences(p: Tensor, direction: str) -> Tensor:
    """Feature map (N, D, H, W) -> sequences (T, B, D) in reading order."""
    n, d, h, w = p.shape
    if direction in VERTICAL:
        sequences = p.permute(2, 0, 3, 1).reshape(h, n * w, d)  # (H, N·W, D)
    else:
        sequences = p.permute(3, 0, 2, 1).reshape(w, n * h, d)  # (W, N·H, D)
    return sequences.flip(0) if direction in BACKWARD else sequences


def to_grid(scan: Tensor, direction: str, images: int) -> Tensor:
    """Per-step values (T', B, …) in reading order -> (N, T', W, …) or (N, H, T', …) in the map's own order."""
    if direction in BACKWARD:
        scan = scan.flip(0)
    steps, sequences = scan.shape[:2]
    grid = scan.reshape(steps, images, sequences // images, *scan.shape[2:])
    return grid.transpose(0, 1) if direction in VERTICAL else grid.permute(1, 2, 0, *range(3, grid.ndim))


def ramp(steps: int, like: Tensor) -> Tensor:
    """Weights 0, 1/steps, …, (steps-1)/steps of a scan's predictions: trust grows with what was read.

    float64, as in the original, where the device has it. `steps` = T - 1.
    """
    return torch.arange(steps, dtype=accumulation_type(like), device=like.device) / steps


def accumulation_type(like: Tensor) -> torch.dtype:
    """float64, except on Apple's GPUs, which have none."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def predict_nothing(seen: Tensor) -> Tensor:
    """The trivial predictor that always says zero, the mean of all features. (T-1, B, D) -> (T-1, B, D)."""
    return torch.zeros_like(seen)


def repeat_last(seen: Tensor) -> Tensor:
    """The trivial predictor that says what it saw last. (T-1, B, D) -> (T-1, B, D)."""
    return seen


TRIVIAL_PREDICTORS: dict[str, Predictor] = {"predict nothing": predict_nothing, "repeat last": repeat_last}


def prediction_errors(p: Tensor, direction: str, predictor: Predictor) -> Tensor:
    """Error vector of every prediction of one scan: (T-1, B, D) in reading order."""
    sequences = to_sequences(p, direction)  # (T, B, D)
    if len(sequences) < 2:
        raise UserError(
            f"a {p.shape[3]}×{p.shape[2]} feature map has nothing to predict along '{direction}': give a larger image"
        )
    return predictor(sequences[:-1]) - sequences[1:]


def mean_squares(errors: Tensor) -> Tensor:
    """How much each error vector counts, the paper's: (T-1, B, D) -> (T-1, B), averaged over the D components."""
    return errors.square().mean(dim=2, dtype=accumulation_type(errors))


def direction_loss(p: Tensor, direction: str, predictor: Predictor) -> Tensor:
    """Mean weighted squared error of one direction, a float64 scalar."""
    errors = prediction_errors(p, direction, predictor)
    per_step = errors.square().mean(dim=(1, 2), dtype=accumulation_type(p))  # (T-1,)
    return (per_step * ramp(len(errors), p)).mean()


def layer_loss(p: Tensor, predictors: Mapping[str, Predictor], directions: Sequence[str] = DIRECTIONS) -> Tensor:
    """Mean of the directions' losses on projected features (N, D, H, W); the paper's layer loss is that of all four."""
    return torch.stack([direction_loss(p, d, predictors[d]) for d in directions]).mean()


def direction_error_map(p: Tensor, direction: str, predictor: Predictor, measure: Measure = mean_squares) -> Tensor:
    """How much the error of every prediction counts by some measure, times the ramp, at its place.

    (N, H-1, W) for the vertical directions, (N, H, W-1) for the horizontal ones. A forward direction's error
    stands where the last vector read stood, a backward one's where the predicted vector stands: both count the
    T-1 steps from the top or the left (original code).
    """
    errors = prediction_errors(p, direction, predictor)
    weighted = measure(errors) * ramp(len(errors), p)[:, None]  # (T-1, B)
    return to_grid(weighted, direction, len(p))


def layer_map(
    p: Tensor,
    predictors: Mapping[str, Predictor],
    apply: Callable[..., Iterable[Tensor]] = map,
    measure: Measure = mean_squares,
) -> Tensor:
    """Unnaturalness map (N, H-1, W-1) of projected features (N, D, H, W): the sum of the four error maps.

    `apply` stands in for `map` over the directions, which do not depend on each other; `measure` for the paper's
    mean squares.
    """
    height, width = p.shape[2] - 1, p.shape[3] - 1
    maps = apply(lambda d: direction_error_map(p, d, predictors[d], measure)[:, :height, :width], DIRECTIONS)
    return torch.stack(list(maps)).sum(0)


def trivial_losses(p: Tensor) -> dict[str, float]:
    """Losses of the two trivial predictors on projected features (N, D, H, W); a trained model must be below both."""
    return {
        name: float(layer_loss(p, dict.fromkeys(DIRECTIONS, predictor)))
        for name, predictor in TRIVIAL_PREDICTORS.items()
    }


class DirectionalModel(nn.Module):
    """A recurrent model of hidden size D, the paper's two stacked LSTMs, and a linear map D → D, in one direction.

    PyTorch's gates stand in the order input, forget, cell, output. Its second bias stays frozen at zero: the
    paper's LSTM has one, and with two gradient descent would move it twice as fast.

    Args:
        cell: one of `CELLS`, and the name of the recurrent part.
    """

    def __init__(self, size: int, cell: str = PAPER_CELL):
        super().__init__()
        self.cell = cell
        self.add_module(cell, CELLS[cell](size))
        self.linear = nn.Linear(size, size)
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            if "bias_hh" in name:
                parameter.requires_grad_(False)

    def initialise(self, generator: torch.Generator) -> None:
        """Weights from N(0, 0.01²), biases zero."""
        for name, parameter in self.named_parameters():
            if "weight" in name:
                nn.init.normal_(parameter, std=INITIAL_STD, generator=generator)

    def forward(self, seen: Tensor) -> Tensor:
        """Sequences (T, B, D) -> predictions (T, B, D) of the step that follows each."""
        hidden, _ = self.get_submodule(self.cell)(seen.contiguous())
        return self.linear(hidden)


def fused_layer_loss(p: Tensor, models: Mapping[str, DirectionalModel]) -> Tensor:
    """`layer_loss` of LSTMs on square maps, the four directions at once; equal to float32 rounding."""
    four = [models[direction] for direction in DIRECTIONS]

    def stacked(name: str) -> Tensor:
        values = torch.stack([model.get_parameter(name) for model in four])
        return values if values.ndim == 3 else values[:, :, None]

    down = p.permute(2, 1, 0, 3).flatten(2)  # (T, D, B)
    right = p.permute(3, 1, 0, 2).flatten(2)
    sequences = torch.stack([down, down.flip(0), right, right.flip(0)], dim=1)  # (T, 4, D, B), as in `DIRECTIONS`
    hidden = sequences[:-1]
    for layer in ("l0", "l1"):
        names = ("weight_ih", "weight_hh", "bias_ih")
        hidden = fused_lstm(hidden, torch.cat([stacked(f"lstm.{name}_{layer}") for name in names], dim=2))
    predictions = torch.matmul(stacked("linear.weight"), hidden).add_(stacked("linear.bias"))
    errors = F.mse_loss(predictions, sequences[1:], reduction="none").mean(dim=2)  # (T-1, 4, B)
    return (errors.mean(dim=2, dtype=accumulation_type(p)) * ramp(len(errors), p)[:, None]).mean()


def part_name(tap: str) -> str:
    """A tap's name in the names of tensors and modules, where dots stand between parts: `layer1.0` -> `layer1/0`."""
    return tap.replace(".", "/")


def tap_name(part: str) -> str:
    """The inverse of `part_name`."""
    return part.replace("/", ".")


class ByTap(nn.ModuleDict):
    """Modules by tap, whose names may have dots."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__({part_name(tap): module for tap, module in modules.items()})

    def __getitem__(self, tap: str) -> nn.Module:
        return super().__getitem__(part_name(tap))

    def __contains__(self, tap: str) -> bool:
        return super().__contains__(part_name(tap))

    def __iter__(self) -> Iterator[str]:
        return map(tap_name, super().__iter__())

    def keys(self) -> Iterable[str]:
        """Taps."""
        return {tap_name(part): None for part in super().keys()}.keys()

    def items(self) -> Iterable[tuple[str, nn.Module]]:
        """Taps and modules."""
        return {tap_name(part): module for part, module in super().items()}.items()


class LayerModel(nn.ModuleDict):
    """The language model of one layer: an independent `DirectionalModel` of one of `CELLS` per direction."""

    def __init__(self, size: int, cell: str = PAPER_CELL):
        super().__init__({direction: DirectionalModel(size, cell) for direction in DIRECTIONS})
        self.size, self.cell = size, cell

    def initialise(self, seed: int, layer: str) -> None:
        """Draw initial weights; they depend on the seed, the layer and the direction only."""
        for direction in DIRECTIONS:
            generator = torch.Generator().manual_seed(seed_for(seed, layer, direction))
            self[direction].initialise(generator)

    def change_basis(self, read: tuple[Tensor, Tensor], written: tuple[Tensor, Tensor]) -> None:
        """Take features of another projection: the same model, where the change of basis loses nothing.

        Args:
            read: W and b of `Projection.change_to`, from the new projection to the one that the weights know.
            written: the same for the way back, of the predictions.
        """
        for model in self.values():
            first = model.get_submodule(model.cell)
            for kept, change in (
                (first.bias_ih_l0, first.bias_ih_l0.double() + first.weight_ih_l0.double() @ read[1]),
                (first.weight_ih_l0, first.weight_ih_l0.double() @ read[0]),
                (model.linear.weight, written[0] @ model.linear.weight.double()),
                (model.linear.bias, written[0] @ model.linear.bias.double() + written[1]),
            ):
                kept.data.copy_(change)

    def loss(self, p: Tensor, directions: Sequence[str] = DIRECTIONS) -> Tensor:
        """Loss on projected features (N, D, H, W), a float64 scalar; of some directions, an estimate of it."""
        if directions == DIRECTIONS and self.is_faster_fused(p):
            return fused_layer_loss(p, self)
        return layer_loss(p, self, directions)

    def is_faster_fused(self, p: Tensor) -> bool:
        """Whether `fused_layer_loss` can and should compute the loss on projected features (N, D, H, W).

        On CPUs with as many sequences as components and more; with fewer its products are too thin.
        """
        square = self.cell == "lstm" and p.shape[2] == p.shape[3] > 1
        plain = p.device.type == "cpu" and p.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return square and plain and p.shape[0] * p.shape[2] >= self.size

    def unnaturalness_map(
        self, p: Tensor, apply: Callable[..., Iterable[Tensor]] = map, measure: Measure = mean_squares
    ) -> Tensor:
        """(N, H-1, W-1) float64 from projected features (N, D, H, W); `apply` and `measure` as in `layer_map`."""
        return layer_map(p, self, apply, measure)


class VisualLanguageModel(nn.Module):
    """Projections and language models of several layers of one backbone.

    Args:
        projections: by layer.
        statistics: by tap, mean and std (C,) of raw features, for all taps that were measured, `data` and the
            reconstruction targets among them.
        cells: one of `CELLS` by layer, where it is not the paper's.
    """

    def __init__(
        self,
        projections: Mapping[str, Projection],
        statistics: Mapping[str, Mapping[str, Tensor]],
        cells: Mapping[str, str] | None = None,
    ):
        super().__init__()
        cells = cells or {}
        self.projections = ByTap(projections)
        models = {name: LayerModel(p.size, cells.get(name, PAPER_CELL)) for name, p in projections.items()}
        self.layers = ByTap(models)
        self.statistics = {tap: dict(values) for tap, values in statistics.items()}

    def initialise(self, seed: int) -> None:
        """Draw initial weights of every layer from the seed."""
        for name, layer in self.layers.items():
            layer.initialise(seed, name)

    def freeze(self) -> "VisualLanguageModel":
        """Stop gradients to the weights, for use as a fixed regulariser or detector.

        The modules stay in train mode: cuDNN refuses the backward pass to the input of an LSTM in eval mode, and
        without dropout the two modes compute the same.
        """
        self.requires_grad_(False)
        return self.train()

    def project(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Projected feature maps (N, D, H, W) by layer, from raw ones (N, C, H, W)."""
        return {name: self.projections[name](x) for name, x in features.items()}

    def losses(self, projected: Mapping[str, Tensor], turn: int | None = None) -> dict[str, Tensor]:
        """Loss by layer on projected feature maps (N, D, H, W); their mean is the paper's loss.

        Args:
            turn: look along one direction of each layer only, another at every turn; None for all four. Layers are
                out of step with each other.
        """
        losses = {}
        for place, (name, p) in enumerate(projected.items()):
            looked = DIRECTIONS if turn is None else (DIRECTIONS[(turn + place) % len(DIRECTIONS)],)
            losses[name] = self.layers[name].loss(p, looked)
        return losses
