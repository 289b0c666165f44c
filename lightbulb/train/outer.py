"""The outer optimizer that keeps the trunk of several branches together, every so many steps.

DiLoCo (Douillard et al. 2023, arXiv:2311.08105): each branch trains by itself for H steps; what the branches moved on
average is then taken for a gradient, on which SGD with Nesterov momentum makes one step. Here parameters can stay
local, as the modules of DiPaCo's paths do (Douillard et al. 2024, arXiv:2403.10616): with local channel mixers and
branches that each read a cluster of the corpus, H = 1 is a mixture of experts routed by cluster with a shared trunk,
and H larger than the run is the branch phase of Branch-Train-MiX.
"""

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lightbulb.config import Config, ConfigError
from lightbulb.models.language import LanguageConfig


class SyncConfig(Config):
    """When and how branches are brought together."""

    every: int = Field(ge=1)
    """Steps between two meetings (H). After the last multiple of it the branches are apart until the run's end; with
    more than the run's steps they never meet."""
    lr: float = Field(0.7, gt=0, le=2)
    """Learning rate of the outer step; 1 without momentum takes the branches' mean."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the outer step."""
    nesterov: bool = True
    """Nesterov's form of it."""
    local: list[str] = ["*.channel.*"]
    """Patterns of parameters that each branch keeps to itself; all others are the trunk. States of routers (loads,
    biases) are always local."""
    wait_seconds: float = Field(1800.0, ge=0)
    """How long the others may show no progress before a branch that waits for them saves and fails; 0 waits on."""


class OuterConfig(SyncConfig):
    """A run's part in it: written by `lightbulb branch`."""

    folder: Path
    """Where the branches exchange their trunks; the same for all, on a file system that all of them share."""
    branch: int = Field(ge=0)
    """Which branch the run is."""
    branches: int = Field(ge=1)
    """How many there are."""

    @model_validator(mode="after")
    def _is_one_of_them(self) -> "OuterConfig":
        if self.branch >= self.branches:
            raise ValueError(f"outer.branch {self.branch}: there are {self.branches}, counted from 0")
        return self


def trunk_names(names: Iterable[str], local: Sequence[str]) -> list[str]:
    """The parameters that branches share, of all of a model.

    Raises:
        ConfigError: a pattern matches no parameter, or they match all.
    """
    names = list(names)
    for pattern in local:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"sync.local: {pattern!r} matches no parameter; there are {', '.join(names[:8])}, ...")
    trunk = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in local)]
    if not trunk:
        raise ConfigError(f"sync.local: {local} match every parameter and leave no trunk; leave sync out")
    return trunk


def shared_names(model: LanguageConfig, trained: Collection[str], local: Sequence[str]) -> frozenset[str]:
    """The parameters that branches bring together: those of the trunk that are trained.

    Raises:
        ConfigError: there are none, or a pattern matches no parameter.
    """
    with torch.device("meta"):
        names = [name for name, _ in model.build().named_parameters()]
    shared = frozenset(trunk_names(names, local)).intersection(trained)
    if not shared:
        raise ConfigError(
            f"sync.local: {list(local)} leaves a trunk of which train.trainable trains nothing; leave sync out"
        )
    return shared


def average(values: Sequence[Tensor]) -> Tensor:
    """The mean of the branches' tensors, formed in float64 in their order: exact where all are equal."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value in values:
        total += value
    return (total / len(values)).to(values[0].dtype)


@torch.no_grad()
def outer_step(
    trunk: Sequence[Tensor], means: Sequence[Tensor], momentum: Sequence[Tensor], config: SyncConfig
) -> None:
    """One step of SGD on ``trunk - means``, in place.

    Args:
        trunk: what all branches had after the meeting before; becomes what they have after this one.
        means: the mean of what they have now (:func:`average`).
        momentum: zeros before the first step; updated.
        config: learning rate and momentum.
    """
    for shared, mean, velocity in zip(trunk, means, momentum, strict=True):
        gradient = shared - mean
        velocity.mul_(config.momentum).add_(gradient)
        step = gradient + config.momentum * velocity if config.nesterov else velocity
        # shared - lr * step, in a form that for lr 1 without momentum is the mean to the last bit
        shared.copy_(mean + (gradient - config.lr * step))
