"""Small agreements between ranks: errors everywhere or nowhere, one rank's decision for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class RankError(RuntimeError):
    """Some rank failed; raised on all of them, so that none waits for another. The message names the rank."""


def agree(error: Exception | None) -> None:
    """Raise on every rank if any rank has an error: its own where it happened, :class:`RankError` elsewhere."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RankError(f"rank {rank}: {message}")


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call on rank 0 and give every rank the (picklable) result, or the error.

    Raises:
        Exception: the function's own error on rank 0, :class:`RankError` on the others.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as caught:  # handed to every rank below, then raised
            error = caught
            outcome[1] = f"{type(caught).__name__}: {caught}"
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RankError(f"rank 0: {outcome[1]}")
    return outcome[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank."""
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


_LOST_PEER = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: its error, not this one, is the cause."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_PEER)
