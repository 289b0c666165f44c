"""Short causal convolution of every feature with its own weights (H3, Fu et al. 2022, arXiv:2212.14052)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightbulb.nn.groups import SINGLE, Axis, share_in_tensor_region, tensor_axis
from lightbulb.nn.parameter import Logical, make_parameter, uniform
from lightbulb.nn.ulysses import my_heads

_BLOCK = 1 << 17  # elements of a block


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None, window: Tensor | None = None
) -> Tensor:
    """``y[t] = bias + sum_k weight[:, width - 1 - k] * x[t - k]`` over the ``width`` last positions.

    Args:
        x: ``[length, batch, features]``.
        weight: ``[features, width]``.
        bias: ``[features]``.
        starts: ``[batch, length]`` bool; no position sees past its document's first token.
        window: ``[batch, width - 1, features]`` before the first position; None for zeros.

    Returns:
        ``[length, batch, features]``.
    """
    past = 0 if window is None else window.shape[1]
    if window is not None:
        x = torch.cat([window.transpose(0, 1).to(x.dtype), x])
    hidden = None if starts is None else _hidden(starts, past, weight.shape[1])
    return _CausalConv.apply(x, weight, bias, hidden)[past:]


class ShortConv(nn.Module):
    """:func:`causal_conv` with its parameters, started as ``nn.Conv1d``'s.

    Args:
        features: of the logical input.
        width: positions a feature sees, its own included.
        is_split: features are split over the tensor axis; else every rank convolves all of them for its own use.
    """

    def __init__(self, features: int, width: int, is_split: bool):
        super().__init__()
        self.axis = tensor_axis()
        self.is_split = is_split
        dim, axis = (0, self.axis) if is_split else (None, SINGLE)
        fill = uniform(width**-0.5)
        self.weight = make_parameter(Logical((features, width), None, tensor_dim=dim, tensor=axis, fill=fill))
        self.bias = make_parameter(Logical((features,), None, tensor_dim=dim, tensor=axis, fill=fill))

    def forward(
        self, x: Tensor, ulysses: Axis = SINGLE, starts: Tensor | None = None, window: Tensor | None = None
    ) -> Tensor:
        """``x [length, batch, features]`` inside the tensor region, of this rank's heads on the axis ``ulysses``."""
        parameters: list[Tensor] = [self.weight, self.bias]
        if not self.is_split:
            parameters = [share_in_tensor_region(parameter, self.axis) for parameter in parameters]
        weight, bias = (my_heads(parameter, ulysses) for parameter in parameters)
        return causal_conv(x, weight, bias, starts, window)


def next_window(x: Tensor, window: Tensor) -> Tensor:
    """The last positions of ``window [batch, width - 1, features]`` followed by ``x [length, batch, features]``."""
    both = torch.cat([window, x.transpose(0, 1).to(window.dtype)], dim=1)
    return both[:, both.shape[1] - window.shape[1] :]


def _hidden(starts: Tensor, past: int, width: int) -> Tensor:
    """``[width - 1, past + length, batch, 1]`` bool: whether the token k + 1 back belongs to another document."""
    document = torch.cat([starts.new_zeros(len(starts), past), starts], dim=1).cumsum(1).t()
    hidden = torch.zeros(width - 1, *document.shape, 1, dtype=torch.bool, device=starts.device)
    for back in range(1, min(width, len(document))):
        hidden[back - 1, back:, :, 0] = document[back:] != document[:-back]
    return hidden


class _CausalConv(torch.autograd.Function):
    """One multiply-add per weight, a block of positions at a time so that all of them find it in the cache; PyTorch's
    depthwise convolution wants the length as the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, hidden)
        ctx.bias_dtype = bias.dtype
        wide, taps, bias = _wide(x), _wide(weight).t().contiguous(), _wide(bias)
        out = torch.empty_like(wide)
        for start, stop in _blocks(x):
            torch.addcmul(bias, wide[start:stop], taps[-1], out=out[start:stop])
            for back in range(1, len(taps)):
                first = max(start, back)
                if first < stop:
                    seen = _seen(wide[first - back : stop - back], hidden, back, first)
                    out[first:stop].addcmul_(seen, taps[-1 - back])
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, hidden = ctx.saved_tensors
        wide, taps, grad = _wide(x), _wide(weight).t().contiguous(), _wide(grad)
        grad_x, grad_taps, grad_bias = torch.empty_like(wide), torch.zeros_like(taps), torch.zeros_like(taps[0])
        for start, stop in _blocks(x):
            block = grad[start:stop]
            torch.mul(block, taps[-1], out=grad_x[start:stop])
            grad_taps[-1] += (block * wide[start:stop]).sum((0, 1))
            grad_bias += block.sum((0, 1))
            for back in range(1, len(taps)):
                first = max(start, back)
                if first < stop:
                    later, earlier = _seen(grad[first:stop], hidden, back, first), slice(first - back, stop - back)
                    grad_x[earlier].addcmul_(later, taps[-1 - back])
                    grad_taps[-1 - back] += (later * wide[earlier]).sum((0, 1))
        return grad_x.to(x.dtype), grad_taps.t().to(weight.dtype), grad_bias.to(ctx.bias_dtype), None


def _blocks(x: Tensor) -> list[tuple[int, int]]:
    """First and last position (exclusive) of each block of ``x [length, batch, features]``; on a GPU all in one."""
    rows = max(1, _BLOCK // x[0].numel()) if x.device.type == "cpu" else len(x)
    return [(start, min(start + rows, len(x))) for start in range(0, len(x), rows)]


def _seen(rows: Tensor, hidden: Tensor | None, back: int, first: int) -> Tensor:
    """``rows`` for the positions from ``first`` on, without those whose token ``back`` before is hidden."""
    return rows if hidden is None else rows.masked_fill(hidden[back - 1, first : first + len(rows)], 0.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
