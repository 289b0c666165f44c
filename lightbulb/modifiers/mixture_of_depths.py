"""Mixture of depths: some layers process only the tokens that need them.

"Mixture-of-Depths: Dynamically allocating compute in transformer-based language models", 2024, arXiv:2404.02258. A
layer's router scores every token; the best ``capacity`` of each sequence go through the layer, the others pass by on
the residual stream: ``x + g (layer(x) - x)`` for the chosen, ``x`` for the rest. Among themselves the chosen tokens
attend in their order and with their true positions. The gate ``g`` puts the router on the path of the gradient.

Choosing the best of a sequence looks at its future, which a text that is still being written does not have. So a small
predictor learns, from what the router sees and without touching the rest of the model, whether a token will be chosen;
outside training it decides alone, token by token: evaluation and decoding are causal and agree with each other.

Experts inside such a layer see its tokens only: the sums of their balance and z-losses run over these.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, silu

from lightbulb.config import Cost
from lightbulb.mixers.base import Context, Facts
from lightbulb.models.block import Block, BlockConfig, BlockState
from lightbulb.models.modifier import ModifierConfig
from lightbulb.nn.documents import run_starts
from lightbulb.nn.norm import Norms
from lightbulb.nn.parameter import Init, Logical, make_parameter
from lightbulb.registry import register
from lightbulb.routing.balance import attach_loss

Gate = Literal["score", "sigmoid", "unit"]


class DepthBlockConfig(BlockConfig):
    """A block that processes a share of the tokens."""

    capacity: float
    gate: Gate
    predictor_dim: int
    predictor_loss: float

    def chosen(self, length: int) -> int:
        """Tokens of a sequence that are processed in training."""
        return max(1, int(self.capacity * length + 1e-9))  # 0.29 * 100 is a little less than 29

    def build(self, dim: int, context_length: int, norms: Norms, dropout: float, init: Init) -> "DepthBlock":
        return DepthBlock(self, dim, context_length, norms, dropout, init)

    def cost(self, dim: int, context_length: int, norms: Norms) -> Cost:
        chosen = self.chosen(context_length)
        share = chosen / context_length
        block = super().cost(dim, chosen, norms)
        always = dim + self.predictor_dim * (dim + 1)
        active = always + round(share * block.active_params)
        return Cost(block.params + always, active, share * block.forward_flops + 2.0 * always)

    def check_sequence_parallel(self, tensor: int, ulysses: int, sequence: bool) -> None:
        if ulysses > 1 or sequence:
            field = "parallel.ulysses: 1" if ulysses > 1 else "parallel.sequence: false"
            raise ValueError(f"model.modifiers: mixture_of_depths chooses among whole sequences; set {field}")


class DepthBlock(Block):
    """See :class:`DepthBlockConfig`; parameter names are the plain block's, and two more."""

    def __init__(
        self, config: DepthBlockConfig, dim: int, context_length: int, norms: Norms, dropout: float, init: Init
    ):
        super().__init__(config, dim, context_length, norms, dropout, init)
        self.config = config
        self.depth_router = make_parameter(Logical((dim,), init.std, keep_fp32=True, by_position=True))
        self.depth_predictor = Predictor(dim, config.predictor_dim, init)

    def forward(self, x: Tensor, context: Context, state: BlockState | None = None) -> tuple[Tensor, BlockState | None]:
        scores = x.to(self.depth_router.dtype) @ self.depth_router
        predicted = self.depth_predictor(x.detach())
        if self.training:
            index = best(scores, self.config.chosen(len(x)))
            chosen = torch.zeros_like(scores).scatter(0, index, 1.0)
            loss = binary_cross_entropy_with_logits(predicted, chosen, reduction="sum")
            present = None
        else:
            index, present = where(predicted > 0)
            if not present.any() and state is not None:
                return x, state
        rows = index[..., None].expand(*index.shape, x.shape[-1])
        taken = x.gather(0, rows)
        processed, state = super().forward(taken, _narrow(context, index, present), state)
        moved = taken + self._gate(scores.gather(0, index)).to(x.dtype)[..., None] * (processed - taken)
        if present is not None:
            moved = torch.where(present.t()[..., None], moved, taken)
        x = x.scatter(0, rows, moved)
        return attach_loss(x, self.config.predictor_loss * loss) if self.training else x, state

    def _gate(self, scores: Tensor) -> Tensor:
        if self.config.gate == "score":
            return scores
        squashed = scores.sigmoid()
        # The value one, with the sigmoid's gradient: a dense layer becomes this one without a change.
        return squashed if self.config.gate == "sigmoid" else 1 + (squashed - squashed.detach())


