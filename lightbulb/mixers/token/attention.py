"""Softmax attention: grouped key/value heads, rotary or disentangled positions, windows, sinks, temperatures.

Attention (Vaswani et al. 2017, arXiv:1706.03762), grouped queries (Ainslie et al. 2023, arXiv:2305.13245), query/key
normalisation (Henry et al. 2020, arXiv:2010.04245; per head, before the rotation). The options have their papers in
:mod:`lightbulb.nn.attention_mask` and :mod:`lightbulb.nn.scores`. Heads are split over the tensor axis, and again over
the Ulysses axis.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lightbulb.config import Cost
from lightbulb.mixers.base import Context, DecodeState, Facts
from lightbulb.mixers.token import visibility
from lightbulb.mixers.token.heads import Biases, HeadsConfig, HeadsMixer
from lightbulb.nn.attention import attend
from lightbulb.nn.attention_backend import Backend, whole_attention
from lightbulb.nn.attention_mask import Rule, Visibility
from lightbulb.nn.groups import share_in_tensor_region
from lightbulb.nn.kv_cache import empty_cache, write
from lightbulb.nn.norm import RMSNorm, SplitRMSNorm
from lightbulb.nn.parameter import Init, Logical, constant, make_parameter
from lightbulb.nn.recompute import recompute
from lightbulb.nn.rope import rotary_angles, rotate
from lightbulb.nn.scores import Clamped, Disentangled, scored_attention
from lightbulb.nn.ulysses import gather_heads, my_heads
from lightbulb.registry import register

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


@register("token_mixer", "attention")
class AttentionConfig(HeadsConfig):
    """Self-attention."""

    facts = Facts(
        "Attention Is All You Need, 2017, arXiv:1706.03762; GQA, 2023, arXiv:2305.13245",
        ("tensor", "sequence", "ulysses"),
        "2 x num_kv_heads x head_dim per token",
        "relative_positions, adaptive_temperature and num_global past max_distance form whole score matrices",
    )
    keeps_gaps: ClassVar[bool] = True
    masks_gists: ClassVar[bool] = True
    type: Literal["attention"] = "attention"
    bias: Biases = "none"
    """Projections with biases: ``none``, those of queries, keys and values (``qkv``), or ``all`` with the output's."""
    qk_norm: bool = False
    """Normalise queries and keys before the rotation."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """What a query/key norm is over: each head by itself, all with one weight, or all heads together (OLMoE, 2024,
    arXiv:2409.02060)."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of the query/key norms."""
    causal: bool = True
    """Tokens see the past only; false for an encoder, which cannot decode."""
    window: int | None = Field(None, ge=1)
    """Tokens see tokens fewer than this many positions away (themselves included); None for all."""
    sink: Literal["none", "one", "learned"] = "none"
    """One more key with value zero, so that a head may attend to nothing: ``one`` with logit 0 (softmax1, Miller
    2023), ``learned`` with a logit per head (from 0), or ``none``."""
    adaptive_temperature: bool = False
    """In evaluation, sharpen rows of weights with much entropy (Veličković et al. 2024, arXiv:2410.01104)."""
    max_distance: int | None = Field(None, ge=1)
    """Longest distance of a trained model that is to run on longer sequences (LM-Infinite, Han et al. 2023,
    arXiv:2308.16137): tokens farther away are not seen, except the ``num_global`` first, which seem that far away."""
    num_global: int = Field(0, ge=0)
    """First tokens of a document that every later one sees; needs ``max_distance``."""
    relative_positions: int | None = Field(None, ge=1)
    """Disentangled scores by relative position, clipped to less than this many positions either way, instead of the
    rotation (DeBERTa, He et al. 2020, arXiv:2006.03654; the relative positions share the query/key projections)."""
    backend: Backend = "auto"
    """Kernel for whole sequences."""

    @model_validator(mode="after")
    def _options_agree(self) -> "AttentionConfig":
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise ValueError(f"qk_norm_over {self.qk_norm_over!r} has no effect without qk_norm; set qk_norm: true")
        if self.num_global and self.max_distance is None:
            raise ValueError(f"num_global {self.num_global} has no effect without max_distance; set it")
        if self.max_distance is not None and self.window is not None:
            raise ValueError(
                f"max_distance {self.max_distance} is a window too, next to window {self.window}; keep one of them"
            )
        if self.max_distance is not None and not self.causal:
            raise ValueError(f"max_distance {self.max_distance} needs causal: true; use window")
        if self.relative_positions is not None and self.rope_theta is not None:
            raise ValueError(
                f"relative_positions {self.relative_positions} take the place of the rotation; set rope_theta: null"
            )
        if self.backend in ("flex", "flash", "tiles"):
            self._check_kernel()
        return self

    def _check_kernel(self) -> None:
        unfused = {
            "relative_positions": self.relative_positions is not None,
            "adaptive_temperature": self.adaptive_temperature,
            "num_global": self.num_global > 0 and (self.rope_theta is not None or self.backend == "flash"),
            "sink": self.sink != "none" and self.backend == "flash",
        }
        for field, used in unfused.items():
            if used:
                raise ValueError(
                    f"backend {self.backend!r} has no kernel for {field} {getattr(self, field)!r}; set backend: auto"
                )

    @property
    def rule(self) -> Rule:
        """Which tokens see which."""
        return Rule(self.causal, self.window, self.max_distance, self.num_global)

    @property
    def sees_future(self) -> bool:
        return not self.causal

    def build(self, dim: int, context_length: int, init: Init) -> "Attention":
        return Attention(self, dim, init)

    def cost(self, dim: int, context_length: int) -> Cost:
        width = self.width(dim)
        matrices = dim * width * (2 * self.num_heads + 2 * self.kv_heads)
        normed = 2 if self.qk_norm_over == "head" else self.num_heads + self.kv_heads
        norms = normed * width if self.qk_norm else 0
        sinks = self.num_heads if self.sink == "learned" else 0
        relative = 2 * (self.relative_positions or 0)
        params = matrices + norms + sinks + relative * dim + self._biases(dim)
        # Scores and weighted values, of visible pairs only: kernels form more of them and hide the rest.
        attended = 4.0 * self.num_heads * width * self.rule.mean_seen(context_length)
        # Each query and each key by every relative position, which are projected once for a context.
        by_position = 4.0 * self.num_heads * width * relative
        projected = 2.0 * dim * width * (self.num_heads + self.kv_heads) * relative / context_length
        return Cost(params, params, 2.0 * matrices + attended + by_position + projected)

    def _biases(self, dim: int) -> int:
        """Parameters of the biases."""
        heads = 0 if self.bias == "none" else self.num_heads + 2 * self.kv_heads
        return heads * self.width(dim) + (dim if self.bias == "all" else 0)

    def check_gaps(self) -> None:
        if self.backend in ("flash", "tiles"):
            raise ValueError(f"backend {self.backend!r} takes no positions per sample; set backend: auto")


