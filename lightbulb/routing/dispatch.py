"""Moving tokens to experts and back, on one rank or over the expert axis.

:func:`dispatch` sorts the (token, choice) pairs by expert, so that each expert's rows are contiguous; with an expert
axis it exchanges rows by all-to-all with unequal splits, so that each rank receives the rows of its own experts. The
exchange runs while the caller computes something else (a shared expert), in the backward too. :func:`combine` brings
the results back and adds them up with their gates. Experts know nothing of either.
Permutations are gathers in both directions: the backward of a permutation is the inverse permutation, never a
scatter-add.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Work, all_to_all_single

from lightbulb import ops
from lightbulb.nn.groups import Axis


@dataclass(frozen=True)
class Plan:
    """How one dispatch went, for the way back.

    Attributes:
        order: ``[kept]`` flat (token, choice) index of each sorted row; dropped pairs are not in it.
        inverse: ``[T * k]`` sorted row of each pair; anything for dropped pairs.
        kept: ``[T, k]`` bool, or None when nothing was dropped.
        counts: rows per local expert after the exchange.
        exchange: the all-to-all's splits, or None on one rank.
    """

    order: Tensor
    inverse: Tensor
    kept: Tensor | None
    counts: list[int]
    exchange: "_Exchange | None"


@dataclass(frozen=True)
class _Exchange:
    axis: Axis
    sent: list[int]
    received: list[int]
    by_expert: Tensor
    by_source: Tensor


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Rows an expert accepts from one rank's micro-batch of ``tokens``."""
    return math.ceil(factor * top_k * tokens / num_experts)


def dispatch(
    x: Tensor, experts: Tensor, num_experts: int, axis: Axis, limit: int | None, priority: Tensor | None = None
) -> tuple[Callable[[], Tensor], Plan]:
    """Rows for this rank's experts, sorted by expert: sent now, received when the result is called.

    Args:
        x: ``[T, dim]`` tokens in time order: with a limit, later tokens are dropped before earlier ones, so that
            dropping never depends on the future (but see ``priority``).
        experts: ``[T, k]`` the router's choice.
        num_experts: number of experts over all ranks.
        axis: the expert axis.
        limit: rows an expert accepts from this rank, or None for all (dropless).
        priority: ``[T, k]``; with a limit, pairs of low priority are dropped first, wherever they are. Whether a token
            is dropped then depends on later tokens and other samples.

    Returns:
        A function that waits for the rows ``[rows, dim]``, and the plan that :func:`combine` needs.
    """
    top_k = experts.shape[1]
    pairs = experts.flatten()
    kept = None
    if limit is not None:
        kept = _within_limit(pairs, num_experts, limit, priority)
        pairs = pairs.masked_fill(~kept, num_experts)
    order = pairs.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(pairs, minlength=num_experts)[:num_experts]
    if kept is not None:
        rows = int(counts.sum())
        order, inverse, kept = order[:rows], inverse.clamp(max=max(rows - 1, 0)), kept.view(-1, top_k)
    rows = ops.spread(x, order, inverse, kept, top_k)
    if axis.group is None:
        return lambda: rows, Plan(order, inverse, kept, counts.tolist(), None)
    exchange, local_counts = _plan_exchange(counts, axis)
    flight = _Flight(axis, exchange.sent, exchange.received)
    received = _Send.apply(rows, flight)

    def receive() -> Tensor:
        return _Permute.apply(_Receive.apply(received, flight), exchange.by_expert, exchange.by_source)

    return receive, Plan(order, inverse, kept, local_counts, exchange)


def carry(values: Tensor, plan: Plan) -> Tensor:
    """``values [T, k]``, one for each (token, choice), brought to where their rows are: ``[rows]`` (no gradient)."""
    rows = values.flatten().index_select(0, plan.order)
    if plan.exchange is None:
        return rows
    exchange = plan.exchange
    received = rows.new_empty(sum(exchange.received))
    all_to_all_single(received, rows, exchange.received, exchange.sent, group=exchange.axis.group)
    return received.index_select(0, exchange.by_expert)