class Predictor(nn.Module):
    """``w2 silu(W1 x)`` in float32: the log-odds that a token is chosen."""

    def __init__(self, dim: int, hidden_dim: int, init: Init):
        super().__init__()
        self.hidden = make_parameter(Logical((hidden_dim, dim), init.std, keep_fp32=True, by_position=True))
        self.output = make_parameter(Logical((hidden_dim,), init.std, keep_fp32=True, by_position=True))

    def forward(self, x: Tensor) -> Tensor:
        """``x [length, batch, dim]`` to ``[length, batch]``."""
        return silu(linear(x.to(self.hidden.dtype), self.hidden)) @ self.output


@register("modifier", "mixture_of_depths")
class MixtureOfDepthsConfig(ModifierConfig):
    """Some layers process a share of the tokens."""

    facts = Facts(
        "Mixture-of-Depths, 2024, arXiv:2404.02258",
        ("tensor", "expert", "pipeline"),
        "that of its layers, with the processed tokens only",
        "needs whole sequences, and mixers that keep true positions; training chooses by looking at the whole sequence",
    )
    type: Literal["mixture_of_depths"] = "mixture_of_depths"
    every: int = Field(2, ge=1)
    """Every so many layers one chooses its tokens: the last of each group."""
    capacity: float = Field(0.125, gt=0, le=1)
    """Share of each sequence that such a layer processes in training."""
    gate: Gate = "score"
    """Factor of what the layer adds: the router's score, its sigmoid, or one with the sigmoid's gradient."""
    predictor_dim: int = Field(32, ge=1)
    """Hidden width of the predictor."""
    predictor_loss: float = Field(0.01, gt=0)
    """Coefficient of the predictor's loss; small, so that it leaves the gradient norm to the model."""

    def block(self, layer: int, config: BlockConfig) -> BlockConfig:
        if layer % self.every != self.every - 1:
            return config
        for name, part in config.mixers().items():
            if not part.keeps_gaps:
                raise ValueError(
                    f"modifiers: mixture_of_depths falls on layer {layer}, whose {part.type!r} needs every token; "
                    f"change every ({self.every}) or the block_pattern so that it falls on other layers"
                )
            try:
                part.check_gaps()
            except ValueError as error:
                raise ValueError(f"modifiers: mixture_of_depths falls on layer {layer}: {name}.{error}") from None
        fields = {name: getattr(config, name) for name in type(config).model_fields}
        settings = self.model_dump(include={"capacity", "gate", "predictor_dim", "predictor_loss"})
        return DepthBlockConfig(**fields, **settings)


def best(scores: Tensor, count: int) -> Tensor:
    """``[count, batch]`` indices of the largest of ``scores [length, batch]``, in order; ties go to earlier tokens.

    Scores that agree to 16 bits tie. Equal tokens at the start of a sequence see equal pasts and score alike, but for
    their rounding, which no layout has in common with another.
    """
    mantissa, exponent = torch.frexp(scores.detach())
    rounded = torch.ldexp((mantissa * 2**16).round(), exponent)
    return rounded.argsort(dim=0, descending=True, stable=True)[:count].sort(dim=0).values


def where(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``[count, batch]`` of the true elements of ``chosen [length, batch]``, in order, filled up to the
    largest count (at least one), and ``[batch, count]``: which are no fillers."""
    count = max(1, int(chosen.sum(0).max()))
    index = (~chosen).to(torch.uint8).argsort(dim=0, stable=True)[:count]
    return index, chosen.gather(0, index).t()


def _narrow(context: Context, index: Tensor, present: Tensor | None) -> Context:
    """The context of the chosen tokens."""
    documents, ages = context.document_ids, None
    if documents is not None:
        ages = (torch.arange(documents.shape[1], device=index.device) - run_starts(documents)).gather(1, index.t())
        documents = documents.gather(1, index.t())
    positions = context.positions[index]
    return replace(context, positions=positions, document_ids=documents, present=present, rows=index, ages=ages)
