"""Which values of the training state this rank writes, as boxes of logical tensors.

The distributed optimizer owns ranges of flattened local parameters; a range is cut into boxes, so that a checkpoint
knows nothing of buckets and ranks, and saving needs no communication.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightbulb.nn.parameter import logical_of, stored_values
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.optimizer import MOMENTS, parts


@dataclass(frozen=True)
class Box:
    """A contiguous piece of a logical tensor that this rank writes.

    Attributes:
        kind: which file it goes to, ``model`` or ``optimizer``.
        name: the logical tensor.
        shape: of the logical tensor.
        start: first index of the piece along each dimension.
        values: the piece, a view of the training state.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    values: Tensor


def owned_boxes(engine: Engine) -> Iterator[Box]:
    """What this rank writes, as views of the training state: every value of the whole state on one rank.

    The distributed optimizer gives each replica a range of every local parameter; without it replicas take turns, as
    they do with frozen parameters, which have no moments.
    """
    for index, (name, parameter) in enumerate(engine.named_parameters()):
        logical, replicas = logical_of(parameter), engine.replicas(parameter)
        is_frozen = not parameter.requires_grad
        part = None if is_frozen else parts(engine.optimizer, parameter)
        rank = logical.tensor.rank if logical.is_expert else engine.tensor_rank
        is_copy = logical.tensor_dim is None and rank > 0
        is_owner = engine.parallel.distributed_optimizer and not is_frozen
        is_turn = is_owner or replicas.rank() == index % replicas.size()
        if is_copy or not is_turn or (part is None and not is_frozen):
            continue
        origin = tuple(side.start for side in logical.slices())
        if part is None:
            yield Box("model", name, logical.shape, origin, stored_values(parameter))
            continue
        master = part.master.detach().flatten()
        state = part.optimizer.state[part.master]
        values = {name: master} | {
            f"{name}:{moment}": state[moment].flatten() if moment in state else torch.zeros_like(master)
            for moment in MOMENTS
        }
        for stored, flat in values.items():
            kind = "model" if stored == name else "optimizer"
            for first, shape, offset in boxes_of_range(logical.local_shape(), part.start, part.stop):
                size = torch.Size(shape).numel()
                start = tuple(a + b for a, b in zip(origin, first, strict=True))
                yield Box(kind, stored, logical.shape, start, flat[offset : offset + size].view(shape))
    for name, router in engine.routers():
        if engine.is_first_copy:
            for key, value in router.named_buffers():
                yield Box("model", f"{name}.{key}", tuple(value.shape), (0,), value)


def boxes_of_range(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut ``[start, stop)`` of a flattened tensor into boxes of it: first index, extent, offset in the range.

    Part of a row, whole rows, part of a row: at most ``2 * dimensions - 1`` boxes.
    """
    offset = 0
    while start < stop:
        depth, size = len(shape), 1  # the largest whole sub-tensors that begin here and fit
        while depth and start % (size * shape[depth - 1]) == 0 and start + size * shape[depth - 1] <= stop:
            depth -= 1
            size *= shape[depth]
        index = [start // torch.Size(shape[d + 1 :]).numel() % shape[d] for d in range(len(shape))]
        extent = [1] * depth + list(shape[depth:])
        if depth:  # as many of them as there are left in the row above and in the range
            count = min(shape[depth - 1] - index[depth - 1], (stop - start) // size)
            extent[depth - 1] = count
            size *= count
        yield tuple(index), tuple(extent), offset
        start, offset = start + size, offset + size
