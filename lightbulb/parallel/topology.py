"""Parallel degrees, their checks, and the process groups built from them."""

import itertools
from collections.abc import Iterator

from megatron.core import parallel_state
from pydantic import Field, model_validator

from lightbulb.config import Config, ConfigError
from lightbulb.models.language import Degrees
from lightbulb.nn.groups import set_sequence_parallel
from lightbulb.nn.recompute import Recompute


class ParallelConfig(Config):
    """How many ranks share what. ``tensor * pipeline * ulysses * data`` is the number of processes."""

    tensor: int = Field(1, ge=1)
    """Ranks that split every matrix."""
    sequence: bool = False
    """The tensor ranks also split the positions between matrices (Megatron's sequence parallelism)."""
    pipeline: int = Field(1, ge=1)
    """Ranks that hold consecutive layers."""
    interleave: int = Field(1, ge=1)
    """Stages per pipeline rank (interleaved 1F1B): smaller bubbles for more messages."""
    stages: list[int] | None = None
    """Layers of each of the ``pipeline * interleave`` stages; None to cut by cost."""
    ulysses: int = Field(1, ge=1)
    """Ranks that split every sequence, and the heads inside an attention (DeepSpeed-Ulysses)."""
    expert: int = Field(1, ge=1)
    """Ranks that hold different experts."""
    expert_tensor: int | None = Field(None, ge=1)
    """Ranks that split each expert's hidden features: ``tensor`` (None), or 1 for whole experts, to which the
    sequence-parallel tensor ranks send their tokens."""
    data: int | None = Field(None, ge=1)
    """Ranks that see different samples; None for all that are left."""
    distributed_optimizer: bool = True
    """Split master weights and moments over the data ranks."""
    recompute: Recompute = "none"
    """What is computed again in the backward instead of being kept: nothing, attention cores, or whole blocks."""

    @model_validator(mode="after")
    def _degrees_fit(self) -> "ParallelConfig":
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence true splits positions over tensor ranks, but tensor is 1; raise tensor")
        if self.interleave > 1 and self.pipeline == 1:
            raise ValueError(f"interleave {self.interleave} needs pipeline ranks, but pipeline is 1; raise pipeline")
        if self.expert_tensor not in (None, self.tensor):
            if self.expert_tensor != 1:
                raise ValueError(f"expert_tensor {self.expert_tensor} is neither tensor ({self.tensor}) nor 1")
            if not self.sequence:
                raise ValueError(
                    f"expert_tensor 1 with tensor {self.tensor} would give every tensor rank the same tokens; "
                    "set sequence: true"
                )
        if self.stages is not None and (len(self.stages) != self.num_stages or min(self.stages) < 1):
            raise ValueError(
                f"stages {self.stages} must list the layers (at least 1) of each of pipeline {self.pipeline} x "
                f"interleave {self.interleave} = {self.num_stages} stages"
            )
        return self

    @property
    def num_stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pipeline * self.interleave

    @property
    def copies(self) -> int:
        """Ranks that read the same samples."""
        return self.tensor * self.pipeline * self.ulysses

    def degrees(self) -> Degrees:
        """What a model has to be divisible by."""
        expert_tensor = self.expert_tensor or self.tensor
        return Degrees(self.tensor, self.num_stages, self.expert, expert_tensor, self.ulysses, self.sequence)

    def resolve(self, world_size: int) -> "ParallelConfig":
        """The same degrees with ``data`` filled in.

        Raises:
            ConfigError: the degrees do not make ``world_size``, or ``expert`` does not divide the ranks that hold
                different tokens.
        """
        data = self.data or max(world_size // self.copies, 1)
        if self.copies * data != world_size:
            raise ConfigError(
                f"parallel: tensor {self.tensor} x pipeline {self.pipeline} x ulysses {self.ulysses} x data {data} "
                f"needs {self.copies * data} processes but {world_size} were started; start that many (--num_gpus) or "
                "change the degrees"
            )
        token_ranks = self.tensor * self.ulysses * data // (self.expert_tensor or self.tensor)
        if token_ranks % self.expert:
            raise ConfigError(
                f"parallel.expert {self.expert} does not divide the {token_ranks} ranks whose tokens differ "
                f"(parallel.data {data} x ulysses {self.ulysses}, x tensor with expert_tensor 1); choose a divisor of "
                f"{token_ranks}"
            )
        return self.model_copy(update={"data": data})

    def label(self) -> str:
        """Short name such as ``TP2xPP1xEP2xDP2 sequence``."""
        ulysses = f"xUL{self.ulysses}" if self.ulysses > 1 else ""
        name = f"TP{self.tensor}xPP{self.pipeline}{ulysses}xEP{self.expert}xDP{self.data}"
        options = {
            "sequence": self.sequence,
            f"interleave-{self.interleave}": self.interleave > 1,
            f"stages-{'-'.join(map(str, self.stages or []))}": self.stages is not None,
            f"expert-tensor-{self.expert_tensor}": self.expert_tensor not in (None, self.tensor),
            f"recompute-{self.recompute}": self.recompute != "none",
            "plain-optimizer": not self.distributed_optimizer,
        }
        return " ".join([name, *(option for option, is_set in options.items() if is_set)])


def layouts(world_size: int) -> Iterator[ParallelConfig]:
    """Every choice of degrees for a number of ranks."""
    degrees = [d for d in range(1, world_size + 1) if world_size % d == 0]
    for tensor, pipeline, ulysses in itertools.product(degrees, degrees, degrees):
        copies = tensor * pipeline * ulysses
        if world_size % copies == 0:
            data = world_size // copies
            for expert in (d for d in range(1, data * ulysses + 1) if (data * ulysses) % d == 0):
                yield ParallelConfig(tensor=tensor, pipeline=pipeline, ulysses=ulysses, expert=expert, data=data)


def initialize_groups(parallel: ParallelConfig) -> None:
    """Create Megatron-core's process groups; ``torch.distributed`` must be initialised.

    The Ulysses axis is Megatron's context-parallel one: gradients are summed over it as over the data axis. The expert
    axis runs across ranks whose tokens differ.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleave if parallel.interleave > 1 else None,
        context_parallel_size=parallel.ulysses,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor or parallel.tensor,
        create_gloo_process_groups=False,
    )
    set_sequence_parallel(parallel.sequence)


def destroy_groups() -> None:
    """Forget the groups, so that others can be made in the same process."""
    parallel_state.destroy_model_parallel()
    set_sequence_parallel(False)
