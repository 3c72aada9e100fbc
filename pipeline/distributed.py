"""Several processes as one: `torchrun --nproc-per-node=K script.py …` starts them, PyTorch carries what they exchange.

Plain `python script.py` is rank 0 of 1; nothing here imports torch then. gloo connects CPUs, NCCL connects CUDA
devices; tensors on the CPU travel by gloo in both cases.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from models.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
PATIENCE = timedelta(hours=6)  # one rank may wait so long for the slowest, e.g. while rank 0 fits and writes


class ElsewhereError(UserError):
    """A user's mistake that another rank found, and reports."""


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process beside others."""
    return all(name in os.environ for name in VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def leads() -> bool:
    """Whether this is the first process of all that were started together, also outside `group`."""
    return not launched() or int(os.environ["RANK"]) == 0


def _group() -> Any:
    """torch.distributed where this process has joined others, else None."""
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if joined else None


def rank() -> int:
    """Number of this process among all, from 0; 0 outside `group`."""
    return _group().get_rank() if _group() else 0


def size() -> int:
    """How many processes work together; 1 outside `group`."""
    return _group().get_world_size() if _group() else 1


@contextmanager
def group(device: "torch.device") -> Iterator[None]:
    """Join the other ranks for a block; ranks above 0 print nothing in it. No effect in a single process."""
    if not launched():
        yield
        return
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    if rank() == 0:
        yield
    else:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield
    # not after an exception: ranks that still wait for this one would make it wait too; torchrun ends them
    torch.distributed.destroy_process_group()


def first(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only; what it returns (plain values, arrays, tensors) comes back on every rank.

    Raises:
        UserError: what the function raised, on every rank.
    """
    if size() == 1:
        return function()
    message: list[Any] = [None]
    error = None
    if rank() == 0:
        try:
            message = [(function(), None)]
        except UserError as raised:
            message, error = [(None, str(raised))], raised
    _group().broadcast_object_list(message, src=0)
    if error is not None:
        raise error
    value, problem = message[0]
    if problem is not None:
        raise ElsewhereError(problem)
    return value


def gather(value: T) -> list[T]:
    """What every rank gives (plain values, arrays), in the order of the ranks, on every rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    _group().all_gather_object(values, value)
    return values


def together(function: Callable[[], T]) -> T:
    """Call `function`, in which ranks exchange nothing, on every rank; returns this one's result.

    Raises:
        UserError: a rank's function raised it; then all ranks do, so that none waits for another, and one tells it.
    """
    result, error = None, None
    try:
        result = function()
    except UserError as raised:
        error = raised
    problems = gather(None if error is None else str(error))
    failed = [number for number, problem in enumerate(problems) if problem is not None]
    if failed and rank() != failed[0]:
        raise ElsewhereError(problems[failed[0]])
    if error is not None:
        raise error
    return result


def all_of(opinion: bool) -> bool:
    """Whether `opinion` is true on every rank."""
    return total(int(not opinion)) == 0


def any_of(opinion: bool) -> bool:
    """Whether `opinion` is true on some rank."""
    return total(int(opinion)) > 0


def wait_for_all() -> None:
    """Go on once every rank has come here."""
    total(0)


def total(value: float) -> float:
    """The sum of a number over all ranks, float64."""
    if size() == 1:
        return value
    import torch

    return add_up(torch.tensor([value], dtype=torch.float64)).item()


def add_up(tensor: "torch.Tensor") -> "torch.Tensor":
    """Replace a tensor by its sum over all ranks, in place; the same bits on each."""
    if size() > 1:
        _group().all_reduce(tensor)
    return tensor


class GradientSum:
    """Sums gradients over all ranks while the next layer's are still being computed.

    Unlike DistributedDataParallel, which averages equal shares, this takes shares of any size, even empty ones: the
    caller weighs each rank's loss by its part of the batch.
    """

    def __init__(self):
        self.running: list[tuple] = []

    def start(self, parameters: "Sequence[torch.nn.Parameter]") -> None:
        """Begin to sum the gradients of some parameters; none counts as zero."""
        if size() == 1:
            return
        import torch

        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.running.append((parameters, flat, _group().all_reduce(flat, async_op=True)))

    def finish(self, losses: "torch.Tensor") -> "torch.Tensor":
        """Wait for all sums and put them in place; returns the sum of the losses, too."""
        for parameters, flat, work in self.running:
            work.wait()
            for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = gradient.view_as(p)
        self.running = []
        return add_up(losses)


def gather_rows(array: np.ndarray) -> np.ndarray | None:
    """All ranks' rows in the order of the ranks, on rank 0; None on the others. Ranks may have none."""
    if size() == 1:
        return array
    parts: list[Any] | None = [None] * size() if rank() == 0 else None
    _group().gather_object(array, parts)
    return None if parts is None else np.concatenate(parts)


def share(items: Sequence[T]) -> list[T]:
    """This rank's part of some items: every K-th, so that costs that grow along the list are spread."""
    return list(items)[rank() :: size()]


def span(count: int, unit: int = 1) -> tuple[int, int]:
    """First and last+1 of this rank's contiguous part of `count` rows, in whole blocks of `unit` rows.

    The parts differ by at most one block; some are empty where there are fewer blocks than ranks.
    """
    blocks = -(-count // unit)
    ends = [min(count, blocks * r // size() * unit) for r in (rank(), rank() + 1)]
    return ends[0], ends[1]