class Attention(HeadsMixer):
    """``softmax(q k^T / sqrt(width)) v`` over what each token may see, heads local to the tensor rank."""

    def __init__(self, config: AttentionConfig, dim: int, init: Init):
        super().__init__(config, dim, init, bias=config.bias)
        self.config = config
        self.norms_heads = config.qk_norm and config.qk_norm_over == "head"
        if self.norms_heads:
            self.query_norm = RMSNorm(self.width, config.norm_eps, by_position=False)
            self.key_norm = RMSNorm(self.width, config.norm_eps, by_position=False)
        elif config.qk_norm:
            heads = {"query_norm": config.num_heads, "key_norm": config.kv_heads}
            for name, count in heads.items():
                setattr(self, name, SplitRMSNorm(count * self.width, 1, config.norm_eps))
        if config.sink == "learned":
            logical = Logical((config.num_heads,), None, tensor_dim=0, tensor=self.axis, fill=constant(0.0))
            self.sink = make_parameter(logical)
        if config.relative_positions is not None:
            self.relative = make_parameter(Logical((2 * config.relative_positions, dim), init.std))

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        query, key, value = self.project(x)
        if self.norms_heads:
            query = self.query_norm(query, share_in_tensor_region(self.query_norm.weight, self.axis))
            key = self.key_norm(key, share_in_tensor_region(self.key_norm.weight, self.axis))
        turned = query
        if self.config.rope_theta is not None:
            cos, sin = rotary_angles(context.positions, self.width, self.config.rope_theta)
            turned, key = rotate(query, cos, sin), rotate(key, cos, sin)
        turned, key, value = (t.permute(1, 2, 0, 3) for t in (turned, key, value))
        if state is None:
            seen = visibility.of_whole(self.config.rule, context)
        else:
            state = write(state, key, value, context.positions, context.present)
            key, value, seen = visibility.of_cache(self.config.rule, context, state)
        core = self._core(query, key, seen, decodes=state is not None)
        if context.recompute == "selective" and state is None:
            core = partial(recompute, core)
        mixed = core(turned, key, value)
        if context.present is not None:
            mixed = mixed.masked_fill(~context.present[:, None, :, None], 0.0)
        return self.output(gather_heads(mixed.permute(2, 0, 1, 3), self.ulysses).flatten(2)), state

    def projected(self, name: str, x: Tensor) -> Tensor:
        features = super().projected(name, x)
        if name == "value" or not self.config.qk_norm or self.norms_heads:
            return features
        return getattr(self, f"{name}_norm")(features)

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        if not self.config.causal:
            raise ValueError("causal: false has nothing to decode: every token sees all others; set causal: true")
        return empty_cache(batch_size, self.kv_heads, max_length, self.width, device, dtype)

    def _core(self, query: Tensor, key: Tensor, seen: Visibility, decodes: bool) -> Core:
        """What makes ``[batch, heads, queries, width]`` of rotated queries, keys and values; from the queries before
        the rotation ``[queries, batch, heads, width]`` and the keys after it."""
        config, sink = self.config, self._sink(query)
        clamps = config.rope_theta is not None and config.num_global > 0 and seen.has_far_pairs
        sharpens = config.adaptive_temperature and not self.training
        if clamps or sharpens or config.relative_positions or (decodes and sink is not None):
            return partial(
                scored_attention,
                mask=seen.dense(),
                distances=seen.distances(),
                sink=sink,
                sharpen=sharpens,
                disentangled=self._disentangled() if config.relative_positions else None,
                clamped=self._clamped(query, key, seen) if clamps else None,
            )
        if decodes:
            return partial(attend, mask=seen.dense())
        return partial(whole_attention, seen=seen, sink=sink, backend=config.backend)

    def _sink(self, query: Tensor) -> Tensor | None:
        """Logits of the sinks of this rank's heads."""
        if self.config.sink == "none":
            return None
        if self.config.sink == "one":
            return query.new_zeros(query.shape[2])
        return my_heads(self.sink, self.ulysses)

    def _disentangled(self) -> Disentangled:
        """The relative positions through the projections of queries and keys, this rank's heads of them."""
        table = share_in_tensor_region(self.relative, self.axis)
        by_head = [part(table).unflatten(-1, (-1, self.width)).transpose(0, 1) for part in (self.key, self.query)]
        key, query = (my_heads(part, self.ulysses) for part in by_head)
        return Disentangled(key, query)

    def _clamped(self, query: Tensor, key: Tensor, seen: Visibility) -> Clamped:
        """Queries as at the longest distance, and the keys that may be farther than that without their rotation."""
        config = self.config
        assert config.max_distance is not None and config.rope_theta is not None
        longest = torch.tensor([config.max_distance], device=query.device)
        far = rotate(query, *rotary_angles(longest, self.width, config.rope_theta))
        # Global tokens come first where there is one document and no filler.
        any_place = seen.key.ages is not None or not seen.consecutive
        count = key.shape[2] if any_place else min(config.num_global, key.shape[2])
        cos, sin = rotary_angles(seen.key.positions[:, :count].t(), self.width, config.rope_theta)
        unturned = rotate(key[:, :, :count].permute(2, 0, 1, 3), cos, -sin)
        return Clamped(far.permute(1, 2, 0, 3), unturned.permute(1, 2, 0, 3), config.max_distance)
