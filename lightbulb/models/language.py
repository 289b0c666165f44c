"""Decoder language model: embedding, a cycled pattern of blocks, norm, head.

A model built for one pipeline stage holds that stage's layers only, under the same global names; with the default
stage it is the whole model.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import lightbulb.mixers  # noqa: F401  (registers the parts a pattern can name)
from lightbulb.config import Config, Cost, Registered
from lightbulb.mixers.base import Context, ModelState
from lightbulb.models.block import Block, BlockConfig
from lightbulb.models.modifier import ModifierConfig
from lightbulb.models.scaling import ScalingConfig, mark_learning_rates, scaled
from lightbulb.models.stack import StackConfig, Stage
from lightbulb.nn.cross_entropy import linear_cross_entropy
from lightbulb.nn.distillation import distilled_cross_entropy
from lightbulb.nn.embedding import PositionEmbedding, VocabParallelEmbedding
from lightbulb.nn.groups import enter_tensor_region, gather_last_dim, tensor_axis, ulysses_axis
from lightbulb.nn.noise import Noise
from lightbulb.nn.norm import Norms
from lightbulb.nn.parameter import Init, Logical, make_parameter
from lightbulb.nn.recompute import Recompute, recompute
from lightbulb.nn.soft_targets import SoftTargets


@dataclass(frozen=True)
class Degrees:
    """How a model is to be split (see ``ParallelConfig``): ranks per axis, pipeline stages over all ranks, and whether
    the tensor axis splits the sequence."""

    tensor: int = 1
    stages: int = 1
    expert: int = 1
    expert_tensor: int = 1
    ulysses: int = 1
    sequence: bool = False


class LanguageConfig(Config):
    """A causal language model."""

    type: Literal["language"] = "language"
    vocab_size: int = Field(ge=2)
    """Rows of the embedding; at least the tokenizer's number of ids."""
    dim: int = Field(ge=2)
    """Width of the residual stream."""
    num_layers: int = Field(ge=1)
    """Blocks."""
    context_length: int = Field(ge=2)
    """Longest sequence the model is trained on."""
    first_blocks: list[BlockConfig] = []
    """Blocks before the pattern starts."""
    block_pattern: list[BlockConfig] = Field(min_length=1)
    """Blocks, repeated in this order until there are ``num_layers``."""
    modifiers: list[Annotated[ModifierConfig, Registered("modifier")]] = []
    """Changes to blocks, stack and linear layers, each at most once; their order does not matter."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of setting a feature to zero, of the embeddings and of what each mixer adds."""
    tie_embeddings: bool = False
    """The head uses the embedding's rows."""
    gist_token_id: int | None = Field(None, ge=0)
    """Tokens after a run of this token see what is before it through it only (Mu et al. 2023, arXiv:2304.08467)."""
    norm: Literal["rms", "layer"] = "rms"
    """Norm before each mixer and before the head: by the root mean square, or by mean and variance, with biases (Ba et
    al. 2016, arXiv:1607.06450)."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of the norms."""
    learned_positions: bool = False
    """Add a learned vector for each of the ``context_length`` positions to the embeddings (GPT-2); longer sequences are
    then refused."""
    z_loss: float = Field(0.0, ge=0)
    """Coefficient of the squared log-sum-exp of the logits, in training part of the loss (PaLM, arXiv:2204.02311)."""
    init_std: float | None = Field(None, gt=0)
    """Standard deviation of the initial weights; None for sqrt(2 / (5 dim)) (Nguyen and Salazar 2019)."""

    scaling: ScalingConfig | None = None
    """Width and depth scaling, so that the best learning rate does not depend on either; None for none."""

    @model_validator(mode="after")
    def _pattern_divides(self) -> "LanguageConfig":
        repeated = self.num_layers - len(self.first_blocks)
        if repeated < 0:
            raise ValueError(
                f"first_blocks has {len(self.first_blocks)} blocks, more than num_layers {self.num_layers}; remove some"
            )
        if repeated % len(self.block_pattern):
            first = f" less the {len(self.first_blocks)} of first_blocks" if self.first_blocks else ""
            raise ValueError(
                f"block_pattern has {len(self.block_pattern)} blocks, which does not divide num_layers "
                f"{self.num_layers}{first}; make it a multiple"
            )
        types = [modifier.type for modifier in self.modifiers]
        if twice := sorted({name for name in types if types.count(name) > 1}):
            raise ValueError(f"modifiers names {twice[0]!r} twice; keep one")
        self._check_gists()
        for place, block in self.written_blocks():
            if block.token.sees_future:
                raise ValueError(
                    f"{place}.token: {block.token.type} is set to see the future, so that a language model would read "
                    "what it is to predict; set causal: true (attention) or bidirectional: false (mamba)"
                )
        self.cost()  # parts check their own widths against dim here, before anything is built
        return self

    def _check_gists(self) -> None:
        if self.gist_token_id is None:
            return
        if self.gist_token_id >= self.vocab_size:
            raise ValueError(
                f"gist_token_id {self.gist_token_id} is no row of vocab_size {self.vocab_size}; choose a smaller id"
            )
        for place, block in self.written_blocks():
            part = "channel" if block.token.masks_gists else "token"
            if part == "token" or (block.channel is not None and not block.channel.treats_tokens_alone):
                raise ValueError(
                    f"gist_token_id {self.gist_token_id}: {place}.{part} of type {block.mixers()[part].type!r} carries "
                    "a prompt past its gist tokens; choose another, or set gist_token_id: null"
                )

    def written_layer(self, index: int) -> BlockConfig:
        """The config of one layer as the lists of blocks have it."""
        later = index - len(self.first_blocks)
        return self.first_blocks[index] if later < 0 else self.block_pattern[later % len(self.block_pattern)]

    def layer(self, index: int) -> BlockConfig:
        """The config of one layer, modified."""
        config = self.written_layer(index)
        for modifier in self.sorted_modifiers():
            config = modifier.block(index, config)
        return config

    def written_blocks(self) -> list[tuple[str, BlockConfig]]:
        """The blocks as the config lists them, each with its place there."""
        lists = {"first_blocks": self.first_blocks, "block_pattern": self.block_pattern}
        return [(f"{name}.{index}", block) for name, blocks in lists.items() for index, block in enumerate(blocks)]

    def stack(self) -> StackConfig:
        """The config of the stack, modified."""
        config = StackConfig()
        for modifier in self.sorted_modifiers():
            config = modifier.stack(config)
        return config

    def sorted_modifiers(self) -> list[ModifierConfig]:
        """The modifiers in the one order they are applied in."""
        return sorted(self.modifiers, key=lambda modifier: modifier.type)

    def routers(self) -> dict[str, int]:
        """Module name of each router of the model, with its experts."""
        return {
            f"blocks.{layer}.{name}": num_experts
            for layer in range(self.num_layers)
            for name, num_experts in self.layer(layer).routers().items()
        }

    def norms(self) -> Norms:
        """The norms of the residual stream."""
        return Norms(self.norm, self.norm_eps)

    def init(self) -> Init:
        """Initial standard deviations of the blocks; what writes to the residual stream shrinks with depth."""
        std = self.table_std() / math.sqrt(self.scaling.width(self.dim) if self.scaling else 1.0)
        return Init(std, std / math.sqrt(2 * self.num_layers))

    def table_std(self) -> float:
        """Initial standard deviation of embedding and head."""
        return self.init_std or math.sqrt(0.4 / (self.scaling.base_dim if self.scaling else self.dim))

    def layer_costs(self) -> list[Cost]:
        """Cost of each block."""
        return [self.layer(i).cost(self.dim, self.context_length, self.norms()) for i in range(self.num_layers)]

    def head_cost(self) -> Cost:
        """Cost of the final norm and the head."""
        table = self.vocab_size * self.dim
        params = self.norms().params(self.dim) + (0 if self.tie_embeddings else table)
        return Cost(params, params + (table if self.tie_embeddings else 0), 2.0 * table)

    def cost(self) -> Cost:
        """The whole model. A token uses one row of each embedding, which counts as no active parameters."""
        rows = self.vocab_size + (self.context_length if self.learned_positions else 0)
        embedding = Cost(rows * self.dim, 0, 0.0)
        plain = sum(self.layer_costs(), embedding) + self.stack().cost(self.num_layers, self.dim) + self.head_cost()
        return sum((modifier.converted_cost(self._on_meta()) for modifier in self.modifiers), plain)

    def carried_widths(self, layer: int) -> list[int]:
        """Widths of the tensors ``[length, batch, width]`` that go into a layer: what a pipeline stage that starts
        there receives."""
        return [self.dim] * self.stack().carried(layer, self.num_layers)

    def check_parallel(self, degrees: "Degrees") -> None:
        """Raise ValueError, naming field, value and fix, when the model cannot be split that way."""
        tensor, ulysses, expert = degrees.tensor, degrees.ulysses, degrees.expert
        if self.vocab_size < tensor:
            raise ValueError(
                f"model.vocab_size {self.vocab_size} is less than parallel.tensor {tensor}; lower parallel.tensor to "
                f"{self.vocab_size} or less"
            )
        if self.num_layers < degrees.stages:
            raise ValueError(
                f"parallel.pipeline x parallel.interleave makes {degrees.stages} stages, more than model.num_layers "
                f"{self.num_layers}; lower one"
            )
        parts = ulysses * (tensor if degrees.sequence else 1)
        if self.context_length % parts:
            raise ValueError(
                f"model.context_length {self.context_length} cannot be split over {parts} ranks (parallel.ulysses, and "
                f"parallel.tensor with parallel.sequence); choose a multiple of {parts}"
            )
        for place, block in self.written_blocks():
            for part, config in block.mixers().items():
                try:
                    config.check_tensor_parallel(tensor)
                    config.check_width(self.dim, tensor, ulysses)
                    config.check_ulysses(tensor, ulysses)
                    config.check_expert_parallel(expert, degrees.expert_tensor)
                except ValueError as error:
                    raise ValueError(f"model.{place}.{part}.{error}") from None
        for layer in range(self.num_layers):
            self.layer(layer).check_sequence_parallel(tensor, ulysses, degrees.sequence)
        channels = [block.channel for _, block in self.written_blocks() if block.channel is not None]
        if expert > 1 and not any(channel.spreads_experts for channel in channels):
            raise ValueError(f"parallel.expert {expert} has no effect: no block has experts; set parallel.expert: 1")

    def build(self, stage: Stage | None = None) -> "LanguageModel":
        """The model, or one stage of it, uninitialised."""
        model = LanguageModel(self, stage or Stage(0, self.num_layers, True, True))
        for modifier in self.sorted_modifiers():
            modifier.convert(model)
        if self.scaling is not None:
            mark_learning_rates(model, 1.0 / self.scaling.width(self.dim))
        return model

    def _on_meta(self) -> "LanguageModel":
        with torch.device("meta"):
            return LanguageModel(self, Stage(0, self.num_layers, True, True))


