"""Plain torch, chunk by chunk: a state passed between chunks, nearly all of it in matrix products.

The sums of token-dependent decays run through all documents of a chunk: another document can change their last digits,
those of float64 in results and those of the state's dtype in the decays' gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LEAST = -800.0  # exp(-746) is zero, in float64 too


def linear_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    starts: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`lightbulb.kernels.linear_recurrence.linear_recurrence`; the last chunk may have fewer positions."""
    length = value.shape[2]
    whole, parts = length - length % chunk_size, []
    for span, size in ((slice(0, whole), chunk_size), (slice(whole, length), length - whole)):
        if span.start == span.stop:
            continue
        steps = log_decay if log_decay.ndim == 1 else log_decay[:, :, span]
        begins = None if starts is None else starts[:, span]
        rows = (t[:, :, span] for t in (query, key, value))
        part, state = _Chunkwise.apply(*rows, steps, begins, state, size)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2), state


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: float32 for bfloat16 on a CPU, which rounds less and, without AMX, is faster."""
    return torch.float32 if x.is_cpu and x.dtype == torch.bfloat16 else x.dtype


class _Sizes(NamedTuple):
    """Groups ``G`` of ``h`` heads, ``n`` chunks of ``C`` positions; matrices are batched over ``M = batch G n``."""

    batch: int
    groups: int
    heads: int
    chunks: int
    rows: int
    state: int
    width: int

    def keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``[batch, G, length, state]`` as ``[M, C, state]``."""
        return x.to(dtype).reshape(-1, self.rows, self.state)

    def values(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``[batch, heads, length, width]`` as ``[batch, G, n, C, h, width]`` in memory."""
        split = x.to(dtype).unflatten(2, (self.chunks, self.rows)).unflatten(1, (self.groups, self.heads))
        return split.permute(0, 1, 3, 4, 2, 5).contiguous()

    def unvalues(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`values`."""
        return x.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)

    def states(self, x: Tensor) -> Tensor:
        """``[batch, heads, state, width]`` as ``[batch, G, state, h, width]``."""
        return x.unflatten(1, (self.groups, self.heads)).transpose(2, 3)

    def unstates(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`states`."""
        return x.transpose(2, 3).flatten(1, 2)


class _Decays(NamedTuple):
    """What a chunk multiplies by; dimensions before the last ones are ``[batch or 1, G, n or 1]``."""

    within: Tensor  # [..., h, C, C]: from column j to row i; zero above the diagonal and between documents
    to_row: Tensor  # [..., C, h, 1]: from the state before the chunk to a row
    to_end: Tensor  # [..., C, h, 1]: from a row to the state after the chunk
    across: Tensor  # [..., 1, h, 1]: from the state before the chunk to the one after


def _decays(log_decay: Tensor, starts: Tensor | None, sizes: _Sizes, dtype: torch.dtype) -> _Decays:
    """Sums of log decays start anew in each chunk and are kept in float64, where their differences are exact enough;
    a decay beyond every number's range is cut, lest it swallow the digits of those that follow."""
    split = (sizes.groups, sizes.heads)
    steps = log_decay.double().clamp(min=_LEAST)
    if log_decay.ndim == 1:
        steps = steps.view(1, split[0], 1, split[1], 1).expand(-1, -1, -1, -1, sizes.rows)
    else:
        steps = steps.unflatten(2, (sizes.chunks, sizes.rows)).unflatten(1, split).transpose(2, 3)
    total = steps.cumsum(-1)
    last = total[..., -1:]
    future = torch.ones(sizes.rows, sizes.rows, dtype=torch.bool, device=total.device).triu(1)
    within = torch.empty(*total.shape, sizes.rows, dtype=dtype, device=total.device)
    torch.sub(total[..., :, None], total[..., None, :], out=within)
    to_row, to_end, across = total.to(dtype).exp(), (last - total).to(dtype).exp(), last.to(dtype).exp()
    if starts is not None:
        document = starts.view(sizes.batch, 1, sizes.chunks, 1, sizes.rows).cumsum(-1)
        future = future | (document[..., :, None] != document[..., None, :])
        to_row = to_row * (document == 0)
        to_end = to_end * (document == document[..., -1:])
        across = across * (document[..., -1:] == 0)
        if within.shape[:3] != (sizes.batch, sizes.groups, sizes.chunks):
            within = within.expand(sizes.batch, -1, sizes.chunks, -1, -1, -1).clone()
    within.masked_fill_(future, float("-inf")).exp_()
    return _Decays(within, *(t.transpose(-1, -2)[..., None] for t in (to_row, to_end, across)))


class _Chunkwise(torch.autograd.Function):
    """Whole chunks only. With heads side by side in the columns, states of all heads of a group are one product."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        starts: Tensor | None,
        state: Tensor,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        batch, groups, length, width = query.shape
        sizes = _Sizes(batch, groups, value.shape[1] // groups, length // rows, rows, width, value.shape[3])
        dtype, wide = _product_dtype(value), state.dtype
        q, k, v = sizes.keys(query, dtype), sizes.keys(key, dtype), sizes.values(value, dtype)
        decays = _decays(log_decay, starts, sizes, wide)
        scores = torch.bmm(q, k.transpose(1, 2)).to(wide).view(*v.shape[:3], 1, rows, rows)
        inside = (scores * decays.within).to(dtype) @ v.transpose(3, 4)
        written = _product(k.transpose(1, 2), (v * decays.to_end).to(dtype), wide)
        entering, state = _scan(sizes.states(state), written, decays.across)
        read = _product(q, entering.to(dtype), wide).mul_(decays.to_row)
        ctx.save_for_backward(q, k, v, scores, entering, read if ctx.needs_input_grad[3] else None, *decays)
        ctx.sizes, ctx.dtypes = sizes, (query.dtype, value.dtype)
        ctx.decay_shape = log_decay.shape
        return sizes.unvalues((read + inside.transpose(3, 4)).to(value.dtype)), sizes.unstates(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, scores, entering, read, *rest = ctx.saved_tensors
        decays, sizes, dtype, wide = _Decays(*rest), ctx.sizes, q.dtype, entering.dtype
        dy = sizes.values(grad, dtype)
        dy_rows = (dy * decays.to_row).to(dtype)
        d_entering = _product(q.transpose(1, 2), dy_rows, wide)
        d_written, d_state = _scan_back(sizes.states(grad_state), d_entering, decays.across)
        dv = _product(k, d_written.to(dtype), wide).mul_(decays.to_end)
        d_weights = (dy.transpose(3, 4) @ v.transpose(3, 4).transpose(4, 5)).to(wide).mul_(decays.within)
        d_decay = None
        if ctx.needs_input_grad[3]:
            along = (d_written * entering).sum((3, 5))[..., None] * decays.across[..., 0, :, :]
            d_decay = _decay_gradient(d_weights * scores, (dy * read).sum(-1), (dv * v).sum(-1), along)
            d_decay = d_decay.transpose(2, 3).reshape(ctx.decay_shape)
        dv += ((scores * decays.within).to(dtype).transpose(4, 5) @ dy.transpose(3, 4)).transpose(3, 4)
        d_scores = d_weights.sum(3).flatten(0, 2).to(dtype)
        dq = _against(dy_rows, entering).baddbmm_(d_scores, k)
        dk = _against((v * decays.to_end).to(dtype), d_written).baddbmm_(d_scores.transpose(1, 2), q)
        shape = (sizes.batch, sizes.groups, -1, sizes.state)
        key_dtype, value_dtype = ctx.dtypes
        return (
            dq.view(shape).to(key_dtype),
            dk.view(shape).to(key_dtype),
            sizes.unvalues(dv.to(value_dtype)),
            d_decay,
            None,
            sizes.unstates(d_state),
            None,
        )


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a [M, i, j]`` by the columns of all heads of ``b [batch, G, n, j, h, width]``, in ``dtype``."""
    product = torch.bmm(a, b.flatten(0, 2).flatten(2))
    return product.to(dtype).view(*b.shape[:3], a.shape[1], *b.shape[4:])


def _against(rows: Tensor, states: Tensor) -> Tensor:
    """``rows [batch, G, n, C, h, width]`` by ``states [batch, G, n, state, h, width]``, summed over heads and width:
    ``[M, C, state]``."""
    rows, states = (t.flatten(0, 2).flatten(2) for t in (rows, states.to(rows.dtype)))
    return torch.bmm(rows, states.transpose(1, 2))


def _scan(state: Tensor, written: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk ``[batch, G, n, state, h, width]``, and the one after the last."""
    entering = torch.empty_like(written)
    entering[:, :, 0] = state
    for chunk in range(1, written.shape[2]):
        _advance(written, entering, across, chunk - 1, entering[:, :, chunk])
    return entering, _advance(written, entering, across, written.shape[2] - 1, torch.empty_like(state))


def _scan_back(grad: Tensor, d_entering: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what each chunk writes, and of the first state."""
    d_written = torch.empty_like(d_entering)
    d_written[:, :, -1] = grad
    for chunk in reversed(range(1, d_entering.shape[2])):
        _advance(d_entering, d_written, across, chunk, d_written[:, :, chunk - 1])
    return d_written, _advance(d_entering, d_written, across, 0, torch.empty_like(grad))


def _advance(added: Tensor, states: Tensor, across: Tensor, chunk: int, out: Tensor) -> Tensor:
    """One chunk's state, faded, plus what is added."""
    fade = across[:, :, chunk % across.shape[2]]
    return torch.addcmul(added[:, :, chunk], states[:, :, chunk], fade, out=out)


def _decay_gradient(pairs: Tensor, read: Tensor, written: Tensor, along: Tensor) -> Tensor:
    """Gradient of each log decay ``[batch, G, n, h, C]``: the sum of what passes through it.

    Args:
        pairs: ``[batch, G, n, h, C, C]``: value times gradient of the decay from column to row.
        read: ``[batch, G, n, C, h]``: that of the decay from the chunk's first state to a row.
        written: ``[batch, G, n, C, h]``: that from a row to the chunk's last state.
        along: ``[batch, G, n, h, 1]``: that from state to state.
    """
    pairs = pairs.tril_(-1)  # the diagonal has no decay; it would cancel, but for rounding
    read, written = read.transpose(-1, -2), written.transpose(-1, -2)
    ends = pairs.sum(-1) + read - pairs.sum(-2)
    # Row i lies behind the decays up to its own; what is written at row j passes those after it.
    after = ends.flip(-1).cumsum(-1).flip(-1)
    return after + (written.cumsum(-1) - written) + along
