"""The run file: everything a pretraining run needs, checked together before anything starts."""

from typing import Any, Literal

from pydantic import Field, model_validator

import lightbulb.modifiers  # noqa: F401  (registers what model.modifiers can name)
from lightbulb.config import Config, ConfigError
from lightbulb.data.batches import BatchSizes
from lightbulb.data.config import DataConfig, MixtureConfig, Stage, first_steps
from lightbulb.data.soft_targets import DistilConfig
from lightbulb.models.language import LanguageConfig
from lightbulb.models.trainable import Trainable, trained_names
from lightbulb.ops import Kernels
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.pipeline_cut import language_stages
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.train.outer import OuterConfig, shared_names
from lightbulb.train.schedule import ScheduleConfig, decay_start

__all__ = ["DETACHED", "RunConfig", "TrainConfig"]

DETACHED: dict[str, Any] = {"start_from": None, "start_from_moments": False, "outer": None}
"""Where a run began and whom it meets: what another run does not take over with its settings."""


class BatchStage(Stage):
    """A batch that takes the place of the one before it."""

    global_batch_size: int = Field(ge=1)
    """Contexts per step over all ranks, from then on."""


class TrainConfig(Config):
    """Length, batch and bookkeeping of a run."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(ge=1)
    """Contexts per step over all ranks."""
    batch_stages: tuple[BatchStage, ...] = ()
    """Later batch sizes. The learning rate is not changed with them."""
    micro_batch_size: int = Field(ge=1)
    """Contexts per forward pass of one rank."""
    trainable: Trainable = "all"
    """What is trained: all, routers, routers+experts, or patterns of parameter names such as blocks.*.token.*; the rest
    stays as it is, without gradients or optimizer state. With LoRA, all are its updates."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of weights and activations; auto picks what the device is fast at. Masters and moments are fp32."""
    kernels: Kernels = "auto"
    """How operations with a kernel of their own are computed: auto by the fastest form the machine has, reference by
    naive PyTorch, to see whether a kernel is to blame. The environment's LIGHTBULB_KERNELS counts more."""
    log_every: int = Field(10, ge=1)
    """Steps between lines on a console that is not a terminal."""
    eval_every: int = Field(0, ge=0)
    """Steps between held-out evaluations; 0 evaluates at the end only."""
    eval_contexts: int = Field(64, ge=1)
    """Held-out contexts of an evaluation during training; the last one uses them all."""
    save_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy of the state in host memory."""
    max_skipped_steps: int = Field(20, ge=1)
    """Consecutive skipped steps (gradients not finite, or spikes) after which the run stops."""
    spike_sigma: float = Field(6.0, ge=0)
    """Skip a step whose loss or gradient norm is this many standard deviations over the last 128; 0 skips none."""
    hang_seconds: float = Field(600.0, ge=0)
    """Longest time in one step, batch of an evaluation (setup and checkpoints: 3 x) before the run ends; 0 waits on."""


class RunConfig(Config):
    """A pretraining run."""

    run: str
    """Folder of the run: config, metrics, checkpoints, report."""
    start_from: str | None = None
    """Folder of a run whose newest checkpoint, or of a checkpoint that, gives the initial weights, by name; parameters
    it lacks keep theirs. Used while this run has no checkpoint of its own."""
    start_from_moments: bool = False
    """Take the optimizer's moments from there too, and their number of updates: the run goes on warm."""
    seed: int = Field(1234, ge=0)
    """Seeds initial weights and the order of the data."""
    model: LanguageConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    outer: OuterConfig | None = None
    """Keeps the trunk of this run and its sister branches together (`lightbulb branch` writes it)."""
    distil: DistilConfig | None = None
    prompts: list[str] = []
    """Prompts to complete when the run ends."""

    @model_validator(mode="after")
    def _batch_divides(self) -> "RunConfig":
        for size in self.batch_sizes().distinct:
            if size % self.train.micro_batch_size:
                raise ValueError(
                    f"train.global_batch_size {size} is not a multiple of train.micro_batch_size "
                    f"{self.train.micro_batch_size}; choose a divisor"
                )
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> "RunConfig":
        if self.train.trainable != "all":
            try:
                trained_names(self.model, self.train.trainable)
            except ValueError as error:
                raise ValueError(f"train.{error}") from None
        return self

    @model_validator(mode="after")
    def _branches_share_something(self) -> "RunConfig":
        if self.outer is not None:
            shared_names(self.model, trained_names(self.model, self.train.trainable), self.outer.local)
        return self

    @model_validator(mode="after")
    def _moments_come_from_somewhere(self) -> "RunConfig":
        if self.start_from_moments and self.start_from is None:
            raise ValueError("start_from_moments: no start_from to take moments from; name a run, or leave it out")
        return self

    @model_validator(mode="after")
    def _stages_rise(self) -> "RunConfig":
        self.mixtures()
        return self

    def mixtures(self) -> list[tuple[int, MixtureConfig]]:
        """Every mixture of the run with the number of steps before it; empty for a run without."""
        return self.data.mixtures(self.train.steps, decay_start(self.schedule, self.train.steps))

    def batch_sizes(self) -> BatchSizes:
        """Contexts of every step."""
        train, stages = self.train, self.train.batch_stages
        starts = first_steps(stages, "train.batch_stages", train.steps, decay_start(self.schedule, train.steps))
        changes = zip(starts, (stage.global_batch_size for stage in stages), strict=True)
        return BatchSizes(train.global_batch_size, list(changes))

    def resolve(self, world_size: int) -> "RunConfig":
        """The config with its degrees filled in and checked against the model and the number of processes.

        Raises:
            ConfigError: naming field, value and fix.
        """
        parallel = self.parallel.resolve(world_size)
        try:
            self.model.check_parallel(parallel.degrees())
            language_stages(self.model, parallel.num_stages, parallel.stages)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for size in self.batch_sizes().distinct:
            self._check_batch(size, parallel)
        return self.model_copy(update={"parallel": parallel})

    def _check_batch(self, size: int, parallel: ParallelConfig) -> None:
        """Whether the ranks can share a global batch."""
        data = parallel.data or 1
        if size % (self.train.micro_batch_size * data):
            raise ConfigError(
                f"train.global_batch_size {size} is not a multiple of train.micro_batch_size "
                f"{self.train.micro_batch_size} x parallel.data {data}; make it a multiple of "
                f"{self.train.micro_batch_size * data}"
            )
        micro_batches = size // (self.train.micro_batch_size * data)
        if parallel.interleave > 1 and micro_batches % parallel.pipeline:
            raise ConfigError(
                f"parallel.interleave {parallel.interleave}: a rank's {micro_batches} micro-batches are not a multiple "
                f"of parallel.pipeline {parallel.pipeline}; change train.global_batch_size or train.micro_batch_size"
            )
