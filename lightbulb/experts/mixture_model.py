"""The config of the mixture that dense models become.

A block's dense channel mixer becomes a ``switch`` of such mixers, and with ``btx+moa`` its attention a mixture of
attention heads. There an expert has one query head for each key/value head; a source with ``r`` query heads for each
therefore becomes ``r`` experts that share a router row and are chosen together, like the parts of a virtual group.
"""

from lightbulb.config import ConfigError, build_config, flatten
from lightbulb.experts.upcycle_config import UpcycleConfig
from lightbulb.mixers.base import ChannelMixerConfig
from lightbulb.mixers.channel.mlp import MLPConfig
from lightbulb.mixers.channel.switch import SwitchConfig
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.mixers.token.moa import MoAConfig
from lightbulb.models.block import BlockConfig
from lightbulb.models.language import LanguageConfig

_MIXTURE = "the mixture"
_MOA_TAKES = {"type", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "qk_norm", "norm_eps", "backend"}


def mixture_config(dense: LanguageConfig, upcycle: UpcycleConfig) -> LanguageConfig:
    """The mixture's config.

    Raises:
        ConfigError: naming what cannot become a mixture, and the fix.
    """
    _check_modifiers(dense, upcycle)
    blocks = [dense.written_layer(index) for index in range(dense.num_layers)]
    for index in mixture_layers(dense, upcycle):
        blocks[index] = blocks[index].model_copy(update={"channel": _mixed(blocks[index].channel, upcycle)})
    for index in attention_layers(dense, upcycle):
        attention = blocks[index].token
        assert isinstance(attention, AttentionConfig)
        blocks[index] = blocks[index].model_copy(update={"token": _heads(attention, dense.dim, upcycle)})
    first = len(dense.first_blocks)
    values = dense.model_dump(mode="json") | {
        "first_blocks": [block.model_dump(mode="json") for block in blocks[:first]],
        "block_pattern": [block.model_dump(mode="json") for block in _pattern(blocks[first:] or dense.block_pattern)],
    }
    return build_config(LanguageConfig, values, "the mixture's model")


def mixture_layers(dense: LanguageConfig, upcycle: UpcycleConfig) -> list[int]:
    """Layers whose channel mixer becomes a mixture."""
    able = [i for i in range(dense.num_layers) if (c := dense.written_layer(i).channel) is not None and not c.routers()]
    wanted = able if upcycle.layers is None else sorted(set(upcycle.layers))
    for index in wanted:
        if index not in able:
            raise ConfigError(f"layers: {index} has no dense channel mixer; choose among {able}")
    if not wanted:
        raise ConfigError("layers: no layer has a dense channel mixer that could become a mixture")
    return wanted


def attention_layers(dense: LanguageConfig, upcycle: UpcycleConfig) -> list[int]:
    """Layers whose attention becomes a mixture of heads: those of :func:`mixture_layers` that have plain attention.
    Other token mixers (memories, state spaces) are averaged."""
    if upcycle.method != "btx+moa":
        return []
    found = [i for i in mixture_layers(dense, upcycle) if isinstance(dense.written_layer(i).token, AttentionConfig)]
    if not found:
        raise ConfigError("method 'btx+moa': no layer has attention that could become a mixture; use method: btx")
    return found


def group_size(attention: AttentionConfig) -> int:
    """Experts that one source's attention becomes."""
    return attention.num_heads // attention.kv_heads


def _mixed(channel: ChannelMixerConfig | None, upcycle: UpcycleConfig) -> SwitchConfig:
    assert channel is not None
    is_mlp = isinstance(channel, MLPConfig)
    needs_units = upcycle.method in ("drop", "virtual-group") or upcycle.shared_expert
    if needs_units and not is_mlp:
        option = "shared_expert" if upcycle.shared_expert else f"method {upcycle.method!r}"
        raise ConfigError(f"{option} needs channel mixers of type 'mlp', not {channel.type!r}; use method: sparse")
    settings: dict[str, object] = {"num_experts": upcycle.experts, "router": upcycle.router}
    if not isinstance(channel, MLPConfig):
        return build_config(SwitchConfig, settings | {"expert": channel}, _MIXTURE)
    if channel.hidden_dim % upcycle.shards:
        raise ConfigError(f"shards {upcycle.shards} do not divide hidden_dim {channel.hidden_dim}; choose a divisor")
    hidden = channel.hidden_dim // upcycle.shards
    if channel.activation != "swiglu" or channel.bias:
        if upcycle.shared_expert:
            odd = "biases" if channel.bias else f"activation {channel.activation!r}"
            raise ConfigError(f"shared_expert needs activation 'swiglu' without biases, not {odd}; leave it out")
        return build_config(
            SwitchConfig, settings | {"expert": channel.model_copy(update={"hidden_dim": hidden})}, _MIXTURE
        )
    shared = {"shared_hidden_dim": channel.hidden_dim} if upcycle.shared_expert else {}
    return build_config(SwitchConfig, settings | {"hidden_dim": hidden} | shared, _MIXTURE)


def _heads(attention: AttentionConfig, dim: int, upcycle: UpcycleConfig) -> MoAConfig:
    plain = AttentionConfig(num_heads=attention.num_heads)
    for field in AttentionConfig.model_fields:
        if field not in _MOA_TAKES and getattr(attention, field) != getattr(plain, field):
            raise ConfigError(
                f"method 'btx+moa': a mixture of attention heads has no {field} ({getattr(attention, field)!r}); use "
                "method: btx, or leave the layer out of layers"
            )
    if attention.rope_theta is None:
        raise ConfigError("method 'btx+moa': a mixture of attention heads rotates, rope_theta is null; use method: btx")
    group = group_size(attention)
    router = upcycle.attention_router or upcycle.router
    if router.top_k > upcycle.experts:
        raise ConfigError(f"attention_router.top_k {router.top_k} exceeds the {upcycle.experts} experts; lower it")
    return build_config(
        MoAConfig,
        {
            "num_experts": upcycle.experts * group,
            "num_kv_heads": attention.kv_heads,
            "head_dim": attention.width(dim),
            "router": router.model_copy(update={"top_k": router.top_k * group}),
            "qk_norm": attention.qk_norm,
            "rope_theta": attention.rope_theta,
            "norm_eps": attention.norm_eps,
        },
        "the mixture's attention",
    )


def _check_modifiers(dense: LanguageConfig, upcycle: UpcycleConfig) -> None:
    names = {modifier.type for modifier in dense.modifiers}
    if "lora" in names:
        raise ConfigError("model.modifiers: an average of adapters is no adapter; merge lora into the weights first")
    if "bitlinear" in names and upcycle.shards > 1:
        raise ConfigError(
            "method 'virtual-group': bitlinear scales each matrix by itself, so that its parts do not add up to it; "
            "use method: sparse"
        )


def _pattern(blocks: list[BlockConfig]) -> list[BlockConfig]:
    """The shortest list that gives these blocks when it is repeated."""
    for length in range(1, len(blocks) + 1):
        if len(blocks) % length == 0 and all(block == blocks[i % length] for i, block in enumerate(blocks)):
            return blocks[:length]
    return blocks


def check_same_model(first: LanguageConfig, other: LanguageConfig, name: str) -> None:
    """Raise ConfigError naming the first setting that makes two models of equal shapes different functions."""
    free = ("dropout", "z_loss", "init_std")
    mine, theirs = (flatten(config.model_dump(mode="json", exclude=set(free))) for config in (first, other))
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            raise ConfigError(
                f"{name}: model.{key} is {theirs.get(key)!r}, the first source has {mine.get(key)!r}; sources must be "
                "models of one shape"
            )