def sort_by_token(rows: Tensor, plan: Plan) -> Tensor:
    """Rows sorted by expert to ``[T * k, dim]``, a token's choices side by side; of a plan that dropped and exchanged
    nothing."""
    return _Permute.apply(rows, plan.inverse, plan.order)


def sort_by_expert(pairs: Tensor, plan: Plan) -> Tensor:
    """The inverse of :func:`sort_by_token`."""
    return _Permute.apply(pairs, plan.order, plan.inverse)


def combine(rows: Tensor, gates: Tensor, plan: Plan) -> Tensor:
    """``y[t] = sum_k gates[t, k] * result of its k-th expert``: ``[T, dim]`` in the rows' dtype."""
    if plan.exchange is not None:
        exchange = plan.exchange
        rows = _Permute.apply(rows, exchange.by_source, exchange.by_expert)
        flight = _Flight(exchange.axis, exchange.received, exchange.sent)
        rows = _Receive.apply(_Send.apply(rows, flight), flight)
    if plan.kept is not None:
        gates = gates.masked_fill(~plan.kept, 0.0)
    return ops.weighted_sum(rows, gates, plan.order, plan.inverse)


def _within_limit(pairs: Tensor, num_experts: int, limit: int, priority: Tensor | None) -> Tensor:
    """``[T * k]`` bool: the pair is among the first ``limit`` of its expert, in time or by priority."""
    if priority is not None:
        order = priority.flatten().argsort(descending=True, stable=True)
        kept = torch.empty_like(pairs, dtype=torch.bool)
        kept[order] = _within_limit(pairs[order], num_experts, limit, None)
        return kept
    one_hot = torch.nn.functional.one_hot(pairs, num_experts)
    return (one_hot.cumsum(0) * one_hot).sum(-1) <= limit


def _plan_exchange(counts: Tensor, axis: Axis) -> tuple[_Exchange, list[int]]:
    """Tell every rank how many rows to expect, and how to reorder them by expert once they are here."""
    arriving = torch.empty_like(counts)
    all_to_all_single(arriving, counts, group=axis.group)
    by_source = arriving.view(axis.size, -1)
    local_experts = by_source.shape[1]
    expert_of_row = torch.arange(local_experts, device=counts.device).repeat(axis.size)
    by_expert = expert_of_row.repeat_interleave(arriving).argsort(stable=True)
    back = torch.empty_like(by_expert)
    back[by_expert] = torch.arange(len(by_expert), device=counts.device)
    sent = counts.view(axis.size, -1).sum(1).tolist()
    exchange = _Exchange(axis, sent, by_source.sum(1).tolist(), by_expert, back)
    return exchange, by_source.sum(0).tolist()


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Flight:
    """One all-to-all on its way, forward or backward."""

    def __init__(self, axis: Axis, sent: list[int], received: list[int]):
        self.axis, self.sent, self.received = axis, sent, received
        self._pending: tuple[Work | None, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send rows; the result is filled when :meth:`wait` returns."""
        rows = rows.contiguous()
        result = rows.new_empty(sum(received), rows.shape[1])
        work = all_to_all_single(result, rows, received, sent, group=self.axis.group, async_op=True)
        self._pending = work, rows, result
        return result

    def wait(self) -> Tensor:
        """The rows, once they are there (on CUDA: once the current stream may use them)."""
        assert self._pending is not None
        work, _, result = self._pending
        if work is not None:
            work.wait()
        self._pending = None
        return result


class _Send(torch.autograd.Function):
    """Start the exchange; in the backward wait for what :class:`_Receive` started.

    Autograd runs what was recorded last first: whatever the caller computed between the two runs backward between
    them too.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.start(rows, flight.sent, flight.received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.wait(), None


class _Receive(torch.autograd.Function):
    """Wait for the exchange; in the backward start the reverse one."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.wait()
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.start(grad, flight.received, flight.sent)
        return grad, None  # of the shape autograd expects; the sender takes the flight's result instead
