"""What each tensor of a mixture is made of, in pieces that exist one at a time.

Names of tensors tell: of a mixture's layer, ``channel.experts`` holds the sources' channel mixers, ``channel.shared``
the dense one, ``token.query`` and ``token.output`` of a mixture of heads the sources' projections; routers are given,
and everything else is averaged. Averages are formed in float64: of equal tensors it is the tensor, bit by bit, and the
order of sources does not show. Draws are functions of (seed, layer, expert, matrix), so that no layout changes them.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial, reduce

import torch
from torch import Tensor

from lightbulb.config import ConfigError
from lightbulb.experts.mixture_model import (
    attention_layers,
    check_same_model,
    group_size,
    mixture_config,
    mixture_layers,
)
from lightbulb.experts.run_folder import Piece, part_at, router_state, shapes_of, whole
from lightbulb.experts.source import Source
from lightbulb.experts.upcycle_config import UpcycleConfig
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.models.language import LanguageConfig

CHUNK = 1 << 22  # elements compared at a time
_GATED = ("gate", "up")
_OUTPUT = "down.weight"
_OUTPUT_BIAS = "down.bias"


@dataclass
class Deltas:
    """How far the sources went from their seed, and whether in one direction: sums over all tensors in common.

    Attributes:
        products: ``[sources, sources]`` dot products of the differences to the seed.
        seed_square: the seed's squared norm.
    """

    products: Tensor
    seed_square: float = 0.0

    def cosines(self) -> list[list[float]]:
        """Cosine of each two sources' differences to the seed; 0 where a source is the seed."""
        lengths = self.products.diagonal().sqrt()
        return (self.products / torch.outer(lengths, lengths).clamp_min(1e-300)).tolist()

    def distances(self) -> list[float]:
        """Length of each source's difference to the seed, as a share of the seed's."""
        return (self.products.diagonal().sqrt() / max(math.sqrt(self.seed_square), 1e-300)).tolist()


