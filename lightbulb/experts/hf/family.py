"""What an architecture of another library is to us: its config and ours, and whose weights are whose.

A model of ours has *traits* (a window, experts, ...). A family names those it must and those it may have; the first
family that fits a model is the one it is exported as.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightbulb.config import ConfigError, build_config
from lightbulb.experts.hf.links import LinkTable
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.parameter import logical_of


class InteropError(ValueError):
    """A model that cannot be exchanged; the message says what is in the way, and the fix if there is one."""


@dataclass(frozen=True)
class Family(ABC):
    """An architecture.

    Attributes:
        prefix: what the names of its tensors begin with; folders of the model without its head leave it out.
    """

    model_type: str
    architecture: str
    must: frozenset[str] = frozenset()
    """Traits without which a model is not one."""
    may: frozenset[str] = frozenset()
    """Further traits it can express."""

    prefix: ClassVar[str] = "model."

    @abstractmethod
    def read(self, theirs: dict[str, Any], source: str) -> dict[str, Any]:
        """Values of our config from their config.json.

        Raises:
            InteropError: they use something that we have not.
        """

    @abstractmethod
    def write(self, ours: LanguageConfig) -> dict[str, Any]:
        """Their config.json, for a model whose traits fit."""

    @abstractmethod
    def link(self, ours: LanguageConfig, table: LinkTable) -> None:
        """Link all weights."""

    def fits(self, traits: frozenset[str]) -> bool:
        """Whether a model with these traits is one."""
        return self.must <= traits <= self.must | self.may

    def config(self, theirs: dict[str, Any], source: str) -> LanguageConfig:
        """Our config from theirs.

        Raises:
            InteropError: as :meth:`read`, or the values do not make a model.
        """
        try:
            return build_config(LanguageConfig, self.read(theirs, source), source)
        except ConfigError as error:
            raise InteropError(str(error)) from None

    def table(self, ours: LanguageConfig) -> LinkTable:
        """The links of a model, complete."""
        table = LinkTable(logical_shapes(ours))
        self.link(ours, table)
        for problem in table.problems():
            raise InteropError(f"{self.architecture}: {problem}")
        return table


def logical_shapes(config: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a whole model."""
    with torch.device("meta"):
        model = config.build()
    return {name: logical_of(parameter).shape for name, parameter in model.named_parameters()}


def expect(theirs: dict[str, Any], source: str, **wanted: Any) -> None:
    """Refuse values of their config that we have nothing for; what is missing is as wanted.

    Raises:
        InteropError: naming key and value.
    """
    for key, value in wanted.items():
        found = theirs.get(key, value)
        if found != value:
            raise InteropError(f"{source}: {key} is {found!r}; LightBulb's models have {value!r} only")


def needed(theirs: dict[str, Any], source: str, key: str) -> Any:
    """A value their config must have.

    Raises:
        InteropError: it has not.
    """
    if theirs.get(key) is None:
        raise InteropError(f"{source}: has no {key!r}, without which the model's shape is not known")
    return theirs[key]


def period(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shortest list that, repeated, is the whole."""
    for size in range(1, len(blocks) + 1):
        if len(blocks) % size == 0 and blocks[:size] * (len(blocks) // size) == blocks:
            return blocks[:size]
    return blocks