class LanguageModel(nn.Module):
    """Tokens to hidden states, logits or losses.

    The attributes ``pre_process``, ``post_process``, ``share_embeddings_and_output_weights`` and the method
    ``set_input_tensor`` are what Megatron-core's pipeline schedules and gradient finalisation ask a stage for.
    """

    def __init__(self, config: LanguageConfig, stage: Stage):
        super().__init__()
        self.config = config
        self.context_length = config.context_length
        self.axis = tensor_axis()
        self.ulysses = ulysses_axis()
        self.recompute: Recompute = "none"
        self.pre_process = stage.has_embedding
        self.post_process = stage.has_head
        self.share_embeddings_and_output_weights = config.tie_embeddings
        self._input: Tensor | None = None
        self.divergence: Tensor | None = None  # summed over the tokens that had soft targets, until it is taken
        init, std, scaling = config.init(), config.table_std(), config.scaling
        self._embedding_scale = scaling.scale_emb if scaling else 1.0
        self._head_scale = 1.0 / scaling.width(config.dim) if scaling else 1.0
        if stage.has_embedding or (stage.has_head and config.tie_embeddings):
            self.embedding = VocabParallelEmbedding(config.vocab_size, config.dim, std)
            if config.tie_embeddings and not (stage.has_embedding and stage.has_head):
                # Both copies get gradient buckets of their own: the distributed optimizer reduces each bucket to shards
                # before the copies' gradients are added up, and the shards of both must cover the same elements.
                self.embedding.weight.shared_embedding = True  # type: ignore[attr-defined]
        if stage.has_embedding and config.learned_positions:
            self.positions = PositionEmbedding(config.context_length, config.dim, std)
        norms = config.norms()
        self.blocks = nn.ModuleDict(
            {
                str(i): config.layer(i).build(config.dim, config.context_length, norms, config.dropout, init)
                for i in range(stage.first, stage.last)
            }
        )
        if scaling is not None:
            for block in self.blocks.values():
                cast(Block, block).residual_scale = scaling.residual(config.num_layers)
        self.stack = config.stack().build(config.num_layers, stage)
        self._received_widths = config.carried_widths(stage.first)
        if stage.has_head:
            self.norm = norms.build(config.dim)
            if config.tie_embeddings and not stage.has_embedding:
                # A copy of the first stage's table: its gradient is added to the original's, its norm not counted.
                self.embedding.weight.shared = True  # type: ignore[attr-defined]
            if not config.tie_embeddings:
                shape = (config.vocab_size, config.dim)
                self.head = make_parameter(Logical(shape, std, tensor_dim=0, is_vocab=True, tensor=self.axis))

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Give a later pipeline stage the hidden states of the one before."""
        self._input = tensors[0]

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied table on the stages that hold it."""
        return self.embedding.weight if self.config.tie_embeddings and hasattr(self, "embedding") else None

    def head_weight(self) -> Tensor:
        """This tensor rank's rows of the head."""
        return self.embedding.weight if self.config.tie_embeddings else self.head

    def my_positions(self, x: Tensor) -> Tensor:
        """This Ulysses rank's columns of ``x [batch, length]``."""
        return x.chunk(self.ulysses.size, dim=1)[self.ulysses.rank]

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        noise: Noise | None = None,
        targets: SoftTargets | None = None,
    ) -> Tensor:
        """One pass over whole contexts.

        Args:
            tokens: ``[batch, length]``.
            labels: ``[batch, length]`` next tokens, or IGNORE; with labels the last stage returns losses.
            document_ids: ``[batch, length]`` to keep documents apart, or None.
            noise: source of dropout and jitter in training; None for neither.
            targets: ``[batch, length, k]`` distributions to learn from besides the labels: they change the gradient of
                the losses, not their values, and :attr:`divergence`.

        Returns:
            Losses ``[batch, length]`` in nats; logits ``[batch, length, vocab]`` float32 without labels (of
            :meth:`my_positions` both); on a stage without the head what the next stage receives,
            ``[rows, batch, sum of widths]``.
        """
        length = tokens.shape[1]
        self._check_length(length)
        positions = torch.arange(length, device=tokens.device)
        noise = noise if self.training else None
        rows = self._rows(length)
        gist = self._gist(tokens)
        context = Context(positions, document_ids, rows=rows, noise=noise, recompute=self.recompute, gist=gist)
        if self.pre_process:
            embedded = self._embed(self.my_positions(tokens), positions[rows])
            carried = self.stack.start(context.at("embedding").dropout(embedded, self.config.dropout))
        else:
            assert self._input is not None
            carried = list(self._input.split(self._received_widths, dim=-1))
        carried, _ = self.run_blocks(carried, context)
        if not self.post_process:
            sent = carried[0] if len(carried) == 1 else torch.cat(carried, dim=-1)
            if torch.is_grad_enabled() and not sent.requires_grad:
                sent.requires_grad_()  # nothing is trained up to here, but the schedule runs this stage's backward too
            return sent
        x = self._for_head(carried[0])
        return self._logits(x) if labels is None else self._losses(x, labels, targets)

    def _losses(self, x: Tensor, labels: Tensor, targets: SoftTargets | None) -> Tensor:
        labels = self.my_positions(labels)
        z_loss = self.config.z_loss if self.training else 0.0
        head = enter_tensor_region(x, self.axis).flatten(0, 1), self.head_weight(), labels.t().flatten()
        first = self.axis.part(self.config.vocab_size).start
        if targets is None:
            losses = linear_cross_entropy(*head, self.axis, first, z_loss)
        else:
            targets = targets.mapped(lambda part: self.my_positions(part).transpose(0, 1).flatten(0, 1))
            losses, divergence = distilled_cross_entropy(*head, targets, self.axis, first, z_loss)
            self.divergence = divergence.sum() + (0.0 if self.divergence is None else self.divergence)
        return losses.view(labels.shape[1], labels.shape[0]).t()

    def run_blocks(
        self, carried: list[Tensor], context: Context, state: ModelState | None = None
    ) -> tuple[list[Tensor], ModelState]:
        """This stage's blocks, from what the first of them takes (``config.carried_widths``) to what the next stage's
        first block takes; the head reads the first tensor. With the decode state of each block, and to it."""
        updated: ModelState = {}
        for name, block in self.blocks.items():
            here, past = context.at(name), None if state is None else state[name]
            run = partial(recompute, block) if self.recompute == "full" else block
            x, updated[name] = run(carried[0], here, past)
            carried = self.stack.after(int(name), x, carried)
        return carried, updated

    def init_state(self, batch_size: int, max_length: int) -> ModelState:
        """Empty decode state of every layer, for sequences up to ``max_length``."""
        weight = self.head_weight()
        blocks: dict[str, Block] = dict(self.blocks.items())  # type: ignore[arg-type]
        state: ModelState = {
            name: block.init_state(batch_size, max_length, weight.device, weight.dtype)
            for name, block in blocks.items()
        }
        if self.config.gist_token_id is not None:
            state["gist"] = torch.zeros(batch_size, max_length, device=weight.device, dtype=torch.bool)
        return state | {"position": 0}

    def decode(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Continue the sequences in ``state`` by ``tokens [batch, length]``: logits ``[batch, length, vocab]``."""
        start, length = state["position"], tokens.shape[1]
        self._check_length(start + length)
        positions, known = torch.arange(start, start + length, device=tokens.device), None
        extra: ModelState = {"position": start + length}
        gist = self._gist(tokens)
        if gist is not None:
            extra["gist"] = state["gist"].index_copy(1, positions, gist)
            known = extra["gist"][:, : start + length]
        context = Context(positions, gist=known)
        carried, updated = self.run_blocks(self.stack.start(self._embed(tokens, positions)), context, state)
        return self._logits(self._for_head(carried[0])), updated | extra

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """``[rows, batch, dim]`` of this Ulysses rank's ``tokens``, at the positions that this rank holds of them."""
        embedded = self.embedding(tokens)
        if self.config.learned_positions:
            embedded = embedded + self.positions(positions)
        return scaled(embedded, self._embedding_scale)

    def _check_length(self, length: int) -> None:
        if self.config.learned_positions and length > self.context_length:
            raise ValueError(
                f"a sequence of {length} tokens: learned_positions end at context_length {self.context_length}; give "
                "shorter ones"
            )

    def _for_head(self, x: Tensor) -> Tensor:
        """What the head multiplies; its logits' scale is that of its input."""
        return scaled(self.norm(x), self._head_scale)

    def _gist(self, tokens: Tensor) -> Tensor | None:
        return None if self.config.gist_token_id is None else tokens == self.config.gist_token_id

    def _rows(self, length: int) -> slice:
        """The positions this rank holds between mixers: Ulysses cuts first, then the tensor axis."""
        tensor = self.axis.size if self.axis.sequence else 1
        part = length // (self.ulysses.size * tensor)
        index = self.ulysses.rank * tensor + (self.axis.rank if self.axis.sequence else 0)
        return slice(index * part, (index + 1) * part)

    def _logits(self, x: Tensor) -> Tensor:
        logits = enter_tensor_region(x, self.axis) @ self.head_weight().t()
        return gather_last_dim(logits.transpose(0, 1), self.config.vocab_size, self.axis).float()
