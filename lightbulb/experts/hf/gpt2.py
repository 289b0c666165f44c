"""GPT-2: learned positions, norms with mean and bias, biases of all products, an ungated layer of GELU.

Its matrices are stored ``[in, out]``, as of convolutions over one position, and those of queries, keys and values are
one. Published folders have the names without ``transformer.`` and hold the causal masks as tensors.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lightbulb.experts.hf.family import Family, InteropError, expect, needed
from lightbulb.experts.hf.links import LinkTable
from lightbulb.mixers.channel.mlp import MLPConfig
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.models.block import BlockConfig
from lightbulb.models.language import LanguageConfig

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""Their name of an activation, and ours."""


@dataclass(frozen=True)
class GPT2Family(Family):
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""

    prefix: ClassVar[str] = "transformer."

    def read(self, theirs: dict[str, Any], source: str) -> dict[str, Any]:
        expect(
            theirs,
            source,
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            reorder_and_upcast_attn=False,
            add_cross_attention=False,
        )
        activation = theirs.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            raise InteropError(
                f"{source}: activation_function is {activation!r}; LightBulb has {', '.join(ACTIVATIONS)} for GPT-2"
            )
        dim, heads = needed(theirs, source, "n_embd"), needed(theirs, source, "n_head")
        return {
            "vocab_size": needed(theirs, source, "vocab_size"),
            "dim": dim,
            "num_layers": needed(theirs, source, "n_layer"),
            "context_length": needed(theirs, source, "n_positions"),
            "block_pattern": [
                {
                    "token": {"type": "attention", "num_heads": heads, "rope_theta": None, "bias": "all"},
                    "channel": {
                        "type": "mlp",
                        "hidden_dim": theirs.get("n_inner") or 4 * dim,
                        "activation": ACTIVATIONS[activation],
                        "bias": True,
                    },
                }
            ],
            "tie_embeddings": bool(theirs.get("tie_word_embeddings", True)),
            "norm": "layer",
            "norm_eps": theirs.get("layer_norm_epsilon", 1e-5),
            "learned_positions": True,
        }

    def write(self, ours: LanguageConfig) -> dict[str, Any]:
        attention, channel = _parts(ours.layer(0))
        return {
            "vocab_size": ours.vocab_size,
            "n_embd": ours.dim,
            "n_layer": ours.num_layers,
            "n_head": attention.num_heads,
            "n_inner": channel.hidden_dim,
            "n_positions": ours.context_length,
            "activation_function": next(key for key, mine in ACTIVATIONS.items() if mine == channel.activation),
            "layer_norm_epsilon": ours.norm_eps,
            "embd_pdrop": ours.dropout,
            "resid_pdrop": ours.dropout,
            "attn_pdrop": 0.0,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "tie_word_embeddings": ours.tie_embeddings,
        }

    def link(self, ours: LanguageConfig, table: LinkTable) -> None:
        table.add("embedding.weight", "transformer.wte.weight")
        table.add("positions.weight", "transformer.wpe.weight")
        for layer in range(ours.num_layers):
            here, there = f"blocks.{layer}.", f"transformer.h.{layer}."
            _link_norm(table, f"{here}token_norm", f"{there}ln_1")
            _link_product(table, f"{there}attn.c_attn", *(f"{here}token.{name}" for name in ("query", "key", "value")))
            _link_product(table, f"{there}attn.c_proj", f"{here}token.output")
            _link_norm(table, f"{here}channel_norm", f"{there}ln_2")
            _link_product(table, f"{there}mlp.c_fc", f"{here}channel.up")
            _link_product(table, f"{there}mlp.c_proj", f"{here}channel.down")
        _link_norm(table, "norm", "transformer.ln_f")
        if not ours.tie_embeddings:
            table.add("head", "lm_head.weight")


def check_gpt2(ours: LanguageConfig) -> None:
    """Raise InteropError when a model with layer norms and learned positions is no GPT-2."""
    blocks = [ours.layer(i) for i in range(ours.num_layers)]
    if any(block != blocks[0] for block in blocks):
        raise InteropError("layers with learned positions that differ are in no stock architecture")
    attention, channel = _parts(blocks[0])
    free = {name: getattr(attention, name) for name in ("num_heads", "num_kv_heads", "head_dim", "norm_eps", "backend")}
    plain = AttentionConfig(rope_theta=None, bias="all", **free)
    odd = [name for name in type(plain).model_fields if getattr(attention, name) != getattr(plain, name)]
    odd += ["num_kv_heads"] if attention.kv_heads != attention.num_heads else []
    odd += ["head_dim"] if attention.width(ours.dim) * attention.num_heads != ours.dim else []
    if odd:
        raise InteropError(f"attention with {odd[0]} {getattr(attention, odd[0])!r} is not GPT-2's")
    if channel.activation not in ACTIVATIONS.values():
        raise InteropError(f"activation {channel.activation!r} is not GPT-2's, which has gelu_tanh or gelu")
    if not channel.bias:
        raise InteropError("channel mixers without biases are not GPT-2's; set bias: true")


def _parts(block: BlockConfig) -> tuple[AttentionConfig, MLPConfig]:
    """The mixers of a block of GPT-2."""
    token, channel = block.token, block.channel
    if not isinstance(token, AttentionConfig) or not isinstance(channel, MLPConfig):
        kind = None if channel is None else channel.type
        raise InteropError(f"mixers {token.type!r} and {kind!r} are not GPT-2's, which has attention and mlp")
    return token, channel


def _link_norm(table: LinkTable, ours: str, theirs: str) -> None:
    for kind in ("weight", "bias"):
        table.add(f"{ours}.{kind}", f"{theirs}.{kind}")


def _link_product(table: LinkTable, theirs: str, *ours: str) -> None:
    """Link one of their stored products with those of ours that have its outputs."""
    table.add_rows(f"{theirs}.weight", *(f"{name}.weight" for name in ours), transposed=True)
    table.add_rows(f"{theirs}.bias", *(f"{name}.bias" for name in ours))


GPT2 = GPT2Family("gpt2", "GPT2LMHeadModel")
