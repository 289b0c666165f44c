"""Which corpus a run reads and how."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictFloat, StrictInt, model_validator

from lightbulb.config import Config, read_yaml


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file (and row), what is wrong and the fix."""


Name = Annotated[str, Field(min_length=1)]
"""A domain, a group (`python/cluster-03`), or a pattern of either with `*`, `?` and `[...]`."""


class MixtureConfig(Config):
    """How often each group of a corpus is drawn: a domain, or a cluster of one."""

    weights: dict[Name, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    """Weight by name; their sum does not matter. What one name matches shares its weight in proportion to tokens. A
    group that several names match takes the one with the most letters; a group that none matches is left out."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Without weights: domains in proportion to tokens^(1 / temperature)."""

    max_epochs: dict[Name, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """Most passes over each group that a name matches, from the start of the run. A group that has had them leaves its
    weight to the others, in proportion."""

    @model_validator(mode="after")
    def _weights_say_something(self) -> "MixtureConfig":
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("weights: all are zero; give one name a positive weight, or leave weights out")
        if self.weights is not None and self.temperature != 1.0:
            raise ValueError("temperature: works on the shares of tokens; leave out either weights or temperature")
        return self


def _from_file(value: Any) -> Any:
    """The content of the file that a path names."""
    return read_yaml(Path(value).expanduser()) if isinstance(value, str | Path) else value


Mixture = Annotated[MixtureConfig, BeforeValidator(_from_file, json_schema_input_type=MixtureConfig | str)]
"""A mixture, or the path of a file that holds one (configs/mixes)."""


class Stage(Config):
    """A part of a run that has settings of its own, up to the next one."""

    start: (
        Literal["decay"]
        | Annotated[StrictInt, Field(ge=1)]
        | Annotated[StrictFloat, Field(gt=0, lt=1, allow_inf_nan=False)]
    )
    """After so many steps, after this fraction of the steps, or where the learning rate begins to decay."""

    def first_step(self, steps: int, decay_start: int) -> int:
        """Steps before it, of a run with so many steps."""
        if self.start == "decay":
            return decay_start
        return self.start if isinstance(self.start, int) else round(self.start * steps)


class PartConfig(Config):
    """A random part of a corpus's rows; those of different numbers have none in common."""

    number: int = Field(ge=0)
    """Which part."""
    of: int = Field(ge=1)
    """How many there are, of equal size."""

    @model_validator(mode="after")
    def _is_one_of_them(self) -> "PartConfig":
        if self.number >= self.of:
            raise ValueError(f"number {self.number}: there are {self.of} parts, counted from 0")
        return self


class StageConfig(Stage):
    """A mixture that takes the place of the one before it."""

    mixture: Mixture


def first_steps(stages: Sequence[Stage], name: str, steps: int, decay_start: int) -> list[int]:
    """Steps before each stage of a setting.

    Raises:
        ValueError: a stage does not begin after the one before it, or the run.
    """
    found: list[int] = []
    for number, stage in enumerate(stages):
        first, last = stage.first_step(steps, decay_start), found[-1] if found else 0
        if first <= last:
            before = "the run" if number == 0 else f"stages.{number - 1}"
            raise ValueError(
                f"{name}.{number}: start {stage.start} is after {first} steps, {before} begins after {last}; list the "
                "stages in their order, each with steps of its own"
            )
        found.append(first)
    return found


class DataConfig(Config):
    """A corpus written by `lightbulb preprocess`."""

    path: Path
    """The corpus folder, the one that holds manifest.json."""

    shuffle: bool = True
    """Visit the training rows in a new order each epoch; without it, in the order they were written."""

    document_mask: bool = False
    """Give the model each token's document, so that no token sees another document of its row."""

    mixture: Mixture | None = None
    """How often each domain or cluster is drawn, or a file that says it; none visits every row once per epoch."""

    stages: tuple[StageConfig, ...] = ()
    """Later mixtures. Without `mixture`, the first one draws in proportion to tokens."""

    part: PartConfig | None = None
    """Train on a random part of the corpus only, without a mixture."""

    @model_validator(mode="after")
    def _part_is_plain(self) -> "DataConfig":
        if self.part is not None and (self.mixture is not None or self.stages):
            raise ValueError("part: not together with mixture or stages; leave one of them out")
        return self

    def mixtures(self, steps: int, decay_start: int) -> list[tuple[int, MixtureConfig]]:
        """Every mixture of a run with the number of steps before it; empty for a run without.

        Raises:
            ValueError: a stage does not begin after the one before it.
        """
        if self.mixture is None and not self.stages:
            return []
        starts = first_steps(self.stages, "data.stages", steps, decay_start)
        later = [(start, stage.mixture) for start, stage in zip(starts, self.stages, strict=True)]
        return [(0, self.mixture or MixtureConfig()), *later]