@dataclass
class Merge:
    """The sources, what they become, and where each value comes from.

    Args:
        config: what is wanted.
        sources: in its order.
        seed_model: what it names.

    Attributes:
        dense: the sources' model.
        mixture: the model they become.
        shapes: of the sources' tensors.
        known: names of what all sources have, biases of their routers among them.
        mixed_layers: whose channel mixers become experts.
        attention_layers: whose attention becomes a mixture of heads.
        routers: rows ``[rows, dim]`` of routers that are not drawn, by the router's name.
        deltas: filled while pieces are made, when there is a seed model.

    Raises:
        ConfigError: the sources are not of one shape, or cannot become such a mixture.
    """

    config: UpcycleConfig
    sources: list[Source]
    seed_model: Source | None = None
    routers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dense: LanguageConfig = self.sources[0].model_config
        self.shapes = shapes_of(self.dense)
        others = [*self.sources[1:], *([self.seed_model] if self.seed_model else [])]
        names = [str(source.path) for source in self.config.sources[1:]] + [str(self.config.seed_model)]
        for name, source in zip(names, others, strict=False):
            _check_shapes(self.shapes, shapes_of(source.model_config), name)
            check_same_model(self.dense, source.model_config, name)
        self.mixture = mixture_config(self.dense, self.config)
        self.mixed_layers = set(mixture_layers(self.dense, self.config))
        self.attention_layers = set(attention_layers(self.dense, self.config))
        count = len(self.sources)
        self.known = set.intersection(*(set(source.names()) for source in self.sources))
        self.deltas = Deltas(torch.zeros(count, count, dtype=torch.float64)) if self.seed_model else None

    @property
    def is_attention_split(self) -> bool:
        """Whether a source's attention became several experts."""
        return any(self._group(layer) > 1 for layer in self.attention_layers)

    def pieces(self) -> Iterator[Piece]:
        """All pieces of the mixture's weights and routers."""
        yield from self.parameters()
        yield from router_state(self.mixture, self.trunk, self.known)

    def parameters(self) -> Iterator[Piece]:
        """All pieces of the mixture's parameters."""
        for name, shape in shapes_of(self.mixture).items():
            yield from self._pieces_of(name, shape)

    def trunk(self, name: str) -> Tensor:
        """A tensor that is no expert's: the average of the sources', or the seed model's."""
        if self.seed_model is not None and self.config.trunk == "seed_model":
            return self.read(self.seed_model, name)
        weights = [source.tokens or 1 for source in self.config.sources]
        parts = (self.read(source, name).double() * w for w, source in zip(weights, self.sources, strict=True))
        return (reduce(Tensor.add_, parts) / sum(weights)).float()

    def expert_model(self, name: str, source: int) -> Tensor:
        """A tensor of the dense model that the mixture is where every token goes to one source's experts."""
        layer, part, rest = _place(name)
        is_expert = (part == "channel" and layer in self.mixed_layers) or (
            part == "token" and layer in self.attention_layers and rest in ("query.weight", "output.weight")
        )
        return self.read(self.sources[source], name) if is_expert else self.trunk(name)

    def read(self, source: Source, name: str) -> Tensor:
        """A source's tensor."""
        return source.read(name).float()

    def compare_with_seed(self) -> None:
        """Fill :attr:`deltas` from all tensors."""
        if self.deltas is None or self.seed_model is None:
            return
        for name in self.shapes:
            seed = self.seed_model.read(name).flatten()
            others = [source.read(name).flatten() for source in self.sources]
            for start in range(0, len(seed), CHUNK):
                part = seed[start : start + CHUNK].double()
                differences = torch.stack([other[start : start + CHUNK].double() - part for other in others])
                self.deltas.products += differences @ differences.t()
                self.deltas.seed_square += float(part @ part)

    def _pieces_of(self, name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        layer, part, rest = _place(name)
        is_mixed = layer in (
            self.mixed_layers if part == "channel" else self.attention_layers if part == "token" else ()
        )
        if not is_mixed or not rest.startswith(_OWN[part]):
            yield whole(name, shape, partial(self.trunk, name))
        elif rest == "router.weight":
            yield whole(name, shape, partial(self._router, name, shape))
        elif part == "token":
            for expert in range(shape[0]):
                yield part_at(name, shape, (expert,), partial(self._head, layer, rest, expert))
        elif rest.startswith("shared.0."):
            yield whole(name, shape, partial(self.trunk, f"blocks.{layer}.channel.{rest.removeprefix('shared.0.')}"))
        else:
            yield from self._experts(name, shape, layer, rest)

    def _experts(self, name: str, shape: tuple[int, ...], layer: int, rest: str) -> Iterator[Piece]:
        """``experts.gate_up.weight [E, 2, hidden, dim]`` and ``experts.down.weight``, or ``experts.each.NAME``."""
        for expert in range(shape[0]):
            if rest == "experts.gate_up.weight":
                for part, matrix in enumerate(_GATED):
                    yield part_at(name, shape, (expert, part), partial(self._matrix, layer, f"{matrix}.weight", expert))
            else:
                matrix = rest.removeprefix("experts.").removeprefix("each.")
                yield part_at(name, shape, (expert,), partial(self._matrix, layer, matrix, expert))

    def _matrix(self, layer: int, matrix: str, expert: int) -> Tensor:
        """One expert's part of a source's channel mixer: a matrix, or a bias."""
        config = self.config
        row, shard = divmod(expert, config.shards)
        values = self.read(self.sources[config.source_of(row)], f"blocks.{layer}.channel.{matrix}")
        if matrix == _OUTPUT_BIAS:  # of no hidden unit
            return self._kept_whole(values, config.shards)
        is_output = matrix == _OUTPUT
        if config.shared_expert and is_output:
            return torch.zeros_like(values)
        if config.method == "drop":
            return self._with_new_units(values, is_output, layer, expert, matrix)
        if config.shards > 1:
            # Gates of the parts of one copy are equal and sum to 1 / shards each of what the copy's gate is.
            part = values.chunk(config.shards, dim=1 if is_output else 0)[shard]
            return self._scaled(part, config.shards) if is_output else part
        return values

    def _with_new_units(self, values: Tensor, is_output: bool, layer: int, expert: int, matrix: str) -> Tensor:
        """A matrix of which some hidden units are not taken over."""
        return redrawn(values, self.config.drop_ratio, is_output, self.config.seed, layer, expert, matrix)

    def _scaled(self, values: Tensor, factor: int) -> Tensor:
        """Weights that stand before a gate of 1 / ``factor``."""
        return values * factor

    def _kept_whole(self, values: Tensor, count: int) -> Tensor:
        """What each of ``count`` parts of a copy has whole: their gates sum to the copy's."""
        return values

    def _head(self, layer: int, rest: str, expert: int) -> Tensor:
        """One expert's query or output projection: of each key/value head one of the query heads that share it."""
        attention = self._attention(layer)
        group, heads = group_size(attention), attention.kv_heads
        row, member = divmod(expert, group)
        source = self.sources[row * len(self.sources) // self.config.experts]
        values = self.read(source, f"blocks.{layer}.token.{rest}")
        if rest == "query.weight":
            return values.unflatten(0, (heads, group, -1))[:, member].flatten(0, 1)
        return self._scaled(values.unflatten(1, (heads, group, -1))[:, :, member].flatten(1, 2), group)

    def _router(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Rows that were learned, or drawn; experts that are parts of one share its row."""
        layer, part, _ = _place(name)
        group = self.config.shards if part == "channel" else self._group(layer)
        module = name.removesuffix(".weight")
        if module in self.routers:
            rows = self.routers[module]
        else:
            std = self.config.router_start.std or self.mixture.init().std
            draws = [keyed(self.config.seed, layer, row, f"{part}.router") for row in range(shape[0] // group)]
            rows = torch.stack([torch.empty(shape[1]).normal_(0.0, std, generator=draw) for draw in draws])
        return rows.repeat_interleave(group, dim=0)

    def _group(self, layer: int) -> int:
        return group_size(self._attention(layer))

    def _attention(self, layer: int) -> AttentionConfig:
        attention = self.dense.written_layer(layer).token
        assert isinstance(attention, AttentionConfig)
        return attention


def redrawn(values: Tensor, ratio: float, is_output: bool, seed: int, layer: int, expert: int, matrix: str) -> Tensor:
    """A matrix with a share of its hidden units drawn anew, normal with mean and deviation of what they replace.

    The units are the same in all matrices of an expert, as in the paper's text; its code draws a set for each matrix,
    which leaves most of these units half new. Hidden units are rows, of the output matrix columns.
    """
    hidden = values.shape[1 if is_output else 0]
    units = dropped_units(hidden, ratio, seed, layer, expert)
    if not len(units):
        return values
    result = values.t().clone() if is_output else values.clone()
    old = result[units].double()
    fresh = torch.empty(old.shape).normal_(generator=keyed(seed, layer, expert, matrix))
    result[units] = (old.mean() + old.std(correction=0) * fresh).float()
    return result.t().contiguous() if is_output else result


def dropped_units(hidden: int, ratio: float, seed: int, layer: int, expert: int) -> Tensor:
    """The hidden units that an expert does not take over."""
    return torch.randperm(hidden, generator=keyed(seed, layer, expert, "units"))[: round(ratio * hidden)]


def keyed(seed: int, layer: int, expert: int, matrix: str) -> torch.Generator:
    """A generator for one matrix of one expert, whoever makes it."""
    digest = hashlib.blake2b(f"upcycle/{seed}/{layer}/{expert}/{matrix}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _check_shapes(first: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]], name: str) -> None:
    for tensor in [*first, *(tensor for tensor in other if tensor not in first)]:
        mine, theirs = first.get(tensor), other.get(tensor)
        if mine != theirs:
            raise ConfigError(
                f"{name}: {tensor!r} is {theirs or 'missing'}, in the first source it is {mine or 'missing'}; sources "
                "must have equal shapes"
            )


_OWN = {"channel": ("router.", "experts.", "shared."), "token": ("router.", "query.weight", "output.weight")}
"""Of a layer that became a mixture, what is not averaged."""


def _place(name: str) -> tuple[int, str, str]:
    """Layer, part and name within it; layer -1 of what belongs to no layer."""
    names = name.split(".", 3)
    return (int(names[1]), names[2], names[3]) if names[0] == "blocks" and len(names) == 4 else (-1, "", name)
