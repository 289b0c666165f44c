"""Mamba-2 without channel mixers, as transformers has it.

Its input projection is our gate, value, key, query and step one below the other, its convolution our three. Its norm
is over all heads whatever the groups, unlike the paper's code and ours: only one group is the same in both.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lightbulb.experts.hf.family import Family, InteropError, expect, needed
from lightbulb.experts.hf.links import LinkTable
from lightbulb.mixers.token.mamba import MambaConfig
from lightbulb.models.language import LanguageConfig


@dataclass(frozen=True)
class Mamba2(Family):
    """Layers of Mamba-2 and nothing else."""

    prefix: ClassVar[str] = "backbone."

    def read(self, theirs: dict[str, Any], source: str) -> dict[str, Any]:
        expect(theirs, source, hidden_act="silu", use_conv_bias=True, rms_norm=True, n_groups=1)
        low, high = theirs.get("time_step_limit") or (0.0, float("inf"))
        if low > 0 or float(high) != float("inf"):
            raise InteropError(f"{source}: time_step_limit is [{low}, {high}]; LightBulb's steps have no limit")
        eps = theirs.get("layer_norm_epsilon", 1e-5)
        return {
            "vocab_size": needed(theirs, source, "vocab_size"),
            "dim": needed(theirs, source, "hidden_size"),
            "num_layers": needed(theirs, source, "num_hidden_layers"),
            "context_length": theirs.get("max_position_embeddings", CONTEXT_LENGTH),
            "block_pattern": [
                {
                    "token": {
                        "type": "mamba",
                        "state_dim": needed(theirs, source, "state_size"),
                        "head_dim": needed(theirs, source, "head_dim"),
                        "expand": theirs.get("expand", 2),
                        "conv_width": theirs.get("conv_kernel", 4),
                        "norm_eps": eps,
                    }
                }
            ],
            "tie_embeddings": bool(theirs.get("tie_word_embeddings", False)),
            "norm_eps": eps,
        }

    def write(self, ours: LanguageConfig) -> dict[str, Any]:
        mamba = ours.layer(0).token
        assert isinstance(mamba, MambaConfig)
        return {
            "vocab_size": ours.vocab_size,
            "hidden_size": ours.dim,
            "num_hidden_layers": ours.num_layers,
            "max_position_embeddings": ours.context_length,
            "num_heads": mamba.heads(ours.dim),
            "head_dim": mamba.head_dim,
            "state_size": mamba.state_dim,
            "expand": mamba.expand,
            "conv_kernel": mamba.conv_width,
            "n_groups": 1,
            "chunk_size": mamba.chunk_size,
            "hidden_act": "silu",
            "use_bias": False,
            "use_conv_bias": True,
            "rms_norm": True,
            "layer_norm_epsilon": ours.norm_eps,
            "residual_in_fp32": True,
            "tie_word_embeddings": ours.tie_embeddings,
        }

    def link(self, ours: LanguageConfig, table: LinkTable) -> None:
        table.add("embedding.weight", "backbone.embeddings.weight")
        for layer in range(ours.num_layers):
            here, there = f"blocks.{layer}.", f"backbone.layers.{layer}."
            token, scan, mixer = f"{here}token.", f"{here}token.scan.", f"{there}mixer."
            table.add(f"{here}token_norm.weight", f"{there}norm.weight")
            parts = [f"{token}gate", f"{token}value", f"{scan}key", f"{scan}query", f"{scan}step"]
            table.add_rows(f"{mixer}in_proj.weight", *(f"{part}.weight" for part in parts))
            convs = [f"{scan}{name}_conv" for name in ("value", "key", "query")]
            table.add_rows(f"{mixer}conv1d.weight", *(f"{conv}.weight" for conv in convs), flat=True)
            table.add_rows(f"{mixer}conv1d.bias", *(f"{conv}.bias" for conv in convs))
            for name, theirs in (("step_bias", "dt_bias"), ("log_rate", "A_log"), ("skip", "D")):
                table.add(f"{scan}{name}", f"{mixer}{theirs}")
            table.add(f"{token}norm.weight", f"{mixer}norm.weight")
            table.add(f"{token}output.weight", f"{mixer}out_proj.weight")
        table.add("norm.weight", "backbone.norm_f.weight")
        if not ours.tie_embeddings:
            table.add("head", "lm_head.weight")


def check_mamba(ours: LanguageConfig) -> None:
    """Raise InteropError when a model of Mamba-2 layers is none that transformers can express."""
    blocks = [ours.layer(i) for i in range(ours.num_layers)]
    if any(block != blocks[0] for block in blocks):
        raise InteropError("layers of Mamba-2 that differ are in no stock architecture")
    if blocks[0].channel is not None:
        raise InteropError("Mamba-2 with channel mixers between is in no stock architecture")
    mamba = blocks[0].token
    assert isinstance(mamba, MambaConfig)
    if mamba.num_groups > 1:
        raise InteropError("transformers' Mamba-2 normalises over all groups, ours over each; num_groups 1 is the same")
    if mamba.norm_eps != ours.norm_eps:
        raise InteropError(f"mamba's norm_eps {mamba.norm_eps:g} is not the model's {ours.norm_eps:g}")


CONTEXT_LENGTH = 2048
"""Of an imported model: a recurrence has none of its own."""

MAMBA2 = Mamba2("mamba2", "Mamba2ForCausalLM")
