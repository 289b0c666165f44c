"""DenseFormer: each layer reads a learned weighted sum of all earlier layers' outputs.

"DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted Averaging", 2024, arXiv:2402.02622. With
``X_0`` the embeddings and ``X_i`` the output of layer i, the input of layer i + 1 is ``Y_i = sum_j alpha_ij X_j`` over
``j <= i``, instead of ``X_i``. A dilation k leaves the ``j`` with ``j = i mod k``; a period p averages only where p
divides i. Every ``alpha_ii`` starts at 1 and all others at 0: at the start the model is the plain one.

The weights are kept by source: ``X_j`` has one for each average it goes into. So a pipeline stage adds what its own
layers contribute to the averages that later stages finish, and only these sums travel, not the history.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from lightbulb.config import Cost
from lightbulb.mixers.base import Facts
from lightbulb.models.modifier import ModifierConfig
from lightbulb.models.stack import Stack, StackConfig, Stage
from lightbulb.nn.parameter import Fill, Logical, make_parameter
from lightbulb.registry import register


class DenseStackConfig(StackConfig):
    """The stack with depth-weighted averages. Layers count from 1 here; 0 is the embedding."""

    dilation: int
    period: int

    def averages(self, source: int, num_layers: int) -> list[int]:
        """The layers after which an average with ``X_source`` is taken."""
        first = max(source, 1)
        return [i for i in range(first, num_layers + 1) if i % self.period == 0 and (i - source) % self.dilation == 0]

    def pending(self, done: int, num_layers: int) -> list[int]:
        """The averages that are begun but not finished when ``done`` layers have run."""
        begun = {i for source in range(done + 1) for i in self.averages(source, num_layers)}
        return sorted(i for i in begun if i > done)

    def carried(self, layer: int, num_layers: int) -> int:
        return 1 + len(self.pending(layer, num_layers))

    def cost(self, num_layers: int, dim: int) -> Cost:
        weights = sum(len(self.averages(source, num_layers)) for source in range(num_layers + 1))
        return Cost(weights, weights, 0.0)

    def build(self, num_layers: int, stage: Stage) -> "DenseStack":
        return DenseStack(self, num_layers, stage)


class DenseStack(Stack):
    """``carried`` is the next layer's input and the sums of the pending averages so far, by layer."""

    def __init__(self, config: DenseStackConfig, num_layers: int, stage: Stage):
        super().__init__()
        self.config, self.num_layers = config, num_layers
        sources = range(0 if stage.has_embedding else stage.first + 1, stage.last + 1)
        self.weights = nn.ParameterDict()
        for source in sources:
            if averages := config.averages(source, num_layers):
                logical = Logical((len(averages),), None, fill=_own(averages, source), keep_fp32=True, by_position=True)
                self.weights[str(source)] = make_parameter(logical)

    def start(self, embedded: Tensor) -> list[Tensor]:
        return [embedded, *self._add(0, embedded, {}).values()]

    def after(self, layer: int, output: Tensor, carried: list[Tensor]) -> list[Tensor]:
        done = layer + 1
        sums = dict(zip(self.config.pending(layer, self.num_layers), carried[1:], strict=True))
        sums = self._add(done, output, sums)
        return [sums.pop(done, output), *sums.values()]

    def _add(self, source: int, x: Tensor, sums: dict[int, Tensor]) -> dict[int, Tensor]:
        """``sums`` with what ``X_source`` adds to each average it goes into."""
        for weight, average in zip(self._weights(source), self.config.averages(source, self.num_layers), strict=True):
            term = weight.to(x.dtype) * x
            sums[average] = sums[average] + term if average in sums else term
        return dict(sorted(sums.items()))

    def _weights(self, source: int) -> tuple[Tensor, ...]:
        return self.weights[str(source)].unbind(0) if str(source) in self.weights else ()


@register("modifier", "denseformer")
class DenseFormerConfig(ModifierConfig):
    """Depth-weighted averages of earlier layers."""

    facts = Facts(
        "DenseFormer, 2024, arXiv:2402.02622",
        ("tensor", "sequence", "ulysses", "pipeline"),
        "none",
        "stages send one running sum for each average that later stages finish",
    )
    type: Literal["denseformer"] = "denseformer"
    dilation: int = Field(1, ge=1)
    """Average over every so many layers."""
    period: int = Field(1, ge=1)
    """Average after every so many layers; ``dilation + 1`` lets averages see the results of earlier ones."""

    def stack(self, config: StackConfig) -> StackConfig:
        return DenseStackConfig(**config.model_dump(), dilation=self.dilation, period=self.period)


def _own(averages: list[int], source: int) -> Fill:
    """One for a layer's own average, zero for later ones."""

    def fill(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return torch.tensor([float(average == source) for average in averages])

    return fill
