"""Decoders of attention and SwiGLU layers, dense or with experts: Llama and what followed it.

Names and conventions are those of transformers 4.57; the tests compare logits. Rotary features are paired half by half
in both libraries. Mixtral's gates (softmax, top-k, divided by their sum) are ``normalize_gates: true``, the others have
``norm_topk_prob``. Qwen2-MoE multiplies its shared expert by a sigmoid of a product that is zero for us: 1/2, for which
the expert's last matrix is doubled there. Dense Qwen2 always has biases of queries, keys and values: zeros,
when ours has none.
"""

from dataclasses import dataclass
from typing import Any, Literal

from lightbulb.experts.hf.family import Family, InteropError, expect, needed, period
from lightbulb.experts.hf.links import LinkTable
from lightbulb.mixers.channel.mlp import MLPConfig
from lightbulb.mixers.channel.switch import RoutedConfig, SwitchConfig
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.mixers.token.heads import Biases
from lightbulb.models.block import BlockConfig
from lightbulb.models.language import LanguageConfig

SWIGLU = ("gate", "up", "down")


@dataclass(frozen=True)
class Decoder(Family):
    """One of Llama's kind.

    Attributes:
        experts: where a layer's experts are, or None.
        count: key of the number of experts.
        matrices: names of an expert's gate, up and down projections.
        bias: which projections of attention can have biases.
        bias_key: key that says whether they have; None where they always have.
        default_bias: what a config that does not say has.
        window: how windows are written: one for all layers, or by layers.
        default_window: what a config that does not say has.
    """

    experts: str | None = None
    count: str = "num_experts"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    bias: Biases = "all"
    bias_key: str | None = "attention_bias"
    default_bias: bool = False
    window: Literal["one", "layers"] | None = None
    default_window: int | None = None

    def read(self, theirs: dict[str, Any], source: str) -> dict[str, Any]:
        expect(theirs, source, hidden_act="silu", clip_qkv=None)
        dim, heads = needed(theirs, source, "hidden_size"), needed(theirs, source, "num_attention_heads")
        attention = {
            "type": "attention",
            "num_heads": heads,
            "num_kv_heads": theirs.get("num_key_value_heads") or heads,
            "rope_theta": _rope_theta(theirs, source),
            "bias": self.bias if self._has_bias(theirs) else "none",
        }
        head_dim = theirs.get("head_dim")
        if head_dim is not None and head_dim * heads != dim:
            attention["head_dim"] = head_dim
        eps = theirs.get("rms_norm_eps", 1e-6)
        if self.must & {"qk_norm", "wide_qk_norm"}:
            attention |= {"qk_norm": True, "norm_eps": eps}
            if "wide_qk_norm" in self.must:
                attention["qk_norm_over"] = "all_heads"
        layers = range(needed(theirs, source, "num_hidden_layers"))
        windows = self._windows(theirs, len(layers))
        blocks = [
            {"token": attention | ({"window": w} if w else {}), "channel": self._channel(theirs, source, layer)}
            for layer, w in zip(layers, windows, strict=True)
        ]
        return {
            "vocab_size": needed(theirs, source, "vocab_size"),
            "dim": dim,
            "num_layers": len(layers),
            "context_length": needed(theirs, source, "max_position_embeddings"),
            "block_pattern": period(blocks),
            "tie_embeddings": bool(theirs.get("tie_word_embeddings", False)),
            "norm_eps": eps,
        }

    def _has_bias(self, theirs: dict[str, Any]) -> bool:
        """Whether their attention has biases, if it can."""
        return self.bias_key is None or bool(theirs.get(self.bias_key, self.default_bias))

    def _channel(self, theirs: dict[str, Any], source: str, layer: int) -> dict[str, Any]:
        width = needed(theirs, source, "intermediate_size")
        is_dense = layer in (theirs.get("mlp_only_layers") or []) or (layer + 1) % theirs.get("decoder_sparse_step", 1)
        if self.experts is None or is_dense:
            return {"type": "mlp", "hidden_dim": width, "bias": self._may_bias_mlp and bool(theirs.get("mlp_bias"))}
        top_k = needed(theirs, source, "num_experts_per_tok")
        channel: dict[str, Any] = {
            "type": "switch",
            "num_experts": needed(theirs, source, self.count),
            "hidden_dim": theirs.get("moe_intermediate_size") or width,
            "router": {
                "top_k": top_k,
                "normalize_gates": self.count == "num_local_experts" or bool(theirs.get("norm_topk_prob", False)),
                "balance_loss": theirs.get("router_aux_loss_coef", 0.01),
            },
        }
        if top_k == 1 and channel["router"]["normalize_gates"]:
            channel["router"]["normalizer_gradient"] = False
        if "shared" in self.may:
            channel["shared_hidden_dim"] = needed(theirs, source, "shared_expert_intermediate_size")
        return channel

    def _windows(self, theirs: dict[str, Any], layers: int) -> list[int | None]:
        width = theirs.get("sliding_window", self.default_window)
        if self.window is None or (self.window == "layers" and not theirs.get("use_sliding_window", False)):
            width = None
        if self.window != "layers" or width is None:
            return [width] * layers
        first = theirs.get("max_window_layers", 28)
        default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
        kinds = theirs.get("layer_types") or default
        return [width if kind == "sliding_attention" else None for kind in kinds]

    @property
    def _may_bias_mlp(self) -> bool:
        return "mlp_bias" in self.may

    def write(self, ours: LanguageConfig) -> dict[str, Any]:
        blocks = [ours.layer(i) for i in range(ours.num_layers)]
        attentions = [block.token for block in blocks]
        first = attentions[0]
        assert isinstance(first, AttentionConfig)
        theirs: dict[str, Any] = {
            "vocab_size": ours.vocab_size,
            "hidden_size": ours.dim,
            "intermediate_size": _dense_width(blocks) or 4 * ours.dim,
            "num_hidden_layers": ours.num_layers,
            "num_attention_heads": first.num_heads,
            "num_key_value_heads": first.kv_heads,
            "head_dim": first.width(ours.dim),
            "hidden_act": "silu",
            "max_position_embeddings": ours.context_length,
            "rms_norm_eps": ours.norm_eps,
            "rope_theta": first.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": ours.tie_embeddings,
            "attention_dropout": 0.0,
        }
        if self.bias_key is not None:
            theirs[self.bias_key] = first.bias != "none"
        if self._may_bias_mlp:
            theirs["mlp_bias"] = _has_mlp_bias(blocks)
        windows = [token.window for token in attentions if isinstance(token, AttentionConfig)]
        if self.window is not None:
            theirs["sliding_window"] = next((w for w in windows if w), None)
        if self.window == "layers":
            theirs["use_sliding_window"] = any(windows)
            theirs["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
        return theirs | self._write_experts(blocks)

    def _write_experts(self, blocks: list[BlockConfig]) -> dict[str, Any]:
        routed = next((b.channel for b in blocks if isinstance(b.channel, RoutedConfig)), None)
        if self.experts is None or routed is None:
            return {}
        theirs: dict[str, Any] = {
            self.count: routed.num_experts,
            "num_experts_per_tok": routed.router.top_k,
            "router_aux_loss_coef": routed.router.balance_loss,
            "output_router_logits": False,
        }
        if self.count == "num_local_experts" or "dense_layers" not in self.may:
            theirs["intermediate_size"] = routed.hidden_dim
        else:
            theirs |= {
                "moe_intermediate_size": routed.hidden_dim,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [i for i, b in enumerate(blocks) if isinstance(b.channel, MLPConfig)],
            }
        if self.count != "num_local_experts":
            theirs["norm_topk_prob"] = routed.router.normalize_gates
        if "shared" in self.may:
            theirs["shared_expert_intermediate_size"] = shared_width(routed) or 1
        return theirs

    def link(self, ours: LanguageConfig, table: LinkTable) -> None:
        table.add("embedding.weight", "model.embed_tokens.weight")
        for layer in range(ours.num_layers):
            self._link_layer(ours, table, layer)
        table.add("norm.weight", "model.norm.weight")
        if not ours.tie_embeddings:
            table.add("head", "lm_head.weight")

    def _link_layer(self, ours: LanguageConfig, table: LinkTable, layer: int) -> None:
        here, there, block = f"blocks.{layer}.", f"model.layers.{layer}.", ours.layer(layer)
        table.add(f"{here}token_norm.weight", f"{there}input_layernorm.weight")
        table.add(f"{here}channel_norm.weight", f"{there}post_attention_layernorm.weight")
        for name in ("query", "key", "value", "output"):
            mine, theirs = f"{here}token.{name}.", f"{there}self_attn.{name[0]}_proj."
            table.add(f"{mine}weight", f"{theirs}weight")
            if f"{mine}bias" in table.shapes:
                table.add(f"{mine}bias", f"{theirs}bias")
            elif self.bias == "qkv" and self.bias_key is None and name != "output":
                table.zeros[f"{theirs}bias"] = table.shapes[f"{mine}weight"][:1]
        if self.must & {"qk_norm", "wide_qk_norm"}:
            for name in ("query", "key"):
                table.add(f"{here}token.{name}_norm.weight", f"{there}self_attn.{name[0]}_norm.weight")
        if isinstance(block.channel, RoutedConfig):
            self._link_experts(ours, table, layer, block.channel)
        else:
            for name in SWIGLU:
                for kind in ("weight", "bias") if _has_mlp_bias([block]) else ("weight",):
                    table.add(f"{here}channel.{name}.{kind}", f"{there}mlp.{name}_proj.{kind}")

    def _link_experts(self, ours: LanguageConfig, table: LinkTable, layer: int, routed: RoutedConfig) -> None:
        here, there = f"blocks.{layer}.channel.", f"model.layers.{layer}.{self.experts}."
        table.add(f"{here}router.weight", f"{there}gate.weight")
        for expert in range(routed.num_experts):
            gate, up, down = (f"{there}experts.{expert}.{name}.weight" for name in self.matrices)
            table.add_part(f"{here}experts.gate_up.weight", gate, (expert, 0))
            table.add_part(f"{here}experts.gate_up.weight", up, (expert, 1))
            table.add_part(f"{here}experts.down.weight", down, (expert,))
        if "shared" in self.may:
            table.zeros[f"{there}shared_expert_gate.weight"] = (1, ours.dim)
            for name in SWIGLU:
                theirs = f"{there}shared_expert.{name}_proj.weight"
                if routed.shared():
                    table.add(f"{here}shared.0.{name}.weight", theirs, factor=2.0 if name == "down" else 1.0)
                else:  # one feature, which is nothing
                    table.zeros[theirs] = (ours.dim, 1) if name == "down" else (1, ours.dim)


def traits(ours: LanguageConfig) -> frozenset[str]:
    """What a decoder of ours has beyond Llama.

    Raises:
        InteropError: something that none of these families has; the message says what.
    """
    blocks = [ours.layer(i) for i in range(ours.num_layers)]
    found = _attention_traits(ours, [block.token for block in blocks])
    channels = [block.channel for block in blocks]
    routed = [channel for channel in channels if isinstance(channel, RoutedConfig)]
    dense = [channel for channel in channels if isinstance(channel, MLPConfig)]
    for channel in channels:
        if not isinstance(channel, RoutedConfig | MLPConfig):
            raise InteropError(f"channel mixer {channel.type if channel else None!r} is in no stock architecture")
    if any(channel.activation != "swiglu" for channel in dense):
        raise InteropError(f"activation {dense[0].activation!r} is in no stock architecture; swiglu is")
    if len({channel.hidden_dim for channel in dense}) > 1:
        raise InteropError("dense layers of several widths are in no stock architecture")
    if len({channel.bias for channel in dense}) > 1:
        raise InteropError("dense layers of which some have biases are in no stock architecture")
    found |= {"mlp_bias"} if dense and dense[0].bias else set()
    if not routed:
        return found
    same = {(c.num_experts, c.hidden_dim, c.router.top_k, c.router.normalize_gates, shared_width(c)) for c in routed}
    if len(same) > 1:
        raise InteropError("layers of experts that differ are in no stock architecture")
    one = routed[0]
    if one.expert is not None or any(channel.expert is not None for channel in routed):
        raise InteropError("experts other than SwiGLU are in no stock architecture")
    for channel in routed:
        router = channel.router
        if (router.score, router.gate_scale, router.bias_rate) != ("softmax", 1.0, 0.0):
            raise InteropError(
                f"a router with score {router.score}, gate_scale {router.gate_scale:g} and bias_rate "
                f"{router.bias_rate:g} is in none of the supported architectures"
            )
    found |= {"experts"}
    found |= set() if one.router.normalize_gates else {"raw_gates"}
    found |= {"shared"} if shared_width(one) else set()
    return found | ({"dense_layers"} if dense else set())


def _attention_traits(ours: LanguageConfig, tokens: list[Any]) -> frozenset[str]:
    found: set[str] = set()
    for token in tokens:
        if not isinstance(token, AttentionConfig):
            raise InteropError(f"token mixer {token.type!r} is in no stock architecture with these layers")
        odd = {
            "sink": token.sink != "none",
            "adaptive_temperature": token.adaptive_temperature,
            "max_distance": token.max_distance is not None,
            "relative_positions": token.relative_positions is not None,
            "rope_theta": token.rope_theta is None,
        }
        for name, is_odd in odd.items():
            if is_odd:
                raise InteropError(f"attention with {name} {getattr(token, name)!r} is in no stock architecture")
        if token.qk_norm and token.norm_eps != ours.norm_eps:
            raise InteropError(f"attention's norm_eps {token.norm_eps:g} is not the model's {ours.norm_eps:g}")
    shapes = {
        (t.num_heads, t.kv_heads, t.width(ours.dim), t.rope_theta, t.bias, t.qk_norm, t.qk_norm_over) for t in tokens
    }
    if len(shapes) > 1:
        raise InteropError("layers of attention that differ in more than their window are in no stock architecture")
    if tokens[0].bias != "none":
        found.add(f"{tokens[0].bias}_bias")
    if tokens[0].qk_norm:
        found.add("qk_norm" if tokens[0].qk_norm_over == "head" else "wide_qk_norm")
    if tokens[0].width(ours.dim) * tokens[0].num_heads != ours.dim:
        found.add("head_dim")
    windows = {token.window for token in tokens}
    if len(windows - {None}) > 1:
        raise InteropError("windows of several lengths are in no stock architecture")
    if windows != {None}:
        found.add("window" if len(windows) == 1 else "some_windows")
    return frozenset(found)


def shared_width(routed: RoutedConfig) -> int:
    """Width of the one SwiGLU layer that the shared experts are; 0 for none."""
    if isinstance(routed, SwitchConfig):
        return routed.shared_hidden_dim or 0
    return sum(part.hidden_dim for part in routed.shared() if isinstance(part, MLPConfig))


def _dense_width(blocks: list[BlockConfig]) -> int | None:
    return next((block.channel.hidden_dim for block in blocks if isinstance(block.channel, MLPConfig)), None)


def _has_mlp_bias(blocks: list[BlockConfig]) -> bool:
    return any(isinstance(block.channel, MLPConfig) and block.channel.bias for block in blocks)


def _rope_theta(theirs: dict[str, Any], source: str) -> float:
    """The base of the rotation; newer configs keep it with its scaling."""
    parameters = theirs.get("rope_parameters") or {}
    scaling = theirs.get("rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise InteropError(
            f"{source}: rope_scaling of type {kind!r} is not supported; LightBulb's rotations are unscaled"
        )
    expect(theirs | parameters, source, partial_rotary_factor=1.0)
    return float(parameters.get("rope_theta", theirs.get("rope_theta", 10_000.0)))


def _family(model_type: str, architecture: str, must: str = "", may: str = "", **options: Any) -> Decoder:
    return Decoder(model_type, architecture, frozenset(must.split()), frozenset(may.split()), **options)


DECODERS = [
    _family("llama", "LlamaForCausalLM", may="head_dim all_bias mlp_bias"),
    _family("mistral", "MistralForCausalLM", may="head_dim window", bias="none", bias_key=None, window="one",
            default_window=4096),
    _family("qwen2", "Qwen2ForCausalLM", may="head_dim qkv_bias window some_windows", bias="qkv", bias_key=None,
            window="layers"),
    _family("qwen3", "Qwen3ForCausalLM", must="qk_norm", may="head_dim all_bias window some_windows",
            window="layers"),
    _family("mixtral", "MixtralForCausalLM", must="experts", may="head_dim window", bias="none", bias_key=None,
            window="one", experts="block_sparse_moe", count="num_local_experts", matrices=("w1", "w3", "w2")),
    _family("olmoe", "OlmoeForCausalLM", must="experts wide_qk_norm", may="all_bias raw_gates", experts="mlp"),
    _family("qwen3_moe", "Qwen3MoeForCausalLM", must="experts qk_norm",
            may="head_dim all_bias raw_gates dense_layers", experts="mlp"),
    _family("qwen2_moe", "Qwen2MoeForCausalLM", must="experts", may="qkv_bias raw_gates shared dense_layers",
            bias="qkv", bias_key="qkv_bias", default_bias=True, experts="mlp"),
]  # fmt: skip
"""In the order in which a model of ours is tried as one."""
