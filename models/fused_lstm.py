"""The LSTM layer of several directions at once, as one autograd function, for speed on CPUs.

`nn.LSTM` runs the directions one after the other and spends much of its time between the matrix products. Here

- the directions are one batched product per step, with input, hidden state and a row of ones for the bias below each
  other, so that a step needs one product, and so do its weights' gradients;
- sequences stand last in memory, so that every elementwise operation is long;
- tanh, three times as dear as the logistic function σ, is replaced by it: tanh(a) = 2σ(2a) - 1 = 1 - 2σ(-2a). For that
  the cell's rows of the weights are doubled and cells kept with the opposite sign; one call squashes all four gates.

Results equal `nn.LSTM`'s to rounding.

Letters: K directions, T steps, B sequences, I inputs, D hidden units. Gates stand in the order input, forget, cell,
output.
"""

import torch
from torch import Tensor

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # gradient · y · (1 - y), in one pass


class _FusedLSTM(torch.autograd.Function):
    """The autograd function behind `fused_lstm`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        """Hidden states (T, K, D, B); what was read, gates and cells are kept for backward."""
        steps, k, i, b = x.shape
        d = weight.shape[1] // 4
        weight = weight.clone()
        weight[:, 2 * d : 3 * d] *= 2
        seen = x.new_empty(steps + 1, k, i + d + 1, b)  # rows: input of step t, hidden state before it, ones
        seen[:-1, :, :i] = x
        seen[0, :, i:-1] = 0
        seen[:, :, -1] = 1
        gates = x.new_empty(steps, k, 4 * d, b)  # after σ
        minus_cells, squashed = (x.new_empty(steps, k, d, b) for _ in range(2))  # -cell, σ(-2·cell)
        for t in range(steps):
            i_, f, c, o = torch.bmm(weight, seen[t], out=gates[t]).sigmoid_().split(d, dim=1)  # (K, D, B) each
            torch.addcmul(i_, i_, c, value=-2, out=minus_cells[t])
            if t:
                minus_cells[t].addcmul_(f, minus_cells[t - 1])
            torch.mul(minus_cells[t], 2, out=squashed[t]).sigmoid_()
            torch.addcmul(o, o, squashed[t], value=-2, out=seen[t + 1, :, i:-1])
        ctx.save_for_backward(weight, seen, gates, minus_cells, squashed)
        return seen[1:, :, i:-1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Back-propagation through time."""
        weight, seen, gates, minus_cells, squashed = ctx.saved_tensors
        d, inputs = grad.shape[2], seen.shape[2] - grad.shape[2] - 1
        # The cell's gate is i·(2σ - 1) and enters with the opposite sign: the factor -2 that its gradient lacks below
        # stands in these weights instead, and at the end in its rows of the weights' gradient.
        back = weight.transpose(1, 2).clone()
        back[:, :, 2 * d : 3 * d] *= -2
        back_x, back_hidden = back[:, :inputs].contiguous(), back[:, inputs:-1].contiguous()
        grad_x = seen.new_empty(len(gates), *back_x.shape[:2], seen.shape[3]) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_cells, through = torch.zeros_like(squashed[0]), torch.empty_like(squashed[0])
        raw, grad_gates = torch.empty_like(gates[0]), torch.zeros_like(gates[0])
        raw_i, raw_f, raw_c, raw_o = raw.split(d, dim=1)
        for t in reversed(range(len(gates))):
            i, f, c, o = gates[t].split(d, dim=1)
            grad_hidden = torch.baddbmm(grad[t], back_hidden, grad_gates)
            torch.addcmul(grad_hidden, grad_hidden, squashed[t], value=-2, out=raw_o)
            torch.mul(grad_hidden, o, out=through)
            grad_cells.add_(sigmoid_backward(through, squashed[t], grad_input=through), alpha=-4)
            torch.addcmul(grad_cells, grad_cells, c, value=-2, out=raw_i)
            torch.mul(grad_cells, i, out=raw_c)
            torch.mul(grad_cells, minus_cells[t - 1], out=raw_f) if t else raw_f.zero_()
            grad_cells.mul_(f)
            sigmoid_backward(raw, gates[t], grad_input=grad_gates)
            if grad_weight is not None:
                grad_weight.baddbmm_(grad_gates, seen[t].transpose(1, 2))
            if grad_x is not None:
                torch.bmm(back_x, grad_gates, out=grad_x[t])
        if grad_weight is not None:
            grad_weight[:, 2 * d : 3 * d] *= -4  # -2 from above, 2 from the doubled rows
        return grad_x, grad_weight


def fused_lstm(x: Tensor, weight: Tensor) -> Tensor:
    """One LSTM layer over the sequences of K directions, zero initial state.

    Args:
        x: (T, K, I, B).
        weight: (K, 4D, I+D+1), side by side: of the input, of the hidden state, the bias.

    Returns:
        hidden states (T, K, D, B).
    """
    return _FusedLSTM.apply(x, weight)
