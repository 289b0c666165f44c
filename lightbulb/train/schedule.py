"""Learning-rate schedules as pure functions of the step.

Warmup-stable-decay (MiniCPM, Hu et al. 2024, arXiv:2404.06395; 1-sqrt decay from Hägele et al. 2024,
arXiv:2405.18392): a long constant phase from which any number of decays can be forked. Cosine (Loshchilov and Hutter
2017, arXiv:1608.03983) is what it is compared with: a decay that begins where the warmup ends.
"""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from lightbulb.config import Config

Shape = Literal["linear", "one_minus_sqrt", "exponential", "cosine"]


class ScheduleConfig(Config):
    """Warmup-stable-decay, in fractions of the run's steps."""

    warmup: float = Field(0.02, ge=0, lt=1)
    """Fraction of the steps over which the learning rate rises linearly from zero."""
    decay: float = Field(0.2, ge=0, le=1)
    """Fraction of the steps, at the end, over which it falls. With the shape cosine the default is all after the
    warmup."""
    shape: Shape = "linear"
    """How it falls."""
    final: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end as a fraction of the peak."""

    @model_validator(mode="before")
    @classmethod
    def _cosine_has_no_stable_phase(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("shape") == "cosine" and values.get("decay") is None:
            warmup = values.get("warmup", cls.model_fields["warmup"].default)
            return values | ({"decay": 1 - warmup} if isinstance(warmup, int | float) else {})
        return values

    @model_validator(mode="after")
    def _phases_fit(self) -> "ScheduleConfig":
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} + decay {self.decay} exceed the run; their sum may be at most 1")
        if self.shape == "exponential" and self.final == 0:
            raise ValueError("shape exponential never reaches final 0; set final above 0, for example 0.01")
        return self


def warmup_end(config: ScheduleConfig, steps: int) -> int:
    """Steps before the learning rate is at its peak, of a run with so many."""
    return round(config.warmup * steps)


def decay_start(config: ScheduleConfig, steps: int) -> int:
    """Steps before the learning rate begins to fall, of a run with so many."""
    return steps - round(config.decay * steps)


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Fraction of the peak learning rate at ``step`` (counted from 0) of ``steps``."""
    warmup, start = warmup_end(config, steps), decay_start(config, steps)
    if step < warmup:
        return (step + 1) / warmup
    if step < start:
        return 1.0
    done = (step + 1 - start) / (steps - start)
    if config.shape == "exponential":
        return config.final**done
    return config.final + (1.0 - config.final) * _left(config.shape, done)


def _left(shape: Shape, done: float) -> float:
    """What a decay to zero has left of the peak, ``done`` being the part of it that is over."""
    if shape == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * done)
    return 1.0 - (math.sqrt(done) if shape == "one_minus_sqrt" else done)
