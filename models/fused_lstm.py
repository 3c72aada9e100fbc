"""The LSTM layer of several directions at once, as one autograd function, for speed on CPUs.

`nn.LSTM` runs the directions one after the other and spends much of its time between the matrix products. Here

- the directions are one batched product per step, with input, hidden state and a row of ones for the bias below each
  other, so that a step needs one product, and so do its weights' gradients;
- sequences stand last in memory, so that every elementwise operation is long;
- tanh, dearer than the logistic function σ, is replaced by it: tanh(a) = 2σ(2a) - 1 = 1 - 2σ(-2a). For that
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
        steps, k, inputs, b = x.shape
        d = weight.shape[1] // 4
        weight = weight.clone()
        weight[:, 2 * d : 3 * d] *= 2
        seen = x.new_empty(steps + 1, k, inputs + d + 1, b)  # rows: input of step t, hidden state before it, ones
        seen[:-1, :, :inputs] = x
        seen[0, :, inputs:-1] = 0
        seen[:, :, -1] = 1
        hidden = seen[1:, :, inputs:-1]
        gates = x.new_empty(steps, k, 4 * d, b)  # after σ
        minus_cells, squashed = (x.new_empty(steps, k, d, b) for _ in range(2))  # -cell, σ(-2·cell)
        ctx.save_for_backward(weight, seen, gates, minus_cells, squashed)
        i, f, c, o = (gate.unbind() for gate in gates.split(d, dim=2))  # (K, D, B) by step, as all that follow
        reads, gates, cells, squashed, states = (v.unbind() for v in (seen, gates, minus_cells, squashed, hidden))
        for t in range(steps):
            torch.bmm(weight, reads[t], out=gates[t]).sigmoid_()
            torch.addcmul(i[t], i[t], c[t], value=-2, out=cells[t])
            if t:
                cells[t].addcmul_(f[t], cells[t - 1])
            torch.mul(cells[t], 2, out=squashed[t]).sigmoid_()
            torch.addcmul(o[t], o[t], squashed[t], value=-2, out=states[t])
        return hidden

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
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = seen.new_empty(len(gates) if needs_x else 0, *back_x.shape[:2], seen.shape[3])
        grad_weight = torch.zeros_like(weight)
        grad_cells, through = torch.zeros_like(squashed[0]), torch.empty_like(squashed[0])
        grad_gates, steps = torch.empty_like(gates[0]), len(gates)
        grad_i, grad_f, grad_c, grad_o = grad_gates.split(d, dim=1)  # first of σ's results, then of what it squashed
        i, f, c, o = (gate.unbind() for gate in gates.split(d, dim=2))
        reads, to_x = seen.transpose(2, 3).unbind(), grad_x.unbind() if needs_x else ()
        gates, cells, squashed, grad = (v.unbind() for v in (gates, minus_cells, squashed, grad))
        for t in reversed(range(steps)):
            grad_hidden = grad[t] if t == steps - 1 else torch.baddbmm(grad[t], back_hidden, grad_gates)
            torch.addcmul(grad_hidden, grad_hidden, squashed[t], value=-2, out=grad_o)
            torch.mul(grad_hidden, o[t], out=through)
            grad_cells.add_(sigmoid_backward(through, squashed[t], grad_input=through), alpha=-4)
            torch.addcmul(grad_cells, grad_cells, c[t], value=-2, out=grad_i)
            torch.mul(grad_cells, i[t], out=grad_c)
            torch.mul(grad_cells, cells[t - 1], out=grad_f) if t else grad_f.zero_()
            grad_cells.mul_(f[t])
            sigmoid_backward(grad_gates, gates[t], grad_input=grad_gates)
            if needs_weight:
                grad_weight.baddbmm_(grad_gates, reads[t])
            if needs_x:
                torch.bmm(back_x, grad_gates, out=to_x[t])
        grad_weight[:, 2 * d : 3 * d] *= -4  # -2 from above, 2 from the doubled rows
        return grad_x if needs_x else None, grad_weight if needs_weight else None


def fused_lstm(x: Tensor, weight: Tensor) -> Tensor:
    """One LSTM layer over the sequences of K directions, zero initial state.

    Args:
        x: (T, K, I, B).
        weight: (K, 4D, I+D+1), side by side: of the input, of the hidden state, the bias.

    Returns:
        hidden states (T, K, D, B).
    """
    return _FusedLSTM.apply(x, weight)
