"""Parameters that know which part of which logical tensor they are.

A layer creates its local shard with :func:`make_parameter`. The attached :class:`Logical` record is all that
initialisation, checkpoints and the layout proof need: names and shapes of the *logical* tensors are the same on
every layout, so weights can be seeded, saved, compared and loaded without knowing how they were split.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightbulb.nn.groups import SINGLE, Axis, tensor_axis

Fill = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Initial values of a logical tensor, a function of its shape and a seeded generator."""


def constant(value: float) -> Fill:
    """A fill with one value."""
    return lambda shape, generator: torch.full(shape, value)


def uniform(bound: float) -> Fill:
    """A fill uniform between ``-bound`` and ``bound``."""
    return lambda shape, generator: torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Keeper(ABC):
    """Holds a frozen parameter's values in fewer bits than its dtype has (the attribute ``keeper`` of a parameter whose
    own storage is empty once values were set)."""

    @abstractmethod
    def write(self, values: Tensor) -> None:
        """Keep ``values``, as far as the bits allow."""

    @abstractmethod
    def read(self, dtype: torch.dtype) -> Tensor:
        """The values that are kept."""


@dataclass(frozen=True)
class Init:
    """Standard deviations of the initial weights: of ordinary matrices, and of those that write to the residual
    stream (smaller, so that depth does not grow its variance; GPT-2, Radford et al. 2019)."""

    std: float
    output_std: float


@dataclass(frozen=True)
class Logical:
    """How a local parameter lies in its logical tensor.

    Attributes:
        shape: shape of the logical tensor.
        std: standard deviation of the initial values; None for ones (norm weights).
        tensor_dim: dimension split over the tensor axis, or None when replicated.
        tensor: the tensor axis (of an expert: the expert tensor axis).
        expert: the expert axis, which splits dimension 0 when ``is_expert``.
        is_expert: dimension 0 counts experts.
        fill: draws the initial values of the logical tensor (of one expert), instead of ``std``.
        keep_fp32: stays in float32 when the model is cast to bfloat16.
        by_position: used outside tensor regions, so that under sequence parallelism each tensor rank's gradient covers
            its own positions only.
        is_vocab: the split dimension counts token ids, of which ranks may hold unequal numbers.
    """

    shape: tuple[int, ...]
    std: float | None
    tensor_dim: int | None = None
    tensor: Axis = SINGLE
    expert: Axis = SINGLE
    is_expert: bool = False
    fill: Fill | None = None
    keep_fp32: bool = False
    by_position: bool = False
    is_vocab: bool = False

    def slices(self) -> tuple[slice, ...]:
        """The part of the logical tensor this rank holds."""
        parts = [slice(0, size) for size in self.shape]
        if self.is_expert:
            parts[0] = _equal_part(self.shape[0], self.expert)
        if self.tensor_dim is not None:
            size = self.shape[self.tensor_dim]
            parts[self.tensor_dim] = self.tensor.part(size) if self.is_vocab else _equal_part(size, self.tensor)
        return tuple(parts)

    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        return tuple(part.stop - part.start for part in self.slices())


def _equal_part(size: int, axis: Axis) -> slice:
    if size % axis.size:
        raise ValueError(f"a dimension of {size} cannot be split over {axis.size} ranks; choose a divisor of {size}")
    return axis.part(size)


def make_parameter(logical: Logical) -> nn.Parameter:
    """An uninitialised local parameter, marked for Megatron-core's gradient reduction and norm."""
    parameter = nn.Parameter(torch.empty(logical.local_shape()))
    annotate(parameter, logical)
    return parameter


def annotate(parameter: nn.Parameter, logical: Logical) -> None:
    """Attach the record and Megatron-core's attributes (`allreduce`: reduced over the whole data axis, not the expert
    data axis; `sequence_parallel`: summed over the tensor axis; `tensor_model_parallel`: distinct on each tensor rank,
    so counted once per rank in the gradient norm)."""
    tensor = tensor_axis()
    is_whole = logical.tensor.size != tensor.size  # an expert that tensor ranks do not split: each has others
    spread = logical.expert.size > 1 or is_whole
    is_distinct = logical.tensor_dim is not None or (logical.is_expert and is_whole)
    parameter.logical = logical  # type: ignore[attr-defined]
    parameter.allreduce = not (logical.is_expert and spread)  # type: ignore[attr-defined]
    parameter.sequence_parallel = logical.by_position and tensor.sequence  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = is_distinct  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if logical.tensor_dim is None else logical.tensor_dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


def logical_of(parameter: nn.Parameter) -> Logical:
    """The record attached by :func:`make_parameter`."""
    return parameter.logical  # type: ignore[attr-defined]


def keeper_of(parameter: Tensor) -> Keeper | None:
    """What keeps a parameter's values, when it does not do so itself."""
    return getattr(parameter, "keeper", None)


def values_of(parameter: Tensor) -> Tensor:
    """A parameter, or in its dtype what its keeper holds."""
    keeper = keeper_of(parameter)
    return parameter if keeper is None else keeper.read(parameter.dtype)


def stored_values(parameter: Tensor) -> Tensor:
    """What checkpoints hold of a frozen parameter, in float32: read in a narrower dtype, a keeper's values would lose
    the scales they are made of, and give other values when they are written back."""
    keeper = keeper_of(parameter)
    return (parameter if keeper is None else keeper.read(torch.float32)).detach().float()


@torch.no_grad()
def set_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a local parameter, or its keeper, values of its local shape."""
    keeper = keeper_of(parameter)
    if keeper is None:
        parameter.copy_(values.view(parameter.shape))
        return
    keeper.write(values.to(parameter.device).view(logical_of(parameter).local_shape()))
    parameter.data = parameter.data.new_empty(0)


def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter from its global name and the seed, the same on every layout.

    The logical tensor is drawn on the CPU, expert by expert, and the local part is kept: what a rank holds does not
    depend on how many ranks there are.
    """
    for name, parameter in model.named_parameters():
        set_values(parameter, _local_values(name, logical_of(parameter), seed))


def _local_values(name: str, logical: Logical, seed: int) -> Tensor:
    slices = logical.slices()
    if not logical.is_expert:
        return _draw(logical, name, logical.shape, seed)[slices]
    experts = range(slices[0].start, slices[0].stop)
    return torch.stack([_draw(logical, f"{name}[{e}]", logical.shape[1:], seed)[slices[1:]] for e in experts])


def _draw(logical: Logical, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if logical.fill is not None:
        return logical.fill(shape, generator)
    return (
        torch.ones(shape) if logical.std is None else torch.empty(shape).normal_(0.0, logical.std, generator=generator)
    )
