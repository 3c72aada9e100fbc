"""The LSTM of several directions at once, with one weight-gradient product for the whole scan.

`nn.LSTM` runs the directions one after the other; where a layer has few components and many steps, as the pixels
have, it spends its time on overhead. Here the directions are one batched product per step, sequences stand last in
memory so that every elementwise operation is long, and backward collects the gates' gradients of all steps before it
multiplies. Results equal `nn.LSTM`'s to float32 rounding.

Letters: K directions, T steps, B sequences, I inputs, D hidden units. Gates stand in the order input, forget, cell,
output.
"""

import torch
from torch import Tensor


class _FusedLSTM(torch.autograd.Function):
    """The autograd function behind `fused_lstm`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
        """Hidden states (T, K, D, B); gates and cells are kept for backward."""
        steps, k, _, b = x.shape
        d = weight_hh.shape[2]
        gates = x.new_empty(steps, k, 4 * d, b)
        cells = x.new_empty(steps, k, d, b)
        hidden = torch.empty_like(cells)
        bias = bias[:, :, None]
        for t in range(steps):
            g = torch.baddbmm(bias, weight_ih, x[t], out=gates[t])  # (K, 4D, B)
            if t:
                g.baddbmm_(weight_hh, hidden[t - 1])
            g[:, : 2 * d].sigmoid_()
            g[:, 2 * d : 3 * d].tanh_()
            g[:, 3 * d :].sigmoid_()
            i, f, c, o = g.split(d, dim=1)
            torch.mul(i, c, out=cells[t])
            if t:
                cells[t].addcmul_(f, cells[t - 1])
            torch.tanh(cells[t], out=hidden[t]).mul_(o)
        ctx.save_for_backward(x, weight_ih, weight_hh, gates, cells, hidden)
        return hidden

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Back-propagation through time; the weights' gradients are one product over all steps."""
        x, weight_ih, weight_hh, gates, cells, hidden = ctx.saved_tensors
        d = weight_hh.shape[2]
        back_ih, back_hh = weight_ih.transpose(1, 2), weight_hh.transpose(1, 2)
        grad_gates = torch.empty_like(gates)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_cell, grad_hidden = torch.zeros_like(cells[0]), torch.zeros_like(cells[0])
        for t in range(len(x) - 1, -1, -1):
            i, f, c, o = gates[t].split(d, dim=1)  # (K, D, B) each
            gi, gf, gc, go = grad_gates[t].split(d, dim=1)
            grad_hidden += grad[t]
            squashed = cells[t].tanh()
            torch.mul(grad_hidden, squashed, out=go)
            through = grad_hidden.mul_(o)
            grad_cell += through
            grad_cell.addcmul_(through.mul_(squashed), squashed, value=-1)
            torch.mul(grad_cell, c, out=gi)
            torch.mul(grad_cell, i, out=gc)
            if t:
                torch.mul(grad_cell, cells[t - 1], out=gf)
                grad_cell.mul_(f)
            else:
                gf.zero_()
            for gradient, gate in ((gi, i), (gf, f), (go, o)):
                gradient.mul_(torch.addcmul(gate, gate, gate, value=-1))  # σ' = σ (1 - σ)
            gc.addcmul_(gc * c, c, value=-1)  # tanh' = 1 - tanh²
            if t:
                torch.bmm(back_hh, grad_gates[t], out=grad_hidden)
            if grad_x is not None:
                torch.bmm(back_ih, grad_gates[t], out=grad_x[t])
        if not any(ctx.needs_input_grad[1:]):
            return grad_x, None, None, None
        flat = grad_gates.permute(1, 2, 0, 3).flatten(2)  # (K, 4D, T·B)
        grad_ih = torch.bmm(flat, x.permute(1, 0, 3, 2).flatten(1, 2))
        before = hidden[:-1].permute(1, 0, 3, 2).flatten(1, 2)  # (K, (T-1)·B, D)
        grad_hh = torch.bmm(flat[:, :, x.shape[3] :], before)
        return grad_x, grad_ih, grad_hh, flat.sum(2)


def fused_lstm(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    """One LSTM layer over the sequences of K directions, zero initial state.

    Args:
        x: (T, K, I, B), contiguous.
        weight_ih, weight_hh: (K, 4D, I) and (K, 4D, D).
        bias: (K, 4D).

    Returns:
        hidden states (T, K, D, B).
    """
    return _FusedLSTM.apply(x, weight_ih, weight_hh, bias)
