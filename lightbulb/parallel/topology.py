"""Parallel degrees, their checks, and the process groups built from them."""

import itertools
from collections.abc import Iterator

from megatron.core import parallel_state
from pydantic import Field

from lightbulb.config import Config, ConfigError


class ParallelConfig(Config):
    """How many ranks share what. ``tensor * pipeline * data`` is the number of processes."""

    tensor: int = Field(1, ge=1)
    """Ranks that split every matrix."""
    pipeline: int = Field(1, ge=1)
    """Ranks that hold consecutive layers."""
    expert: int = Field(1, ge=1)
    """Ranks that hold different experts; divides ``data``."""
    data: int | None = Field(None, ge=1)
    """Ranks that see different samples; None for all that are left."""
    distributed_optimizer: bool = True
    """Split master weights and moments over the data ranks."""

    def resolve(self, world_size: int) -> "ParallelConfig":
        """The same degrees with ``data`` filled in.

        Raises:
            ConfigError: the degrees do not make ``world_size``, or ``expert`` does not divide ``data``.
        """
        model_ranks = self.tensor * self.pipeline
        data = self.data or max(world_size // model_ranks, 1)
        if model_ranks * data != world_size:
            raise ConfigError(
                f"parallel: tensor {self.tensor} x pipeline {self.pipeline} x data {data} needs {model_ranks * data} "
                f"processes but {world_size} were started; start that many (--num_gpus) or change the degrees"
            )
        if data % self.expert:
            raise ConfigError(
                f"parallel.expert {self.expert} does not divide parallel.data {data}; choose a divisor of {data}"
            )
        return self.model_copy(update={"data": data})

    def label(self) -> str:
        """Short name such as ``TP2xPP1xEP2xDP2``."""
        return f"TP{self.tensor}xPP{self.pipeline}xEP{self.expert}xDP{self.data}"


def layouts(world_size: int) -> Iterator[ParallelConfig]:
    """Every choice of degrees for a number of ranks."""
    degrees = [d for d in range(1, world_size + 1) if world_size % d == 0]
    for tensor, pipeline in itertools.product(degrees, degrees):
        if world_size % (tensor * pipeline) == 0:
            data = world_size // (tensor * pipeline)
            for expert in (d for d in range(1, data + 1) if data % d == 0):
                yield ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, data=data)


def initialize_groups(parallel: ParallelConfig) -> None:
    """Create Megatron-core's process groups; ``torch.distributed`` must be initialised.

    Experts are tensor-parallel like everything else (expert-tensor degree = tensor degree), so the expert axis runs
    across data ranks whose tokens differ.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.tensor,
        create_gloo_process_groups=False,
    )


def destroy_groups() -> None:
    """Forget the groups, so that others can be made in the same process."""
    parallel_state.destroy_model_parallel()
